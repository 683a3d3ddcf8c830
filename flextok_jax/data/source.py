"""What every data set is here: numbered examples, each read by its number.

An example has an image, a label, a caption and a key. The rules that all sources share are here:
what splits are called, which labels and captions are usable, what is counted as passed over.
"""

import hashlib
import logging
import pathlib
import re
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flextok_jax.io.paths import as_path, is_remote

IMAGE_SUFFIXES = (
    ".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .avif .heic .heif"
).split()
TRAIN, ALL = "train", "all"
VALIDATION = ("validation", "val", "test")  # Different words for the same.
VALIDATION_PERCENT = 5  # Share of the examples of a data set without splits of its own.
MAX_LABEL = 2**31 - 1
MAX_NAME, MAX_CAPTION = 200, 20_000  # Characters.
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
    """{reason: names} of the files, fields and examples that a source does not use.

    Names are kept in order and once each, so `len(skipped[reason])` is the count.
    """

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()

    def add(self, reason: str, name: str) -> bool:
        """Counts one; whether it is new."""
        with self._lock:
            names = self.setdefault(reason, {})
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
        found = []
        for reason, names in list(self.items()):
            first = ", ".join(list(names)[:SHOWN])
            found.append(f"{len(names)}: {reason}: {first}{', ...' * (len(names) > SHOWN)}")
        return found


class Source:
    """The interface of all data sets; those below it say where the examples come from.

    Attributes:
        classes: the names of the labels; empty where labels are numbers, or there are none.
        skipped: what the source does not use, and why. Pixels never depend on it: a caption, label
            or field that is not usable counts as missing.
        labels: int [N], of every example; None: they are not known without reading all.
    """

    classes: Sequence[str] = ()
    labels: np.ndarray | None

    def __init__(self):
        self.skipped = Skipped()

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The key of an example, without reading it."""
        raise NotImplementedError

    def read(self, index: int) -> Example:
        """An example. Any exception means that it cannot be read."""
        raise NotImplementedError

    def embedding(self, index: int) -> np.ndarray | None:
        """float [T, E] of the caption; None where there is none.

        Raises:
            ValueError: it is not usable, see `check_embedding`.
        """
        return None

    def fingerprint(self) -> str:
        """A hash of all keys in order: 16 hexadecimal digits, the identity of the data.

        Neither the folder's own path nor the pixels are part of it.
        """
        return keys_sha256(self, len(self))[:16]


def keys_sha256(source: Source, count: int) -> str:
    """The sha256 over the first `count` keys in order."""
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(source.key(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def local(path) -> pathlib.Path:
    """A folder or file of data; addresses are refused.

    Raises:
        ValueError: it is an address.
    """
    path = as_path(path)
    if is_remote(path):
        raise ValueError(f"{path}: data are read from local or mounted folders; mount the bucket")
    return path


# Splits.


def resolve_split(split: str, present: Collection[str], what: str) -> str:
    """The split of `present` that a name means.

    "validation", "val" and "test" mean the same where only one of them is there.

    Args:
        what: the data set, for the message.

    Raises:
        ValueError: there is no such split; it lists those that there are.
    """
    if split in present or split == ALL:
        return split
    if split in VALIDATION:
        for name in VALIDATION:
            if name in present:
                return name
    raise ValueError(f"split {split!r}: {what} has {', '.join([*present, ALL])}")


def select(
    keys: Sequence[str], parts: Sequence[str], split: str, what: str, skipped: Skipped
) -> tuple[np.ndarray, bool]:
    """Which examples a split of a data set has.

    The paths name the splits where "train" and one of VALIDATION are among them. Otherwise "test"
    is about 5 % of the examples, at least one and never all, by a hash of the key: the same on
    every machine, and others do not move when some are added.

    Args:
        keys, parts: of each example, and the split that its path names or some other word.
        split, what: as in `resolve_split`.
        skipped: gets the examples outside of the splits.

    Returns:
        (bool [N], whether the paths name the splits).

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
        raise ValueError(
            f"{what} has no images for split {split!r} ({len(keys)} in all)"
            + "".join(f"\n  {line}" for line in skipped.lines())
        )
    return mask, named


# Labels, captions and embeddings. What is not usable raises a ValueError whose text is the reason.


