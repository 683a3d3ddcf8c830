"""Worn pages and what was written on them: pairs of images for image-to-image models.

`python -m examples.paper` prints the path of their folder.

A page is a grid of handwritten digits in ink. The worn page has low-frequency stains, the writing
of its back, mirrored, showing through, a blurred scan and noise; the clean one is black ink on
white. Pair `index` of a split is a function of (seed, split, index) and of the arguments alone; its
digits are of the same split of `examples.digits`.
"""

from typing import NamedTuple

import numpy as np

from examples import digits, image_folder

SPLITS = {"train": 2000, "test": 200}  # Pairs in the folder.
SIDE = 16  # Of a digit, in pixels.
INK = 0.5  # The clean page is black where a digit covers more than this share of a pixel.


class Pair(NamedTuple):
    """A worn page and the clean one, uint8 [size, size, 3] of equal channels each."""

    worn: np.ndarray
    clean: np.ndarray


def pair(split: str, index: int, seed: int = 0, size: int = 32, wear: float = 1.0) -> Pair:
    """Pair `index` of a split, "train" or "test".

    Args:
        split, index, seed: which.
        size: side in pixels, a multiple of 16.
        wear: how strong stains, the back's writing, blur and noise are; 0 is a clean scan.

    Raises:
        ValueError: another size.
    """
    if size < SIDE or size % SIDE:
        raise ValueError(f"size={size}: must be a multiple of {SIDE}, the side of a digit")
    random = np.random.default_rng((seed, list(SPLITS).index(split), index))
    images = digits.arrays(split)[0]
    front, back = (_page(images, random, size) for _ in range(2))
    stains = _smooth(random.uniform(0, 1, (5, 5)), size)
    ink, through, shade = random.uniform((0.5, 0.2, 0.2), (0.9, 0.45, 0.5))
    noise = random.normal(0, 0.03, (size, size))
    light = (1 - ink * front) * (1 - wear * through * _blur(_blur(back[:, ::-1])))
    light = light * (1 - wear * shade * stains)
    worn = (1 - wear) * light + wear * _blur(light) + wear * noise
    return Pair(_rgb(worn), _rgb(front <= INK))


def folder() -> str:
    """The path of {train,test}/IIII.png, 64 x 32 pixels: worn left, clean right."""
    return image_folder("paper", _files)


def f_measure(found: np.ndarray, clean: np.ndarray) -> float:
    """2 P R / (P + R) of ink, with its precision P and its recall R; 0 where no ink is right.

    Args:
        found: bool [..., H, W, 3] or [..., H, W], True for paper, False for ink.
        clean: the same of the clean page.
    """
    found, clean = np.asarray(found, bool), np.asarray(clean, bool)
    right = np.sum(~found & ~clean)
    return 2.0 * right / max(1, np.sum(~found) + np.sum(~clean))


def _page(images, random, size: int) -> np.ndarray:
    """The share of ink in each pixel, float64 [size, size] from 0 to 1."""
    cells = size // SIDE
    rows = random.integers(len(images), size=(cells, cells))
    grid = images[rows][..., 0] / 255  # [cells, cells, 16, 16]
    return grid.swapaxes(1, 2).reshape(size, size)


def _smooth(grid: np.ndarray, size: int) -> np.ndarray:
    """A square grid of values, interpolated linearly to size x size."""
    last = len(grid) - 1
    at = np.linspace(0, last, size)[:, None]
    weights = np.maximum(0, 1 - np.abs(at - np.arange(last + 1)))
    return weights @ grid @ weights.T


def _blur(x: np.ndarray) -> np.ndarray:
    """(1, 2, 1) / 4 along both axes; edges are repeated."""
    for _ in range(2):
        padded = np.pad(x, ((1, 1), (0, 0)), "edge")
        x = ((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4).T
    return x


def _rgb(x: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 -> uint8 [H, W, 3]."""
    grey = np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _files():
    for split, count in SPLITS.items():
        for i in range(count):
            yield f"{split}/{i:04d}.png", np.concatenate(pair(split, i), axis=1)


if __name__ == "__main__":
    print(folder())
