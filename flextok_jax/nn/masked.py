"""Masked generation: some passes, each of which predicts all tokens and keeps the surest ones.

The model is that of nn/ar.py with `ARConfig.masked`: every position reads its own token, or the
start vector where the token is not known, and attends to all others (Chang et al., arXiv
2202.04200). Tokens may have any order.

B batch, L positions, V ids, S passes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import ar, generation
from flextok_jax.nn.ar import SOS, ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.nn.generation import Sampling


def draw(key: jax.Array, batch: int, length: int) -> jax.Array:
    """Which tokens training hides: bool [B, L], at least one of each image.

    Of each image a share arccos(u) / (pi / 2) of its tokens, u uniform in 0..1: the sampler's
    schedule at a random time.
    """
    times, places = jax.random.split(key)
    share = jnp.arccos(jax.random.uniform(times, (batch, 1))) / (jnp.pi / 2)
    count = jnp.maximum(1, jnp.round(share * length))
    return _ranks(jax.random.uniform(places, (batch, length))) < count


def left(unknown: int, passes: int) -> tuple[int, ...]:
    """How many tokens of `unknown` ones are still masked after each pass.

    After pass s of S: unknown arccos(s / S) / (pi / 2), rounded down; each pass fills at least one,
    the last all. More passes than tokens are as many as tokens.
    """
    found, passes = [], min(passes, unknown)
    for i in range(1, passes):
        wanted = math.floor(unknown * math.acos(i / passes) / (math.pi / 2))
        found.append(min(max(wanted, 1), (found[-1] if found else unknown) - 1))
    return (*found, 0)


def generate(
    params,
    cfg: ARConfig,
    compute: Compute,
    condition: ARCondition,
    null: ARCondition | None,
    sampling: Sampling,
    keys: jax.Array,
    known: jax.Array,
    masked: jax.Array,
) -> jax.Array:
    """All tokens.

    Each pass takes argmax(logits + t Gumbel) wherever a token is masked, and masks again those
    whose logit + t Gumbel is smallest. t falls linearly to 0, which it is in the last pass.

    Args:
        condition, null: see `generation.generate`.
        sampling: its temperature is t before the first pass.
        keys: [B]. A sample depends on its own key, not on the rest of the batch.
        known: int32 [B, L], `SOS` where a token is to be found. The others stay.
        masked: int32 [S], how many are masked after each pass; see `left`.

    Returns:
        int32 [B, L]; all of a sample's tokens are -1 where its logits are not finite.
    """
    (rows, length), passes = known.shape, len(masked)
    both = condition if null is None else jax.tree.map(generation.interleave, condition, null)
    weights = ar.head_weights(params, jnp.dtype(compute.dtype))

    def logits(tokens):
        if null is None:
            return ar.head(weights, ar.hidden(params, cfg, compute, tokens, both))
        x = ar.hidden(params, cfg, compute, jnp.repeat(tokens, 2, axis=0), both)
        return ar.head(weights, generation.guided(x, sampling.guidance[None, :, None]))

    def one(carry, item):
        tokens, finite = carry
        i, again = item
        found = logits(tokens)
        how = sampling._replace(temperature=sampling.temperature * (1 - (i + 1) / passes))
        drawn = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i), length + 1))(keys)
        flat = found.reshape(rows * length, -1), drawn[:, 1:].reshape(-1), how
        ids = generation.sample(*flat).reshape(rows, length)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(drawn[:, 0])
        sure = jnp.take_along_axis(found, ids[..., None], axis=-1)[..., 0]
        unknown = tokens == SOS
        sure = jnp.where(unknown, sure + how.temperature * noise, jnp.inf)
        tokens = jnp.where(unknown, ids, tokens)
        tokens = jnp.where(_ranks(sure) < again, SOS, tokens)
        return (tokens, finite & jnp.isfinite(found).all(axis=(1, 2))), None

    start = known, jnp.ones(rows, bool)
    (tokens, finite), _ = jax.lax.scan(one, start, (np.arange(passes), masked))
    return jnp.where(finite[:, None], tokens, -1)


def _ranks(x: jax.Array) -> jax.Array:
    """Of each value its place in ascending order: [B, L] -> int [B, L]."""
    return jnp.argsort(jnp.argsort(x, axis=1), axis=1)
