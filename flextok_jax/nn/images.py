"""Pixels between uint8 and float32 in [-1, 1], and their errors: the place that knows the range.

`to_float` and `to_uint8` use array methods only, so they take NumPy and JAX arrays alike and return
the same kind.
"""

import jax.numpy as jnp

SMALLEST_ERROR = 1e-10  # Mean squared; caps the PSNR of equal images at 106 dB.


def to_float(images):
    """uint8 [...] in 0..255 → float32 [...] in [-1, 1]: x / 127.5 - 1."""
    return images.astype("float32") / 127.5 - 1.0


def to_uint8(images):
    """float [...] → uint8 [...]: clipped to [-1, 1], then rounded to the nearest of 0..255."""
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype("uint8")


def psnr(images, originals):
    """Peak signal-to-noise ratio of [B, H, W, C] in [-1, 1], 10 log10(2^2 / MSE): dB [B]."""
    error = jnp.mean(jnp.square(images - originals), axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, SMALLEST_ERROR))


def mae(images, originals):
    """Mean absolute error per image, of a range of 2: [B]."""
    return jnp.mean(jnp.abs(images - originals), axis=(1, 2, 3))
