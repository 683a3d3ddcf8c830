"""Random-access image sources, all of one schema.

A source has `len(source)`, `source.classes` (names of the labels, empty where they have none),
`source.name(i)`, the key of example i: unique, and the words by which a warning names it, and

    source[i] -> {"image": bytes of an image file, or uint8 [H, W, 3],
                  "label": int, -1 unknown,
                  "caption": str, or None}

`source.embedding(i)` is float [T, E] of the caption, or None; apart, because few want it and it is
large. Bytes become RGB by `decode.decode_image`.

A config names a source by its keys data.source, .path, .name, .split; a command by one text, which
`parse` reads.
"""

import dataclasses
import pathlib

import numpy as np

from flextok_jax.data.folder import IMAGE_SUFFIXES, FolderSource, check_split
from flextok_jax.data.photos import photos
from flextok_jax.data.records import NULL_TEXT

IN_MEMORY = ("digits", "photos")
ENCODED = ("tokens", "encoded")  # Not images any more; see `encoded`.
SOURCES = (*IN_MEMORY, "folder", "tfds", "webdataset", "array_record", *ENCODED)
NUM_DIGITS, NUM_TRAIN_DIGITS = 1797, 1500


@dataclasses.dataclass(frozen=True)
class Data:
    """What a text names: the keys of a config's `data` that `make_source` reads.

    Attributes:
        source: one of SOURCES.
        path: a folder; "" for "digits" and "photos".
        name: of a TFDS data set.
        image_size: of the tiles that held-out photographs are cut into; 0: whole ones.
    """

    source: str
    path: str = ""
    name: str = ""
    image_size: int = 0

    def __str__(self) -> str:
        if self.source in IN_MEMORY:
            return self.source
        return f"{self.source}:{self.name}{'@' if self.name else ''}{self.path}"


def parse(text: str, image_size: int = 0) -> Data:
    """The data that a command's argument names.

    Args:
        text: "digits", "photos", KIND:PATH with a kind of SOURCES, "tfds:NAME@DIR" (NAME may be
            NAME/CONFIG:VERSION), or PATH alone, whose kind is seen from what lies there: shards
            with a manifest, tar files, or else image files.
        image_size: see `Data`.

    Raises:
        ValueError: "tfds:" without a name or a folder, a manifest of another format, or tar files
            beside image files.
    """
    if text in IN_MEMORY:
        return Data(text, image_size=image_size)
    kind, colon, rest = text.partition(":")
    if not colon or kind not in SOURCES or kind in IN_MEMORY:
        path = pathlib.Path(text).expanduser()
        return Data(_kind(path), _absolute(path))
    if kind == "tfds":
        name, _, path = rest.partition("@")
        if not (name and path):
            raise ValueError(f"{text!r}: a TFDS data set is named tfds:NAME@DIR, DIR its data_dir")
        return Data(kind, _absolute(path), name)
    return Data(kind, _absolute(rest))


def _absolute(path) -> str:
    return str(pathlib.Path(path).expanduser().resolve())


def _kind(path: pathlib.Path) -> str:
    from flextok_jax.data.shards import manifests, open_manifest

    for file in manifests(path):
        arrays = open_manifest(file)["arrays"]
        if "image" in arrays:
            return "array_record"
        return "encoded" if "moments" in arrays else "tokens"
    if path.suffix == ".tar":
        return "webdataset"
    tar = next(path.glob("*.tar"), next(path.glob("*/*.tar"), None))
    if tar is None:
        return "folder"
    inside = (file.relative_to(path).as_posix() for file in path.rglob("*"))
    for name in inside:
        if name.lower().endswith(IMAGE_SUFFIXES) and "/." not in f"/{name}":
            raise ValueError(
                f"{path} holds both tar files ({tar.relative_to(path)}) and image files ({name}): "
                f"say webdataset:{path} or folder:{path}"
            )
    return "webdataset"


def make_source(cfg, split: str):
    """The source that `cfg.source` names, restricted to `split`.

    Args:
        cfg: the `data` part of a config, or `Data`: `source`, `path` (but for "digits" and
            "photos"), `name` ("tfds"), `image_size` ("photos").
        split: "train", "test" or "all"; for "tfds" any TFDS split, such as "train[:10%]".

    Raises:
        ValueError, FileNotFoundError: what is wrong with the config or the data, and the remedy.
    """
    if cfg.source == "digits":
        return digits(split)
    if cfg.source == "photos":
        return photos(split, cfg.image_size)
    if cfg.source not in SOURCES:
        raise ValueError(f"data.source is {cfg.source!r}; allowed are {', '.join(SOURCES)}.")
    if not cfg.path:
        raise ValueError(
            f"data.source={cfg.source!r} needs a folder: pass --config.data.path=FOLDER."
        )
    if cfg.source == "folder":
        return FolderSource(cfg.path, split)
    if cfg.source == "webdataset":
        from flextok_jax.data.webdataset import WebDatasetSource

        return WebDatasetSource(cfg.path, split)
    if cfg.source == "tfds":
        from flextok_jax.data.tfds_source import TfdsSource

        return TfdsSource(cfg.name, split, cfg.path)
    from flextok_jax.data import shards

    if cfg.source == "array_record":
        return shards.ImageSource(cfg.path, split)
    return shards.ShardSource(cfg.path, split)


def make_image_source(data: Data, split: str):
    """`make_source`, of data that hold images.

    Raises:
        ValueError: as `check_images` and `make_source`.
    """
    check_images(data)
    return make_source(data, split)


def check_images(data: Data) -> None:
    """Raises ValueError for what `flextok encode` made of images."""
    if data.source in ENCODED:
        raise ValueError(
            f"{data.path} holds what `flextok encode` made of images, and the images no more: name "
            "the data set that it was made of (`flextok data check` tells which)"
        )


def null_text(cfg) -> np.ndarray | None:
    """float [T, E]: the embedding of the empty caption, of data with text embeddings."""
    path = pathlib.Path(cfg.path).expanduser() / NULL_TEXT
    return np.load(path, allow_pickle=False) if cfg.path and path.is_file() else None


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A small data set held in memory.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int32 [N].
        title: what warnings call it.
    """

    images: np.ndarray
    labels: np.ndarray
    title: str
    classes = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index]), "caption": None}

    def embedding(self, index: int) -> None:
        return None

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def digits_images() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 handwritten digits of scikit-learn, 8x8 scaled bilinearly to 16x16.

    Values 0..16 are interpolated in float with half-pixel centres and clamped edges (at a factor of
    two the weights are exactly 3/4 and 1/4: the result of Pillow's bilinear resize in mode "F"),
    then stored as round(value / 16 * 255) in three equal channels.

    Returns:
        images uint8 [1797, 16, 16, 3] and labels int32 [1797].
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    target = np.arange(16)
    near = target // 2
    far = np.clip(near + np.where(target % 2, 1, -1), 0, 7)
    weights = 0.75 * np.eye(8)[near] + 0.25 * np.eye(8)[far]
    values = weights @ data.images @ weights.T  # Exact: sixteenths of integers.
    grey = np.rint(values / 16 * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), data.target.astype(np.int32)


def digits(split: str) -> ArraySource:
    """The digits, split: 1500 of a fixed permutation to train, the other 297 to test."""
    check_split(split, "the digits have")
    order = np.random.RandomState(0).permutation(NUM_DIGITS)
    parts = {"train": order[:NUM_TRAIN_DIGITS], "test": order[NUM_TRAIN_DIGITS:], "all": order}
    images, labels = digits_images()
    return ArraySource(images[parts[split]], labels[parts[split]], f"digits/{split}")
