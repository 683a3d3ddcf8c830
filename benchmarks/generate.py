"""Tokens per second with the cache, against recomputing the growing prefix for every token.

    python -m benchmarks.generate
    python -m benchmarks.generate --depths 12,24 --batch-sizes 1,16,128 --dtype bfloat16 \
        --no-baseline --bandwidth 4800 --json generate.json

Random weights, width 64 per layer, 64 000 ids, classes, guidance, temperature 1. Needs jax, flax,
numpy.

"cache" is the whole sequence through `generation.generate`. "recompute" makes each token by a pass
over SOS and all tokens before it, conditional and null branch, with the head on every position, as
the released sampler does; "recompute, head on last" has the head on the last position only. They
are timed at prefixes of 1, 32, 64, 128, 192 and 255 tokens and integrated over the sequence (linear
in between). All run in turn within a round, and a ratio is the median over the rounds, so that
other load on the machine falls on all.

With --bandwidth (GB/s of the device's memory) the last column is the part of it that decoding
reaches: bytes of the weights that a token needs (blocks and head, in the compute type) and of the
keys and values that are filled, per second.
"""

import argparse
import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tokens import random_params, weights
from flextok_jax.nn import ar, generation, layout
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.config import ARConfig, Compute

PREFIXES = (1, 32, 64, 128, 192, 255)
GUIDANCE = 1.5

_generate = jax.jit(generation.generate, static_argnames=("cfg", "compute"))


def model_config(depth: int, vocab_size: int, num_tokens: int) -> ARConfig:
    """Width 64 per layer, SwiGLU of 8/3 the width rounded up to a multiple of 128."""
    width = 64 * depth
    hidden = -(-(8 * width // 3) // 128) * 128
    return ARConfig(vocab_size, num_tokens, width, depth, mlp_hidden=hidden, num_classes=1000)


def sampling(cfg: ARConfig) -> generation.Sampling:
    """Guidance everywhere, temperature 1, no filter."""
    scales = np.full(cfg.num_tokens, GUIDANCE, np.float32)
    return generation.Sampling(scales, np.float32(1), np.int32(0), np.float32(0))


def cached(params, cfg, compute, batch):
    """A call that generates all tokens of a batch."""
    keys = generation.sample_keys(0, batch)
    labels, null = np.arange(batch, dtype=np.int32), np.full(batch, -1, np.int32)

    def call():
        return _generate(
            params,
            cfg=cfg,
            compute=compute,
            condition=ARCondition(labels),
            null=ARCondition(null),
            sampling=sampling(cfg),
            keys=keys,
            prefix=np.zeros((batch, 0), np.int32),
            start=np.int32(0),
            stop=np.int32(cfg.num_tokens),
        )

    return call


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "everywhere"))
def recompute(params, cfg, compute, tokens, how, keys, everywhere):
    """One more token after [B, n], and the logits, so that none of them can be left out."""
    batch = len(tokens)
    labels = jnp.concatenate([jnp.arange(batch), jnp.full(batch, -1)])
    inputs = jnp.pad(jnp.concatenate([tokens, tokens]), ((0, 0), (0, 1)))  # Position n is asked.
    x = ar.hidden(params, cfg, compute, inputs, ARCondition(labels))
    weights = ar.head_weights(params, x.dtype)
    given, null = jnp.split(ar.head(weights, x if everywhere else x[:, -1:]), 2)
    logits = null + how.guidance[0] * (given - null)
    return generation.sample(logits[:, -1], keys, how), logits


def seconds(call) -> float:
    """Of one call, to the end."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def over_sequence(prefixes, times, num_tokens: int) -> float:
    """The sum over prefixes of 0 .. L - 1 tokens of the times, linear between those measured."""
    return float(np.interp(np.arange(num_tokens), prefixes, times).sum())


def bytes_per_run(cfg: ARConfig, compute: Compute, batch: int) -> float:
    """Weights, once per token, and the filled keys and values of both branches."""
    shapes = layout.unbox(ar.shapes(cfg))
    matrices = weights(shapes, "ar/blocks") + weights(shapes, "ar/head")
    filled = cfg.num_tokens * (cfg.num_tokens + 1) / 2
    cache = 2 * cfg.depth * cfg.width * 2 * batch * filled
    return jnp.dtype(compute.dtype).itemsize * (matrices * cfg.num_tokens + cache)


def measure(cfg, compute, batch, repeats, baseline):
    """Rows of one model and batch size."""
    shapes = layout.unbox(ar.shapes(cfg))
    params = random_params(shapes)
    how, keys = sampling(cfg), generation.sample_keys(0, batch)
    prefixes = [n for n in PREFIXES if n < cfg.num_tokens]
    calls = {"cache": cached(params, cfg, compute, batch)}
    for n in prefixes if baseline else ():
        ids = np.zeros((batch, n), np.int32)
        for name, everywhere in (("recompute", True), ("recompute, head on last", False)):
            calls[name, n] = functools.partial(
                recompute, params, cfg, compute, ids, how, keys, everywhere
            )
    compiling = {name: seconds(call) for name, call in calls.items()}
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    rows = []
    for name in dict.fromkeys(key if isinstance(key, str) else key[0] for key in calls):

        def whole(times, name=name):
            if name in times:
                return times[name]
            return over_sequence(prefixes, [times[name, n] for n in prefixes], cfg.num_tokens)

        took = float(np.median([whole(times) for times in rounds]))
        row = {"depth": cfg.depth, "batch": batch, "what": name, "seconds": took}
        row["tokens_per_s"] = batch * cfg.num_tokens / took
        row["cache_is_faster"] = float(np.median([whole(t) / t["cache"] for t in rounds]))
        if name == "cache":
            row["first_call_s"] = compiling[name]
            row["bytes_per_s"] = bytes_per_run(cfg, compute, batch) / took
        else:
            at = {n: float(np.median([times[name, n] for times in rounds])) for n in prefixes}
            row["seconds_at"] = at
        rows.append(row)
    return rows


def show(rows, bandwidth):
    """Prints the rows of one model and batch size."""
    for row in rows:
        line = f"d{row['depth']:<4} batch {row['batch']:<5}{row['what']:<25}"
        line += f"{row['seconds']:>10.2f} s{row['tokens_per_s']:>12.1f} tokens/s"
        if row["what"] != "cache":
            line += f"{row['cache_is_faster']:>10.1f} x"
        elif bandwidth:
            line += f"{row['bytes_per_s'] / (1e9 * bandwidth):>10.1%} of the bandwidth"
        print(line, flush=True)


def numbers(text: str) -> list[int]:
    """ "1,16" -> [1, 16]."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be positive")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=numbers, default=[12], help="layers; width is 64 times it")
    parser.add_argument("--batch-sizes", type=numbers, default=[4], help="sequences per call")
    parser.add_argument("--num-tokens", type=int, default=256, help="length of a sequence")
    parser.add_argument("--vocab-size", type=int, default=64000, help="number of ids")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--no-baseline", action="store_true", help="the cache only")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the device's memory")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    about = {name: value for name, value in vars(args).items() if name != "json"} | {
        "device": f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)",
        "jax": jax.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    table = []
    for depth in args.depths:
        cfg = model_config(depth, args.vocab_size, args.num_tokens)
        for batch in args.batch_sizes:
            inputs = (cfg, Compute(args.dtype), batch, args.repeats, not args.no_baseline)
            table += measure(*inputs)
            show(table[-3 if inputs[-1] else -1 :], args.bandwidth)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": table}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
