# Sourced by the scripts of this folder: the virtual environment, made once and kept up to date.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
VENV=${VENV:-$ROOT/.venv}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
    return 1
}

# setup_venv [EXTRAS]: installs the project, editable, with extras such as "dev" or "train,tpu".
setup_venv() {
    local python wanted
    wanted="$(cksum setup.py) ${1:-}"
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python) || return 1
    echo "Setting up $VENV with $python (about a minute) ..."
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
    echo "$wanted" >"$VENV/.installed"
}

# setup_gpu: setup_venv with the CUDA that this machine's driver can run; JAX_PLATFORMS=cpu: without.
setup_gpu() {
    local driver extras=train
    if [ "${JAX_PLATFORMS:-cuda}" != cpu ]; then
        if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
            echo "error: no NVIDIA GPU answers to nvidia-smi; JAX_PLATFORMS=cpu runs without one" >&2
            return 2
        fi
        # CUDA 13 needs driver 580 or newer (NVIDIA's compatibility table).
        if [ "${driver%%.*}" -ge 580 ]; then extras+=,cuda13; else extras+=,cuda12; fi
        export JAX_PLATFORMS=cuda
    fi
    setup_venv $extras || return
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
}

# shown WORD ...: the command as one can type it.
shown() {
    local word out=()
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then out+=("$word"); else out+=("${word@Q}"); fi
    done
    echo "${out[*]}"
}
