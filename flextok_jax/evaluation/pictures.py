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
from flextok_jax.nn.images import to_uint8

GRID_ROWS = 16
_CELL = 96  # Pixels that a picture of a grid should have at least.
_GAP, _TITLE, _NAME = 8, 30, 130
_LISTED = 10  # Images that could not be read, by name.


class Batch(NamedTuple):
    """Readable images, in order."""

    seeds: np.ndarray  # uint32 [n], see `name_seeds`
    names: list[str]  # relative to the folder
    labels: np.ndarray  # int32 [n], -1 unknown
    images: np.ndarray  # uint8 [n, S, S, 3]


class Pictures:
    """The images of a split of a data set, at most the first `limit` (see `sources.parse`).

    Attributes:
        title: what was asked for, and the split.
        names: of all images, in the source's order (of a folder: sorted).
        classes: names of the labels, empty where the data set has none.
        unreadable: {name: reason} of those that were met so far and could not be read.
        skipped: what the data set has and is not used (`source.Skipped`).

    Raises:
        FileNotFoundError, ValueError: there is no such data set, or no image in it.
    """

    def __init__(self, images: str, limit: int | None = None, split: str | None = None):
        split = split or "all"
        self.title = f"{images}, {split}"
        self.unreadable: dict[str, str] = {}
        self._source = sources.make_image_source(sources.parse(str(images)), split)
        self.names = [self._source.key(i) for i in range(len(self._source))][:limit]
        self.classes, self.skipped = tuple(self._source.classes), self._source.skipped

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int, batch_size: int) -> Iterator[Batch]:
        """Upright RGB, centre-cropped, resized to `size` x `size`; unreadable images are left out.

        The last batch may be smaller. Raises ValueError where not one image could be read.
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
            reasons = listed(self.unreadable)
            raise ValueError(f"none of the images could be read ({self.title}):{reasons}")

    def class_name(self, label: int) -> str:
        """The name of a label; "" for an unknown one."""
        if label < 0:
            return ""
        return self.classes[label] if self.classes else f"class {label}"


def _batch(found) -> Batch:
    names, images, labels = zip(*found)
    return Batch(name_seeds(names), list(names), np.asarray(labels, np.int32), np.stack(images))


def listed(unreadable: dict[str, str]) -> str:
    """Unreadable images with their reasons, one per line, at most ten."""
    lines = [f"\n  {name}: {reason}" for name, reason in unreadable.items()]
    more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "".join(lines[:_LISTED]) + more


def name_seeds(names: Sequence[str]) -> np.ndarray:
    """The seed of each image's noise, whatever other images there are: uint32 [n]."""
    return np.array([zlib.crc32(os.fsencode(name)) for name in names], np.uint32)


def png_names(names: Sequence[str]) -> list[str]:
    """The name of the PNG file of each image: its own without the ending.

    Where two images differ in the ending alone, all keep theirs: no picture overwrites another.
    """
    parts = [os.path.splitext(name) for name in names]
    stems = [a if b.lower() in IMAGE_SUFFIXES else a + b for a, b in parts]
    clash = len({stem.casefold() for stem in stems}) < len(stems)
    return [f"{stem}.png" for stem in (names if clash else stems)]


def write_png(path, picture, metadata: dict) -> None:
    """Writes a PNG file of uint8 [H, W, 3] or a `PIL.Image.Image`, with text metadata."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_text(key, str(value))
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    with storage.atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)


def is_png_of(path, metadata: dict) -> bool:
    """Whether a file is a picture of `write_png` with this metadata among its own."""
    from PIL import Image

    try:
        with as_path(path).open("rb") as file, Image.open(file) as image:
            text = {key: str(value) for key, value in metadata.items()}
            return text.items() <= getattr(image, "text", {}).items()
    except (OSError, SyntaxError, ValueError):
        return False


def read_png(path) -> np.ndarray:
    """The picture of `write_png`: uint8 [H, W, 3]."""
    from PIL import Image

    with as_path(path).open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def saved_pictures(
    paths: Sequence, metadata: Sequence[dict], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Pictures in files, uint8 [n, H, W, 3]; those that are missing are made and written.

    Args:
        metadata: of each file.
        make: returns float [n, H, W, 3] in [-1, 1].

    Raises:
        ValueError: a file is there that is no picture with this metadata.
    """
    for path, text in zip(paths, metadata, strict=True):
        if path.exists() and not is_png_of(path, text):
            raise ValueError(
                f"{path} is not what is made now: its image was another one, or it was changed. "
                "Remove it, or write to another folder"
            )
    if not all(path.exists() for path in paths):
        for path, image, text in zip(paths, to_uint8(make()), metadata, strict=True):
            if not path.exists():
                write_png(path, image, text)
    return np.stack([read_png(path) for path in paths])


def grid(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), names: Sequence[str] = ()
):
    """A `PIL.Image.Image` of rows of pictures, small ones enlarged by a whole factor.

    Args:
        rows: uint8 [H, W, 3] each, all of one size; a shorter row leaves its end empty.
        titles: one per column, above it.
        names: one per row, to its left, such as names of classes.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-_CELL // min(height, width)))
    height, width = height * factor, width * factor
    top, left = _TITLE if any(titles) else _GAP, _NAME if any(names) else _GAP
    columns = max(map(len, rows))
    size = (left + columns * (width + _GAP), top + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        middle = (left + column * (width + _GAP) + width / 2, top / 2)
        canvas.text(middle, title, fill="black", font=font, anchor="mm")
    for row, pictures in enumerate(rows):
        y = top + row * (height + _GAP)
        if any(names):
            name = names[row] if len(names[row]) <= 16 else names[row][:15] + "…"
            middle = (left - _GAP, y + height / 2)
            canvas.text(middle, name, fill="black", font=font, anchor="rm")
        for column, picture in enumerate(pictures):
            picture = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * (width + _GAP), y))
    return sheet
