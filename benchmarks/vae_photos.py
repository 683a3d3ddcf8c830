"""What a VAE keeps of validation photographs, beside small images of as many numbers.

    python -m flextok_jax.main --config=configs/vae.py:photos --workdir=runs/vae_photos
    python -m benchmarks.vae_photos runs/vae_photos

Prints the PSNR in dB (mean over the tiles of each validation photograph) of two ways to store a
tile of 64 x 64 pixels: the VAE's latents (the posterior's mean, not rounded), and a thumbnail of at
least as many numbers (Lanczos, 8 bits each), enlarged bicubically when read.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from examples import photos
from flextok_jax.evaluation import metrics
from flextok_jax.io import models
from flextok_jax.nn import vae
from flextok_jax.nn.images import to_float


@functools.partial(jax.jit, static_argnums=1)
def reconstructed(params, cfg, images):
    mean, _ = vae.encode_moments(params, cfg, images)
    return vae.decode_latents(params, cfg, mean)


def thumbnail(tile, side):
    """A tile reduced to side x side pixels and enlarged."""
    small = Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small.resize(tile.shape[:2], Image.Resampling.BICUBIC))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vae", help="a workdir of the VAE stage, or a folder in diffusers' layout")
    args = parser.parse_args()
    cfg, params = models.load_vae(args.vae)
    tiles = photos.tiles()
    values = (photos.TILE // cfg.downsample) ** 2 * cfg.latent_channels
    side = math.ceil(photos.TILE * math.sqrt(values / (3 * photos.TILE**2)) - 1e-6)
    images = np.stack([*tiles.values()])
    thumbnails = np.stack([thumbnail(tile, side) for tile in images])
    images, thumbnails = to_float(images), to_float(thumbnails)
    made = jnp.clip(reconstructed(params, cfg, images), -1, 1)
    ours, small = (np.asarray(metrics.psnr(x, images)) for x in (made, thumbnails))
    print(f"trained on {', '.join(photos.TRAIN)}")
    print(f"{values} latents a tile; small image {side} x {side} x 3 = {3 * side**2} numbers")
    print(f"{'validation':12}{'tiles':>6}{'VAE':>9}{'small':>9}{'gain':>8}")
    photo = np.array([name.split("/")[0] for name in tiles])
    for name in (*photos.VALIDATION, "all"):
        chosen = (photo == name) | (name == "all")
        a, b = ours[chosen].mean(), small[chosen].mean()
        print(f"{name:12}{chosen.sum():6}{a:9.2f}{b:9.2f}{a - b:+8.2f}")


if __name__ == "__main__":
    main()
