"""What a data set is, and the rules that all share: splits, labels, captions, what is skipped."""

import hashlib
import logging
import re
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flextok_jax.io.paths import as_path, reached

IMAGE_SUFFIXES = (
    ".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .avif .heic .heif"
).split()
TRAIN, ALL = "train", "all"
VALIDATION = ("validation", "val", "test")  # Synonyms.
VALIDATION_PERCENT = 5  # Of a data set without splits.
MAX_LABEL = 2**31 - 1
LOOKED_AT = 200  # Examples, where labels are not known without reading all.
LABEL, CAPTION = ("label", "class"), ("caption", "text")  # Fields of lists and JSON files.
SHOWN = 5  # Names and warnings per reason.

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """One example as it is stored.

    Attributes:
        image: the bytes of an image file, or uint8 [H, W, 3].
        label: an index into the source's `classes`, or a number where it has none; -1 unknown.
        caption: None where there is none.
        key: unique in the source; names the example in every message.
    """

    image: bytes | np.ndarray
    label: int = -1
    caption: str | None = None
    key: str = ""


class Skipped(dict):
    """{reason: names} of the files, fields and examples that a source does not use."""

    def add(self, reason: str, name: str) -> bool:
        """Counts a name once; whether it is new."""
        names = self.setdefault(reason, {})  # A dictionary keeps the order.
        new = name not in names
        names[name] = None
        return new

    def usable(self, parse: Callable, value, name: str):
        """`parse(value)`; None where it raises ValueError, which is counted and warned of."""
        try:
            return parse(value)
        except ValueError as error:
            if self.add(str(error), name) and len(self[str(error)]) <= SHOWN:
                log.warning("%s: %s", name, error)
            return None

    def lines(self) -> list[str]:
        """One line for each reason: the count, the reason and the first names."""
        return [
            f"{len(names)}: {reason}: {', '.join(list(names)[:SHOWN])}"
            + ", ..." * (len(names) > SHOWN)
            for reason, names in list(self.items())
        ]


class Source:
    """The interface of all data sets.

    Attributes:
        classes: the names of the labels; empty where labels are numbers, or there are none.
        skipped: what the source does not use. A caption or a label that is not usable counts as
            missing, and its image stays.
        labels: int [N], of every example; None: they are not known without reading all.
    """

    classes: Sequence[str] = ()
    labels: np.ndarray | None = None
    _keys: Sequence[str]  # Or `__len__` and `key` are the source's own.

    def __init__(self):
        self.skipped = Skipped()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The key of an example, without reading it."""
        return self._keys[index]

    def read(self, index: int) -> Example:
        """An example. Any exception means that it cannot be read."""
        raise NotImplementedError

    def caption(self, index: int) -> str | None:
        """The caption of an example, None where there is none. Raises as `read`."""
        return self.read(index).caption

    def embedding(self, index: int) -> np.ndarray | None:
        """float16 [T, E] of the caption; None where there is none. Raises as `read_embedding`."""
        return None

    def fingerprint(self) -> str:
        """A hash of all keys in order, the identity of the data: 16 hexadecimal digits."""
        return keys_sha256(self, len(self))[:16]


def keys_sha256(source: Source, count: int) -> str:
    """The sha256 over the first `count` keys in order."""
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(source.key(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def place(path):
    """A folder or file of data, by its path or address. Raises as `paths.reached`."""
    return reached(as_path(path))


def composed(name: str) -> str:
    """The same name however its accents are stored: in NFC (macOS decomposes them)."""
    return unicodedata.normalize("NFC", name)


# Splits.


def resolve_split(split: str, present: Collection[str], what: str) -> str:
    """The split of `present` that a name means: "validation", "val" and "test" are synonyms.

    Raises:
        ValueError: `what`, the data set, has no such split.
    """
    if split in present or split == ALL:
        return split
    found = [name for name in VALIDATION if name in present and split in VALIDATION]
    if not found:
        raise ValueError(f"split {split!r}: {what} has {', '.join([*present, ALL])}")
    return found[0]


def select(
    keys: Sequence[str], parts: Sequence[str], split: str, what: str, skipped: Skipped
) -> tuple[np.ndarray, bool]:
    """(bool [N]: which examples a split has, whether the paths name the splits).

    They do where "train" and one of VALIDATION are among `parts`, a word of each example's path.
    Otherwise "test" is about 5 % of the examples, at least one and never all, by a hash of the key:
    the same on every machine, and others do not move when some are added. `skipped` gets the
    examples outside of the splits.

    Raises:
        ValueError: there is no such split, or no example in it.
    """
    parts = np.array(parts)
    present = [name for name in (TRAIN, *VALIDATION) if (parts == name).any()]
    named = TRAIN in present and len(present) > 1
    wanted = resolve_split(split, present if named else [TRAIN, "test"], what)
    if named:
        for index in np.flatnonzero(~np.isin(parts, present)):
            skipped.add(f"outside of {', '.join(present)}", keys[index])
        mask = np.isin(parts, present if wanted == ALL else [wanted])
    elif wanted == ALL:
        mask = np.ones(len(keys), bool)
    else:
        ranks = [zlib.crc32(key.encode("utf-8", "surrogateescape")) % 100 for key in keys]
        count = sum(rank < VALIDATION_PERCENT for rank in ranks)
        count = min(max(count, 1), max(len(keys) - 1, 0))
        first = sorted(range(len(keys)), key=lambda i: (ranks[i], keys[i]))[:count]
        mask = np.isin(np.arange(len(keys)), first) == (wanted != TRAIN)
    if not mask.any():
        lines = [f"{what} has no images for split {split!r}; skipped:", *skipped.lines()]
        raise ValueError("\n  ".join(lines))
    return mask, named


# Labels, captions and embeddings. What is not usable raises a ValueError whose text is the reason.


def parse_label(value) -> str | None:
    """A label as text (NFC), None for an unknown one; of a whole number its digits.

    Also where it was stored as a float, as pandas does with a column that has gaps: "1.0" is "1".
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | float | list | dict):
        raise ValueError("the label is neither a whole number nor a name")
    text = "" if value is None else composed(str(value).strip())
    if number := re.fullmatch(r"(-?)0*([0-9]+)(\.0*)?", text):
        if len(number[2]) > 10 or int(number[2]) > MAX_LABEL:
            raise ValueError(f"the label is larger than {MAX_LABEL}")
        text = number[1] + number[2]
        if number[1] and text != "-1":
            raise ValueError("the label is negative (only -1, unknown, may be)")
    return None if text in ("", "-1") else text


