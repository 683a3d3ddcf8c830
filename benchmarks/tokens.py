"""Cost follows tokens: time and analytic FLOPs of k tokens against the full length.

    python -m benchmarks.tokens
    python -m benchmarks.tokens --model d18_d28 --batch 32 --dtype bfloat16 --attention cudnn \
        --end-to-end --json d18_d28.json

Random weights (gates and heads are not zero), 256x256 images, 256 tokens. Needs jax, flax, numpy.

"encode" is the Transformer on latents: N + K positions, against k = 256. "step" is one guided Euler
step of the decoder: a pass of N + K + 1 positions (N + R at k = R) and a null pass of N + 1,
against the plain step, whose two passes both have all N + R positions. The variants of a table run
in turn, round after round, and a ratio is the median over the rounds of a variant's time over the
reference's time in the same round, so that other load on the machine falls on both.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.flow import sampler
from flextok_jax.nn import flextok, layout
from flextok_jax.nn.config import Blocks, Compute, TokenizerConfig
from flextok_jax.nn.decoder import Condition

KS = (1, 16, 64, 256)
STEPS = 20  # Euler steps of an image, end to end.
MIN_SECONDS = 0.2  # A measurement repeats short calls until it lasts about this long.


def model_config(name: str) -> TokenizerConfig:
    """The configuration of "dE_dD": depths E and D, widths 64 per layer."""
    found = re.fullmatch(r"d(\d+)_d(\d+)", name)
    if not found:
        raise argparse.ArgumentTypeError(f"{name!r}: must be dE_dD, such as d12_d12 or d18_d28")
    enc, dec = map(int, found.groups())
    encoder, decoder = (Blocks(width=64 * depth, depth=depth) for depth in (enc, dec))
    return TokenizerConfig(encoder=encoder, decoder=decoder)


def random_params(shapes):
    """Normal weights of variance 1 / fan-in, made on the device."""
    leaves, tree = jax.tree.flatten(shapes)
    draw = jax.jit(jax.random.normal, static_argnums=1)
    drawn = [
        draw(jax.random.key(i), leaf.shape) / math.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 16)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


def weights(shapes, path: str) -> int:
    """Elements of all matrices below `path` ("decoder/blocks/mlp")."""
    for name in path.split("/"):
        shapes = shapes[name]
    found = jax.tree_util.tree_leaves_with_path(shapes)
    return sum(leaf.size for at, leaf in found if jax.tree_util.keystr(at).endswith("'kernel']"))


def encode_flops(shapes, cfg: TokenizerConfig, count: int) -> int:
    """One image: 2 per weight and position, 4 T S D per layer for T queries and S keys."""
    n, of = cfg.num_patches, lambda part: weights(shapes, f"encoder/{part}")
    matrices = n * of("patch_emb") + (n + count) * of("blocks") + count * of("head")
    attention = cfg.encoder.depth * cfg.encoder.width * (n * n + count * (n + count))
    return 2 * matrices + 4 * attention


def step_flops(shapes, cfg: TokenizerConfig, counts: tuple[int, ...]) -> int:
    """One image through one pass per count of codes; the modulation of the time is shared."""
    n, of = cfg.num_patches, lambda part: weights(shapes, f"decoder/{part}")
    once = n * of("patch_emb") + of("blocks/adaln") + of("head_adaln")
    once += of("time_mlp_0") + of("time_mlp_1")
    flops = 2 * once
    for count in counts:
        length = n + registers(cfg, count)
        matrices = length * (of("blocks/attn") + of("blocks/mlp"))
        matrices += count * of("register_proj") + n * of("head")
        flops += 2 * matrices + 4 * cfg.decoder.depth * cfg.decoder.width * length**2
    return flops


def registers(cfg: TokenizerConfig, count: int) -> int:
    """Positions behind the patches in a pass with `count` codes: the dropped ones are one."""
    return count + (count < cfg.num_tokens)


def time_in_turn(variants: dict, repeats: int) -> dict:
    """Seconds per call of each variant, [repeats]; the variants alternate within a round."""
    calls = {}
    for name, call in variants.items():
        jax.block_until_ready(call())  # Compiles.
        begin = time.perf_counter()
        jax.block_until_ready(call())
        calls[name] = max(1, round(MIN_SECONDS / (time.perf_counter() - begin)))
    seconds = {name: np.empty(repeats) for name in variants}
    for i in range(repeats):
        for name, call in variants.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                last = call()
            jax.block_until_ready(last)
            seconds[name][i] = (time.perf_counter() - begin) / calls[name]
    return seconds


def encode_table(params, shapes, cfg, compute, batch, repeats):
    """Rows of the encoder's Transformer for each k."""
    latents = jax.random.normal(jax.random.key(1), (batch, *cfg.latent_shape))

    @functools.partial(jax.jit, static_argnums=1)
    def encode(params, count):
        return flextok.encode(params, cfg, compute, latents, count)

    variants = {k: (lambda k=k: encode(params, k)) for k in KS}
    seconds = time_in_turn(variants, repeats)
    flops = {k: batch * encode_flops(shapes, cfg, k) for k in KS}
    positions = {k: f"{cfg.num_patches + k}" for k in KS}
    return rows("encode", seconds, flops, positions, reference=KS[-1])


