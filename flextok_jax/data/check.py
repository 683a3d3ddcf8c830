"""What is in a source: counts, kinds of images, labels, captions, problems; a contact sheet."""

import collections
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from flextok_jax.data import decode
from flextok_jax.data.reader import Picture
from flextok_jax.evaluation.pictures import grid

CELL, ROWS, COLUMNS = 144, 16, 8  # Pixels of a picture; pictures of the contact sheet.


class Look(NamedTuple):
    """One readable example.

    Attributes:
        format, mode: of the file, such as "JPEG" and "CMYK"; "array" and "RGB" without one.
        size: upright (width, height).
        embedding: its shape, None where there is none.
        thumbnail: uint8 [CELL, CELL, 3]; None where it is not kept.
        label, caption: as in `source.Example`.
    """

    format: str
    mode: str
    size: tuple[int, int]
    embedding: tuple[int, ...] | None
    thumbnail: np.ndarray | None
    label: int
    caption: str | None


def look(picture: Picture) -> Look:
    """What `summary` and `contact_sheet` say of a picture."""
    size, small, stored = picture.image.size, picture.image.copy(), picture.image
    if isinstance(picture.stored, bytes):
        stored = decode.opened(picture.stored)
    small.thumbnail((CELL, CELL))
    small = np.asarray(ImageOps.pad(small, (CELL, CELL), Image.Resampling.NEAREST, "white"))
    shape = None if picture.embedding is None else picture.embedding.shape
    kind = stored.format or "array", stored.mode
    return Look(*kind, size, shape, small, picture.label, picture.caption)


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
    """At most ROWS rows of COLUMNS pictures, each row of one class."""
    by_label: dict[int, list] = collections.defaultdict(list)
    for look in found:
        if look.thumbnail is not None:
            by_label[look.label].append(look.thumbnail)
    labels, rows = sorted(by_label)[:ROWS], []
    for label in labels:
        of_class = by_label[label][: COLUMNS * (ROWS // len(labels))]
        parts = [of_class[i : i + COLUMNS] for i in range(0, len(of_class), COLUMNS)]
        rows += [(_class(label, classes), part) for part in parts]
    return grid([part for _, part in rows], names=[name for name, _ in rows])
