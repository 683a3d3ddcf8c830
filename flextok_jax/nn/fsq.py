"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505). Always float32 and integers."""

import jax
import jax.numpy as jnp
import numpy as np


def _basis(levels: tuple[int, ...]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]]).astype(np.int32)


def _bound(z: jax.Array, levels: tuple[int, ...], eps: float) -> jax.Array:
    half = (np.asarray(levels) - 1) * (1 + eps) / 2
    offset = np.where(np.asarray(levels) % 2 == 0, 0.5, 0.0)
    shift = np.arctanh(offset / half)

    def row(a):
        return jnp.asarray(a, jnp.float32).reshape((1,) * (z.ndim - 1) + (-1,))

    return jnp.tanh(z.astype(jnp.float32) + row(shift)) * row(half) - row(offset)


def _half_width(levels: tuple[int, ...], ndim: int) -> jax.Array:
    return jnp.asarray(np.asarray(levels) // 2, jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def quantize(z: jax.Array, levels: tuple[int, ...], eps: float = 1e-3) -> jax.Array:
    """Registers to codes with a straight-through gradient: [..., F] -> float32 [..., F] in [-1, 1].

    The gradient is that of the bounded value before rounding.
    """
    bounded = _bound(z, levels, eps)
    rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
    return rounded / _half_width(levels, z.ndim)


def codes_to_indices(codes: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Codes [..., F] -> token ids int32 [...]; the first level varies fastest."""
    digits = jnp.round(codes * _half_width(levels, codes.ndim)).astype(jnp.int32)
    digits = digits + np.asarray(levels).reshape((1,) * (codes.ndim - 1) + (-1,)) // 2
    basis = _basis(levels).reshape((1,) * (codes.ndim - 1) + (-1,))
    return jnp.sum(digits * basis, axis=-1)


def indices_to_codes(indices: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Token ids int [...] -> codes float32 [..., F]: the inverse of `codes_to_indices`."""
    basis = _basis(levels).reshape((1,) * indices.ndim + (-1,))
    sizes = np.asarray(levels).reshape(basis.shape)
    digits = (indices[..., None] // basis) % sizes
    return (digits - sizes // 2).astype(jnp.float32) / (sizes // 2).astype(np.float32)
