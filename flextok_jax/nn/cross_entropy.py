"""Softmax cross-entropy over many ids, without the logits of the whole batch at once.

B batch, L positions, D width, V ids.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class CrossEntropy(NamedTuple):
    """Of each position and its target.

    Attributes:
        loss: float32 [B, L], -log softmax(logits)[target].
        log_z: float32 [B, L], the log-normaliser, logsumexp(logits): for a z-loss.
        correct: bool [B, L], whether no id has a larger logit than the target.
    """

    loss: jax.Array
    log_z: jax.Array
    correct: jax.Array


def cross_entropy(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, chunk: int
) -> CrossEntropy:
    """Cross-entropy by chunks of positions.

    A loop over chunks makes the logits of `chunk` positions of every image, forgets them, and makes
    them once more in the backward pass. So [B, chunk, V] exist at a time, instead of [B, L, V], for
    one more product with the head. The batch stays whole in each chunk, so a batch that is spread
    over devices stays spread. Where one chunk holds all positions nothing is made twice.

    Args:
        head: [B, C, D] -> float32 logits [B, C, V], position by position.
        hidden: [B, L, D].
        targets: int32 [B, L], ids in 0..V-1.
        chunk: positions at a time, at least 1. The last chunk is filled up where it does not
            divide L.

    Raises:
        ValueError: chunk is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be a number of positions, at least 1")

    def part(hidden, targets):
        logits = head(hidden)
        # A comparison instead of a look-up: its gradient is no scatter, and it needs no exchange
        # where the ids are spread over devices.
        ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
        picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        correct = picked >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
        return CrossEntropy(log_z - picked, log_z, correct)

    length = targets.shape[1]
    if chunk >= length:
        return part(hidden, targets)

    def chunks(x):  # [B, L, ...] -> [L / chunk, B, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def whole(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]

    again = jax.checkpoint(part, prevent_cse=False)  # a loop's body is not merged with its copy
    items = chunks(hidden), chunks(targets)
    _, out = jax.lax.scan(lambda _, item: (None, again(*item)), None, items)
    return jax.tree.map(whole, out)
