#!/usr/bin/env bash
# Training on TPU VMs of Google Cloud, on one slice or several, from asking for it to the last step:
#
#   ./launch/tpu.sh run --name=NAME --zone=ZONE --accelerator=TYPE --runtime=VERSION --spot \
#       --bucket=BUCKET -- --config=configs/FILE.py:VARIANT --workdir=/gcs/BUCKET/runs/RUN
#
#   create   asks for the slice (a queued resource) and waits until it is there
#   setup    copies this folder to every worker, installs it, mounts the bucket as /gcs/BUCKET
#   run      create, setup, then trains what follows `--`; stays, starts again after a preemption
#            (on a new slice) or a fault, and ends when the training has ended. Ctrl-C ends only
#            this supervision, not the training.
#   resume   supervises again what `run` began
#   status   the state of the slice and of the run on each worker
#   logs     the end of the log of one worker [--worker=0] [--lines=50] [--follow]
#   delete   gives the slice back
#
# After `create` or `run` the other commands need --name only. Every setting is a flag or an
# environment variable (TPU_NAME, TPU_ZONE, ...); there are no defaults for what costs money:
#   --name --zone --accelerator --runtime   required; docs/training.md says where to look them up
#   --project=ID              otherwise that of gcloud
#   --bucket=BUCKET           Cloud Storage for data and workdirs
#   --slices=N                several slices, joined over the data-center network
#   --spot                    cheaper, can be preempted
#   --create-flags='...'      more flags for `gcloud ... create`, such as --network or --reserved
#   --ssh-flags='...'         more flags for `gcloud ... ssh|scp`, such as --tunnel-through-iap
#   --retries=3               faults (not preemptions) that may follow each other within an hour
#   --dry-run                 prints every command instead
set -euo pipefail
source "$(dirname "$0")/common.sh"
POLL=${TPU_POLL:-60} # seconds
SETTINGS=(TPU_PROJECT TPU_ZONE TPU_ACCELERATOR TPU_RUNTIME TPU_BUCKET TPU_SLICES TPU_SPOT
    TPU_CREATE_FLAGS TPU_SSH_FLAGS TPU_RETRIES)
MUTE=$(mktemp)
trap 'rm -f "$MUTE"' EXIT

die() {
    echo "error: $*" >&2
    exit 2
}

say() { echo "$(date +%H:%M:%S) $*"; }

usage() {
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

# --- Settings -------------------------------------------------------------------------------------

command=${1:-}
case $command in
create | setup | run | resume | status | logs | delete) shift ;;
*) usage ;;
esac
dry='' worker=0 lines=50 follow='' args=()
while [ $# -gt 0 ]; do
    case $1 in
    --name=* | --project=* | --zone=* | --accelerator=* | --runtime=* | --bucket=* | --slices=* | \
        --create-flags=* | --ssh-flags=* | --retries=*)
        variable=${1%%=*}
        variable=${variable#--}
        variable=TPU_${variable//-/_}
        printf -v "${variable^^}" %s "${1#*=}"
        ;;
    --spot) TPU_SPOT=1 ;;
    --dry-run) dry=1 ;;
    --worker=*) worker=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow=follow ;;
    --)
        shift
        args=("$@")
        break
        ;;
    *) die "unknown option $1 (training arguments follow \`--\`)" ;;
    esac
    shift
done
[ -n "${TPU_NAME:-}" ] || die "--name=NAME is needed: it names the queued resource"
[ "$command" = run ] || [ "${#args[@]}" = 0 ] || die "only \`run\` takes training arguments"
saved=$ROOT/.cache/tpu/$TPU_NAME
if [[ $command != create && $command != run && -e $saved ]]; then
    # shellcheck disable=SC1090  # what `save` wrote: it fills in what was not given
    source "$saved"
fi
need() {
    local setting variable
    for setting in "$@"; do
        variable=TPU_${setting^^}
        [ -n "${!variable:-}" ] || die "--$setting=... is needed (or $variable)"
    done
}
need zone
read -ra create_flags <<<"${TPU_CREATE_FLAGS:-}"
read -ra ssh_flags <<<"${TPU_SSH_FLAGS:-}"