def step_table(params, shapes, cfg, compute, batch, repeats):
    """Rows of one guided Euler step for each k, and of the plain one."""
    noise = jax.random.normal(jax.random.key(2), (batch, *cfg.latent_shape))
    how = dataclasses.replace(cfg.sampler, steps=1)
    codes = jax.random.uniform(
        jax.random.key(3), (batch, cfg.num_tokens, cfg.code_dim), minval=-1.0
    )
    keep = jnp.full((batch,), cfg.num_tokens, jnp.int32)

    @jax.jit
    def short(params, codes, keep):
        return flextok.decode(params, cfg, compute, codes, keep, noise, how)

    @jax.jit
    def plain(params, codes, keep):
        given, dropped = jnp.zeros((batch,), bool), jnp.ones((batch,), bool)
        conditions = (Condition(codes, keep, given), Condition(codes, keep, dropped))

        def velocities(x, t):
            return flextok.velocities(params, cfg, compute, x, t, conditions)

        start = sampler.start(noise)
        return sampler.integrate(velocities, start, how.schedule(), 0, 1, True, True).x

    n, most = cfg.num_patches, cfg.num_tokens
    variants = {"plain": lambda: plain(params, codes, keep)}
    flops = {"plain": batch * step_flops(shapes, cfg, (most, most))}
    positions = {"plain": f"{n + most}+{n + most}"}
    for k in KS:
        variants[k] = lambda k=k: short(params, codes[:, :k], jnp.minimum(keep, k))
        flops[k] = batch * step_flops(shapes, cfg, (k, 0))
        positions[k] = f"{n + registers(cfg, k)}+{n + registers(cfg, 0)}"
    return rows("step", time_in_turn(variants, repeats), flops, positions, reference="plain")


def end_to_end_table(params, cfg, compute, batch, repeats):
    """Rows of whole images through FlexTok, VAE included: `tokenize`, then `detokenize`."""
    from flextok_jax import FlexTok

    tok = FlexTok(cfg, params, compute)
    shape = (batch, *cfg.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (batch, cfg.num_tokens))
    table = []
    for name, call in (
        ("tokenize", lambda k: tok.tokenize(images, k)),
        ("detokenize", lambda k: tok.detokenize(ids[:, :k], steps=STEPS)),
    ):
        seconds = time_in_turn({k: (lambda k=k: call(k)) for k in KS}, repeats)
        for row in rows(name, seconds, {}, {}, reference=KS[-1]):
            table.append(row | {"images_per_s": batch / row["seconds"]})
    return table


def rows(name, seconds, flops, positions, reference) -> list[dict]:
    """One dictionary per variant; ratios are to `reference`."""
    table = []
    for k in seconds:
        row = {"what": name, "k": k, "seconds": float(np.median(seconds[k]))}
        row["time_ratio"] = float(np.median(seconds[k] / seconds[reference]))
        row["reference"] = reference
        if flops:
            row |= {"positions": positions[k], "flops": flops[k]}
            row["flop_ratio"] = flops[k] / flops[reference]
        table.append(row)
    return table


def show(table):
    """Prints the rows, with a heading for each kind."""
    kind = None
    for row in table:
        if row["what"] != kind:
            kind, counted = row["what"], "flops" in row
            last = "GFLOP" if counted else "images/s"
            ratios = f"time / {row['reference']}" + ("   FLOPs" if counted else "")
            print(f"\n{kind:<12}{'k':>6}{'positions':>12}{last:>12}{'ms':>12}    {ratios}")
        amount = row["flops"] / 1e9 if counted else row["images_per_s"]
        line = f"{'':<12}{row['k']:>6}{row.get('positions', ''):>12}{amount:>12.2f}"
        line += f"{1e3 * row['seconds']:>12.2f}    {row['time_ratio']:>8.3f}"
        print(line + (f"{row['flop_ratio']:>12.3f}" if counted else ""))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="d12_d12", help="d12_d12, d18_d18, d18_d28, any dE_dD")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="xla", choices=("xla", "cudnn"))
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--end-to-end", action="store_true", help="also whole images per second")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    try:
        cfg, compute = model_config(args.model), Compute(args.dtype, args.attention)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))

    device = jax.devices()[0]
    about = {name: value for name, value in vars(args).items() if name != "json"} | {
        "device": f"{device.device_kind} ({os.cpu_count()} CPU cores)",
        "jax": jax.__version__,
        "image_size": cfg.image_size,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    shapes = layout.unbox(flextok.shapes(cfg))
    if not args.end_to_end:
        shapes["vae"] = {}
    params = random_params(shapes)
    inputs = (cfg, compute, args.batch, args.repeats)
    table = encode_table(params, shapes, *inputs)
    table += step_table(params, shapes, *inputs)
    if args.end_to_end:
        table += end_to_end_table(params, *inputs)
    show(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": table}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
