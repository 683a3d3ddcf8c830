"""Conditions to tokens, in batches."""

import dataclasses

import jax
import numpy as np

from flextok_jax.conditions import Conditions
from flextok_jax.evaluation.reconstruction import padded
from flextok_jax.generator import ImageGenerator


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How tokens are sampled; see `ImageGenerator.generate_tokens`.

    Attributes:
        guidance: the scale, None: the model's own default.
        temperature: 0 is greedy.
        top_k, top_p: filters, 0 is off.
    """

    guidance: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def metadata(self, gen: ImageGenerator) -> dict:
        """What tokens were sampled with, for files and settings."""
        scale = gen.config.guidance_scale if self.guidance is None else self.guidance
        return {
            "token_guidance": scale,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def sample_tokens(
    gen: ImageGenerator,
    conditions: Conditions,
    seeds: np.ndarray,
    num_tokens: int,
    how: TokenSampling,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Tokens of one batch of samples: int32 [n, num_tokens].

    Args:
        conditions: n of them.
        seeds: uint32 [n], one per sample: it depends on `seed` and its own, not on the batches.
        batch_size: the number of samples it is run as, n or more.
    """
    key = jax.random.key(seed)
    keys = jax.vmap(lambda one: jax.random.fold_in(key, one))(padded(seeds, batch_size))
    tokens = gen.generate_tokens(
        conditions=conditions.take(padded(np.arange(len(conditions)), batch_size)),
        num_tokens=num_tokens,
        guidance_scale=how.guidance,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        key=keys,
    )
    return np.asarray(tokens)[: len(conditions)]