# Settings and training arguments, so that the next command needs the name only.
save() {
    local variable
    if [ -n "$dry" ]; then return; fi
    mkdir -p "${saved%/*}"
    {
        for variable in "${SETTINGS[@]}"; do
            if [ -n "${!variable:-}" ]; then
                echo "[ -n \"\${$variable:-}\" ] || $variable=${!variable@Q}"
            fi
        done
        if [ "${#args[@]}" != 0 ]; then echo "args=(${args[*]@Q})"; fi
    } >"$saved"
}

# --- The commands of gcloud -----------------------------------------------------------------------

# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
queued() {
    local words=(gcloud compute tpus queued-resources "$@" --zone="$TPU_ZONE")
    if [ -n "${TPU_PROJECT:-}" ]; then words+=(--project="$TPU_PROJECT"); fi
    if [ -n "$dry" ]; then
        shown "${words[@]}"
    else
        "${words[@]}"
    fi
}

# .../queued-resources/create: one node is named, several get a prefix and run as one multislice.
create() {
    local nodes=(--node-id="$TPU_NAME")
    if [ "${TPU_SLICES:-1}" != 1 ]; then
        nodes=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME")
    fi
    queued create "$TPU_NAME" "${nodes[@]}" --accelerator-type="$TPU_ACCELERATOR" \
        --runtime-version="$TPU_RUNTIME" ${TPU_SPOT:+--spot} "${create_flags[@]}"
}

# .../queued-resources/describe. Prints a state of
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources#State,
# NONE if there is no such resource, UNKNOWN if gcloud did not answer.
state() {
    if queued describe "$TPU_NAME" --format='value(state.state)' 2>"$MUTE"; then
        return
    elif grep -q NOT_FOUND "$MUTE"; then
        echo NONE
    else
        cat "$MUTE" >&2
        echo UNKNOWN
    fi
}

# .../queued-resources/delete; --force deletes the nodes too, --quiet asks nothing.
remove() { queued delete "$TPU_NAME" --force --quiet; }

# .../queued-resources/ssh
on_workers() {
    queued ssh "$TPU_NAME" --node=all --worker=all "${ssh_flags[@]}" --command="$1"
}

# .../queued-resources/scp
install() {
    local archive=$ROOT/.cache/tpu/flextok.tgz
    if [ -z "$dry" ]; then
        mkdir -p "${archive%/*}"
        tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" \
            flextok_jax configs examples launch setup.py README.md LICENSE
    fi
    queued scp "$archive" "$TPU_NAME:" --node=all --worker=all "${ssh_flags[@]}" &&
        on_workers "rm -rf flextok && mkdir flextok && tar -xzf flextok.tgz -C flextok && \
flextok/launch/worker.sh setup ${TPU_BUCKET:-}"
}

start() { on_workers "flextok/launch/worker.sh start ${args[*]@Q}"; }

# What the workers say together: none (nothing was started), running, mixed (some still run), done,
# again (saved and stopped, or lost), failed, unreachable.
workers() {
    local found
    if ! found=$(on_workers "! test -e flextok || flextok/launch/worker.sh state" 2>"$MUTE"); then
        echo unreachable
        return
    fi
    found=$(sed -n 's/^flextok-worker [^ ]* //p' <<<"$found" | sort -u | tr '\n' ' ')
    case $found in
    '' | 'none ') echo none ;;
    'running ') echo running ;;
    *running*) echo mixed ;;
    'exit:0 ') echo 'done' ;;
    *)
        if tr ' ' '\n' <<<"$found" | grep -q '^exit:' &&
            tr ' ' '\n' <<<"$found" | grep '^exit:' | grep -qvE ':(0|143)$'; then
            echo failed
        else
            echo again
        fi
        ;;
    esac
}

# --- Supervision ----------------------------------------------------------------------------------

faults=0 since=$SECONDS

fault() {
    if [ $((SECONDS - since)) -gt 3600 ]; then faults=0; fi
    since=$SECONDS
    faults=$((faults + 1))
    say "$1 (fault $faults of ${TPU_RETRIES:-3} before giving up)"
    if [ "$faults" -gt "${TPU_RETRIES:-3}" ]; then
        say "given up: the slice is still there (and costs); \`$0 logs|delete --name=$TPU_NAME\`"
        exit 1
    fi
}

