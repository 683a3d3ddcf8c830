#!/usr/bin/env bash
# What tpu.sh runs on each worker of a slice:
#
#   worker.sh setup             the environment
#   worker.sh start ARGUMENTS   python -m flextok_jax.main ARGUMENTS, detached from the connection
#   worker.sh state             one line: "flextok-worker HOST none|running|exit:CODE|lost"
#   worker.sh log [N] [follow]  the last N lines of the log
set -euo pipefail
VENV=${VENV:-$HOME/flextok-venv} # Outside the code, which `tpu.sh run` replaces.
source "$(dirname "$0")/common.sh"
RUN=$HOME/flextok-run
mkdir -p "$RUN"

# The images of TPU VMs are Ubuntu 22.04, whose Python is 3.10.
ensure_python() {
    if ! find_python >/dev/null 2>&1; then
        # https://docs.astral.sh/uv/guides/install-python/
        python3 -m pip install --quiet --user uv
        python3 -m uv python install 3.12
        PYTHON=$(python3 -m uv python find 3.12)
        export PYTHON
    fi
}

# The training holds this lock for as long as it lives; who looks shares it for a moment.
running() { [ -e "$RUN/lock" ] && ! flock -n -s "$RUN/lock" true; }

case ${1:-} in
setup)
    ensure_python
    setup_venv train,tpu,gs
    ;;
start)
    if running; then
        echo "error: a training is running on $(hostname)" >&2
        exit 1
    fi
    rm -f "$RUN/exit"
    echo "--- $(date) ${*:2}" >>"$RUN/log"
    # shellcheck disable=SC2016  # for the inner shell
    setsid flock -w 5 "$RUN/lock" bash -c 'code=0
        "$1" -u -m flextok_jax.main "${@:2}" || code=$?
        echo "$code" >"$0/exit"' \
        "$RUN" "$VENV/bin/python" "${@:2}" >>"$RUN/log" 2>&1 </dev/null &
    for ((i = 0; i < 50; i++)); do
        if running || [ -e "$RUN/exit" ]; then exit; fi
        sleep 0.1
    done
    echo "error: the training did not start; see $RUN/log on $(hostname)" >&2
    exit 1
    ;;
state)
    if [ ! -e "$RUN/lock" ]; then
        found=none
    elif running; then
        found=running
    elif [ -e "$RUN/exit" ]; then
        found=exit:$(cat "$RUN/exit")
    else
        found=lost # The machine was restarted.
    fi
    echo "flextok-worker $(hostname) $found"
    ;;
log) tail -n "${2:-50}" ${3:+-F} "$RUN/log" ;;
*)
    echo "usage: $0 setup|start|state|log" >&2
    exit 2
    ;;
esac
