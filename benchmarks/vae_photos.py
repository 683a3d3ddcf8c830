"""What a VAE keeps of held-out photographs, beside small images of as many numbers.

    python -m flextok_jax.main --config=configs/vae.py:photos --workdir=runs/vae_photos
    python -m benchmarks.vae_photos runs/vae_photos

Prints the PSNR in dB (mean over the tiles of each held-out photograph) of two ways to store a tile
of S x S pixels: the VAE's latents (the posterior's mean, not rounded), and the tile averaged over
areas to the smallest grid that holds at least as many numbers, enlarged bicubically when read.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.data.photos import HELD_OUT, SPLITS, TRAIN, photos
from flextok_jax.evaluation import metrics
from flextok_jax.io import models
from flextok_jax.nn import vae
from flextok_jax.training.vae_stage import downsampled


@functools.partial(jax.jit, static_argnums=1)
def scores(params, cfg, images):
    """PSNR [B] of the VAE and of the small image."""
    mean, _ = vae.encode_moments(params, cfg, images)
    small = downsampled(images, math.prod(mean.shape[1:]))
    made = jnp.clip(vae.decode_latents(params, cfg, mean), -1, 1)
    return metrics.psnr(made, images), metrics.psnr(jnp.clip(small, -1, 1), images)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vae", help="a workdir of the VAE stage, or a folder in diffusers' layout")
    parser.add_argument("--size", type=int, default=64, help="S (64)")
    args = parser.parse_args()
    cfg, params = models.load_vae(args.vae)
    tiles = photos("test", args.size)
    images = np.stack(tiles.images).astype(np.float32) / 127.5 - 1
    ours, small = (np.asarray(x) for x in scores(params, cfg, images))
    values = (args.size // cfg.downsample) ** 2 * cfg.latent_channels
    side = math.ceil(args.size * math.sqrt(values / (3 * args.size**2)) - 1e-6)
    print(f"trained on {', '.join(TRAIN)}")
    print(f"{values} latents a tile; small image {side} x {side} x 3 = {3 * side**2} numbers")
    print(f"{'held out':12}{'tiles':>6}{'VAE':>9}{'small':>9}{'gain':>8}")
    labels = np.array(tiles.labels)
    for name in (*HELD_OUT, "all"):
        chosen = (labels == SPLITS["all"].index(name)) if name != "all" else labels >= 0
        a, b = ours[chosen].mean(), small[chosen].mean()
        print(f"{name:12}{chosen.sum():6}{a:9.2f}{b:9.2f}{a - b:+8.2f}")


if __name__ == "__main__":
    main()
