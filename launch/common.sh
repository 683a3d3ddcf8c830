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

# setup_venv [EXTRA]: installs the project, editable, with an extra such as dev or cuda.
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
