"""Are generated digits the class asked for, and are they new? Real digits are the measure."""

from collections.abc import Callable

import numpy as np

from examples.digits import arrays
from examples.digits.judge import SIDE, judge
from flextok_jax import conditions
from flextok_jax.evaluation.generation import TokenSampling, sample_tokens
from flextok_jax.evaluation.pictures import from_uint8
from flextok_jax.evaluation.reconstruction import (
    Sampler,
    decode,
    default_sampler,
    identity,
    sampler_metadata,
    side,
)
from flextok_jax.generator import ImageGenerator

CLASSES = 10


def evaluate_samples(
    gen: ImageGenerator,
    per_class: int = 10,
    num_tokens: int | None = None,
    how: TokenSampling = TokenSampling(),
    sampler: Sampler | None = None,
    batch_size: int = 100,
    visit: Callable[[np.ndarray, np.ndarray], None] | None = None,
    seed: int = 0,
) -> dict:
    """Draws digits of every class and lets the judge read them.

    Args:
        gen: a generator of 16 x 16 images of ten classes, with its tokenizer.
        per_class: samples of each class; sample i of all has the label i mod 10.
        num_tokens: tokens per sample, L by default.
        sampler: of the decoder, None: the tokenizer's own.
        visit: is given the labels int [n] and images float32 [n, 16, 16, 3] of each batch.

    Returns:
        "model", "tokenizer", the settings, "count"; "recognition", the share taken for the class
        asked for, and "recognition_by_class"; "nearest": see `nearest`.

    Raises:
        ValueError: the generator makes something else.
    """
    if side(gen.tokenizer) != SIDE or gen.config.num_classes != CLASSES:
        raise ValueError(
            f"the digits' judge reads {SIDE} x {SIDE} pixels of {CLASSES} classes; this generator "
            f"makes {side(gen.tokenizer)} x {side(gen.tokenizer)} of {gen.config.num_classes}"
        )
    k = gen.num_tokens if num_tokens is None else num_tokens
    sampler = sampler or default_sampler(gen.tokenizer)
    labels = np.tile(np.arange(CLASSES), per_class)
    found = []
    for first in range(0, len(labels), batch_size):
        places = np.arange(len(labels), dtype=np.uint32)[first : first + batch_size]
        asked = conditions.of_labels(labels[places])
        tokens = sample_tokens(gen, asked, places, k, how, seed, batch_size)
        found.append(decode(gen.tokenizer, tokens, k, places, sampler, seed, batch_size))
        if visit is not None:
            visit(labels[places], found[-1])
    images = np.concatenate(found)
    hits = [judge().recognized(images[labels == c], np.full(per_class, c)) for c in range(CLASSES)]
    return {
        "model": identity(gen),
        "tokenizer": identity(gen.tokenizer),
        **sampler_metadata(sampler, seed),
        **how.metadata(gen),
        "num_tokens": k,
        "count": len(images),
        "recognition": sum(hits) / len(images),
        "recognition_by_class": [hit / per_class for hit in hits],
        "nearest": nearest(images),
    }


def nearest_training(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closest training digit of each image.

    Args:
        images: float [n, 16, 16, 3] in [-1, 1].

    Returns:
        (index int [n] into `arrays("train")`, distance float64 [n]: the root of the mean
        square over pixels, of a range of 2).
    """
    train = _flat(from_uint8(arrays("train")[0]))
    flat = _flat(images)
    squares = (flat**2).sum(1)[:, None] - 2 * flat @ train.T + (train**2).sum(1)[None]
    index = squares.argmin(axis=1)
    exact = np.mean((flat - train[index]) ** 2, axis=1)
    return index, np.sqrt(exact)


def nearest(images: np.ndarray) -> dict:
    """How close images come to the training digits, beside how close real held-out digits come.

    Returns:
        the median distance of "samples" and of "held_out" digits, and "closer": the share of the
        samples that lie closer to a training digit than 95 % of the held-out digits do (5 % of
        real digits do; copies all would).
    """
    _, ours = nearest_training(images)
    _, real = nearest_training(from_uint8(arrays("test")[0]))
    return {
        "samples": float(np.median(ours)),
        "held_out": float(np.median(real)),
        "closer": float(np.mean(ours < np.quantile(real, 0.05))),
    }


def _flat(images):
    return images.reshape(len(images), -1).astype(np.float64)
