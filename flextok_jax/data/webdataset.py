"""WebDataset-style tar shards with random access, by an index that is built once.

The files of a shard that share a name up to its first dot are one example (the convention of
github.com/webdataset/webdataset): `n01440764_18.jpg` the image, `.cls` its label as text, `.txt`
the caption, `.npy` the caption's embedding, `.json` a dictionary with `label`, `caption` or `text`.
Files with other endings, such as `.seg.png`, are left alone.
"""

import hashlib
import io
import json
import logging
import os
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flextok_jax.data.folder import (
    HELD_OUT,
    IMAGE_SUFFIXES,
    check_split,
    hold_out,
    label_classes,
    label_text,
)
from flextok_jax.io import storage

FIELDS = ("image", "txt", "json", "npy")  # That are read when an example is wanted.
LONGEST = 200  # Characters of a class's name.
CACHE = pathlib.Path("~/.cache/flextok_jax/tar")  # Of indices that cannot lie beside their shard.

log = logging.getLogger(__name__)


class Index(NamedTuple):
    """The examples with an image in one tar file, in its order.

    Attributes:
        keys: bytes [N], UTF-8.
        places: int64 [N, FIELDS, (start, size)], of each field's bytes, start -1 where the example
            has none.
        labels: int64 [N], indices into `texts`.
        texts: bytes [T], UTF-8, sorted: the labels that there are (see `folder.label_text`), "" for
            an unknown one.
    """

    keys: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    texts: np.ndarray


class WebDatasetSource:
    """The examples of all tar files below a folder, or of one tar file, in their order.

    The splits "train" and "test" are the subfolders train/ and test/ (or val/, validation/) or the
    files whose name has such a word ("imagenet-train-0001.tar"), where there are both; otherwise
    examples are held out as in an image folder, by a hash of their key, "SHARD.tar/NAME".

    Reading SHARD.tar the first time writes .SHARD.tar.index.npz beside it (in ~/.cache/flextok_jax
    where the folder is read-only); it is made again when the shard's size or time has changed.

    Attributes:
        classes: sorted names of the classes, over both splits; empty where the labels are numbers.
    """

    def __init__(self, path, split: str):
        root = pathlib.Path(path).expanduser()
        check_split(split, "a folder of tar files has")
        files = [root] if root.is_file() else sorted(root.rglob("*.tar"))
        if not files:
            raise FileNotFoundError(
                f"{str(root)!r} holds no .tar files (compressed ones, .tar.gz, have no random "
                "access: unpack them with gunzip). Pass the folder that holds the shards "
                "(in a config: --config.data.path=FOLDER)."
            )
        self._title, base = str(root), root.parent if root.is_file() else root
        names = [file.relative_to(base).as_posix() for file in files]
        parts = [_part(name) for name in names]
        by_name = {"train", "test"} <= set(parts)
        indices = {name: read_index(file) for name, file in zip(names, files)}
        self.classes, numbers = _numbers(indices, root)
        if by_name and split != "all":
            chosen = [i for i, part in enumerate(parts) if part == split]
            files, names = ([x[i] for i in chosen] for x in (files, names))
        self._files = files
        keys = [f"{name}/{_text(key)}" for name in names for key in indices[name].keys]
        shard = np.repeat(np.arange(len(files)), [len(indices[name].keys) for name in names])
        places = np.concatenate([indices[name].places for name in names])
        labels = np.concatenate([numbers[name] for name in names])
        if not by_name and split != "all":
            wanted = np.array(hold_out(keys), bool) == (split == "test")
            keys = [key for key, keep in zip(keys, wanted) if keep]
            shard, places, labels = shard[wanted], places[wanted], labels[wanted]
        if not keys:
            raise ValueError(f"The tar files in {str(root)!r} hold no images for split {split!r}.")
        self._keys, self._shard, self._places, self._labels = keys, shard, places, labels

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict:
        found = self._read(index, FIELDS[:-1])
        about = json.loads(found.get("json", b"{}"))
        about = about if isinstance(about, dict) else {}  # A list of boxes, for example.
        caption = about.get("caption") or about.get("text")
        if "txt" in found:
            caption = found["txt"].decode().strip()
        label = int(self._labels[index])
        return {"image": found["image"], "label": label, "caption": caption or None}

    def embedding(self, index: int) -> np.ndarray | None:
        """float [T, E] of the caption, None where there is none."""
        data = self._read(index, ("npy",)).get("npy")
        return None if data is None else np.load(io.BytesIO(data), allow_pickle=False)

    def name(self, index: int) -> str:
        return self._keys[index]

    def _read(self, index: int, fields) -> dict[str, bytes]:
        """The bytes of those fields that the example has."""
        found = {}
        with open(self._files[self._shard[index]], "rb") as file:
            for field in fields:
                start, size = self._places[index, FIELDS.index(field)]
                if start < 0:
                    continue
                file.seek(start)
                found[field] = file.read(size)
                if len(found[field]) < size:
                    raise OSError(f"the tar file ends inside of the example's {field}")
        return found


