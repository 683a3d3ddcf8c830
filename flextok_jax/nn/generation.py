"""Generation: tokens one after the other, with a cache (docs/reference.md, AR models).

Each position costs one pass of the blocks over one token per sequence, and the head on that one.
The cache grows by doubling, so attention costs in proportion to the positions that are filled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import ar
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.block import Block, Cache
from flextok_jax.nn.config import ARConfig, Compute

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
    dtype = jnp.dtype(compute.dtype)
    batch, given = prefix.shape
    params = jax.tree.map(lambda p: p.astype(dtype), params)  # Once, not once per token.
    stacked, weights = params["ar"]["blocks"], ar.head_weights(params, dtype)
    # Unstacked, so that each product reads its matrix where it lies instead of a copied slice.
    layers = [jax.tree.map(lambda p: p[i], stacked) for i in range(cfg.depth)]
    branches = 1 if null is None else 2
    both = condition if null is None else jax.tree.map(_interleave, condition, null)
    context = ar.context(params, cfg, dtype, both)

    def blocks(previous, index, context, caches):
        """Tokens [B, T] before the positions from `index` on -> features [B', T, D], caches."""
        previous = jnp.repeat(previous, branches, axis=0)
        x = ar.embed(params, cfg, dtype, previous, index, both.labels)
        kept = []
        block = Block(cfg.blocks, compute, cross=bool(cfg.text_dim))
        for layer, cache in zip(layers, caches):
            carry = ((x,), None, jnp.int32(0))
            ((x,), *_), cache = block.apply({"params": layer}, carry, (None, context, cache))
            kept.append(cache)
        return x, tuple(kept)

    shape = (batch * branches, cfg.num_heads, max(given, min(FIRST_LENGTH, cfg.num_tokens)))
    empty = jnp.zeros((*shape, cfg.head_dim), dtype)
    caches = (Cache(empty, empty, None, jnp.int32(0)),) * cfg.depth
    tokens = jnp.pad(prefix, ((0, 0), (0, cfg.num_tokens - given)))
    if given or cfg.text_dim:  # The text's keys and values are computed here, once.
        previous = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=ar.SOS)[:, : max(given, 1)]
        _, caches = blocks(previous, 0, context, caches)
        caches = tuple(cache._replace(index=start) for cache in caches)
        context = None if context is None else (None, context[1])

    def step(i, state):
        tokens, caches = state
        before = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(i - 1, 0), 1, axis=1)
        x, caches = blocks(jnp.where(i == 0, ar.SOS, before), i, context, caches)
        x = ar.final_norm(params, cfg, x[:, 0])
        if null is not None:
            # The head is linear: guiding the features is guiding the logits, at half the cost.
            x, other = jnp.moveaxis(x.astype(jnp.float32).reshape(batch, 2, -1), 1, 0)
            x = (other + sampling.guidance[i] * (x - other)).astype(dtype)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        logits = ar.head(weights, x)
        token = sample(logits, step_keys, sampling)
        token = jnp.where(jnp.isfinite(logits).all(axis=-1), token, -1)
        return jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1), caches

    for length in _lengths(shape[2], cfg.num_tokens):
        caches = tuple(_grow(cache, length) for cache in caches)
        first = jnp.minimum(start, length)
        last = jnp.minimum(stop, length)
        tokens, caches = jax.lax.fori_loop(first, last, step, (tokens, caches))
        start = jnp.maximum(first, last)
    return tokens


def sample(logits: jax.Array, keys: jax.Array, how: Sampling) -> jax.Array:
    """Samples from softmax(filtered logits / temperature): float32 [B, V], keys [B] -> int32 [B].

    By the maximum of logits plus temperature times Gumbel noise (greedy at 0).
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    kept = keep_likely(logits, how.temperature, how.top_k, how.top_p)
    return jnp.argmax(kept + how.temperature * noise, axis=-1).astype(jnp.int32)


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
        ValueError: an array of another shape, or values that are no finite numbers.
    """
    given = [scale(i) for i in range(count)] if callable(scale) else scale
    try:
        values = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if values.shape not in ((), (count,), (length,)) or not np.isfinite(values).all():
        raise ValueError(
            f"guidance_scale={scale!r} gives {given!r}: must be a finite number, one per position "
            f"({count} or {length}), or a callable of the position"
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
        more = ((0, 0), (0, length - c.text.shape[1]))
        return c._replace(text=np.pad(c.text, (*more, (0, 0))), text_mask=np.pad(c.text_mask, more))

    return pad(condition), None if null is None else pad(null)


def repeat(condition: ARCondition, batch: int) -> ARCondition:
    """The condition of one sequence for `batch` of them."""
    return jax.tree.map(lambda a: np.repeat(a, batch, axis=0), condition)


def _interleave(a, b):
    """[B, ...] twice -> [2B, ...], pairs side by side: a cut of the batch keeps them together."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def _lengths(first: int, most: int):
    """Sizes of the cache, doubling from `first` to `most`."""
    while first < most:
        yield first
        first *= 2
    yield most


def _grow(cache: Cache, length: int) -> Cache:
    """The cache at that length."""
    padding = ((0, 0), (0, 0), (0, length - cache.k.shape[2]), (0, 0))
    return cache._replace(k=jnp.pad(cache.k, padding), v=jnp.pad(cache.v, padding))
