"""Generation: group after group of tokens, with a cache (docs/reference.md, AR models).

Each group, usually of one token, costs one pass of the blocks over its positions, and the head on
each. The cache of single tokens grows by doubling, so attention costs in proportion to the
positions that are filled.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import ar, layout
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.block import Block, Cache
from flextok_jax.nn.config import Compute

FIRST_LENGTH = 64  # Positions of the smallest cache.


class Sampling(NamedTuple):
    """How a token is sampled from logits; all are arrays, so no value compiles a program anew.

    Attributes:
        guidance: float32 [L], scale of each position.
        temperature: float32 [], 0 is greedy.
        top_k: int32 [], keep the k largest logits, and what equals the smallest of them; 0 is off.
        top_p: float32 [], then keep the likeliest tokens up to this probability; 0 is off.
    """

    guidance: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def generate(
    params,
    cfg: ARConfig,
    compute: Compute,
    condition: ARCondition,
    null: ARCondition | None,
    sampling: Sampling,
    keys: jax.Array,
    prefix: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> jax.Array:
    """Tokens at positions start .. stop - 1, given the `start` first ones.

    Args:
        condition: of the B sequences.
        null: their null condition, of the same shapes, or None: no guidance.
        keys: [B] keys. The sample at a position depends on the sequence's own key and the position,
            not on the rest of the batch, nor on where the prefix ended.
        prefix: int32 [B, P], of which the first `start` count; P = 0 for none.
        start, stop: int32 [], start <= P and start < stop <= L.

    Returns:
        int32 [B, L]: the prefix, the new tokens (-1 where logits are not finite), and zeros.
    """
    first = max(prefix.shape[1], first_room(cfg))
    state = open_state(params, cfg, compute, condition, null, prefix, start, first)

    def pick(logits, i):
        return sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), sampling)

    for length in rooms(first, cfg.num_tokens):
        state = grow(state, length // cfg.folds)
        begin, end = jnp.minimum(start, length), jnp.minimum(stop, length)
        state = advance(params, cfg, compute, state, sampling.guidance, pick, begin, end)
        start = jnp.maximum(begin, end)
    return state.tokens


class State(NamedTuple):
    """n sequences under way: what `open_state` makes, `advance` goes on with and `take` picks from.

    Attributes:
        tokens: int32 [n, L].
        caches: of each block, of n sequences with their conditions, and null conditions beside
            them: n or 2 n rows.
        labels: int32 [c] of the conditions, null conditions beside them, or None; c divides the
            rows of the caches, whose conditions repeat.
        text_mask: bool [c, T] of their texts, or None. The keys and values of a text are in the
            caches c times, not for each sequence.
    """

    tokens: jax.Array
    caches: tuple[Cache, ...]
    labels: jax.Array | None
    text_mask: jax.Array | None


def open_state(
    params,
    cfg: ARConfig,
    compute: Compute,
    condition: ARCondition,
    null: ARCondition | None,
    prefix: jax.Array,
    start: jax.Array,
    length: int,
) -> State:
    """Sequences with the `start` first tokens of their prefix.

    Args:
        condition: of the n sequences, or of fewer, c, which divide n: sequence i has number i
            modulo c.
        null: their null conditions, of the same shapes, or None: no guidance.
        prefix: int32 [n, P], start <= P.
        length: tokens there is room for, P or more.
    """
    params, dtype = _cast(params, compute)
    rows, given = prefix.shape
    branches = 1 if null is None else 2
    both = condition if null is None else jax.tree.map(interleave, condition, null)
    context = ar.context(params, cfg, dtype, both)
    shape = (rows * branches, cfg.num_heads, -(-length // cfg.folds), cfg.head_dim)
    empty = layout.batch_first(jnp.zeros(shape, dtype))
    caches = (Cache(empty, empty, None, jnp.int32(0)),) * cfg.depth
    tokens = jnp.pad(prefix, ((0, 0), (0, cfg.num_tokens - given)))
    state = State(tokens, caches, both.labels, None if context is None else context[1])
    if given or cfg.text_dim:  # The text's keys and values are computed here, once.
        # Positions of a group that is not complete are computed once more by `advance`.
        whole = -(-max(given, 1) // cfg.folds) * cfg.folds
        previous = ar.read_by(cfg, tokens)[:, :whole]
        run = _blocks(params, cfg, compute, state, context)
        _, caches = run(previous, 0, caches)
        state = state._replace(caches=tuple(cache._replace(index=start) for cache in caches))
    return state


def advance(
    params,
    cfg: ARConfig,
    compute: Compute,
    state: State,
    guidance: jax.Array,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    stop: jax.Array,
) -> State:
    """Adds tokens at positions start .. stop - 1, for whose groups there must be room.

    Args:
        guidance: float32 [L], scale of each position, where there are null conditions.
        pick: (logits float32 [n, V], position int32 []) -> int32 [n].

    Returns:
        The state; a token is -1 where its logits are not finite.
    """
    params, dtype = _cast(params, compute)
    rows = len(state.tokens)
    has_null = state.caches[0].k.shape[0] > rows
    mask = state.text_mask
    run = _blocks(params, cfg, compute, state, None if mask is None else (None, mask))
    weights = ar.head_weights(params, dtype)

    def drawn(item):
        x, i = item  # [n or 2 n, D], of position i
        if has_null:
            x = guided(x, guidance[i])
        logits = ar.head(weights, x)
        return jnp.where(jnp.isfinite(logits).all(axis=-1), pick(logits, i), -1)

    def step(begin, size, both):
        """The group of `size` positions from `begin` on."""
        tokens, caches = both
        before = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(begin - size, 0), size, axis=1)
        caches = tuple(cache._replace(index=begin // cfg.folds) for cache in caches)
        x, caches = run(jnp.where(begin == 0, ar.SOS, before), begin, caches)
        x = ar.final_norm(params, cfg, x)
        if size == 1:
            token = drawn((x[:, 0], begin))[:, None]
        else:
            positions = begin + jnp.arange(size)
            token = jax.lax.map(drawn, (x.swapaxes(0, 1), positions)).swapaxes(0, 1)
            old = jax.lax.dynamic_slice_in_dim(tokens, begin, size, axis=1)
            asked = (start <= positions) & (positions < stop)
            token = jnp.where(asked[None], token, old)
        return jax.lax.dynamic_update_slice_in_dim(tokens, token, begin, axis=1), caches

    both = state.tokens, state.caches
    for first, size, count in cfg.runs:
        low = jnp.clip((start - first) // size, 0, count)
        high = jnp.clip(-((first - stop) // size), low, count)
        both = jax.lax.fori_loop(
            low, high, lambda i, both, a=first, n=size: step(a + i * n, n, both), both
        )
    return state._replace(tokens=both[0], caches=both[1])


def take(state: State, index: jax.Array) -> State:
    """The sequences with these numbers, int32 [n]; their conditions stay where they are."""

    def rows(x):
        x = x.reshape(len(state.tokens), -1, *x.shape[1:])
        return layout.batch_first(x[index].reshape(-1, *x.shape[2:]))

    caches = tuple(cache._replace(k=rows(cache.k), v=rows(cache.v)) for cache in state.caches)
    return state._replace(tokens=state.tokens[index], caches=caches)


def grow(state: State, length: int) -> State:
    """The state with room for so many positions of the blocks."""
    return state._replace(caches=tuple(_grow(cache, length) for cache in state.caches))


def first_room(cfg: ARConfig) -> int:
    """Tokens of the first cache: few, or all where they come in groups, which it cannot cut."""
    return min(FIRST_LENGTH, cfg.num_tokens) if cfg.group == 1 else cfg.num_tokens


def rooms(first: int, most: int):
    """Tokens that caches have room for, doubling from `first` to `most`."""
    while first < most:
        yield first
        first *= 2
    yield most


def _cast(params, compute: Compute) -> tuple:
    """(parameters in the type of the computation: once, not once per token; that type)."""
    dtype = jnp.dtype(compute.dtype)
    return jax.tree.map(lambda p: p.astype(dtype), params), dtype


def _blocks(params, cfg: ARConfig, compute: Compute, state: State, context) -> Callable:
    """(tokens [n, T] before the positions from `index` on, index, caches) -> (features, caches)."""
    dtype = jnp.dtype(compute.dtype)
    # Unstacked, so that each product reads its matrix where it lies instead of a copied slice.
    layers = [jax.tree.map(lambda p: p[i], params["ar"]["blocks"]) for i in range(cfg.depth)]
    ranks = () if cfg.group == 1 or cfg.folded else cfg.ranks
    block = Block(cfg.blocks, compute, cross=bool(cfg.text_dim), ranks=ranks)
    rows, labels = state.caches[0].k.shape[0], state.labels
    labels = None if labels is None else jnp.tile(labels, rows // len(labels))

    def run(previous, index, caches):
        previous = jnp.repeat(previous, rows // len(previous), axis=0)
        x = ar.fold(params, cfg, ar.embed(params, cfg, dtype, previous, index, labels))
        kept = []
        for layer, cache in zip(layers, caches):
            carry = ((x,), None, jnp.int32(0))
            ((x,), *_), cache = block.apply({"params": layer}, carry, (None, context, cache))
            kept.append(cache)
        return ar.unfold(params, cfg, x), tuple(kept)

    return run


class Branching(NamedTuple):
    """How sequences that begin alike go apart; see `branch`.

    Attributes:
        own: keys [n], of the positions after `split`.
        shared: keys [n], of those up to it: equal for sequences that begin alike.
        rank: int32 [n], which choice a sequence takes at `split`: 0 is the best.
        split: int32 [], a position; before the first one where all are independent.
    """

    own: jax.Array
    shared: jax.Array
    rank: jax.Array
    split: jax.Array


def branch(logits, i, how: Branching, sampling: Sampling, most: int) -> jax.Array:
    """Samples position i: float32 [n, V] -> int32 [n].

    Up to `split` sequences with the same shared key and logits draw the same token, but at `split`
    each takes the choice of its rank among the `most` largest of logits plus Gumbel noise: a draw
    without replacement (Kool et al., arXiv 1903.06059). Where fewer are allowed, ranks begin again.
    """
    together = i <= how.split
    keys = jax.vmap(lambda a, b: jax.random.fold_in(jnp.where(together, a, b), i))(
        how.shared, how.own
    )
    noisy = noisy_logits(logits, keys, sampling)

    def ranked():
        values, ids = jax.lax.top_k(noisy, min(most, logits.shape[1]))
        allowed = jnp.maximum(jnp.sum(jnp.isfinite(values), axis=1), 1)
        return jnp.take_along_axis(ids, (how.rank % allowed)[:, None], axis=1)[:, 0]

    best = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return jax.lax.cond(i == how.split, ranked, lambda: best)


def sample(logits: jax.Array, keys: jax.Array, how: Sampling) -> jax.Array:
    """Samples from softmax(filtered logits / temperature): float32 [B, V], keys [B] -> int32 [B].

    By the maximum of logits plus temperature times Gumbel noise (greedy at 0).
    """
    return jnp.argmax(noisy_logits(logits, keys, how), axis=-1).astype(jnp.int32)


def noisy_logits(logits: jax.Array, keys: jax.Array, how: Sampling) -> jax.Array:
    """Filtered logits plus temperature times Gumbel noise: float32 [B, V]."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return keep_likely(logits, how.temperature, how.top_k, how.top_p) + how.temperature * noise


