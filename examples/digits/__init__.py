"""The 1 797 handwritten digits that come with scikit-learn, as 16 x 16 RGB images.

`python -m examples.digits` prints the path of their folder.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49 (CC BY 4.0); scikit-learn ships its test set.
"""

import functools

import numpy as np

from examples import image_folder

NUM_TRAIN = 1500
WORDS = "zero one two three four five six seven eight nine".split()


def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split.

    The 8 x 8 values 0..16 are enlarged bilinearly with half-pixel centres and clamped edges (at a
    factor of two the weights are exactly 3/4 and 1/4: Pillow's bilinear resize in mode "F") and
    stored as round(value / 16 * 255) in three equal channels.

    Args:
        split: "train", 1500 of a fixed permutation, or "test", the other 297.

    Returns:
        images uint8 [N, 16, 16, 3] and labels int32 [N], read only.

    Raises:
        KeyError: another split.
    """
    return _splits()[split]


def folder(captions: bool = False) -> str:
    """The path of {train,test}/{0..9}/NNNN.png; NNNN is the index in `arrays`.

    With `captions` another one, where NNNN.txt beside an image is one of `captions_of` its digit.
    """
    return (
        image_folder("digits_captions", _captioned) if captions else image_folder("digits", _files)
    )


def captions_of(digit: int) -> list[str]:
    """What a person may call a digit: "7", "seven", "a seven", "the digit seven", …"""
    word = WORDS[digit]
    article = "an" if word == "eight" else "a"
    return [
        str(digit), word, f"{article} {word}", f"the digit {word}", f"the number {digit}",
        f"a handwritten {word}",
    ]  # fmt: skip


@functools.cache
def _splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    target = np.arange(16)
    near = target // 2
    far = np.clip(near + np.where(target % 2, 1, -1), 0, 7)
    weights = 0.75 * np.eye(8)[near] + 0.25 * np.eye(8)[far]
    values = weights @ data.images @ weights.T  # Exact: sixteenths of integers.
    grey = np.rint(values / 16 * 255).astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=-1), data.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(images))
    found = {}
    for split, rows in {"train": order[:NUM_TRAIN], "test": order[NUM_TRAIN:]}.items():
        found[split] = images[rows], labels[rows]
        for array in found[split]:
            array.setflags(write=False)
    return found


def _captioned():
    random = np.random.RandomState(0)
    for path, image in _files():
        yield path, image
        choices = captions_of(int(path.split("/")[1]))
        yield path.removesuffix(".png") + ".txt", choices[random.randint(len(choices))]


def _files():
    for split, (images, labels) in _splits().items():
        for i, (image, label) in enumerate(zip(images, labels)):
            yield f"{split}/{label}/{i:04d}.png", image
