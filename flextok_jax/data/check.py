"""What is in a source: counts, kinds of images, labels, captions, problems; a contact sheet."""

import collections
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flextok_jax.data import decode
from flextok_jax.data.reader import Picture
from flextok_jax.data.source import Source

CELL, TEXT, GAP = 144, 48, 10  # Pixels of a picture, of the words below it, and between.
COLUMNS, SHOWN, LETTERS = 8, 48, 24


class Look(NamedTuple):
    """One readable example.

    Attributes:
        format, mode: of the file, such as "JPEG" and "CMYK"; "array" and "RGB" without one.
        size: upright (width, height).
        embedding: its shape, None where there is none.
        thumbnail: RGB, CELL x CELL pixels.
        key, label, caption: as in `source.Example`.
    """

    format: str
    mode: str
    size: tuple[int, int]
    embedding: tuple[int, ...] | None
    thumbnail: Image.Image
    key: str
    label: int
    caption: str | None


def look(source: Source, picture: Picture) -> Look:
    """What `summary` and `contact_sheet` say of a picture; an unusable embedding is skipped."""
    is_file, image = isinstance(picture.stored, bytes), picture.image
    stored = decode.opened(picture.stored) if is_file else image
    small = max(image.size) <= CELL // 2
    way = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    thumbnail = ImageOps.pad(image, (CELL, CELL), way, "white")
    embedding = source.skipped.usable(source.embedding, picture.index, picture.key)
    shape = None if embedding is None else embedding.shape
    named = picture.key, picture.label, picture.caption
    return Look(stored.format or "array", stored.mode, image.size, shape, thumbnail, *named)


def summary(found: list[Look], classes: list[str]) -> list[tuple[str, str]]:
    """(title, text) of the readable examples."""
    widths, heights = (np.array(side) for side in zip(*(look.size for look in found)))
    short = np.minimum(widths, heights)
    captions = [look.caption for look in found if look.caption]
    example = f", such as {textwrap.shorten(captions[0], 60)!r}" if captions else ""
    lines = [
        ("formats", _counts(look.format for look in found)),
        ("modes", _counts(look.mode for look in found)),
        (
            "sizes",
            f"{widths.min()} to {widths.max()} wide, {heights.min()} to {heights.max()} high; "
            f"short side {short.min()} to {short.max()}, median {int(np.median(short))}",
        ),
        ("labels", _labels([look.label for look in found], classes)),
        ("captions", f"{len(captions)} of these images{example}" if captions else "none"),
    ]
    if shapes := [look.embedding for look in found if look.embedding]:
        tokens, channels = (sorted(set(sides)) for sides in zip(*shapes))
        channels = ", ".join(map(str, channels))
        text = f"{len(shapes)} embeddings, {tokens[0]} to {tokens[-1]} tokens, {channels} channels"
        lines.append(("text", text))
    return lines


def _labels(found: list[int], classes) -> str:
    labels = collections.Counter(label for label in found if label >= 0)
    if not labels:
        return "none"
    of = f" of {len(classes)}" if classes else ""
    names = [_class(label, classes) for label in sorted(labels)[:5]] + ["..."] * (len(labels) > 5)
    return (
        f"{len(labels)}{of} classes, {min(labels.values())} to {max(labels.values())} of these "
        f"images each ({', '.join(names)}); {len(found) - labels.total()} images without"
    )


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in collections.Counter(words).most_common())


def _class(label: int, classes) -> str:
    if label < 0:
        return "no label"
    return classes[label] if label < len(classes) else str(label)


def contact_sheet(found: list[Look], classes: list[str]) -> Image.Image:
    """At most SHOWN of the pictures, evenly chosen, with words below."""
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), SHOWN)).astype(int))
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (GAP + columns * (CELL + GAP), GAP + rows * (CELL + TEXT + GAP))
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(11)
    pen = ImageDraw.Draw(sheet)
    for place, look in enumerate(found[i] for i in chosen):
        row, column = divmod(place, columns)
        x, y = GAP + column * (CELL + GAP), GAP + row * (CELL + TEXT + GAP)
        sheet.paste(look.thumbnail, (x, y))
        first = f"{look.size[0]}x{look.size[1]} {look.mode}, {_class(look.label, classes)}"
        lines = textwrap.wrap(first, LETTERS)
        lines += textwrap.wrap((look.caption or look.key[-48:])[:200], LETTERS)
        pen.multiline_text((x, y + CELL + 2), "\n".join(lines[:3]), fill=(32, 32, 36), font=font)
    return sheet
