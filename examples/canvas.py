"""Pictures of known complexity: one to four handwritten digits in the quarters of a 32x32 canvas.

`python -m examples.canvas` prints the path of their folder.

How much there is to say of a picture is known by construction, and so is a caption. Canvas `index`
of a split is a function of (seed, split, index) alone; its digits are of the same split of
`examples.digits`, so no digit of a test canvas was seen in training.
"""

from typing import NamedTuple

import numpy as np

from examples import digits, image_folder

SPLITS = {"train": 4000, "test": 400}  # Canvases in the folder.
SIDE = 16  # Of a digit, in pixels.
PLACES = "top left", "top right", "bottom left", "bottom right"
CHANNELS = len(digits.WORDS) + len(PLACES)  # Of a caption's embedding.


class Canvas(NamedTuple):
    """One canvas.

    Attributes:
        image: uint8 [32, 32, 3].
        digits: int32 [4], what lies in each of PLACES, -1 for nothing.
    """

    image: np.ndarray
    digits: np.ndarray

    @property
    def count(self) -> int:
        """How many digits there are: 1 to 4, equally often."""
        return int(np.sum(self.digits >= 0))

    @property
    def embedding(self) -> np.ndarray:
        """The caption as float16 [4, CHANNELS]: of each of PLACES its digit; zeros for none."""
        which = np.eye(len(digits.WORDS), dtype=np.float16)[self.digits]
        where = np.eye(len(PLACES), dtype=np.float16)
        return np.concatenate([which, where], axis=1) * (self.digits[:, None] >= 0)

    @property
    def caption(self) -> str:
        """ "a seven top left, a one bottom right"."""
        named = zip(self.digits.tolist(), PLACES)
        words = ((digits.WORDS[digit], place) for digit, place in named if digit >= 0)
        return ", ".join(f"{'an' if w == 'eight' else 'a'} {w} {place}" for w, place in words)


def canvas(split: str, index: int, seed: int = 0) -> Canvas:
    """Canvas `index` of a split, "train" or "test"."""
    random = np.random.default_rng((seed, list(SPLITS).index(split), index))
    images, labels = digits.arrays(split)
    places = random.permutation(len(PLACES))[: 1 + random.integers(len(PLACES))]
    rows = random.integers(len(images), size=len(PLACES))
    image, found = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8), np.full(len(PLACES), -1, np.int32)
    for place, row in zip(places, rows):
        y, x = SIDE * (place // 2), SIDE * (place % 2)
        image[y : y + SIDE, x : x + SIDE] = images[row]
        found[place] = labels[row]
    return Canvas(image, found)


def folder() -> str:
    """The path of {train,test}/N/IIII.png, N its number of digits.

    Beside it lie its caption, IIII.txt, and the caption's embedding, IIII.npy.
    """
    return image_folder("canvas", _files)


def _files():
    for split, count in SPLITS.items():
        for i in range(count):
            made = canvas(split, i)
            path = f"{split}/{made.count}/{i:04d}"
            yield f"{path}.png", made.image
            yield f"{path}.txt", made.caption
            yield f"{path}.npy", made.embedding


if __name__ == "__main__":
    print(folder())
