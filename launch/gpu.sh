#!/usr/bin/env bash
# Bulk jobs and training on the NVIDIA GPUs of this machine, each batch cut over all of them:
#
#   ./launch/gpu.sh tokenize --model SOURCE --data FOLDER --out TOKENS
#   ./launch/gpu.sh reconstruct --model SOURCE --images FOLDER --num-tokens 16,256 --out DIR
#   ./launch/gpu.sh generate --model AR_SOURCE --labels labels.txt --out DIR --attention cudnn
#   ./launch/gpu.sh train --config=configs/FILE.py:VARIANT --workdir=DIR
#
# The arguments are those of `flextok COMMAND`; bfloat16 and batches of 128 unless they say otherwise.
# Those of `train` are those of `python -m flextok_jax.main`; for several machines see slurm.sh.
# The same command goes on where an interrupted one stopped. CUDA_VISIBLE_DEVICES=0,2 takes some of
# the GPUs; JAX_PLATFORMS=cpu tries a job without any. --dry-run prints the commands instead.
set -euo pipefail
source "$(dirname "$0")/common.sh"

usage() {
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$0"
    echo "COMMAND is tokenize, detokenize, reconstruct, generate, evaluate or train."
}

args=() dry=''
for word in "$@"; do
    case $word in
    --help | -h) usage && exit ;;
    --dry-run) dry=1 ;;
    *) args+=("$word") ;;
    esac
done
set -- "${args[@]}"
case ${1:-} in
train) words=("$VENV/bin/python" -m flextok_jax.main "${@:2}") ;;
tokenize | detokenize | reconstruct | generate | evaluate)
    words=("$VENV/bin/flextok" "$1" --dtype bfloat16 --batch-size 128 "${@:2}")
    ;;
*)
    usage >&2
    exit 2
    ;;
esac

if [ -n "$dry" ]; then
    shown cd "$ROOT"
    echo "source launch/common.sh"
    echo "setup_gpu # $VENV, with the CUDA that this machine's driver can run"
    shown "${words[@]}"
    exit
fi
setup_gpu
exec "${words[@]}"
