"""Cost follows tokens: time and FLOPs of k tokens against the full length.

    python -m benchmarks.tokens
    python -m benchmarks.tokens --model d18_d28 --batch 32 --dtype bfloat16 --attention cudnn \
        --parts

Random weights, 256x256 images, 256 tokens. "encode" is the Transformer on latents: N + K
positions, against k = 256. "step" is one guided Euler step of the decoder: a pass of N + K + 1
positions (N + R at k = R) and a null pass of N + 1, against the plain step, whose two passes have
N + R positions.
With `--parts` also the seconds of each part of an image's way to tokens and back: the VAE's
encoder, the encoder, one guided step, one pass alone, and the VAE's decoder; and what part of the
decoding the VAE's decoder is, after 20 guided steps and after 2 passes.
The rows of a table run in turn, round after round, and a ratio is the median over the rounds of a
row's time over the reference's in the same round, so that other load on the machine affects both.
"""

import argparse
import functools
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.compile import count_flops
from flextok_jax.nn import flextok, vae
from flextok_jax.nn.config import Blocks, Compute
from flextok_jax.nn.decoder import Condition, unconditional
from flextok_jax.nn.layout import unbox
from flextok_jax.nn.tokenizer_config import TokenizerConfig

KS = (1, 16, 64, 256)
MIN_SECONDS = 0.2  # Short calls are repeated until they last about this long.


def model_config(name: str) -> TokenizerConfig:
    """The configuration of "dE_dD": depths E and D, widths 64 per layer."""
    found = re.fullmatch(r"d(\d+)_d(\d+)", name)
    if not found:
        raise SystemExit(f"{name!r}: must be dE_dD, such as d12_d12 or d18_d28")
    encoder, decoder = (Blocks(width=64 * int(d), depth=int(d)) for d in found.groups())
    return TokenizerConfig(encoder=encoder, decoder=decoder)


def random_params(shapes):
    """Normal weights of variance 1 / fan-in, made on the device: no gate or head is zero."""
    leaves, tree = jax.tree.flatten(unbox(shapes))
    normal = jax.jit(jax.random.normal, static_argnums=1)
    made = [
        normal(jax.random.key(i), leaf.shape) / math.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 16)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def time_in_turn(calls: dict, repeats: int) -> dict:
    """Seconds per call, [repeats] for each name; the calls alternate within a round."""
    times = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # Compiles.
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times[name] = max(1, round(MIN_SECONDS / (time.perf_counter() - begin)))
    seconds = {name: np.empty(repeats) for name in calls}
    for i in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(times[name]):
                last = call()
            jax.block_until_ready(last)
            seconds[name][i] = (time.perf_counter() - begin) / times[name]
    return seconds


def programs(cfg, compute, batch) -> dict:
    """{table: {k: function of the parameters}}."""
    latents = jax.random.normal(jax.random.key(1), (batch, *cfg.latent_shape))
    shape = (batch, cfg.num_tokens, cfg.code_dim)
    codes = jax.random.uniform(jax.random.key(2), shape, minval=-1.0)

    def encode(params, k):
        return flextok.encode(params, cfg, compute, latents, k)

    def step(params, k):
        if k == "plain":
            keep = jnp.full((batch,), cfg.num_tokens)
            passes = tuple(Condition(codes, keep, jnp.full((batch,), x)) for x in (False, True))
        else:
            given = Condition(codes[:, :k], jnp.full((batch,), k), jnp.zeros((batch,), bool))
            passes = given, unconditional(batch, cfg.code_dim)
        return flextok.velocities(params, cfg, compute, latents, jnp.ones((1,)), passes)

    def one_pass(params, k):
        given = Condition(codes[:, :k], jnp.full((batch,), k), jnp.zeros((batch,), bool))
        return flextok.velocities(params, cfg, compute, latents, jnp.ones((1,)), (given,))

    return {
        "encode": {k: functools.partial(encode, k=k) for k in KS},
        "step": {k: functools.partial(step, k=k) for k in ("plain", *KS)},
        "pass": {k: functools.partial(one_pass, k=k) for k in KS},
    }


def show_parts(cfg, compute, batch, params, by_k, repeats):
    """Prints the seconds of every part of `batch` images' way to tokens and back, for each k."""
    dtype = jnp.dtype(compute.dtype)
    images = jax.random.uniform(jax.random.key(3), (batch, *cfg.image_size, 3), minval=-1.0)
    latents = jax.random.normal(jax.random.key(1), (batch, *cfg.latent_shape))
    calls = {
        ("VAE encode", 0): lambda p: vae.images_to_latents(p["vae"], cfg.vae, images, dtype),
        ("VAE decode", 0): lambda p: vae.latents_to_images(p["vae"], cfg.vae, latents, dtype),
    } | {(name, k): by_k[name][k] for name in ("encode", "step", "pass") for k in KS}
    calls = {name: functools.partial(jax.jit(call), params) for name, call in calls.items()}
    found = {name: np.median(x) for name, x in time_in_turn(calls, repeats).items()}
    to_latents, to_images = found["VAE encode", 0], found["VAE decode", 0]
    print(f"\nseconds for {batch} images; the VAE decoder's part of decoding by steps")
    columns = ("VAE encode", "encoder", "guided step", "pass", "VAE decode")
    print(f"{'k':>4}" + "".join(f"{name:>13}" for name in columns) + "   20 guided   2 passes")
    for k in KS:
        row = to_latents, *(found[name, k] for name in ("encode", "step", "pass")), to_images
        shares = (to_images / (to_images + n * t) for n, t in ((20, row[2]), (2, row[3])))
        cells = "".join(f"{x:>13.3f}" for x in row)
        print(f"{k:>4}{cells}" + "".join(f"{x:>11.0%}" for x in shares), flush=True)


def show(name, seconds, reference, flops):
    """Prints a table: ratios are to `reference`."""
    print(f"\n{name:<12}{'k':>6}{'GFLOP':>12}{'ms':>12}    time / {reference}   FLOPs")
    for k, each in seconds.items():
        ratio = np.median(each / seconds[reference])
        line = f"{'':<12}{k:>6}{flops[k] / 1e9:>12.2f}{1e3 * np.median(each):>12.2f}"
        print(f"{line}    {ratio:>8.3f}{flops[k] / flops[reference]:>12.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="d12_d12", help="any dE_dD")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"))
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--parts", action="store_true", help="also the seconds of every part")
    args = parser.parse_args()
    cfg, compute, batch = model_config(args.model), Compute(args.dtype, args.attention), args.batch
    print(f"{vars(args)}\n{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)", flush=True)
    params = random_params(flextok.shapes(cfg))
    by_k = programs(cfg, compute, batch)
    for name, reference in (("encode", KS[-1]), ("step", "plain")):
        flops = {k: count_flops(f, params) for k, f in by_k[name].items()}
        calls = {k: functools.partial(jax.jit(f), params) for k, f in by_k[name].items()}
        show(name, time_in_turn(calls, args.repeats), reference, flops)
    if args.parts:
        show_parts(cfg, compute, batch, params, by_k, args.repeats)


if __name__ == "__main__":
    main()
