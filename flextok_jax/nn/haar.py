"""The Haar transform of patches: a patch as scales, from its coarse approximation to fine details.

With a patch side of 2^m pixels and L <= m levels, the coefficients of a cell of the image depend on
that cell alone. So L levels of the transform of an image are those of its patches, one orthogonal
matrix for all. Scale 0 holds (side / 2^L)^2 values per channel, 2^L times the means of blocks of
2^L x 2^L pixels; scale s > 0 adds three details of each value so far (horizontal, vertical,
diagonal).

p patch side, C channels, L levels, S = L + 1 scales.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=8)
def matrix(side: int, levels: int) -> np.ndarray:
    """The orthogonal matrix of one channel, float64 [p^2, p^2]: coefficients by pixels."""
    if not levels:
        return np.eye(side * side)
    pairs = np.arange(side) // 2 == np.arange(side // 2)[:, None]
    mean = pairs / np.sqrt(2)
    detail = mean * np.where(np.arange(side) % 2, -1, 1)
    coarse = matrix(side // 2, levels - 1) @ np.kron(mean, mean)
    details = (np.kron(a, b) for a, b in ((mean, detail), (detail, mean), (detail, detail)))
    return np.concatenate([coarse, *details])


def sizes(side: int, levels: int, channels: int) -> tuple[int, ...]:
    """How many values of a patch each scale holds."""
    first = (side >> levels) ** 2 * channels
    return (first, *(3 * first * 4**i for i in range(levels)))


def split(x: jax.Array, side: int, levels: int) -> list[jax.Array]:
    """Patches [..., p*p*C] (see `layers.patchify`) to scales, [..., size] each."""
    channels = x.shape[-1] // side**2
    by_pixel = x.reshape(*x.shape[:-1], side**2, channels)
    found = jnp.einsum("kp,...pc->...kc", matrix(side, levels).astype(x.dtype), by_pixel)
    return jnp.split(found.reshape(x.shape), np.cumsum(sizes(side, levels, channels))[:-1], axis=-1)


def join(scales, side: int, levels: int) -> jax.Array:
    """The inverse of `split`."""
    x = jnp.concatenate(scales, axis=-1)
    by_value = x.reshape(*x.shape[:-1], side**2, -1)
    found = jnp.einsum("kp,...kc->...pc", matrix(side, levels).astype(x.dtype), by_value)
    return found.reshape(x.shape)
