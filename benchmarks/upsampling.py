"""The VAE's decoder with upsampling inside its convolutions, against enlarging the image first.

    python -m benchmarks.upsampling
    python -m benchmarks.upsampling --tpu

Random weights, one image of 256x256 pixels, float32. Both forms (`by_phases` and `enlarged` of
nn/vae.py) run in turn; seconds are of the processor, and the ratio is within a round. With --tpu
instead what the TPU compiler estimates for a v5e: one convolution alone, bfloat16, eight images.
"""

import argparse
import functools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.search import seconds_in_turn
from benchmarks.tokens import random_params
from flextok_jax.compile import count_flops, estimate, topology
from flextok_jax.nn import vae
from flextok_jax.nn.vae_config import VAEConfig
from flextok_jax.parallel.mesh import make_mesh

FORMS = {"enlarged": vae.enlarged, "by phases": vae.by_phases}
LAYERS = ((32, 512), (64, 512), (128, 256))  # (side, channels) before each upsampling.


def on_this_machine(repeats: int) -> None:
    """Prints FLOPs, processor seconds and ratios of the whole decoder."""
    cfg = VAEConfig(latent_channels=16)
    params = random_params(jax.eval_shape(lambda: vae.init_vae(cfg, jax.random.key(0))))
    latents = jax.random.normal(jax.random.key(1), (1, 32, 32, 16))
    calls, flops, images = {}, {}, {}
    for name, form in FORMS.items():
        decode = functools.partial(vae.decode_latents, cfg=cfg)
        with mock.patch.multiple(vae, by_phases=form, enlarged=form):
            flops[name] = count_flops(lambda p, z, f=decode: f(p, latents=z), params, latents)
            program = jax.jit(lambda p, z, f=decode: f(p, latents=z)).lower(params, latents)
        calls[name] = functools.partial(program.compile(), params, latents)
        images[name] = calls[name]()
    found = seconds_in_turn(calls, repeats)
    plain, phases = found.values()
    for name, seconds in found.items():
        print(f"{name:<10}{flops[name] / 1e9:8.1f} GFLOP{np.median(seconds):8.2f} s of CPU")
    ratio = phases / plain
    print(f"ratio {np.median(ratio):.3f} ({min(ratio):.3f} to {max(ratio):.3f})")
    apart = jnp.abs(images["enlarged"] - images["by phases"]).max()
    print(
        f"largest difference {apart / jnp.abs(images['enlarged']).max():.1e} of the largest value"
    )


def on_tpu() -> None:
    """Prints the estimated milliseconds of each convolution."""
    chip, devices = topology("v5e:2x2")
    mesh = make_mesh(1, 1, 1, devices[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for side, channels in LAYERS:
        shapes = (8, side, side, channels), (3, 3, channels, channels)
        args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
        ms = {
            name: 1e3
            * estimate(lambda f=f: jax.jit(f).lower(*args), {}, None, chip, mesh)["seconds"]
            for name, f in FORMS.items()
        }
        print(
            f"from {side}x{side}x{channels}: " + ", ".join(f"{k} {t:.2f} ms" for k, t in ms.items())
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--tpu", action="store_true", help="the estimates of the TPU compiler")
    args = parser.parse_args()
    if args.tpu:
        jax.config.update("jax_platforms", "cpu")
        on_tpu()
    else:
        print(f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)", flush=True)
        on_this_machine(args.repeats)


if __name__ == "__main__":
    main()
