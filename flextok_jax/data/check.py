"""What is in a source: counts, kinds of images, labels, captions, problems; a contact sheet."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flextok_jax.data import decode
from flextok_jax.data.source import Source

CELL, TEXT, GAP = 144, 48, 10  # Pixels of a picture, of the words below it, and between.
COLUMNS, SHOWN, LETTERS = 8, 48, 24
_INK, _PAPER = (32, 32, 36), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Look:
    """One example that was opened.

    Attributes:
        name: its key.
        error: why it cannot be read, None: it can. Then the rest is as in the file:
        format: "JPEG", ...; "array" where it is none.
        mode: Pillow's word for the kind of pixels, such as RGB, L (greyscale) or CMYK.
        size: upright (width, height).
        notes: such as "animated".
        label: -1 unknown.
        caption: None where there is none.
        embedding: its shape, None where there is none.
        picture: RGB, at most CELL pixels wide and high.
    """

    name: str
    error: str | None = None
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    label: int = -1
    caption: str | None = None
    embedding: tuple[int, ...] | None = None
    picture: Image.Image | None = None


def look(source: Source, index: int) -> Look:
    """Opens one example. Nothing that a file can hold raises."""
    key = source.key(index)
    try:
        example, notes = source.read(index), []
        kind, mode, image = "array", "RGB", example.image
        if isinstance(image, bytes):
            image = decode.opened(image)
            kind, mode = image.format, image.mode
            if getattr(image, "is_animated", False):
                notes.append("animated: the first frame counts")
            if decode.orientation(image) != 1:
                notes.append("turned upright by EXIF")
            if image.has_transparency_data:
                notes.append("transparent: laid over white")
        image = decode.upright(image)
    except Exception as error:  # Files break in any way there is.
        return Look(key, decode.reason(error))
    size = image.size
    image.thumbnail((CELL, CELL), Image.Resampling.BICUBIC)
    try:
        shape = None if (embedding := source.embedding(index)) is None else embedding.shape
    except Exception as error:  # Files break in any way there is.
        shape, _ = None, source.skipped.add(str(error).split(": ", 1)[-1], key)
    label, caption = example.label, example.caption
    return Look(key, None, kind, mode, size, tuple(notes), label, caption, shape, image)


def summary(found: list[Look], classes: list[str]) -> list[tuple[str, str]]:
    """(title, text) of the examples that were opened."""
    good = [look for look in found if look.error is None]
    lines = [("opened", f"{len(found)} images, of which {len(found) - len(good)} unreadable")]
    if not good:
        return lines
    lines.append(("formats", _counts(look.format for look in good)))
    lines.append(("modes", _counts(look.mode for look in good)))
    notes = _counts(note for look in good for note in look.notes)
    lines += [("notes", notes)] if notes else []
    widths, heights = (np.array(side) for side in zip(*(look.size for look in good)))
    short = np.minimum(widths, heights)
    lines.append(
        (
            "sizes",
            f"{widths.min()} to {widths.max()} wide, {heights.min()} to {heights.max()} high; "
            f"short side {short.min()} to {short.max()}, median {int(np.median(short))}",
        )
    )
    labels = collections.Counter(look.label for look in good if look.label >= 0)
    if labels:
        rare, common = min(labels.values()), max(labels.values())
        of = f" of {len(classes)}" if classes else ""
        each = f"{rare} to {common}" if rare < common else rare
        text = f"{len(labels)}{of} classes, {each} of these images each"
        names = [_class(label, classes) for label in sorted(labels)[:5]]
        text += f" ({', '.join(names)}{', ...' if len(labels) > 5 else ''})"
        without = len(good) - sum(labels.values())
        lines.append(("labels", text + (f"; {without} images without" if without else "")))
    else:
        lines.append(("labels", "none"))
    captions = [look.caption for look in good if look.caption]
    example = f", such as {textwrap.shorten(captions[0], 60)!r}" if captions else ""
    lines.append(("captions", f"{len(captions)} of these images{example}" if captions else "none"))
    if shapes := [look.embedding for look in good if look.embedding]:
        tokens, channels = (sorted(set(sides)) for sides in zip(*shapes))
        lines.append(
            (
                "text",
                f"{len(shapes)} embeddings, {tokens[0]} to {tokens[-1]} tokens of "
                f"{', '.join(map(str, channels))} channels",
            )
        )
    return lines


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in collections.Counter(words).most_common())


def _class(label: int, classes) -> str:
    return classes[label] if label < len(classes) else str(label)


def contact_sheet(found: list[Look], classes: list[str]) -> Image.Image:
    """The pictures that could be read, at most SHOWN of them evenly chosen, with words below."""
    good = [look for look in found if look.error is None]
    chosen = np.unique(np.linspace(0, len(good) - 1, min(len(good), SHOWN)).astype(int))
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (GAP + columns * (CELL + GAP), GAP + rows * (CELL + TEXT + GAP))
    sheet, font = Image.new("RGB", size, _PAPER), ImageFont.load_default(11)
    draw = ImageDraw.Draw(sheet)
    for place, look in enumerate(good[i] for i in chosen):
        row, column = divmod(place, columns)
        x, y = GAP + column * (CELL + GAP), GAP + row * (CELL + TEXT + GAP)
        picture = look.picture
        if max(picture.size) <= CELL // 2:  # Small ones larger, by a whole factor.
            factor = CELL // max(picture.size)
            picture = picture.resize([s * factor for s in picture.size], Image.Resampling.NEAREST)
        left, top = ((CELL - side) // 2 for side in picture.size)
        sheet.paste(picture, (x + left, y + top))
        label = "no label" if look.label < 0 else _class(look.label, classes)
        words = [f"{look.size[0]}x{look.size[1]} {look.mode}, {label}", look.name[-48:]]
        words = words[:1] + [look.caption] if look.caption else words
        lines = [line for text in words for line in textwrap.wrap(text[:200], LETTERS)]
        draw.multiline_text((x, y + CELL + 2), "\n".join(lines[:3]), fill=_INK, font=font)
    return sheet
