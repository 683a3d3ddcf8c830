"""WebDataset-style tar shards with random access, by an index that is built once.

The files of a shard that share a name up to its first dot are one example (the convention of
github.com/webdataset/webdataset): `n01440764_18.jpg` the image, `.cls` its label as text, `.txt`
the caption, `.npy` the caption's embedding, `.json` a dictionary with `label` or `class`, and
`caption` or `text`. Where there is no such image, names are cut at their last dot: `22.05.png` is
the example `22.05`. Links lead to other members of the same tar file. Other files, such as
`x.seg.png` beside `x.png`, are left alone and counted.
"""

import io
import json
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flextok_jax.data import source
from flextok_jax.data.source import IMAGE_SUFFIXES, TRAIN, VALIDATION, Example, Skipped, log
from flextok_jax.io import paths, storage

FIELDS = ("image", "txt", "json", "npy")  # That are read when an example is wanted.
VERSION = 2  # Of the index: of what counts as an example.


class Index(NamedTuple):
    """The examples with an image in one tar file, in its order; texts as bytes, UTF-8.

    Attributes:
        keys: [N].
        offsets: int64 [N, FIELDS, (start, size)], start -1 where the example has no such field.
        labels: [N] (see `source.parse_label`), empty for an unknown one.
        skipped: [M, (reason, name)].
    """

    keys: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    skipped: np.ndarray


class WebDatasetSource(source.Source):
    """The examples of all tar files below a folder, or of one tar file, in their order.

    The splits are words in the paths of the tar files ("val/0.tar", "imagenet-train-0001.tar"), see
    `source.select`. Reading SHARD.tar the first time writes .SHARD.tar.index.npz beside it, where
    that is allowed; it is made again when the shard's size or time has changed.
    """

    def __init__(self, path, split: str):
        """Opens the index of every tar file.

        Raises:
            FileNotFoundError, ValueError: there is none, no such split, or one is no tar file.
        """
        super().__init__()
        root = source.place(path)
        base, inside = (root.parent, [root.name]) if root.is_file() else (root, _below(root))
        files = {name: base / name for name in inside if name.endswith(".tar")}
        for name in inside:
            if re.search(r"(^|/)[^./][^/]*(\.tar\.\w+|\.tgz)$", name):
                self.skipped.add("compressed, without random access: unpack it to .tar", name)
        if not files:
            skipped = "\n  ".join(self.skipped.lines())
            raise FileNotFoundError(f"{str(root)!r} holds no .tar files\n  {skipped}")
        indices = [read_index(file) for file in files.values()]
        keys, texts = [], []
        for name, index in zip(files, indices):
            for reason, member in index.skipped:
                self.skipped.add(_text(reason), f"{name}/{_text(member)}")
            keys += [f"{name}/{_text(key)}" for key in index.keys]
            texts += [_text(label) or None for label in index.labels]
        labels = {key: text for key, text in zip(keys, texts) if text}
        self.classes = source.label_classes(labels, f"the tar files in {root}")
        shard = np.repeat(np.arange(len(indices)), [len(index.keys) for index in indices])
        parts = np.array([_part(name) for name in files])[shard]
        used, _ = source.select(keys, parts, split, str(root), self.skipped)
        self._files, self._shard = list(files.values()), shard[used]
        self._keys = [key for key, use in zip(keys, used) if use]
        self._offsets = np.concatenate([index.offsets for index in indices])[used]
        self.labels = source.label_numbers(texts, self.classes)[used]

    def read(self, index: int) -> Example:
        found, key = self._read(index, FIELDS[:-1]), self._keys[index]
        value, where = found.get("txt"), f"{key}.txt"
        if value is None:
            where = f"{key}.json"
            fields = self.skipped.usable(_json, found.get("json", b"{}"), where) or {}
            value = source.first_of(fields, source.CAPTION)
        caption = self.skipped.usable(source.parse_caption, value, where)
        return Example(found["image"], int(self.labels[index]), caption, key)

    def embedding(self, index: int) -> np.ndarray | None:
        data = self._read(index, ("npy",)).get("npy")
        return None if data is None else source.read_embedding(io.BytesIO(data))

    def _read(self, index: int, fields) -> dict[str, bytes]:
        """The bytes of those fields that the example has."""
        found = {}
        for field in fields:
            start, size = self._offsets[index, FIELDS.index(field)].tolist()
            if start >= 0:
                found[field] = paths.read(self._files[self._shard[index]], start, size)
        return found


def _below(root) -> list[str]:
    """The sorted names of all files below a folder."""
    if paths.is_remote(root):
        return paths.below(root)
    return [file.relative_to(root).as_posix() for file in sorted(root.rglob("*"))]


