"""Tokenizers and generators of the digits, measured through the public interface.

    python -m examples.digits.evaluation demo-digits demo-digits-ar

prints the numbers in docs and model pages: reconstructions of the 297 validation digits, and 1 000
generated digits.
"""

import argparse
import dataclasses
import json

import numpy as np

from examples.digits import WORDS, arrays
from examples.digits.classifier import CLASSES, correct
from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.evaluation.metrics import psnr
from flextok_jax.nn.images import to_float, to_uint8

COUNTS = (1, 2, 4, 8, 16)
BATCH = 99  # A third of the validation digits.


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstructions:
    """The validation digits from their first k tokens.

    Attributes:
        images: {k: uint8 [297, 16, 16, 3]}.
        psnr: {k: dB, the mean over images}.
        correct: {k: how many are classified as their class}.
        ids: how many different ids occur at each position.
    """

    images: dict[int, np.ndarray]
    psnr: dict[int, float]
    correct: dict[int, int]
    ids: list[int]


def reconstruct(tok: FlexTok, counts=COUNTS, **sampling) -> Reconstructions:
    """Tokenizes the validation digits and decodes their first k tokens, for each k of `counts`.

    Args:
        tok: a tokenizer of 16 x 16 images with 16 tokens.
        sampling: arguments of `FlexTok.detokenize`. The noise is that of key 0 in every batch.
    """
    originals, labels = arrays("test")
    parts = [originals[i : i + BATCH] for i in range(0, len(originals), BATCH)]
    tokens = [tok.tokenize(part) for part in parts]
    images = {
        k: to_uint8(np.concatenate([tok.detokenize(t, k, key=0, **sampling) for t in tokens]))
        for k in counts
    }
    return Reconstructions(
        images,
        {k: float(np.mean(psnr(to_float(x), to_float(originals)))) for k, x in images.items()},
        {k: int(correct(x, labels).sum()) for k, x in images.items()},
        [len(np.unique(column)) for column in np.concatenate(tokens).T],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Generated digits.

    Attributes:
        images: uint8 [10, n, 16, 16, 3], by class.
        correct: int [10], how many of each class are classified as it.
        nearest: uint8 [10, 16, 16, 3], the training digit closest to the first of each class.
        distance: median distance of the samples to the closest training digit, and
        validation_distance: of the validation digits.
        closer: share of the samples that are closer to a training digit than 95 % of the validation
            digits are. New digits: about 0.05; copies: 1.
    """

    images: np.ndarray
    correct: np.ndarray
    nearest: np.ndarray
    distance: float
    validation_distance: float
    closer: float


def sample(gen: ImageGenerator, per_class: int, **sampling) -> Samples:
    """Generates digits of every class.

    Args:
        gen: a generator of ten classes, or by text, with its tokenizer.
        sampling: arguments of `ImageGenerator.generate`. The key of batch i is i.
    """
    sampling |= wanted(gen, list(range(CLASSES)) * 10)
    rounds = [gen.generate(key=i, **sampling) for i in range(-(-per_class // 10))]
    images = to_uint8(np.concatenate(rounds)).reshape(-1, CLASSES, 16, 16, 3).swapaxes(0, 1)
    images = images[:, :per_class]
    hits = [int(correct(x, np.full(per_class, c)).sum()) for c, x in enumerate(images)]
    _, ours = nearest_training(images.reshape(-1, 16, 16, 3))
    _, real = nearest_training(arrays("test")[0])
    rows, _ = nearest_training(images[:, 0])
    return Samples(
        images,
        np.array(hits),
        arrays("train")[0][rows],
        float(np.median(ours)),
        float(np.median(real)),
        float(np.mean(ours < np.quantile(real, 0.05))),
    )


def wanted(gen: ImageGenerator, labels: list[int]) -> dict:
    """The argument that asks for these digits."""
    if gen.config.text_dim:
        return {"text": [f"the digit {WORDS[label]}" for label in labels]}
    return {"labels": labels}


def nearest_training(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closest training digit of each image.

    Args:
        images: uint8 [n, 16, 16, 3].

    Returns:
        (index int [n] into `arrays("train")`, distance float64 [n]: the root of the mean square
        over pixels in [-1, 1]).
    """
    train = to_float(arrays("train")[0]).reshape(-1, 768).astype(np.float64)
    flat = to_float(images).reshape(-1, 768).astype(np.float64)
    index = ((train**2).sum(1) - 2 * flat @ train.T).argmin(axis=1)
    return index, np.sqrt(np.mean((flat - train[index]) ** 2, axis=1))


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="of the digits: a workdir, a folder, or demo-digits")
    parser.add_argument("generator", help="of its tokens, such as demo-digits-ar")
    parser.add_argument("--per-class", type=int, default=100, help="samples of each class (100)")
    args = parser.parse_args()
    tok = FlexTok.from_pretrained(args.tokenizer)
    found = reconstruct(tok)
    made = sample(ImageGenerator.from_pretrained(args.generator, tokenizer=tok), args.per_class)
    originals = int(correct(*arrays("test")).sum())
    numbers = {
        "validation digits": len(arrays("test")[1]),
        "correct, originals": originals,
        "correct": found.correct,
        "psnr": {k: round(value, 2) for k, value in found.psnr.items()},
        "ids": found.ids,
        "samples of each class": args.per_class,
        "correct samples of each class": made.correct.tolist(),
        "correct samples": int(made.correct.sum()),
        "distance": round(made.distance, 3),
        "distance of validation digits": round(made.validation_distance, 3),
        "closer": round(made.closer, 3),
    }
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
