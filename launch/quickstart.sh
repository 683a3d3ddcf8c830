#!/usr/bin/env bash
# From nothing to pictures in minutes: installs, reconstructs held-out digits with the shipped model,
# trains the same configuration briefly from scratch, and writes quickstart/report.html.
set -euo pipefail
source "$(dirname "$0")/common.sh"
started=$SECONDS
setup_venv
OUT=$ROOT/quickstart
STEPS=${STEPS:-3000}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
mkdir -p "$OUT"

echo
echo "1/3  The shipped model reconstructs held-out digits from 1, 2, 4, 8 and 16 tokens"
"$VENV/bin/flextok" reconstruct --model demo-digits --images digits --limit 10 \
    --num-tokens 1,2,4,8,16 --out "$OUT/shipped"

echo
echo "2/3  The same configuration from scratch, $STEPS steps (a few minutes)"
# Two virtual devices keep two cores busier than one device with two threads.
if [ "$JAX_PLATFORMS" = cpu ]; then export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-2}; fi
rm -rf "$OUT/run"
# Without shifted copies a short run learns to use its tokens sooner.
"$VENV/bin/python" -m flextok_jax.main --config=configs/tokenizer.py:digits --workdir="$OUT/run" \
    --config.total_steps="$STEPS" --config.data.shift=0 --config.evaluation.num_images=0
unset JAX_NUM_CPU_DEVICES

echo
echo "3/3  Both models on all 297 held-out digits, and the report"
"$VENV/bin/python" -m flextok_jax.evaluation.quickstart_report --shipped demo-digits \
    --trained "$OUT/run" --out "$OUT/report.html" --picture "$OUT/reconstructions.png"

echo
echo "Done in $((SECONDS - started)) s. Look at:"
echo "  $OUT/report.html"
echo "  $OUT/reconstructions.png"