def _part(name: str) -> str:
    """The split that the words of a shard's path below the folder name, or ""."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in words if word in (TRAIN, *VALIDATION)), "")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _json(data: bytes) -> dict:
    """The fields of a .json file; {} where it holds something else, such as a list of boxes."""
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("the .json file is not JSON") from None
    return fields if isinstance(fields, dict) else {}


def read_index(path) -> Index:
    """The examples of one tar file; makes the index file if it is not there."""
    stamp = np.array([VERSION, *paths.version(path)])
    file = path.with_name(f".{path.name}.index.npz")
    try:
        with np.load(io.BytesIO(paths.read(file)), allow_pickle=False) as found:
            if (found["stamp"] == stamp).all():
                return Index(**{name: found[name] for name in Index._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # Absent, damaged or of an earlier version: it is only a cache.
    log.info("building the index of %s", path)
    index = _scan(path)
    try:
        with storage.atomic(file) as temporary:
            np.savez(temporary, stamp=stamp, **index._asdict())
    except Exception as error:  # Each store has its own.
        log.warning("the index of %s is not kept for the next time: %s", path, error)
    return index


def _scan(path) -> Index:
    """`read_index` by a pass over the headers, the labels and the JSON files."""
    skipped, labels = Skipped(), []
    with path.open("rb") as data:
        examples = _examples(path, data, skipped)
        for key, fields in examples.items():
            label = None
            for field in ("cls", "json"):
                if field in fields and label is None:
                    data.seek(fields[field][0])
                    content = data.read(fields[field][1])
                    if field == "json":
                        parsed = skipped.usable(_json, content, f"{key}.json") or {}
                        content = source.first_of(parsed, source.LABEL)
                    label = skipped.usable(source.parse_label, content, f"{key}.{field}")
            labels.append(label or "")
    offsets = [[fields.get(name, (-1, 0)) for name in FIELDS] for fields in examples.values()]
    offsets = np.array(offsets, np.int64).reshape(-1, len(FIELDS), 2)
    pairs = [pair for reason, names in skipped.items() for name in names for pair in (reason, name)]
    return Index(_bytes(examples), offsets, _bytes(labels), _bytes(pairs).reshape(-1, 2))


def _members(path, data, skipped: Skipped) -> dict[str, tuple[int, int]]:
    """{name: (start, size)} of the files in a tar file, in its order."""
    found: dict[str, tuple[int, int] | str] = {}  # A link's value is the name that it leads to.
    try:
        with tarfile.open(fileobj=data, mode="r:") as tar:
            for member in tar:
                tar.members = []  # Or it keeps them all.
                name, value = _normal(member.name), (member.offset_data, member.size)
                if member.issym():
                    value = _normal(posixpath.join(posixpath.dirname(name), member.linkname))
                elif member.islnk():
                    value = _normal(member.linkname)
                elif not member.isfile():
                    continue
                if name in found:
                    skipped.add("stored again (the first counts)", name)
                else:
                    found[name] = value
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar file ({error}); fetch it again") from error
    members = {}
    for name, value in found.items():
        passed = set()
        while isinstance(value, str) and value not in passed:
            passed.add(value)
            value = found.get(value)
        if isinstance(value, tuple):
            members[name] = value
        else:
            skipped.add("a link to what is no file of this tar file: use tar --dereference", name)
    return members


def _normal(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _examples(path, data, skipped: Skipped) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {field: (start, size)}} of the examples with an image."""
    members = _members(path, data, skipped)
    names = [name for name in members if not posixpath.basename(name).startswith(".")]
    first = {name: _split(name, name.find(".", name.rfind("/") + 1)) for name in names}
    complete = {key for key, field in first.values() if field == "image"}
    examples: dict[str, dict[str, tuple[int, int]]] = {}
    for name in names:
        (key, field), last = first[name], _split(name, name.rfind("."))
        if field is None and last[1] is None:
            ending = posixpath.splitext(name)[1] or "(none)"
            skipped.add(f"no image, label or caption by its ending {ending}", name)
            continue
        if field is None and key in complete:
            skipped.add("another file of an example (its name goes to the first dot)", name)
            continue
        key, field = last if field is None else (key, field)
        if field in examples.setdefault(key, {}):
            raise ValueError(
                f"{path} has more than one {field} of the example {key!r}, the second is {name!r}: "
                "give each image a name of its own up to the first dot"
            )
        examples[key][field] = members[name]
    for key in [key for key, fields in examples.items() if "image" not in fields]:
        skipped.add("labels or captions without an image", key)
        del examples[key]
    return examples


def _split(name: str, dot: int) -> tuple[str, str | None]:
    """(key, field) of a member's name that is cut at a dot; None: no field that is known."""
    stem, suffix = (name[:dot], name[dot:].lower()) if dot > 0 else (name, "")
    if suffix in IMAGE_SUFFIXES:
        return stem, "image"
    return stem, suffix[1:] if suffix[1:] in ("cls", *FIELDS[1:]) else None


def _bytes(texts: Iterable[str]) -> np.ndarray:
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], np.bytes_)
