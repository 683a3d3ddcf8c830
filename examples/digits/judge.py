"""Can reconstructed digits still be read? A classifier trained on real digits is the judge."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from examples.digits import arrays, folder
from flextok_jax.evaluation.pictures import Pictures, from_uint8
from flextok_jax.evaluation.reconstruction import (
    check_counts,
    default_sampler,
    evaluate,
    side,
)
from flextok_jax.tokenizer import FlexTok

SIDE = 16
COUNTS = (1, 2, 4, 8, 16)


class Judge:
    """Logistic regression on the flattened pixels of the 1 500 real training digits, in [-1, 1]."""

    def __init__(self):
        from sklearn.linear_model import LogisticRegression

        images, labels = arrays("train")
        self._model = LogisticRegression(C=0.1, max_iter=2000)
        self._model.fit(_flat(from_uint8(images)), labels)

    def recognized(self, images: np.ndarray, labels: np.ndarray) -> int:
        """How many images [n, 16, 16, 3] in [-1, 1] are taken for what they are."""
        return int(np.sum(self._model.predict(_flat(images)) == labels))


@functools.cache
def judge() -> Judge:
    """Trained once, in about a second."""
    return Judge()


def evaluate_digits(
    tok: FlexTok,
    num_tokens: Sequence[int] | None = COUNTS,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    *,
    norm_guidance: bool = True,
    batch_size: int = 99,
    limit: int | None = None,
    visit: Callable | None = None,
) -> dict:
    """Reconstructs the 297 held-out digits and lets the judge read them.

    Args:
        tok: a tokenizer of 16 x 16 images.
        num_tokens: the numbers of tokens to reconstruct from, None: 1, 2, 4, ..., R.
        steps, guidance, seed, norm_guidance: see `reconstruction.Sampler`; None: the model's own.
        batch_size: changes nothing but speed and memory.
        limit: only the first of the digits.
        visit: see `reconstruction.evaluate`.

    Returns:
        what `reconstruction.evaluate` returns, and "recognition": the share of digits recognised
        by k, "real_recognition": the share of the originals.

    Raises:
        ValueError: the model has another image size, or fewer tokens.
    """
    if side(tok) != SIDE:
        raise ValueError(
            f"the digits' judge reads {SIDE} x {SIDE} pixels; this model makes images of "
            f"{side(tok)} x {side(tok)}: evaluate it on a folder of images"
        )
    counts = check_counts(tok, num_tokens)
    right, real = dict.fromkeys(counts, 0), 0

    def look(batch, drawn):
        nonlocal real
        real += judge().recognized(from_uint8(batch.images), batch.labels)
        for k, images in drawn.items():
            right[k] += judge().recognized(images, batch.labels)
        if visit is not None:
            visit(batch, drawn)

    changes = {"steps": steps, "guidance_scale": guidance, "norm_guidance": norm_guidance}
    sampler = default_sampler(tok, **changes)
    pictures = Pictures(f"{folder()}/test", limit)
    result = evaluate(tok, pictures, counts, sampler, seed, batch_size, look)
    count = result["count"]
    return result | {
        "recognition": {k: hits / count for k, hits in right.items()},
        "real_recognition": real / count,
    }


def _flat(images):
    return images.reshape(len(images), -1)
