"""Random streams: every key is a function of (seed, step, name), never carried in a state."""

import zlib

import jax


def step_key(seed: int, step) -> jax.Array:
    """The key of one training step; `step` may be traced."""
    return jax.random.fold_in(jax.random.key(seed), step)


def named(key: jax.Array, name: str) -> jax.Array:
    """An independent key for the stream `name`."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
