"""Generation in groups of tokens and in passes, against one token after the other.

    python -m benchmarks.groups
    python -m benchmarks.groups --depth 24 --batch-size 16 --dtype bfloat16

Random weights, width 64 per layer, 64 000 ids, 256 tokens, classes, guidance, temperature 1:
processor seconds of a call (wall-clock seconds on an accelerator) after one that compiles. All run
in turn within a round, and a ratio is the median over the rounds, so that other load affects all.
"""

import argparse
import dataclasses
import os
import time

import jax
import numpy as np

from benchmarks.generate import LENGTH, model_config
from benchmarks.tokens import random_params
from flextok_jax import ImageGenerator
from flextok_jax.nn import ar
from flextok_jax.nn.config import Compute

KINDS = {
    "one by one, 256 steps": dict(),
    "groups of 4, 64 steps": dict(group=4),
    "folded groups of 4, 64 steps": dict(group=4, folded=True),
    "one step for each doubling, 9 steps": dict(group=0),
    "masked, 8 passes": dict(masked=True),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=12, help="layers; width is 64 times it")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per call")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    args = parser.parse_args()
    print(f"{vars(args)}\n{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)", flush=True)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    calls = {}
    for name, fields in KINDS.items():
        cfg = dataclasses.replace(model_config(args.depth), **fields)
        gen = ImageGenerator(cfg, random_params(ar.shapes(cfg)), compute=Compute(args.dtype))
        calls[name] = gen
        gen.generate_tokens([0] * args.batch_size)

    def seconds(gen) -> float:
        begin = clock()
        gen.generate_tokens([0] * args.batch_size)
        return clock() - begin

    rounds = [{name: seconds(gen) for name, gen in calls.items()} for _ in range(args.repeats)]
    first = next(iter(KINDS))
    for name in KINDS:
        took = np.median([times[name] for times in rounds])
        ratio = np.median([times[first] / times[name] for times in rounds])
        rate = args.batch_size * LENGTH / took
        print(f"{name:<36}{took:>10.2f} s{rate:>12.1f} tokens/s{ratio:>10.1f} x", flush=True)


if __name__ == "__main__":
    main()
