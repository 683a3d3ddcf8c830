#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest (such as -m slow, or a file).
set -euo pipefail
source "$(dirname "$0")/common.sh"
setup_venv dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "$VENV/bin/python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