def parse_label(value) -> str | None:
    """A label as it stands in a list or a file, as text; None for an unknown one.

    A whole number becomes its digits, also where it was stored as a float, as pandas does with a
    column that has gaps: "1.0" is "1".
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "surrogateescape")
    if isinstance(value, list | dict):
        raise ValueError("the label is neither a whole number nor a name")
    text = "" if value is None else str(value).strip()
    number = re.fullmatch(r"(-?[0-9]+)(\.0*)?", text)
    text = str(number[1]) if number else text
    if len(text) > MAX_NAME:
        raise ValueError(f"the label is longer than {MAX_NAME} characters")
    if number:
        if int(text) > MAX_LABEL:
            raise ValueError(f"the label is larger than {MAX_LABEL}")
        text = str(int(text))
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
    if value and len(value) > MAX_CAPTION:
        raise ValueError(f"the caption is longer than {MAX_CAPTION} characters")
    return (value or "").strip() or None


def first_of(fields: dict, names: Sequence[str]):
    """The first of these fields that is there and not empty; None without one."""
    return next((fields[name] for name in names if fields.get(name) not in (None, "")), None)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in order: "0" ... "11" as numbers, all else as text."""
    names = set(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def label_classes(labels: Mapping[str, str], where) -> list[str]:
    """The sorted names that these labels ({key: label}, see `parse_label`) are.

    Returns:
        [] where all are numbers.

    Raises:
        ValueError: some are numbers and some are names.
    """
    numbers = {key: label for key, label in labels.items() if label.isdecimal()}
    if numbers and len(numbers) < len(labels):
        names = ((key, label) for key, label in labels.items() if key not in numbers)
        (a, number), (b, name) = next(iter(numbers.items())), next(names)
        raise ValueError(
            f"{where}: the label of {a} is the number {number}, that of {b} the name {name!r}. "
            "Give every image a whole number from 0 on (-1: unknown), or every image a name"
        )
    return [] if numbers else sorted(set(labels.values()))


def label_numbers(texts: Iterable[str | None], classes: Sequence[str]) -> np.ndarray:
    """int32 [N] of labels as text: indices into `classes`, or numbers without classes; -1: None."""
    index = {name: i for i, name in enumerate(classes)}
    found = (-1 if text is None else index[text] if index else int(text) for text in texts)
    return np.fromiter(found, np.int32)


def check_embedding(array: np.ndarray, where) -> np.ndarray:
    """float16 [T, E] of an embedding as it was stored.

    Args:
        where: its file or key, for the message.

    Raises:
        ValueError: it is no floating-point array [T, E], or a value is not finite in float16.
    """
    if array.dtype.kind == "V":
        problem = f"has type {array.dtype} (bfloat16 has none in .npy): store float16 or float32"
    elif array.dtype.kind != "f":
        problem = f"has type {array.dtype}: store float16 or float32"
    elif array.ndim != 2 or 0 in array.shape:
        problem = f"has shape {list(array.shape)}: [tokens, channels] is needed"
    elif not np.isfinite(array).all():
        problem = "holds values that are not finite"
    elif (most := np.abs(array).max()) > np.finfo(np.float16).max:
        problem = f"reaches {most:g}: more than 65504, the most that float16 holds"
    else:
        return array.astype(np.float16)
    raise ValueError(f"{where}: the embedding {problem}")


def read_embedding(file, where) -> np.ndarray:
    """`check_embedding` of an .npy file, by its path or an open file."""
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception:  # NumPy raises nearly anything for a broken file.
        array = None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{where}: the embedding is no .npy file of numbers")
    return check_embedding(array, where)


def check_labels(source: Source, train: Source | None = None) -> int:
    """How many examples have no label, for a class-conditional model.

    Args:
        train: of a validation split: the training split, whose classes it must share.

    Raises:
        ValueError: the two splits have other classes.
    """
    labels, classes = source.labels, list(source.classes)
    if train is not None and classes != list(train.classes):
        only = sorted(set(classes) ^ set(train.classes)) or ["another order"]
        raise ValueError(
            "the validation data must have the classes of the training data; these differ: "
            + ", ".join(map(repr, only[:SHOWN]))
        )
    if train is not None and labels is not None and train.labels is not None:
        if new := sorted(set(labels.tolist()) - set(train.labels.tolist()) - {-1}):
            names = [classes[i] if classes else str(i) for i in new[:SHOWN]]
            log.warning("classes without a training example: %d, %s", len(new), ", ".join(names))
    if labels is None:
        return 0 if classes else len(source)
    return int((labels < 0).sum())
