#!/usr/bin/env bash
# Training on TPU VMs of Google Cloud, on one slice or several:
#
#   ./launch/tpu.sh run --name=NAME --zone=ZONE --accelerator=TYPE --runtime=VERSION --spot \
#       -- --config=configs/FILE.py:VARIANT --workdir=gs://BUCKET/runs/RUN
#
#   create   asks for the slice (a queued resource) and waits until it is active
#   run      create; copies this folder to every worker and installs it; trains with the arguments
#            after `--`. Starts again after a preemption (on a new slice) or a fault. Ctrl-C stops
#            watching, not the training.
#   resume   watches and restarts again what `run` began
#   status   the state of the slice and of the training on each worker
#   logs     the end of the log of one worker [--worker=0] [--lines=50] [--follow]
#   delete   gives the slice back
#
# After `create` or `run` the other commands need --name only. Every setting is a flag or an
# environment variable (TPU_NAME, TPU_ZONE, ...):
#   --name --zone --accelerator --runtime   required; docs/training.md says where to look them up
#   --project=ID              default: that of gcloud
#   --slices=N                several slices
#   --spot                    cheaper, can be preempted
#   --create-flags='...'      more flags for `gcloud ... create`, such as --network or --reserved
#   --ssh-flags='...'         more flags for `gcloud ... ssh|scp`, such as --tunnel-through-iap
#   --retries=3               faults (not preemptions) in a row within an hour before giving up
#   --dry-run                 prints the commands instead
set -euo pipefail
source "$(dirname "$0")/common.sh"
POLL=${TPU_POLL:-60} # seconds

die() {
    echo "error: $*" >&2
    exit 2
}

say() { echo "$(date +%H:%M:%S) $*"; }

# --- Settings -------------------------------------------------------------------------------------

command=${1:-}
case $command in
create | run | resume | status | logs | delete) shift ;;
*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
dry='' worker=0 lines=50 follow='' args=()
for word in "$@"; do
    if [[ $word == --name=* ]]; then TPU_NAME=${word#*=}; fi
done
[ -n "${TPU_NAME:-}" ] || die "--name=NAME is needed: it names the queued resource"
saved=$ROOT/.cache/tpu/$TPU_NAME
if [[ $command != create && $command != run && -e $saved ]]; then
    # shellcheck disable=SC1090  # settings and training arguments, written by `create` or `run`
    source "$saved"
fi
while [ $# -gt 0 ]; do
    case $1 in
    --name=* | --project=* | --zone=* | --accelerator=* | --runtime=* | --slices=* | \
        --create-flags=* | --ssh-flags=* | --retries=*)
        setting=${1%%=*}
        setting=TPU_${setting#--}
        setting=${setting//-/_}
        printf -v "${setting^^}" %s "${1#*=}"
        ;;
    --spot) TPU_SPOT=1 ;;
    --dry-run) dry=1 ;;
    --worker=*) worker=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow=follow ;;
    --)
        [ "$command" = run ] || die "only \`run\` takes training arguments"
        shift
        args=("$@")
        break
        ;;
    *) die "unknown option $1 (training arguments follow \`--\`)" ;;
    esac
    shift