def keep_likely(logits, temperature, top_k, top_p) -> jax.Array:
    """Logits [B, V] with -inf where top-k, and after it top-p, drop a token.

    Top-p drops a token when the probability of it and of all less likely ones is at most 1 - p.
    Among equals, all are kept.
    """

    def by_count(x):
        return _drop_below(x, jnp.ones_like(x), top_k.astype(jnp.float32))

    def by_probability(x):
        # Greedy choice takes the largest, which no filter drops: any temperature will do.
        p = jax.nn.softmax(x / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
        return _drop_below(x, p, top_p)

    x = jax.lax.cond(top_k > 0, by_count, lambda x: x, logits)
    return jax.lax.cond(top_p > 0, by_probability, lambda x: x, x)


def _drop_below(x, weight, target):
    """-inf for what is below the largest threshold that leaves `target` of the weight.

    The threshold is found bit by bit in an order-preserving map of float32 to uint32: 32 sums over
    the row in place of a sort. [B, V], [B, V], [] -> [B, V].
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def try_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        left = jnp.sum(jnp.where(order >= candidate, weight, 0.0), axis=-1, keepdims=True)
        return jnp.where(left >= target, candidate, threshold)

    start = jnp.zeros((x.shape[0], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, try_bit, start)
    return jnp.where(order >= threshold, x, -jnp.inf)


def guidance_schedule(scale, count: int, length: int) -> np.ndarray:
    """Guidance of each position: float32 [length], of which the first `count` are used.

    Args:
        scale: a number, a callable of the position, or an array over `count` or `length` positions.

    Raises:
        ValueError: an array of another shape, or values that are no finite numbers from 0 on.
    """
    given = [scale(i) for i in range(count)] if callable(scale) else scale
    try:
        values = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    fits = values.shape in ((), (count,), (length,))
    if not fits or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"guidance_scale={scale!r} gives {given!r}: must be a finite number from 0 on, one per "
            f"position ({count} or {length}), or a callable of the position"
        )
    schedule = np.ones(length, np.float32)
    schedule[:count] = values[:count] if values.ndim else values
    return schedule


def sample_keys(key, batch: int) -> jax.Array:
    """One key per sample, [batch].

    Args:
        key: an int or a key, from which sample i gets its i-th; or `batch` of them; None is 0.

    Raises:
        ValueError: another number of keys, or something else.
    """
    key = 0 if key is None else key
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        seeds = np.asarray(key)
        if seeds.dtype == np.uint32 and seeds.shape == (2,):  # jax.random.PRNGKey
            key = jax.random.wrap_key_data(jnp.asarray(seeds))
        elif np.issubdtype(seeds.dtype, np.integer) and seeds.ndim < 2:
            key = jax.vmap(jax.random.key)(seeds) if seeds.ndim else jax.random.key(seeds)
        else:
            raise ValueError(f"key={key!r}: must be a key, an int seed, or one of them per sample")
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"keys of shape {key.shape}: must be one, or {batch}, one per sample")
    return key


def pad_texts(condition: ARCondition, null: ARCondition | None):
    """Both with their texts padded (and masked) to one length, a power of two: few programs."""
    texts = [c.text for c in (condition, null) if c is not None and c.text is not None]
    if not texts:
        return condition, null
    length = 1 << (max(t.shape[1] for t in texts) - 1).bit_length()

    def pad(c):
        if c.text is None:
            return c
        more = ((0, 0), (0, length - c.text.shape[1]))
        return c._replace(text=np.pad(c.text, (*more, (0, 0))), text_mask=np.pad(c.text_mask, more))

    return pad(condition), None if null is None else pad(null)


def repeat(condition: ARCondition, batch: int) -> ARCondition:
    """The condition of one sequence for `batch` of them."""
    return jax.tree.map(lambda a: np.repeat(a, batch, axis=0), condition)


def guided(x: jax.Array, scale) -> jax.Array:
    """Features of conditions and null conditions (see `interleave`): [2B, ...] -> [B, ...].

    The head is linear: guiding the features is guiding the logits, at half the cost.
    """
    x32 = x.astype(jnp.float32).reshape(-1, 2, *x.shape[1:])
    given, null = x32[:, 0], x32[:, 1]
    return (null + scale * (given - null)).astype(x.dtype)


def interleave(a, b):
    """[B, ...] twice -> [2B, ...], pairs side by side: a cut of the batch keeps them together."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def _grow(cache: Cache, length: int) -> Cache:
    """The cache at that length."""
    padding = ((0, 0), (0, 0), (0, length - cache.k.shape[2]), (0, 0))
    return cache._replace(k=jnp.pad(cache.k, padding), v=jnp.pad(cache.v, padding))