def parse_caption(value) -> str | None:
    """A caption, of bytes or of a JSON value; None for an empty one."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("the caption is not UTF-8") from None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the caption is no text but a {type(value).__name__}")
    return (value or "").strip() or None


def first_of(fields: dict, names: Sequence[str]):
    """The first of these fields that is there and not empty; None without one."""
    return next((fields[name] for name in names if fields.get(name) not in (None, "")), None)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in order: "0" ... "11" as numbers, all else as text."""
    names = set(names)
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def label_classes(labels: Mapping[str, str], where) -> list[str]:
    """The sorted names that labels are ({key: label}); [] for numbers; ValueError for both."""
    numbers = [key for key, label in labels.items() if label.isdecimal()]
    names = [key for key, label in labels.items() if not label.isdecimal()]
    if numbers and names:
        a, b = numbers[0], names[0]
        raise ValueError(
            f"{where}: the label of {a} is the number {labels[a]}, that of {b} the name "
            f"{labels[b]!r}; give every image a number (-1: unknown), or every image a name"
        )
    return sorted({labels[key] for key in names})


def label_numbers(texts: Iterable[str | None], classes: Sequence[str]) -> np.ndarray:
    """int32 [N] of labels as text: indices into `classes`, or numbers without classes; -1: None."""
    index = {name: i for i, name in enumerate(classes)}
    found = (-1 if text is None else index[text] if index else int(text) for text in texts)
    return np.fromiter(found, np.int32)


def read_embedding(file) -> np.ndarray:
    """float16 [T, E] of an .npy file, by its path or an open file.

    Raises:
        ValueError: it is no array of floats [T, E], or a value is not finite in float16.
    """
    try:
        array = np.load(file, allow_pickle=False)
        is_array = isinstance(array, np.ndarray)  # And no archive of several.
    except Exception:  # NumPy raises nearly anything for a broken file.
        is_array = False
    if not is_array:
        raise ValueError("the embedding is no .npy file of numbers")
    if array.dtype.kind != "f" or array.ndim != 2 or not array.size:
        empty = "" if array.size else "empty "
        raise ValueError(
            f"the embedding is {empty}{array.dtype} with {array.ndim} axes; store float16 or "
            "float32 [tokens, channels]"
        )
    if not np.abs(array).max() <= np.finfo(np.float16).max:
        raise ValueError("the embedding holds NaN or values beyond 65504, the most of float16")
    return array.astype(np.float16)


def check_labels(source: Source, train: Source | None = None) -> int:
    """How many examples have no label, for a class-conditional model.

    Where labels are not known without reading all, that is estimated from LOOKED_AT examples.

    Raises:
        ValueError: the training split `train` has other classes.
    """
    labels, classes = source.labels, list(source.classes)
    if train is not None and classes != list(train.classes):
        only = ", ".join(map(repr, sorted(set(classes) ^ set(train.classes))[:SHOWN]))
        raise ValueError(f"training and validation data have other classes: {only}")
    if labels is None:
        rows = np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int)
        absent = np.mean([source.read(row).label < 0 for row in rows.tolist()])
        return round(len(source) * absent)
    if train is not None and train.labels is not None:
        if new := sorted(set(labels.tolist()) - set(train.labels.tolist()) - {-1}):
            names = [classes[i] if classes else str(i) for i in new[:SHOWN]]
            log.warning("classes without a training example: %d, %s", len(new), ", ".join(names))
    return int((labels < 0).sum())
