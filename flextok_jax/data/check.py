"""What is in a source: counts, kinds of images, labels, captions, problems; a contact sheet."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flextok_jax.data import decode
from flextok_jax.data.reader import Picture
from flextok_jax.data.source import Source

CELL, TEXT, GAP = 144, 48, 10  # Pixels of a picture, of the words below it, and between.
COLUMNS, SHOWN, LETTERS = 8, 48, 24
_INK, _PAPER = (32, 32, 36), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Look:
    """One readable example.

    Attributes:
        kind: (format, mode) of the file, such as ("JPEG", "CMYK"); ("array", "RGB") without one.
        turned: the camera's rotation was applied.
        size: upright (width, height).
        embedding: its shape, None where there is none.
        image: RGB, at most CELL pixels wide and high.
        key, label, caption: as in `source.Example`.
    """

    kind: tuple[str, str]
    turned: bool
    size: tuple[int, int]
    embedding: tuple[int, ...] | None
    image: Image.Image
    key: str
    label: int
    caption: str | None


def look(source: Source, picture: Picture) -> Look:
    """What `summary` and `contact_sheet` say of a picture; an embedding that is none counts."""
    kind, turned, image = ("array", "RGB"), False, picture.image.copy()
    if isinstance(picture.stored, bytes):
        stored = decode.opened(picture.stored)
        kind, turned = (stored.format, stored.mode), decode.orientation(stored) != 1
    image.thumbnail((CELL, CELL), Image.Resampling.BICUBIC)
    embedding = source.skipped.usable(source.embedding, picture.index, picture.key)
    shape = None if embedding is None else embedding.shape
    size, named = picture.image.size, (picture.key, picture.label, picture.caption)
    return Look(kind, turned, size, shape, image, *named)


def summary(found: list[Look], classes: list[str]) -> list[tuple[str, str]]:
    """(title, text) of the readable examples."""
    if not found:
        return []
    formats, modes = zip(*(look.kind for look in found))
    widths, heights = (np.array(side) for side in zip(*(look.size for look in found)))
    short = np.minimum(widths, heights)
    turned = sum(look.turned for look in found)
    captions = [look.caption for look in found if look.caption]
    example = f", such as {textwrap.shorten(captions[0], 60)!r}" if captions else ""
    lines = [
        ("formats", _counts(formats)),
        ("modes", _counts(modes) + (f"; {turned} turned upright by EXIF" if turned else "")),
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
        text = (
            f"{len(shapes)} embeddings, {tokens[0]} to {tokens[-1]} tokens of {channels} channels"
        )
        lines.append(("text", text))
    return lines


def _labels(found: list[int], classes) -> str:
    labels = collections.Counter(label for label in found if label >= 0)
    if not labels:
        return "none"
    of = f" of {len(classes)}" if classes else ""
    rare, common = min(labels.values()), max(labels.values())
    names = [_class(label, classes) for label in sorted(labels)[:5]] + ["..."] * (len(labels) > 5)
    without = len(found) - labels.total()
    return (
        f"{len(labels)}{of} classes, {rare} to {common} of these images each ({', '.join(names)})"
        + (f"; {without} images without" if without else "")
    )


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in collections.Counter(words).most_common())


def _class(label: int, classes) -> str:
    return classes[label] if label < len(classes) else str(label)


def contact_sheet(found: list[Look], classes: list[str]) -> Image.Image:
    """At most SHOWN of the pictures, evenly chosen, with words below."""
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), SHOWN)).astype(int))
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (GAP + columns * (CELL + GAP), GAP + rows * (CELL + TEXT + GAP))
    sheet, font = Image.new("RGB", size, _PAPER), ImageFont.load_default(11)
    draw = ImageDraw.Draw(sheet)
    for place, look in enumerate(found[i] for i in chosen):
        row, column = divmod(place, columns)
        x, y = GAP + column * (CELL + GAP), GAP + row * (CELL + TEXT + GAP)
        image = look.image
        if max(image.size) <= CELL // 2:  # Small ones larger, by a whole factor.
            factor = CELL // max(image.size)
            image = image.resize([s * factor for s in image.size], Image.Resampling.NEAREST)
        left, top = ((CELL - side) // 2 for side in image.size)
        sheet.paste(image, (x + left, y + top))
        label = "no label" if look.label < 0 else _class(look.label, classes)
        words = [f"{look.size[0]}x{look.size[1]} {look.kind[1]}, {label}"]
        words.append(look.caption or look.key[-48:])
        lines = [line for text in words for line in textwrap.wrap(text[:200], LETTERS)]
        draw.multiline_text((x, y + CELL + 2), "\n".join(lines[:3]), fill=_INK, font=font)
    return sheet
