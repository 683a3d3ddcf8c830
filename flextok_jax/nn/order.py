"""Order is a rank: who may attend to whom in a sequence of named segments.

Every position has an integer rank, and position q may attend to position k if and only if
rank(k) <= rank(q). FlexTok's encoder: patches have rank 0, registers 1 to R. Full attention: all
ranks are 0. An autoregressive model: the position. A prefix of a sequence can be computed without
the rest exactly where the rank rises.

Only this file knows where in a sequence a segment lies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Named segments in a row, and the ranks of their positions. Hashable: a static argument.

    Attributes:
        names: of the segments.
        lengths: positions of each segment.
        ranks: of every position; () if all are 0.
        folded: how many identical positions the last one stands for. n identical keys with score s
            and value v contribute n e^s v = e^(s + log n) v to a softmax, so one key with the bias
            log n takes their place, exactly (docs/reference.md, Sequences and positions).
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    folded: int = 1

    def __post_init__(self):
        if self.ranks and len(self.ranks) != self.length:
            raise ValueError(f"{len(self.ranks)} ranks of {self.length} positions")

    @property
    def length(self) -> int:
        """T, all positions."""
        return sum(self.lengths)

    def join(self, *parts: jax.Array) -> jax.Array:
        """The segments, [B, length, D] each, as one sequence [B, T, D]."""
        found = tuple(part.shape[1] for part in parts)
        if found != self.lengths:
            raise ValueError(f"segments {self.names} of {found} positions, expected {self.lengths}")
        return jnp.concatenate(parts, axis=1)

    def part(self, x: jax.Array, name: str) -> jax.Array:
        """One segment of a sequence: [B, T, ...] -> [B, length, ...]."""
        index = self.names.index(name)
        start = sum(self.lengths[:index])
        return x[:, start : start + self.lengths[index]]

    def seen(self, batch: int, **masks: jax.Array | None) -> jax.Array | None:
        """bool [B, T], from bool [B, length] of some segments; None: of all, everything is seen."""
        if not any(mask is not None for mask in masks.values()):
            return None
        parts = (
            jnp.ones((batch, length), bool) if masks.get(name) is None else masks[name]
            for name, length in zip(self.names, self.lengths)
        )
        return jnp.concatenate(list(parts), axis=1)

    def mask(self) -> np.ndarray | None:
        """bool [T, T]: whether query q (row) may attend to key k (column); None: everywhere."""
        return mask(self.ranks) if any(rank != self.ranks[0] for rank in self.ranks) else None

    def key_bias(self) -> np.ndarray | None:
        """float32 [T]: what is added to every logit of a key; None: nothing."""
        if self.folded == 1:
            return None
        bias = np.zeros(self.length, np.float32)
        bias[-1] = np.log(self.folded)
        return bias

    @property
    def is_causal(self) -> bool:
        """Whether every position attends to itself and those before it."""
        return bool(self.ranks) and all(a < b for a, b in zip(self.ranks, self.ranks[1:]))

    @property
    def head(self) -> int:
        """n, if the first n positions have one rank and those after it rise one by one; else 0.

        Such a sequence ("causal last") needs no masked work among its first n positions.
        """
        head = self.ranks.count(self.ranks[0]) if self.ranks else 0
        tail = self.ranks[head:]
        rising = all(a < b for a, b in zip(self.ranks[head - 1 :], tail))
        return head if tail and head > 1 and rising else 0


def full(**lengths: int) -> Sequence:
    """Everybody attends to everybody."""
    return Sequence(tuple(lengths), tuple(lengths.values()))


def causal_last(**lengths: int) -> Sequence:
    """The last segment's positions attend to all others and to those before them (FlexTok)."""
    *first, last = lengths.values()
    ranks = (0,) * sum(first) + tuple(range(1, last + 1))
    return Sequence(tuple(lengths), tuple(lengths.values()), ranks)


def scales(name: str, length: int, of_each: int) -> Sequence:
    """A segment whose positions attend to those of their scale, `of_each` in a row, and before."""
    return Sequence((name,), (length,), tuple(i // of_each for i in range(length)))


def causal(**lengths: int) -> Sequence:
    """Every position attends to itself and those before it."""
    total = sum(lengths.values())
    return Sequence(tuple(lengths), tuple(lengths.values()), tuple(range(total)))


@functools.lru_cache(maxsize=64)
def _mask(ranks: tuple[int, ...]) -> np.ndarray:
    rank = np.asarray(ranks)
    found = rank[None, :] <= rank[:, None]
    found.setflags(write=False)
    return found


def mask(ranks) -> np.ndarray:
    """bool [T, T] from T ranks: rank(k) <= rank(q), queries in rows."""
    return _mask(tuple(int(rank) for rank in ranks))
