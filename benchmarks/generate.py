"""Tokens per second with the cache, against recomputing the growing prefix for every token.

    python -m benchmarks.generate
    python -m benchmarks.generate --depths 12,24 --batch-sizes 1,16,128 --dtype bfloat16

Random weights, width 64 per layer, 64 000 ids, 256 tokens, classes, guidance, temperature 1.
"cache" is the whole sequence by `generation.generate`. "recompute" makes each token by a pass over
all tokens before it, conditional and null branch, with the head on every position, as the released
sampler does; "recompute, head on last" has the head on the last position only. They are timed at
prefixes of 1, 32, 64, 128, 192 and 255 tokens and integrated over the sequence. All run in turn
within a round, and a ratio is the median over the rounds, so that other load affects all.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tokens import random_params
from flextok_jax.nn import ar, generation
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute

LENGTH, VOCABULARY = 256, 64_000
PREFIXES = (1, 32, 64, 128, 192, 255)
HOW = generation.Sampling(
    np.full(LENGTH, 1.5, np.float32), np.float32(1), np.int32(0), np.float32(0)
)
_generate = jax.jit(generation.generate, static_argnames=("cfg", "compute"))


def model_config(depth: int) -> ARConfig:
    """Width 64 per layer, SwiGLU of 8/3 the width rounded up to a multiple of 128."""
    width = 64 * depth
    hidden = -(-(8 * width // 3) // 128) * 128
    return ARConfig(VOCABULARY, LENGTH, width, depth, mlp_hidden=hidden, num_classes=1000)


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "everywhere"))
def recompute(params, cfg, compute, tokens, keys, everywhere):
    """One more token after [B, n], and the logits, so that none of them can be left out."""
    batch = len(tokens)
    labels = jnp.concatenate([jnp.arange(batch), jnp.full(batch, -1)])
    inputs = jnp.pad(jnp.concatenate([tokens, tokens]), ((0, 0), (0, 1)))  # Position n is asked.
    x = ar.hidden(params, cfg, compute, inputs, ARCondition(labels))
    weights = ar.head_weights(params, x.dtype)
    given, null = jnp.split(ar.head(weights, x if everywhere else x[:, -1:]), 2)
    logits = null + HOW.guidance[0] * (given - null)
    return generation.sample(logits[:, -1], keys, HOW), logits


def calls(params, cfg, compute, batch) -> dict:
    """{"cache" or (name, prefix): a call}."""
    keys = generation.sample_keys(0, batch)
    labels, null = np.arange(batch, dtype=np.int32), np.full(batch, -1, np.int32)
    found = {
        "cache": functools.partial(
            _generate, params, cfg=cfg, compute=compute, sampling=HOW, keys=keys,
            condition=ARCondition(labels), null=ARCondition(null),
            prefix=np.zeros((batch, 0), np.int32), start=np.int32(0), stop=np.int32(LENGTH),
        )
    }  # fmt: skip
    for n in PREFIXES:
        ids = np.zeros((batch, n), np.int32)
        for name, everywhere in (("recompute", True), ("recompute, head on last", False)):
            found[name, n] = functools.partial(
                recompute, params, cfg, compute, ids, keys, everywhere
            )
    return found


def seconds(call) -> float:
    """Of one call, to the end."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def whole(times: dict, name: str) -> float:
    """Seconds of a sequence: the sum over its prefixes, linear between those measured."""
    if name == "cache":
        return times[name]
    return float(np.interp(np.arange(LENGTH), PREFIXES, [times[name, n] for n in PREFIXES]).sum())


def numbers(text: str) -> list[int]:
    """ "1,16" -> [1, 16]."""
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=numbers, default=[12], help="layers; width is 64 times it")
    parser.add_argument("--batch-sizes", type=numbers, default=[4], help="sequences per call")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    args = parser.parse_args()
    print(f"{vars(args)}\n{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)", flush=True)
    for depth in args.depths:
        cfg = model_config(depth)
        params = random_params(ar.shapes(cfg))
        for batch in args.batch_sizes:
            found = calls(params, cfg, Compute(args.dtype), batch)
            compiling = seconds(found["cache"])
            for call in found.values():
                seconds(call)
            rounds = [
                {key: seconds(call) for key, call in found.items()} for _ in range(args.repeats)
            ]
            for name in ("cache", "recompute", "recompute, head on last"):
                took = np.median([whole(times, name) for times in rounds])
                ratio = np.median([whole(times, name) / times["cache"] for times in rounds])
                print(
                    f"d{depth:<4} batch {batch:<5}{name:<25}{took:>10.2f} s"
                    f"{batch * LENGTH / took:>12.1f} tokens/s{ratio:>10.1f} x"
                    + (f"   first call {compiling:.1f} s" if name == "cache" else ""),
                    flush=True,
                )


if __name__ == "__main__":
    main()