done
needed=(TPU_ZONE)
if [[ $command == create || $command == run ]]; then needed+=(TPU_ACCELERATOR TPU_RUNTIME); fi
for setting in "${needed[@]}"; do
    flag=${setting#TPU_}
    [ -n "${!setting:-}" ] || die "--${flag,,}=... is needed (or $setting)"
done
read -ra create_flags <<<"${TPU_CREATE_FLAGS:-}"
read -ra ssh_flags <<<"${TPU_SSH_FLAGS:-}"

if [[ $command == run || $command == resume ]]; then
    workdir=$(printf '%s\n' "${args[@]}" | sed -n 's/^--workdir=//p')
    if [[ " ${args[*]}" != *" --config="* || -z $workdir ]]; then
        die "training arguments are needed: run ... -- --config=FILE.py:VARIANT --workdir=DIR"
    elif [[ $workdir != gs://?*/?* && $workdir != /* || $workdir == /home/* ]]; then
        # The disks of a slice go with it.
        die "--workdir=$workdir must be on storage of all workers: gs://BUCKET/..."
    fi
fi
if [[ -z $dry ]] && [[ $command == run || ($command == create && ! -e $saved) ]]; then
    mkdir -p "${saved%/*}"
    declare -p "${!TPU_@}" args >"$saved"
fi

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

# One node is named; several get a prefix and run as one multislice.
create() {
    local nodes=(--node-id="$TPU_NAME")
    if [ "${TPU_SLICES:-1}" != 1 ]; then
        nodes=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME")
    fi
    queued create "$TPU_NAME" "${nodes[@]}" --accelerator-type="$TPU_ACCELERATOR" \
        --runtime-version="$TPU_RUNTIME" ${TPU_SPOT:+--spot} "${create_flags[@]}"
}

# A state of https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources,
# NONE if there is no such resource, UNKNOWN if gcloud did not answer.
state() {
    local errors
    if { errors=$(queued describe "$TPU_NAME" --format='value(state.state)' 2>&1 >&3); } 3>&1; then
        return
    elif [[ $errors == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "$errors" >&2
        echo UNKNOWN
    fi
}

remove() { queued delete "$TPU_NAME" --force --quiet; }

on_workers() {
    queued ssh "$TPU_NAME" --node=all --worker=all "${ssh_flags[@]}" --command="$1"
}

install() {
    local archive=$ROOT/.cache/tpu/flextok.tgz
    if [ -z "$dry" ]; then
        mkdir -p "${archive%/*}"
        tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" \
            flextok_jax configs examples launch setup.py README.md LICENSE NOTICE
    fi
    queued scp "$archive" "$TPU_NAME:" --node=all --worker=all "${ssh_flags[@]}" &&
        on_workers "rm -rf flextok && mkdir flextok && tar -xzf flextok.tgz -C flextok && \
flextok/launch/worker.sh setup"
}

start() { on_workers "flextok/launch/worker.sh start ${args[*]@Q}"; }

states() { on_workers "! test -e flextok || flextok/launch/worker.sh state"; }

# All workers together: none (nothing was started), running, done, again (saved and stopped, or
# lost), failed, unreachable.
workers() {
    local found
    if ! found=$(states); then
        echo unreachable
        return
    fi
    found=$(sed -n 's/^flextok-worker [^ ]* //p' <<<"$found" | sort -u | tr '\n' ' ')
    case $found in
    *running*) echo running ;;
    '' | *none*) echo none ;;
    'exit:0 ') echo 'done' ;;
    *) if [[ $found =~ ^((exit:(0|143)|lost)\ )*$ ]]; then echo again; else echo failed; fi ;;
    esac
}

# --- Watching -------------------------------------------------------------------------------------

faults=0 since=$SECONDS

fault() {
    if [ $((SECONDS - since)) -gt 3600 ]; then faults=0; fi
    since=$SECONDS
    faults=$((faults + 1))
    say "$1 (fault $faults of ${TPU_RETRIES:-3} before giving up)"
    if [ "$faults" -gt "${TPU_RETRIES:-3}" ]; then
        say "given up; the slice still costs: $0 delete --name=$TPU_NAME"
        exit 1
    fi
}

# Returns when the slice is active. A preempted one is deleted and asked for again.
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

watch() {
    local now before=''
    while true; do
        hold
        now=$(workers)
        if [ "$now" != "$before" ]; then say "training: $now"; fi
        before=$now
        case $now in
        'done')
            say "done; the slice still costs: $0 delete --name=$TPU_NAME"
            return
            ;;
        none) launch || fault "the workers could not be set up" ;;
        again) start || fault "the training could not be started" ;;
        failed)
            on_workers "flextok/launch/worker.sh log 20" || true
            fault "the training failed"
            start || true # The next look tells.
            ;;
        esac
        sleep "$POLL"
    done
}

if [ -n "$dry" ] && [[ $command == create || $command == run || $command == resume ]]; then
    if [ "$command" != resume ]; then create; fi
    state
    if [ "$command" = run ]; then install && start; fi
    if [ "$command" != create ]; then states; fi
    exit
fi
trap 'say "the training goes on: $0 resume --name=$TPU_NAME"; exit 130' INT
case $command in
create) hold ;;
run)
    hold
    if [ "$(workers)" = running ]; then
        die "a training is running on $TPU_NAME: $0 resume --name=$TPU_NAME"
    fi
    until launch; do
        fault "the workers could not be set up"
        sleep "$POLL"
        hold
    done
    watch
    ;;
resume) watch ;;
status)
    state
    states
    ;;
logs)
    queued ssh "$TPU_NAME" --node=0 --worker="$worker" "${ssh_flags[@]}" \
        --command="flextok/launch/worker.sh log $lines $follow"
    ;;
delete) remove ;;
esac
