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
# the GPUs; JAX_PLATFORMS=cpu tries a job without any.
set -euo pipefail
source "$(dirname "$0")/common.sh"

case ${1:-} in
tokenize | detokenize | reconstruct | generate | evaluate | train) ;;
*)
    echo "usage: $0 tokenize|detokenize|reconstruct|generate|evaluate|train ARGUMENTS" >&2
    echo "       (flextok COMMAND --help tells the arguments)" >&2
    exit 2
    ;;
esac

setup_gpu
command=$1
shift
if [ "$command" = train ]; then
    exec "$VENV/bin/python" -m flextok_jax.main "$@"
fi
exec "$VENV/bin/flextok" "$command" --dtype bfloat16 --batch-size 128 "$@"
