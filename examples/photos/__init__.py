"""Eleven photographs that come with scikit-image and scikit-learn; nothing is downloaded.

`python -m examples.photos` prints the path of their folder.

Whole photographs are kept for validation, so that no pixel of a validation image was seen in
training, in whatever crop. The two views of the motorcycle are one scene and lie on the same side.
Every photograph is reduced to a third of its side (Lanczos), because pixels as stored are
interpolated from a sensor's colour mosaic, or compressed, and hold little detail of their own.

Sources and licences: the docstrings of skimage.data, and sklearn/datasets/images/README.txt.
"""

import functools

import numpy as np
from PIL import Image

from examples import image_folder

# Chosen before anything was trained: an animal, a building, a still life.
VALIDATION = ("chelsea", "china", "coffee")
TRAIN = (
    "astronaut",
    "flower",
    "hubble_deep_field",
    "immunohistochemistry",
    "motorcycle_left",
    "motorcycle_right",
    "retina",
    "rocket",
)
TILE = 64


@functools.cache
def photographs() -> dict[str, np.ndarray]:
    """{name: uint8 [H, W, 3]}, all of them, read only."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    left, right, _ = data.stereo_motorcycle()
    found = {"motorcycle_left": left, "motorcycle_right": right}
    found |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    names = TRAIN + VALIDATION
    found |= {name: getattr(data, name)() for name in names if name not in found}
    return {name: _third(found[name]) for name in names}


def tiles() -> dict[str, np.ndarray]:
    """The validation photographs, cut into all whole tiles of a grid from the upper left corner.

    Returns:
        {"NAME/Y_X": uint8 [64, 64, 3]}, where (Y, X) is the tile's first pixel; in order.
    """
    found = {}
    for name in VALIDATION:
        photo = photographs()[name]
        for y in range(0, photo.shape[0] - TILE + 1, TILE):
            for x in range(0, photo.shape[1] - TILE + 1, TILE):
                found[f"{name}/{y:03d}_{x:03d}"] = photo[y : y + TILE, x : x + TILE]
    return found


def folder() -> str:
    """The path of train/NAME/NAME.png, whole, and test/NAME/Y_X.png, tiles."""
    return image_folder("photos", _files)


def _files():
    for name in TRAIN:
        yield f"train/{name}/{name}.png", photographs()[name]
    for name, tile in tiles().items():
        yield f"test/{name}.png", tile


def _third(photo: np.ndarray) -> np.ndarray:
    size = photo.shape[1] // 3, photo.shape[0] // 3
    small = np.array(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
    small.setflags(write=False)
    return small
