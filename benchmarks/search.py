"""Seconds per candidate of a search over tokens, beside the published way.

    python -m benchmarks.search

Sizes of d12-d12 and of an AR model of depth 12, random weights, 256x256 images, 256 tokens of
64 000 ids, float32, guidance of both. For a step of the schedule to k tokens, from k / 2:

published   20 Euler steps whose two passes have all 256 tokens; the VAE's decoder; k / 2 new
            tokens, each by a pass over all tokens before it with the head everywhere, shared by 8
            candidates of a beam, which differ in the last one.
ours        4 Euler steps at the cost of k tokens; the VAE's decoder; k / 2 new tokens of every
            candidate, with the cache.

Seconds are of the processor, of all cores together. All parts run in turn within a round, and a
ratio is the median over rounds. "without VAE" is the ratio of the rest, which a search over latents
would have.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.generate import HOW, model_config, recompute
from benchmarks.tokens import model_config as tokenizer_config
from benchmarks.tokens import programs, random_params
from flextok_jax import candidates
from flextok_jax.nn import ar, flextok, generation, vae
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.config import Compute

CANDIDATES = 8
TIMED = 8  # The last so many positions are timed, and stand for all new ones.
KS = (1, 16, 256)
PUBLISHED, OURS = 20, 4  # Steps of decoding.


def calls(depth: int) -> dict:
    """{part: a call}: (name, k) or "plain" or "vae"."""
    cfg, compute = tokenizer_config(f"d{depth}_d{depth}"), Compute()
    params = random_params(flextok.shapes(cfg))
    latents = jax.random.normal(jax.random.key(1), (1, *cfg.latent_shape))

    def decode(p):
        return vae.latents_to_images(p["vae"], cfg.vae, latents, jnp.float32)

    steps = programs(cfg, compute, 1)["step"]
    found = {"vae": functools.partial(jax.jit(decode), params)}
    found["plain"] = functools.partial(jax.jit(steps["plain"]), params)
    for k in KS:
        found["step", k] = functools.partial(jax.jit(steps[k]), params)
    return found | tokens_of(model_config(depth), compute)


def tokens_of(cfg, compute: Compute) -> dict:
    """The last new tokens of k: of 8 candidates with the cache, and one by recomputing."""
    params = random_params(ar.shapes(cfg))
    label, null = (ARCondition(np.full(1, x, np.int32)) for x in (0, -1))
    prefix = np.zeros((CANDIDATES, 0), np.int32)
    make = jax.jit(generation.open_state, static_argnames=("cfg", "compute", "length"))
    state = make(params, cfg, compute, label, null, prefix, np.int32(0), length=cfg.num_tokens)
    keys = generation.sample_keys(0, CANDIDATES)
    rank, found = np.arange(CANDIDATES, dtype=np.int32), {}
    for k in KS:
        first = k - min(k - k // 2, TIMED)
        how = generation.Branching(keys, keys, rank, np.int32(first))
        found["cache", k] = functools.partial(
            candidates._extend, params, state, HOW, how, np.int32(first), np.int32(k),
            cfg=cfg, compute=compute, most=CANDIDATES,
        )  # fmt: skip
        middle = np.zeros((1, 3 * k // 4), np.int32)
        found["recompute", k] = functools.partial(
            recompute, params, cfg, compute, middle, keys[:1], True
        )
    return found


def seconds_in_turn(calls: dict, repeats: int) -> dict:
    """Processor seconds of each call, [repeats]; the calls alternate within a round."""
    for call in calls.values():
        jax.block_until_ready(call())  # Compiles.
    seconds = {name: np.empty(repeats) for name in calls}
    for i in range(repeats):
        for name, call in calls.items():
            begin = time.process_time()
            jax.block_until_ready(call())
            seconds[name][i] = time.process_time() - begin
        print(
            f"round {i + 1}: " + ", ".join(f"{n} {x[i]:.2f}" for n, x in seconds.items()),
            flush=True,
        )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=12, help="of all Transformers (12)")
    parser.add_argument("--repeats", type=int, default=2, help="rounds (2)")
    args = parser.parse_args()
    print(f"{vars(args)}\n{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)", flush=True)
    seconds = seconds_in_turn(calls(args.depth), args.repeats)
    print(f"VAE decoder {np.median(seconds['vae']):.2f} s")
    print("| k | published, s | of it tokens | ours, s | of it tokens | ratio | without VAE |")
    print("|---|---|---|---|---|---|---|")
    for k in KS:
        new = k - k // 2
        cached = seconds["cache", k] * new / min(new, TIMED)
        tokens = seconds["recompute", k] * new / CANDIDATES, cached / CANDIDATES
        steps = PUBLISHED * seconds["plain"], OURS * seconds["step", k]
        rest = [a + b for a, b in zip(tokens, steps)]
        whole = [x + seconds["vae"] for x in rest]
        ratios = (np.median(x[0] / x[1]) for x in (whole, rest))
        cells = (f"{np.median(a):.2f} | {np.median(b):.2f}" for a, b in zip(whole, tokens))
        print(f"| {k} | {' | '.join(cells)} | {' | '.join(f'{x:.1f}' for x in ratios)} |")


if __name__ == "__main__":
    main()
