"""Memory and time of the AR loss and its gradient: all logits at once against chunks of positions.

    python -m benchmarks.ar_loss
    python -m benchmarks.ar_loss --depth 24 --batch 16 --dtype bfloat16 --chunks 8,32,128

The whole model of `configs/ar.py:c2i_dDEPTH` (64 000 ids, 256 positions, remat), random weights and
tokens. "temporaries" is what the compiled program needs beside its arguments and results, by
its own `memory_analysis()`; "logits" is the size of [B, L, V] in float32, which the plain program
holds several times. The programs run in turn, round after round, and a ratio is the median over the
rounds of a program's time over the plain one's in the same round, so that other load on the machine
falls on both. Needs jax, flax, numpy, ml_collections, clu, grain.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import ar as ar_config
from flextok_jax.nn import ar, layout
from flextok_jax.nn.config import ARConfig, Compute
from flextok_jax.nn.cross_entropy import cross_entropy
from flextok_jax.training.ar_stage import PAPER, ARStage


def model_config(depth: int) -> ARConfig:
    """The model of configs/ar.py:c2i_dDEPTH."""
    return ARStage(ar_config.get_config(f"c2i_d{depth}"), PAPER).model


def programs(cfg: ARConfig, compute: Compute, args, chunks):
    """{chunk: compiled (params, tokens, labels) -> (loss, gradients)}."""

    def compiled(chunk):
        def loss(params, tokens, labels):
            hidden = ar.hidden(params, cfg, compute, tokens, ar.ARCondition(labels))
            weights = ar.head_weights(params, hidden.dtype)
            out = cross_entropy(lambda h: ar.head(weights, h), hidden, tokens, chunk)
            return jnp.mean(out.loss)

        return jax.jit(jax.value_and_grad(loss)).lower(*args).compile()

    return {chunk: compiled(chunk) for chunk in chunks}


def main():
    """Prints a table, and JSON where --json asks for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chunks", default="8,32", help="positions at a time, by commas")
    parser.add_argument("--rounds", type=int, default=3, help="0: memory only, nothing is run")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cfg, compute = model_config(options.depth), Compute(dtype=options.dtype, remat="full")

    def arguments():
        shape = options.batch, cfg.num_tokens
        tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size)
        return layout.unbox(ar.init(cfg, jax.random.key(0))), tokens, jnp.arange(options.batch)

    args = jax.jit(arguments)() if options.rounds else jax.eval_shape(arguments)
    plain = cfg.num_tokens
    chunks = [plain, *(int(c) for c in options.chunks.split(","))]
    found = programs(cfg, compute, args, chunks)

    times = {chunk: [] for chunk in chunks}
    losses = dict.fromkeys(chunks)
    if options.rounds:
        losses = {chunk: float(program(*args)[0]) for chunk, program in found.items()}  # Warm.
    for _ in range(options.rounds):
        for chunk, program in found.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[chunk].append(time.perf_counter() - begin)

    logits = 4 * options.batch * cfg.num_tokens * cfg.vocab_size
    device = jax.devices()[0]
    print(
        f"d{cfg.depth}, width {cfg.width}, {cfg.vocab_size} ids, {cfg.num_tokens} positions, batch "
        f"{options.batch}, {options.dtype}, {device.device_kind}; logits {logits / 2**20:.0f} MiB"
    )
    print(f"{'positions at a time':>20}{'temporaries':>16}{'share':>8}{'seconds':>10}{'ratio':>8}")
    rows = []
    for chunk, program in found.items():
        memory = program.memory_analysis().temp_size_in_bytes
        if not rows:
            most = memory
        row = dict(chunk=chunk, temporaries=memory, share=memory / most, loss=losses[chunk])
        name = chunk if chunk < plain else "all"
        line = f"{name:>20}{memory / 2**20:>12.0f} MiB{row['share']:>8.2f}"
        if options.rounds:
            row["seconds"] = float(np.median(times[chunk]))
            row["time_ratio"] = float(np.median(np.divide(times[chunk], times[plain])))
            line += f"{row['seconds']:>10.2f}{row['time_ratio']:>8.2f}"
        rows.append(row)
        print(line)
    if options.json:
        about = dict(depth=cfg.depth, batch=options.batch, dtype=options.dtype, logits=logits)
        about["device"] = device.device_kind
        pathlib.Path(options.json).write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
