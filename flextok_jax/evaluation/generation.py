"""Conditions to tokens to images, over lists of labels of any length."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from flextok_jax.evaluation.reconstruction import Sampling, draw, padded
from flextok_jax.generator import ImageGenerator


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How tokens are drawn; see `ImageGenerator.generate_tokens`.

    Attributes:
        guidance: the scale, None: the model's own default.
        temperature: 0 is greedy.
        top_k, top_p: filters, 0 is off.
    """

    guidance: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def about(self, gen: ImageGenerator) -> dict:
        """What is used, in words for a file."""
        scale = gen.config.guidance_scale if self.guidance is None else self.guidance
        return {
            "token_guidance": scale,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def generate(
    gen: ImageGenerator,
    labels: np.ndarray,
    seeds: np.ndarray,
    counts: Sequence[int],
    how: TokenSampling,
    sampling: Sampling,
    batch_size: int,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """One batch of class-conditional samples, coarse to fine.

    Args:
        labels: int [n].
        seeds: uint32 [n], of the samples: a sample depends on `sampling.seed` and its own, not on
            the size of the batches.
        counts: numbers of tokens to draw images from.
        batch_size: the number of samples it is run as, n or more.

    Returns:
        (tokens int32 [n, K], K the largest count; {k: float32 [n, S, S, 3] in [-1, 1]}).
    """
    tokens = sample_tokens(gen, labels, seeds, max(counts), how, sampling.seed, batch_size)
    images = {
        k: draw(gen.tokenizer, tokens, k, seeds, sampling, batch_size) for k in sorted(counts)
    }
    return tokens, images


def sample_tokens(
    gen: ImageGenerator,
    labels: np.ndarray,
    seeds: np.ndarray,
    num_tokens: int,
    how: TokenSampling,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """The tokens of one batch of samples; see `generate`: int32 [n, num_tokens]."""
    key = jax.random.key(seed)
    keys = jax.vmap(lambda one: jax.random.fold_in(key, one))(padded(seeds, batch_size))
    tokens = gen.generate_tokens(
        padded(labels, batch_size),
        num_tokens=num_tokens,
        guidance_scale=how.guidance,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        key=keys,
    )
    return np.asarray(tokens)[: len(labels)]
