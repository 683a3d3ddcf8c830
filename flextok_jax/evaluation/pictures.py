"""Pictures in and out: images fitted to a model, PNG files that say what made them, grids."""

import os
import pathlib
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flextok_jax.data import reader, sources, transforms
from flextok_jax.data.source import IMAGE_SUFFIXES
from flextok_jax.nn.images import to_float as from_uint8  # noqa: F401
from flextok_jax.nn.images import to_uint8  # noqa: F401

GRID_ROWS = 16
_CELL = 96  # Pixels that a picture of a grid should have at least.
_GAP, _TITLE, _NAME = 8, 30, 120
_INK, _PAPER = (32, 32, 36), (255, 255, 255)


class Batch(NamedTuple):
    """Readable images, in order.

    Attributes:
        seeds: uint32 [n], see `name_seeds`.
        names: of each image, relative to its folder.
        images: uint8 [n, S, S, 3].
        labels: int32 [n], -1 unknown.
    """

    seeds: np.ndarray
    names: list[str]
    images: np.ndarray
    labels: np.ndarray


class Pictures:
    """All images of a split of a data set (see `sources.parse`).

    Attributes:
        title: what was asked for, and the split.
        names: of all images, in the source's order (of a folder: sorted).
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
        names = [self._source.key(i) for i in range(len(self._source))]
        self.names = names[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int, batch_size: int, skip: Collection[str] = ()) -> Iterator[Batch]:
        """Upright RGB, centre-cropped, resized to `size` x `size`; unreadable images are left out.

        Only the last batch may be smaller than `batch_size`. Files are read ahead by threads.

        Args:
            skip: the names of images that are not wanted.

        Raises:
            ValueError: nothing is skipped, and not one image could be read.
        """
        places = [i for i, name in enumerate(self.names) if name not in skip]
        found, any_readable = [], bool(skip) or not places
        for index, (image, label) in self._readable(places, size):
            found.append((self.names[index], image, label))
            if len(found) == batch_size:
                yield _batch(found)
                found, any_readable = [], True
        if found:
            yield _batch(found)
        elif not any_readable:
            raise ValueError(f"none of the {len(places)} images could be read{self.complaint()}")

    def read(self, places: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The readable images of these places, as they are in a batch.

        Returns:
            (int [n], those of the places that could be read; images uint8 [n, size, size, 3];
            labels int32 [n]).
        """
        found = list(self._readable(places, size))
        images = np.zeros((len(found), size, size, 3), np.uint8)
        for row, (_, (image, _)) in zip(images, found):
            row[:] = image
        labels = np.array([label for _, (_, label) in found], np.int32)
        return np.array([place for place, _ in found], int), images, labels

    def image(self, place: int, size: int) -> np.ndarray:
        """One readable image as it is in a batch: uint8 [size, size, 3]."""
        found = reader.read(self._source, place)
        return transforms.center_crop(found.image, size)

    def complaint(self) -> str:
        """The unreadable images with their reasons, one per line, at most ten."""
        lines = [f"\n  {name}: {reason}" for name, reason in self.unreadable.items()]
        more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
        return "".join(lines[:10]) + more

    def _readable(self, places, size) -> Iterator[tuple]:
        """(place, (image, label)) of the readable images, in order, read ahead by threads."""

        def fit(picture):
            return transforms.center_crop(picture.image, size), picture.label

        for place, found in zip(places, reader.read_ahead(self._source, places, fit)):
            if isinstance(found, reader.Unreadable):
                self.unreadable[self.names[place]] = found.reason
            else:
                yield place, found


def _batch(found) -> Batch:
    names, images, labels = zip(*found)
    return Batch(name_seeds(names), list(names), np.stack(images), np.asarray(labels, np.int32))


def name_seeds(names: Sequence[str]) -> np.ndarray:
    """What an image's noise is drawn from, beside the seed: a hash of its name, uint32 [n].

    So it does not depend on which other images there are, or can be read.
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


def write_png(path: pathlib.Path, picture, about: dict) -> None:
    """Writes a PNG file with text metadata.

    Args:
        path: its folder is made where it is missing.
        picture: uint8 [H, W, 3], or a `PIL.Image.Image`.
        about: what made it; becomes text.
    """
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in about.items():
        text.add_text(key, str(value))
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", pnginfo=text)


def read_png(path: pathlib.Path) -> np.ndarray:
    """The picture of `write_png`: uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def grid(
    rows: list[list[np.ndarray]],
    titles: Sequence[str] = (),
    names: Sequence[str] = (),
    cell: int = _CELL,
):
    """A `PIL.Image.Image` of rows of pictures.

    Args:
        rows: equally long lists of uint8 [H, W, 3], all of one size.
        titles: one per column, above it.
        names: one per row, to its left.
        cell: pictures smaller than this are enlarged by a whole factor, nearest neighbour, to at
            least this size.
    """
    from PIL import Image, ImageDraw

    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-cell // min(height, width)))
    height, width = height * factor, width * factor
    top, left = _TITLE if titles else _GAP, _NAME if names else 0
    size = (left + _GAP + len(rows[0]) * (width + _GAP), top + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = left + _GAP + column * (width + _GAP) + width / 2
        font = _font(draw, title, width)
        draw.text((x, _TITLE / 2), title, fill=_INK, font=font, anchor="mm")
    for row, pictures in enumerate(rows):
        y = top + row * (height + _GAP)
        if names:
            font = _font(draw, names[row], _NAME - _GAP)
            draw.text((_NAME, y + height / 2), names[row], fill=_INK, font=font, anchor="rm")
        for column, picture in enumerate(pictures):
            picture = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + _GAP + column * (width + _GAP), y))
    return sheet


def _font(draw, text: str, width: int):
    """The largest of a few sizes at which the text fits."""
    from PIL import ImageFont

    for size in (18, 16, 14, 12, 10):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font=font) <= width:
            break
    return font