def _part(name: str) -> str:
    """ "train", "test" or "" by the words of a shard's path below the folder."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word == "train" or word in HELD_OUT:
            return "train" if word == "train" else "test"
    return ""


def _numbers(indices: dict[str, Index], root) -> tuple[list[str], dict[str, np.ndarray]]:
    """(classes, {name of a tar file: int64 [N], its labels}).

    Raises:
        ValueError: some labels are numbers and some are names.
    """
    labels = {
        f"{name}/{_text(index.keys[np.argmax(index.labels == i)])}": _text(text)
        for name, index in indices.items()
        for i, text in enumerate(index.texts)
        if text
    }
    classes = label_classes(labels, f"the tar files in {root}")
    number = {name: i for i, name in enumerate(classes)} or {n: int(n) for n in labels.values()}
    found = {}
    for name, index in indices.items():
        numbers = [number.get(_text(text), -1) for text in index.texts]
        found[name] = np.array(numbers, np.int64)[index.labels]
    return classes, found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def read_index(path: pathlib.Path) -> Index:
    """The examples of one tar file; makes the index file if it is not there.

    Raises:
        ValueError: it is no whole tar file, or its examples are not clear; with the remedy.
    """
    stat = path.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    beside = path.with_name(f".{path.name}.index.npz")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    for file in (beside, CACHE.expanduser() / f"{name}.npz"):
        try:
            with np.load(file, allow_pickle=False) as found:
                if (found["stamp"] == stamp).all():
                    return Index(**{name: found[name] for name in Index._fields})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # Absent or damaged: it is only a cache.
    log.info("building the index of %s", path)
    index = _scan(path)
    for file in (beside, CACHE.expanduser() / f"{name}.npz"):
        try:
            with storage.atomic(file) as temporary:
                np.savez(temporary, stamp=stamp, **index._asdict())
            break
        except OSError:
            continue
    return index


def _scan(path: pathlib.Path) -> Index:
    """`read_index` by a pass over the headers, the labels and the JSON files."""
    examples: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                field = "image" if dot + suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                if member.isfile() and stem and field in (*FIELDS, "cls"):
                    key = f"{folder}/{stem}" if folder else stem
                    fields = examples.setdefault(key, {})
                    if field in fields:
                        raise ValueError(
                            f"{path} has more than one {field} of the example {key!r}, the second "
                            f"is {member.name!r}: give each image a name of its own up to the "
                            "first dot"
                        )
                    fields[field] = (member.offset_data, member.size)
                    if field in ("cls", "json"):
                        label = _label(field, tar.extractfile(member).read(), f"{path}: {key}")
                        if field == "cls" or "cls" not in fields:
                            labels[key] = label
                tar.members = []  # Or it keeps them all.
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar file ({error}); fetch it again") from error
    examples = {key: fields for key, fields in examples.items() if "image" in fields}
    places = [[fields.get(name, (-1, 0)) for name in FIELDS] for fields in examples.values()]
    texts, numbers = np.unique(_bytes(labels.get(key, "") for key in examples), return_inverse=True)
    places = np.array(places, np.int64).reshape(-1, len(FIELDS), 2)
    return Index(_bytes(examples), places, numbers.astype(np.int64), texts)


def _bytes(texts: Iterable[str]) -> np.ndarray:
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], np.bytes_)


def _label(field: str, data: bytes, where: str) -> str:
    """The label that a .cls or .json file tells, as text; "" where it tells none.

    Raises:
        ValueError: it is neither a number nor a name.
    """
    label = _text(data)
    if field == "json":
        try:
            about = json.loads(data)
        except (ValueError, RecursionError):
            return ""  # The example cannot be read; that is told when it is wanted.
        label = about.get("label") if isinstance(about, dict) else None
    text = label_text(label) or ""
    if isinstance(label, list | dict) or len(text) > LONGEST:
        raise ValueError(
            f"{where} has the label {text[:LONGEST]!r}: a label is a whole number or a name of at "
            f"most {LONGEST} characters"
        )
    return text
