"""Coarse ids in order, then all ids at once (Guo et al., arXiv 2503.16194).

FSQ ids that differ little in each level are neighbours, so a coarse id is a cell of the grid of
levels, and nothing has to be clustered. The AR model (nn/ar.py) predicts coarse ids. The refiner, a
second Transformer under "refiner", reads all of them, every position attending to all, and
predicts the ids within their cells.

B batch, L positions, V ids, M coarse ids, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import ar, generation
from flextok_jax.nn.ar import SOS, ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.nn.generation import Sampling


def cells(cfg: ARConfig) -> np.ndarray:
    """The coarse id of each id: int32 [V]. Both have the first level vary fastest (nn/fsq.py)."""
    digits = np.unravel_index(np.arange(cfg.vocab_size), cfg.levels, order="F")
    merged = [digit // size for digit, size in zip(digits, cfg.coarse)]
    counts = [-(-n // size) for n, size in zip(cfg.levels, cfg.coarse)]
    return np.ravel_multi_index(merged, counts, order="F").astype(np.int32)


def hidden(params, cfg: ARConfig, compute: Compute, tokens, condition: ARCondition) -> jax.Array:
    """What `head` reads of teacher-forced ids, [B, T, 2D]: coarse features, then the refiner's.

    Args:
        tokens: int32 [B, T], ids; T = L, as the refiner reads all coarse ids.
    """
    coarse = jnp.asarray(cells(cfg))[tokens]
    first = ar.hidden(params, cfg, compute, coarse, condition)
    return jnp.concatenate([first, _refined(params, cfg, compute, coarse, condition)], axis=-1)


def _refined(params, cfg: ARConfig, compute: Compute, coarse, condition: ARCondition) -> jax.Array:
    """The refiner's features [B, L, D] of coarse ids int32 [B, L]."""
    params, dtype = {"ar": params["ar"]["refiner"]}, jnp.dtype(compute.dtype)
    # The start vector, with the class, is a part of every position: no id is hidden here.
    x = ar.embed(params, cfg.refiner, jnp.float32, jnp.full_like(coarse, SOS), 0, condition.labels)
    x = (x + params["ar"]["embed"][coarse]).astype(dtype)
    return ar.through(params, cfg.refiner, compute, x, condition)


def head_weights(params, dtype) -> tuple[jax.Array, jax.Array]:
    """The matrices of both heads in the compute type: [D, M] and [D, V]."""
    return ar.head_weights(params, dtype), ar.head_weights({"ar": params["ar"]["refiner"]}, dtype)


def head(cfg: ARConfig, weights, features: jax.Array) -> jax.Array:
    """Features [..., 2D] -> float32 [..., V], normalised: log p(coarse id) + log p(id | coarse id).

    The second term is the refiner's softmax within each cell.
    """
    first, second = (ar.head(w, x) for w, x in zip(weights, jnp.split(features, 2, axis=-1)))
    cell = jnp.asarray(cells(cfg))
    shape = (*second.shape[:-1], cfg.num_ids)
    highest = jnp.full(shape, -jnp.inf).at[..., cell].max(jax.lax.stop_gradient(second))
    sums = jnp.zeros(shape).at[..., cell].add(jnp.exp(second - highest[..., cell]))
    within = second - (highest + jnp.log(sums))[..., cell]
    return jax.nn.log_softmax(first)[..., cell] + within


def logits(params, cfg: ARConfig, compute: Compute, tokens, condition: ARCondition) -> jax.Array:
    """log p of every id, float32 [B, L, V], whose entries at `tokens` add up to their log p."""
    features = hidden(params, cfg, compute, tokens, condition)
    return head(cfg, head_weights(params, features.dtype), features)


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
) -> jax.Array:
    """All tokens, of which the `start` first ones are those of the prefix.

    Arguments as of `generation.generate`; a sample's ids are drawn within the cells of its coarse
    ids, with the same guidance, temperature and filters.

    Returns:
        int32 [B, L]; -1 where logits are not finite.
    """
    cell, dtype, length = jnp.asarray(cells(cfg)), jnp.dtype(compute.dtype), cfg.num_tokens
    given = condition, null, sampling, keys, cell[prefix], start, jnp.int32(length)
    coarse = generation.generate(params, cfg, compute, *given)
    both, read = condition, jnp.maximum(coarse, 0)
    if null is not None:
        both = jax.tree.map(generation.interleave, condition, null)
        read = jnp.repeat(read, 2, axis=0)
    x = _refined(params, cfg, compute, read, both)
    if null is not None:
        x = generation.guided(x, sampling.guidance[None, :, None])
    weights = head_weights(params, dtype)[1]

    def drawn(item):
        x, coarse, i = item  # [B, D], [B], of position i
        found = ar.head(weights, x)
        fits = jnp.isfinite(found).all(axis=-1) & (coarse >= 0)
        found = jnp.where(cell[None] == coarse[:, None], found, -jnp.inf)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, length + i)  # Others than coarse ids'.
        return jnp.where(fits, generation.sample(found, own, sampling), -1)

    items = x.swapaxes(0, 1), coarse.swapaxes(0, 1), jnp.arange(length)
    tokens = jax.lax.map(drawn, items).swapaxes(0, 1)
    padded = jnp.pad(prefix, ((0, 0), (0, length - prefix.shape[1])))
    return jnp.where(jnp.arange(length)[None] < start, padded, tokens)
