"""Sampling: Euler's method on a uniform grid, guidance, and adaptive projected guidance (APG)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

APG_MOMENTUM = -0.5  # Sadat et al., arXiv 2410.02416, applied to velocities
APG_NORM = 2.5


def guidance_schedule(scale, steps: int) -> np.ndarray:
    """The guidance scale at each step, float32 [steps].

    Args:
        scale: a number, or a callable of t (a float, from 1 down to 1/steps).
        steps: number of Euler steps.
    """
    if callable(scale):
        return np.asarray([float(scale(1.0 - i / steps)) for i in range(steps)], np.float32)
    return np.full((steps,), scale, np.float32)


def classifier_free(v_cond, v_null, scale):
    """v_null + g (v_cond - v_null)."""
    return v_null + scale * (v_cond - v_null)


def adaptive_projected(v_cond, v_null, scale, momentum):
    """APG: momentum, norm limit, and only the part of the difference orthogonal to v_cond.

    Args:
        v_cond, v_null: [B, h, w, C].
        scale: g, a scalar.
        momentum: [B, h, w, C], zero at the first step; carried before the norm limit.

    Returns:
        (guided velocity, new momentum).
    """
    axes = (1, 2, 3)

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    momentum = v_cond - v_null + APG_MOMENTUM * momentum
    update = momentum * jnp.minimum(1.0, APG_NORM / norm(momentum))
    unit = v_cond / jnp.maximum(norm(v_cond), 1e-12)  # an untrained model's velocity is zero
    update = update - jnp.sum(update * unit, axis=axes, keepdims=True) * unit
    return v_cond + (scale - 1.0) * update, momentum


def euler(
    velocities: Callable,
    noise: jax.Array,
    scales: jax.Array,
    guided: bool,
    normalized: bool,
) -> jax.Array:
    """Integrate from noise (t = 1) to data (t = 0): x <- x - v / steps, in float32.

    Args:
        velocities: (x [B, h, w, C], t [1]) -> (v_cond, v_null) if guided, else (v_cond,).
        noise: [B, h, w, C].
        scales: guidance scale at each step, [steps]; their number is the number of steps.
        guided: whether there is a null pass.
        normalized: APG instead of plain guidance.

    Returns:
        float32 [B, h, w, C].
    """
    steps = scales.shape[0]
    x = noise.astype(jnp.float32)

    def step(carry, inputs):
        x, momentum = carry
        index, scale = inputs
        t = (1.0 - index.astype(jnp.float32) / steps).reshape(1)
        v, *null = (v.astype(jnp.float32) for v in velocities(x, t))
        if guided and normalized:
            v, momentum = adaptive_projected(v, null[0], scale, momentum)
        elif guided:
            v = classifier_free(v, null[0], scale)
        return (x - v / steps, momentum), None

    momentum = jnp.zeros_like(x) if guided and normalized else None
    (x, _), _ = jax.lax.scan(step, (x, momentum), (jnp.arange(steps), scales))
    return x
