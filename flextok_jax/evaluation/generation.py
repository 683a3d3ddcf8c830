"""Conditions to tokens, in batches."""

import jax
import numpy as np

from flextok_jax.conditions import Conditions
from flextok_jax.evaluation.reconstruction import padded
from flextok_jax.generator import ImageGenerator


def sample_tokens(
    gen: ImageGenerator,
    conditions: Conditions,
    seeds: np.ndarray,
    num_tokens: int,
    how: dict,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Tokens of one batch of samples: int32 [n, num_tokens].

    Args:
        conditions: n of them.
        seeds: uint32 [n], one per sample: it depends on `seed` and its own, not on the batches.
        how: arguments of `ImageGenerator.generate_tokens`: guidance_scale, temperature, ...
        batch_size: the number of samples it is run as, n or more.
    """
    key = jax.random.key(seed)
    keys = jax.vmap(lambda one: jax.random.fold_in(key, one))(padded(seeds, batch_size))
    conditions = conditions.take(padded(np.arange(len(conditions)), batch_size))
    tokens = gen.generate_tokens(conditions=conditions, num_tokens=num_tokens, key=keys, **how)
    return np.asarray(tokens)[: len(seeds)]
