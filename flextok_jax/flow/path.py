"""Rectified flow: times, path and target (t = 1 is noise, t = 0 is data)."""

import jax
import jax.numpy as jnp


def mode_time(u: jax.Array, scale: float) -> jax.Array:
    """The "mode" time density: t = 1 - u - s (cos^2(pi u / 2) - 1 + u).

    Args:
        u: uniform in [0, 1), any shape.
        scale: s; 0 gives uniform times.
    """
    return 1.0 - u - scale * (jnp.square(jnp.cos(jnp.pi * u / 2)) - 1.0 + u)


def shift_time(t, shift: float):
    """Times moved towards noise: t' = s t / (1 + (s - 1) t), any shape (arXiv 2403.03206, eq. 23).

    An image whose pixels repeat each other m-fold shows through noise sqrt(m) times as strong, so
    the times at which its content is undecided, and its tokens matter, lie nearer to 1. s = 1
    changes nothing.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def logit_normal_time(key: jax.Array, batch: int) -> jax.Array:
    """t = sigmoid(n), n standard normal."""
    return jax.nn.sigmoid(jax.random.normal(key, (batch,)))


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = t eps + (1 - t) x0. x0, noise: [B, ...]; t: [B]."""
    t = t.reshape(-1, *(1,) * (x0.ndim - 1))
    return t * noise + (1.0 - t) * x0


MIN_TIME = 0.05  # arXiv 2511.13720: below it a velocity to an image is not scaled up any more.


def velocity_to(image: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The velocity at x_t of the straight path from `image`: (x_t - image) / max(t, MIN_TIME).

    Of x0 it is `target`, up to the limit. image, x_t: [B, h, w, C]; t: [B] or [1].
    """
    return (x_t - image) / jnp.maximum(t, MIN_TIME)[:, None, None, None]


def target(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity dx/dt = eps - x0."""
    return noise - x0


def flow_loss(velocity: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean squared error of a velocity, per image: [B, ...] -> float32 [B]."""
    error = velocity.astype(jnp.float32) - wanted
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))


def kept(q: jax.Array, num_tokens: int, mode: str) -> jax.Array:
    """Nested dropout: how many tokens an image keeps, by the quantile of that number.

    Args:
        q: in [0, 1), any shape; of a uniform q the result has the distribution of `mode`.
        mode: "pow2": uniform over 1, 2, 4, ..., R; "uniform": over 1..R; "uniform_pow2": uniform,
            rounded up to a power of two, at most R; "fixed": always R.

    Returns:
        int32 in 1..R, of the shape of q; it rises with q.
    """

    def below(count):  # uniform over 0 .. count - 1
        return jnp.minimum(jnp.floor(q * count), count - 1).astype(jnp.int32)

    if mode == "fixed":
        return jnp.full(jnp.shape(q), num_tokens, jnp.int32)
    if mode == "pow2":
        return jnp.left_shift(1, below(num_tokens.bit_length()))
    keep = below(num_tokens) + 1
    return keep if mode == "uniform" else next_pow2(keep, num_tokens)


def next_pow2(k: jax.Array, most: int) -> jax.Array:
    """The smallest power of two >= k, at most `most`. int32, same shape."""
    powers = jnp.left_shift(1, jnp.arange((most - 1).bit_length() + 1))
    position = jnp.searchsorted(powers, k)
    return jnp.minimum(powers[position], most).astype(jnp.int32)
