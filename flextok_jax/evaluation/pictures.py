"""Pictures in and out: images fitted to a model, PNG files with metadata, grids."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flextok_jax.data import reader, sources, transforms
from flextok_jax.data.source import IMAGE_SUFFIXES
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path
from flextok_jax.nn.images import to_float as from_uint8  # noqa: F401
from flextok_jax.nn.images import to_uint8  # noqa: F401

GRID_ROWS = 16
_CELL = 96  # Pixels that a picture of a grid should have at least.
_GAP, _TITLE, _NAME = 8, 30, 130
_INK, _PAPER = (32, 32, 36), (255, 255, 255)


class Batch(NamedTuple):
    """Readable images, in order.

    Attributes:
        seeds: uint32 [n], see `name_seeds`.
        names: of each image, relative to its folder.
        labels: int32 [n], -1 unknown.
        images: uint8 [n, S, S, 3].
    """

    seeds: np.ndarray
    names: list[str]
    labels: np.ndarray
    images: np.ndarray


class Pictures:
    """All images of a split of a data set (see `sources.parse`).

    Attributes:
        title: what was asked for, and the split.
        names: of all images, in the source's order (of a folder: sorted).
        classes: names of the labels, empty where the data set has none.
        path: where the data are.
        unreadable: {name: reason} of those that were met so far and could not be read.
    """

    def __init__(self, images: str, limit: int | None = None, split: str | None = None):
        """Lists the images, at most the first `limit` of them.

        Args:
            split: of the data set; None: all.

        Raises:
            FileNotFoundError, ValueError: there is no such data set, or no image in it.
        """
        data = sources.parse(str(images))
        split = split or "all"
        self.title = f"{images}, {split}"
        self.unreadable: dict[str, str] = {}
        self._source = sources.make_image_source(data, split)
        self.names = [self._source.key(i) for i in range(len(self._source))][:limit]
        self.classes = tuple(self._source.classes)
        self.path = data.path

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int, batch_size: int) -> Iterator[Batch]:
        """Upright RGB, centre-cropped, resized to `size` x `size`; unreadable images are left out.

        Only the last batch may be smaller than `batch_size`. Files are read ahead by threads.

        Raises:
            ValueError: not one image could be read.
        """

        def fit(picture):
            return picture.key, transforms.center_crop(picture.image, size), picture.label

        found, any_readable = [], False
        for example in reader.read_ahead(self._source, range(len(self)), fit):
            if isinstance(example, reader.Unreadable):
                self.unreadable[example.key] = example.reason
                continue
            found.append(example)
            if len(found) == batch_size:
                yield _batch(found)
                found, any_readable = [], True
        if found:
            yield _batch(found)
        elif not any_readable:
            raise ValueError(f"none of the {len(self)} images could be read{self.complaint()}")

    def class_name(self, label: int) -> str:
        """The name of a label; "" for an unknown one."""
        if label < 0:
            return ""
        return self.classes[label] if self.classes else f"class {label}"

    def complaint(self) -> str:
        """The unreadable images with their reasons, one per line, at most ten."""
        lines = [f"\n  {name}: {reason}" for name, reason in self.unreadable.items()]
        more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
        return "".join(lines[:10]) + more


def _batch(found) -> Batch:
    names, images, labels = zip(*found)
    return Batch(name_seeds(names), list(names), np.asarray(labels, np.int32), np.stack(images))


def name_seeds(names: Sequence[str]) -> np.ndarray:
    """The seed of each image's noise: a hash of its name, uint32 [n].

    It does not depend on which other images there are, or can be read.
    """
    return np.array([zlib.crc32(os.fsencode(name)) for name in names], np.uint32)


def png_names(names: list[str]) -> list[str]:
    """The name of the PNG file of each image: its own without the ending.

    Where two images differ in the ending alone, all keep theirs: no picture overwrites another.
    """
    stems = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        stems.append(stem if suffix.lower() in IMAGE_SUFFIXES else name)
    clash = len({stem.casefold() for stem in stems}) < len(stems)
    return [f"{stem}.png" for stem in (names if clash else stems)]


def write_png(path, picture, metadata: dict) -> None:
    """Writes a PNG file with text metadata, whole or not at all.

    Args:
        path: its folder is made where it is missing.
        picture: uint8 [H, W, 3], or a `PIL.Image.Image`.
        metadata: becomes text.
    """
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_text(key, str(value))
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    with storage.atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)


def read_png(path) -> np.ndarray:
    """The picture of `write_png`: uint8 [H, W, 3]."""
    from PIL import Image

    with as_path(path).open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def saved_pictures(
    paths: Sequence, metadata: Sequence[dict], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Pictures in files; where one is missing, they are made, and the missing ones are written.

    So an interrupted command goes on where it stopped.

    Args:
        paths: of the PNG files, n of them.
        metadata: of each file.
        make: returns float [n, H, W, 3] in [-1, 1].

    Returns:
        uint8 [n, H, W, 3].

    Raises:
        ValueError: a file that is there has other metadata: this command did not write it.
    """
    from PIL import Image

    missing = [not path.exists() for path in paths]
    for path, absent, wanted in zip(paths, missing, metadata, strict=True):
        if absent:
            continue
        with path.open("rb") as file, Image.open(file) as image:
            found = getattr(image, "text", {})
        if found != {key: str(value) for key, value in wanted.items()}:
            raise ValueError(
                f"{path} is not a picture of this command with these settings, and is not replaced:"
                " move it away, or pass another --out"
            )
    if not any(missing):
        return np.stack([read_png(path) for path in paths])
    images = to_uint8(make())
    for path, absent, image, text in zip(paths, missing, images, metadata):
        if absent:
            write_png(path, image, text)
    return images


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] = (),
    names: Sequence[str] = (),
    cell: int = _CELL,
):
    """A `PIL.Image.Image` of rows of pictures.

    Args:
        rows: uint8 [H, W, 3] each, all of one size; a shorter row leaves its end empty.
        titles: one per column, above it.
        names: one per row, to its left, such as names of classes.
        cell: pictures smaller than this are enlarged by a whole factor, nearest neighbour, to at
            least this size.
    """
    from PIL import Image, ImageDraw

    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-cell // min(height, width)))
    height, width = height * factor, width * factor
    top, left = _TITLE if any(titles) else _GAP, _NAME if any(names) else _GAP
    columns = max(map(len, rows))
    size = (left + columns * (width + _GAP), top + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    sketch = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = left + column * (width + _GAP) + width / 2
        font = _font(sketch, title, width)
        sketch.text((x, _TITLE / 2), title, fill=_INK, font=font, anchor="mm")
    for row, pictures in enumerate(rows):
        y = top + row * (height + _GAP)
        if any(names):
            name = names[row] if len(names[row]) <= 20 else names[row][:19] + "…"
            font = _font(sketch, name, _NAME - 2 * _GAP)
            middle = (_NAME - _GAP, y + height / 2)
            sketch.text(middle, name, fill=_INK, font=font, anchor="rm")
        for column, picture in enumerate(pictures):
            picture = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * (width + _GAP), y))
    return sheet


def _font(sketch, text: str, width: int):
    """The largest of a few sizes at which the text fits."""
    from PIL import ImageFont

    for size in (18, 16, 14, 12, 10):
        font = ImageFont.load_default(size)
        if sketch.textlength(text, font=font) <= width:
            break
    return font