# Returns when the slice is there. A preempted one is deleted and asked for again.
hold() {
    local now before=''
    while true; do
        now=$(state)
        if [ "$now" != "$before" ]; then say "$TPU_NAME: $now"; fi
        before=$now
        case $now in
        ACTIVE) return ;;
        NONE) create || fault "the slice could not be asked for" ;;
        SUSPENDED)
            say "preempted: asking for another slice"
            remove || true # The next look tells.
            ;;
        FAILED)
            fault "the request for a slice failed"
            remove || true
            ;;
        esac
        sleep "$POLL"
    done
}

launch() {
    say "setting up every worker"
    install && start && say "training began"
}

supervise() {
    local now before='' mixed=0
    while true; do
        hold
        now=$(workers)
        if [ "$now" != "$before" ]; then say "training: $now"; fi
        before=$now
        if [ "$now" = mixed ]; then mixed=$((mixed + 1)); else mixed=0; fi
        case $now in
        'done') return ;;
        none) launch || fault "the workers could not be set up" ;;
        again) start || fault "the training could not be started" ;;
        failed)
            on_workers "flextok/launch/worker.sh log 20" || true
            fault "the training failed"
            start || true # The next look tells.
            ;;
        mixed)
            # JAX ends the others some 100 s after it lost one. If not, something hangs.
            if [ "$mixed" -gt 10 ]; then on_workers "flextok/launch/worker.sh stop" || true; fi
            ;;
        unreachable) cat "$MUTE" >&2 ;;
        esac
        sleep "$POLL"
    done
}

check_arguments() {
    local workdir
    workdir=$(printf '%s\n' "${args[@]}" | sed -n 's/^--workdir=//p')
    [[ " ${args[*]}" == *" --config="* ]] || die "training arguments need --config=FILE.py:VARIANT"
    [ -n "$workdir" ] || die "training arguments need --workdir=..."
    # The disks of a slice go with it, and every worker needs the same files.
    if [ -n "${TPU_BUCKET:-}" ] && [[ $workdir != "/gcs/$TPU_BUCKET/"* ]]; then
        die "--workdir=$workdir would be lost with the slice: put it under /gcs/$TPU_BUCKET/"
    elif [[ $workdir != /* ]]; then
        die "--workdir=$workdir must be a full path on storage that all workers share (--bucket)"
    fi
}

case $command in
create | run) need accelerator runtime ;;&
run | resume)
    [ "${#args[@]}" != 0 ] || die "nothing to train: \`run\` takes arguments after \`--\`, and" \
        "\`resume\` those of the last run of this name"
    check_arguments
    ;;&
run) save ;;
create) # What is there already keeps what `resume` needs to know.
    if [ -n "$dry" ] || [ ! -e "$saved" ] || [ "$(state)" = NONE ]; then save; fi
    ;;
esac
if [ -n "$dry" ] && [[ $command == run || $command == resume ]]; then
    if [ "$command" = run ]; then
        create
        state
        install
        start
    fi
    echo "# then every $POLL s:"
    state
    on_workers "! test -e flextok || flextok/launch/worker.sh state"
    echo "# and after a preemption (SUSPENDED):"
    remove
    create
    install
    start
    exit
fi
trap 'echo; say "no longer supervised; the training goes on: $0 resume --name=$TPU_NAME"; exit 130' INT
case $command in
create)
    if [ -n "$dry" ]; then create && state; else hold; fi
    ;;
setup) install ;;
run)
    hold
    case $(workers) in
    running | mixed) die "a run is going on on $TPU_NAME: \`$0 resume --name=$TPU_NAME\`" ;;
    esac
    # Not the verdict of an earlier run on these workers: this one has to begin.
    until launch; do
        fault "the workers could not be set up"
        sleep "$POLL"
        hold
    done
    supervise
    say "done; the slice is still there (and costs): $0 delete --name=$TPU_NAME"
    ;;
resume) supervise ;;
status)
    state
    on_workers "! test -e flextok || flextok/launch/worker.sh state"
    ;;
logs)
    queued ssh "$TPU_NAME" --node=0 --worker="$worker" "${ssh_flags[@]}" \
        --command="flextok/launch/worker.sh log $lines $follow"
    ;;
delete) remove ;;
esac
