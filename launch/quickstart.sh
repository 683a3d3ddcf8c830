#!/usr/bin/env bash
# From nothing to pictures in minutes: installs, reconstructs and generates emoji with the shipped
# models, trains all three stages on digits from scratch, and writes quickstart/report.html.
set -euo pipefail
source "$(dirname "$0")/common.sh"
started=$SECONDS
setup_venv train
OUT=$ROOT/quickstart
PYTHON="$VENV/bin/python"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
# Two virtual devices keep two cores busier than one device with two threads.
DEVICES=${JAX_NUM_CPU_DEVICES:-2}
mkdir -p "$OUT"

# train STAGE CONFIG [ARGUMENTS]: from scratch, into $OUT/STAGE.
train() {
    local stage=$1 config=$2
    shift 2
    rm -rf "${OUT:?}/$stage"
    JAX_NUM_CPU_DEVICES=$DEVICES "$PYTHON" -m flextok_jax.main --config="$config" \
        --workdir="$OUT/$stage" "$@"
}

echo
echo "1/5  The shipped models: emoji from 1, 2, 4, ... 32 tokens, and new ones of each group"
rm -rf "$OUT/reconstructions" "$OUT/samples"
"$VENV/bin/flextok" reconstruct --model demo-emoji --images flextok_jax/demos/emoji/images \
    --num-tokens 1,2,4,8,16,32 --out "$OUT/reconstructions"
"$VENV/bin/flextok" generate --model demo-emoji-ar --labels all --per-label 10 \
    --batch-size 90 --out "$OUT/samples"

echo
echo "2/5  Digits, stage 0 from scratch: a VAE (a minute or two)"
train vae configs/vae.py:digits --config.total_steps="${VAE_STEPS:-600}"

echo
echo "3/5  Digits, stage 1 from scratch: a tokenizer (some minutes)"
train tokenizer configs/tokenizer.py:digits --config.total_steps="${TOKENIZER_STEPS:-2500}" \
    --config.evaluation.num_images=0

echo
echo "4/5  Digits, stage 2 from scratch: an AR model of its tokens (a minute)"
train ar configs/ar.py:digits --config.tokenizer.source="$OUT/tokenizer" \
    --config.total_steps="${AR_STEPS:-600}"

echo
echo "5/5  All models on all 297 validation digits, 100 generated digits of each AR model: the report"
"$PYTHON" -m examples.quickstart "$OUT"

echo
echo "Done in $((SECONDS - started)) s. Look at:"
echo "  $OUT/report.html"
echo "  $OUT/digits.png"
