"""Real RGB photographs that come with scikit-image and scikit-learn: nothing is downloaded.

Whole photographs are held out, so that no pixel of a test image was seen in training, in whatever
crop. The two views of the motorcycle are one scene and lie on the same side. Every photograph is
reduced to a third of its side (Lanczos), because pixels as stored are interpolated from a sensor's
colour mosaic, or compressed, and hold little detail of their own.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image

# Chosen before anything was trained: an animal, a building, a still life.
HELD_OUT = ("chelsea", "china", "coffee")
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
SPLITS = {"train": TRAIN, "test": HELD_OUT, "all": TRAIN + HELD_OUT}


@dataclasses.dataclass(frozen=True, eq=False)
class PhotoSource:
    """Photographs, or square tiles of them.

    Attributes:
        images: uint8 [H, W, 3] each.
        labels: int each, the photograph's index in TRAIN + HELD_OUT.
        names: of each, such as "coffee" or "coffee[64:128, 0:64]".
    """

    images: tuple[np.ndarray, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    classes = SPLITS["all"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": self.labels[index], "caption": None}

    def embedding(self, index: int) -> None:
        return None

    def name(self, index: int) -> str:
        return f"photos/{self.names[index]}"


def photos(split: str, size: int) -> PhotoSource:
    """The photographs of a split.

    Args:
        split: "train": whole photographs, for random crops; "test": the held-out photographs, and
            "all": every one, cut into all whole tiles of a regular grid from the upper left corner,
            pixels as they are.
        size: side of a tile; 0: whole photographs in every split.

    Raises:
        ValueError: an unknown split, or a photograph smaller than a tile.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the photographs have {', '.join(SPLITS)}.")
    images, labels, names = [], [], []
    for name in SPLITS[split]:
        photo, label = _photographs()[name], SPLITS["all"].index(name)
        if size > min(photo.shape[:2]):
            raise ValueError(
                f"data.image_size is {size}, and the photograph {name!r} is "
                f"{photo.shape[1]} x {photo.shape[0]} pixels: choose a smaller size."
            )
        whole = split == "train" or not size
        cut = {name: photo} if whole else _tiles(name, photo, size)
        images += cut.values()
        names += cut.keys()
        labels += [label] * len(cut)
    return PhotoSource(tuple(images), tuple(labels), tuple(names))


def _tiles(name: str, photo: np.ndarray, size: int) -> dict[str, np.ndarray]:
    rows, columns = (range(0, side - size + 1, size) for side in photo.shape[:2])
    return {
        f"{name}[{y}:{y + size}, {x}:{x + size}]": photo[y : y + size, x : x + size]
        for y in rows
        for x in columns
    }


@functools.cache
def _photographs() -> dict[str, np.ndarray]:
    """Name -> uint8 [H, W, 3], read only."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    left, right, _ = data.stereo_motorcycle()
    found = {"motorcycle_left": left, "motorcycle_right": right}
    found |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    found |= {name: getattr(data, name)() for name in SPLITS["all"] if name not in found}
    return {name: _third(photo) for name, photo in found.items()}


def _third(photo: np.ndarray) -> np.ndarray:
    """A third of each side, read only."""
    size = photo.shape[1] // 3, photo.shape[0] // 3
    small = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
    small.setflags(write=False)
    return small
