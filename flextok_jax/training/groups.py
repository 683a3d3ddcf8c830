"""A step's batch, cut into groups of images whose sequences have one length.

Each image of a batch has a rank, and a stage says what ranks need (`Stage.lengths`): a tokenizer
samples the number of kept tokens such that it rises with the rank. Groups of consecutive ranks are
the microbatches of accumulation, or slices of the batch.

With d_1, d_2, ... the digits of an image's index, the least significant first, its rank has the
digits d_i + s_i (modulo the radix), the most significant first, with uniform shifts s_i: a
randomised van der Corput sequence. So any image is as likely to have any rank; images that follow
each other lie in different groups, and every device, which has images in a row, holds an equal
share of each group. Ranks do not depend on the mesh.

B images of a batch, G groups.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOST_GROUPS = 16  # Without accumulation.


class Run(NamedTuple):
    """Groups in a row that have one length.

    Attributes:
        calls: how often the loss is called, one after the other.
        images: of a call.
        length: what the loss is told; None: nothing.
    """

    calls: int
    images: int
    length: int | None


def plan(stage, size: int, parts: int, shards: int) -> tuple[Run, ...]:
    """The runs of a step, in the order of ranks.

    Args:
        stage: see training/stage.py.
        size: B.
        parts: microbatches of accumulation.
        shards: devices that the batch is cut over; parts * shards divides B.
    """
    count = parts if parts > 1 else math.gcd(MOST_GROUPS, size // shards)
    runs = [(length, len(list(run))) for length, run in itertools.groupby(stage.lengths(count))]
    if parts > 1:
        return tuple(Run(n, size // parts, length) for length, n in runs)
    return tuple(Run(1, n * size // count, length) for length, n in runs)


def ranks(key: jax.Array, size: int, parts: int = 1) -> jax.Array:
    """int32 [B], a permutation of 0 .. B - 1, such that `cut` moves nothing between devices."""
    rest = size // parts
    twos = (rest & -rest).bit_length() - 1
    radices = (parts, *(2,) * twos, rest >> twos)
    digits = np.unravel_index(np.arange(size), radices[::-1])[::-1]
    shifts = jax.random.randint(key, (len(radices),), 0, jnp.array(radices))
    turned = [digit + shift for digit, shift in zip(digits, shifts)]
    return jnp.ravel_multi_index(turned, radices, mode="wrap")


def cut(batch: dict, rank: jax.Array, runs: tuple[Run, ...], sharding) -> list[dict]:
    """The images of each run: [calls, images, ...], or [images, ...] for one call.

    Args:
        batch: {name: [B, ...]}.
        rank: of `ranks`, for the `parts` of `plan`.
        sharding: from the number of leading dimensions before that of images to a sharding.
    """
    if len(runs) == 1 and runs[0].calls == 1:
        return [batch]
    size = len(rank)
    each = math.gcd(*(run.images for run in runs))  # Images of a group, or of some in a row.
    count = size // each
    # Of every `count` images in a row one is in each group.
    order = jnp.argsort(rank[:count] // each)
    if runs[0].length is None:
        order = None
    ordered = {name: _blocks(x, count, order) for name, x in batch.items()}

    def images(x, start, run):
        stop = start + run.calls * run.images // each
        x, rest = x[:, start:stop], x.shape[2:]
        if run.calls == 1:
            x = x.reshape(run.images, *rest)
        else:
            x = jnp.moveaxis(x, 1, 0)
        return jax.lax.with_sharding_constraint(x, sharding(int(run.calls > 1)))

    starts = itertools.accumulate((r.calls * r.images // each for r in runs), initial=0)
    return [
        {name: images(x, start, run) for name, x in ordered.items()}
        for start, run in zip(starts, runs)
    ]


def _blocks(x, count, order):
    """[B, ...] -> [B / G, G, ...], the second dimension in the order of groups."""
    x = x.reshape(-1, count, *x.shape[1:])
    return x if order is None else jnp.take(x, order, axis=1, mode="clip")


def few(bounds: list[int], most: int) -> tuple[int, ...]:
    """Each rounded up to one of at most `most` of them, those that make the least sum."""
    *smaller, largest = sorted(set(bounds))

    def rounded(chosen):
        return tuple(min(x for x in (*chosen, largest) if x >= bound) for bound in bounds)

    count = min(most - 1, len(smaller))
    return min(map(rounded, itertools.combinations(smaller, count)), key=sum)
