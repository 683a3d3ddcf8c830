"""Data sets in ArrayRecord shards, with a manifest that says what they are.

    DIR/train/manifest.json                              made by whom, of what, how; its shards
    DIR/train/records-00000-of-00040.array_record        see records.py
    DIR/train/records-00000-of-00040.json                sha256, count and keys of that shard
    DIR/test/...                                         another split, made by the same models
    DIR/null_text.npy                                    where there are embeddings of captions

A shard is written to a temporary name and renamed, and gets its .json after that: a shard without
one, or whose bytes have another sha256, is made again. So any number of processes may each write
their own shards, and die at any time; whoever finds all shards there completes the manifest.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from flextok_jax.data.records import NULL_TEXT, Record, from_bytes, to_bytes
from flextok_jax.data.unreadable import MAX_UNREADABLE, complaint, too_many
from flextok_jax.io import storage

MANIFEST = "manifest.json"
FORMAT = 2  # Of manifest and records.
MODELS = ("tokenizer", "vae", "dinov2")  # Keys of a manifest: by whom the arrays were made.
PROGRESS = ("shards", "unreadable")  # What the manifest gathers; all else is a setting.
# Words for a model; its sha256 decides.
NAMES = tuple(f"{model}.{word}" for model in MODELS for word in ("source", "origin"))

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """An image that has no record, and why."""

    key: str
    reason: str


def write_split(
    folder,
    settings: dict,
    make_shard: Callable[[int], Iterable[Record | LeftOut]],
    null_text: np.ndarray | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict:
    """Writes every shard that is not there yet; an interrupted run is continued by the same call.

    What is there is read once and kept if its sha256 is right.

    Args:
        folder: DIR/SPLIT.
        settings: in JSON terms: "num_shards", those of `about_images`, "arrays" ({name: shape of
            one crop, None: bytes of a file}), those of MODELS (dictionaries with "origin" and
            "fingerprint"), and all else that decides the records.
        make_shard: index -> what becomes of its images, in order; each record is written before
            the next is asked for, because a shard of features is larger than memory.
        null_text: float [T, E], the embedding of the empty caption, where the data set has text.
        part: (i, n): write the shards i, i + n, i + 2n, ...

    Returns:
        The manifest; some of its "shards" are missing as long as other parts are.

    Raises:
        ValueError: the folder, or another split beside it, holds what other models made, or was
            made with other settings; or too many images are left out: it stops at once, without
            the shard that it was at.
    """
    folder, settings = pathlib.Path(folder), json.loads(json.dumps({"format": FORMAT} | settings))
    for other in manifests(folder.parent):
        if other.parent != folder:
            check_same(models(open_manifest(other)), models(settings), other.parent)
    path = folder / MANIFEST
    if path.exists():
        found = open_manifest(path)
        check_same({k: v for k, v in found.items() if k not in PROGRESS}, settings, folder)
    else:
        _write_json(path, settings | {"shards": {}, "unreadable": {}})
    if null_text is not None:
        with storage.atomic(folder.parent / NULL_TEXT) as temporary:
            np.save(temporary, np.asarray(null_text, np.float16))
    left_out: dict[str, str] = {}
    for name in _names(settings)[part[0] :: part[1]]:
        shard, beside = folder / f"{name}.array_record", folder / f"{name}.json"
        known = _about(beside)
        if known and shard.is_file() and _sha256(shard) == known["sha256"]:
            left_out |= known["unreadable"]
            continue
        if known:
            log.warning("%s is missing or damaged: it is made again", shard)
        for leftover in folder.glob(f".{name}.*"):  # of a killed run
            leftover.unlink()
        unreadable: dict[str, str] = {}

        def records(index: int) -> Iterator[Record]:
            for made in make_shard(index):
                if isinstance(made, Record):
                    yield made
                else:
                    left_out[made.key] = unreadable[made.key] = made.reason
                    _check_readable(left_out, settings, folder)

        about = _write_shard(shard, records(int(name.split("-")[1])))
        _write_json(beside, about | {"unreadable": unreadable})
    return _gather(folder, settings)


def about_images(source, count: int) -> dict:
    """The part of `settings` that says which images there are: the first `count` of a source.

    "keys_sha256" is over their keys in order, so that work which was interrupted does not go on
    with other images than it began with.
    """
    digest = hashlib.sha256()
    for place in range(count):
        digest.update(source.name(place).encode("utf-8", "surrogateescape") + b"\0")
    keys = digest.hexdigest()
    return {"num_images": count, "keys_sha256": keys, "classes": list(source.classes)}


def _names(settings: dict) -> list[str]:
    count = settings["num_shards"]
    return [f"records-{index:05d}-of-{count:05d}" for index in range(count)]


def _check_readable(unreadable: dict, settings: dict, folder: pathlib.Path):
    count = settings["num_images"]
    if too_many(len(unreadable), count):
        remedy = f", delete {folder} and give the command again"
        raise ValueError(complaint(unreadable, count, f"more than {MAX_UNREADABLE:.0%}", remedy))


def _gather(folder: pathlib.Path, settings: dict) -> dict:
    """The manifest of what is there; written once everything is."""
    manifest = settings | {"shards": {}, "unreadable": {}}
    for name in _names(settings):
        if about := _about(folder / f"{name}.json"):
            manifest["unreadable"] |= about.pop("unreadable")
            del about["keys"]
            manifest["shards"][f"{name}.array_record"] = about
    if len(manifest["shards"]) == settings["num_shards"]:
        _check_readable(manifest["unreadable"], settings, folder)
        _write_json(folder / MANIFEST, manifest)
    return manifest


def _write_shard(path: pathlib.Path, records: Iterable[Record]) -> dict:
    from array_record.python.array_record_module import ArrayRecordWriter

    keys, max_label, max_text = [], -1, 0
    with storage.atomic(path) as temporary:
        # One record per group: they are read one by one, in any order.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for record in records:
                writer.write(to_bytes(record))
                keys.append(record.key)
                max_label = max(max_label, record.label)
                if record.embedding is not None:
                    max_text = max(max_text, len(record.embedding))
        finally:
            writer.close()
        about = {"sha256": _sha256(temporary), "bytes": temporary.stat().st_size}
    about |= {"records": len(keys), "max_label": max_label, "max_text": max_text}
    return about | {"keys": keys}


def _about(file: pathlib.Path) -> dict | None:
    """What a shard's .json tells; None where there is none, or a lost machine left a part of it."""
    try:
        return storage.read_json(file)
    except (FileNotFoundError, ValueError):
        return None


def _write_json(path: pathlib.Path, content: dict):
    with storage.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def models(manifest: dict) -> dict:
    """The part of a manifest that says which models made the arrays."""
    return {name: manifest[name] for name in MODELS if name in manifest}


def check_same(found: dict, wanted: dict, where) -> None:
    """Refuses the work of two models, or made in two ways, in one place.

    Args:
        found: (a part of) the manifest that is there.
        wanted: the same part, as it is to be now.
        where: the place, for the message.

    Raises:
        ValueError: they differ; it names both sides of each difference.
    """
    theirs, ours = (_flatten(d) for d in (found, wanted))
    differences = [
        f"{key}: {theirs.get(key, '(absent)')!r} there, {ours.get(key, '(absent)')!r} now"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, ...) != theirs.get(key, ...)
    ]
    if any(not difference.startswith(NAMES) for difference in differences):
        raise ValueError(
            f"{where} holds what another model or other settings made, which must not be mixed. "
            "Write to another folder, or set these back:\n  " + "\n  ".join(differences)
        )


def _flatten(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in json.loads(json.dumps(tree)).items():
        nested = isinstance(value, dict)
        out |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out


def manifests(path) -> list[pathlib.Path]:
    """The manifests of all splits in DIR, finished or not."""
    return sorted(pathlib.Path(path).expanduser().glob(f"*/{MANIFEST}"))


def open_manifest(file: pathlib.Path) -> dict:
    """A manifest, of a finished split or not.

    Raises:
        ValueError: it has another format.
    """
    manifest = storage.read_json(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {manifest.get('format')}, and this version of flextok reads "
            f"{FORMAT}: encode (or pack) the images again, to another folder"
        )
    return manifest


def read_manifest(path, split: str) -> dict:
    """The manifest of a finished split.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the split is not finished, or has another format.
    """
    file = pathlib.Path(path).expanduser() / split / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: `flextok encode`, `flextok tokenize` or `flextok data pack` "
            f"with --split {split} --out {path} makes it"
        )
    manifest = open_manifest(file)
    if len(manifest["shards"]) != manifest["num_shards"]:
        done = sum(_about(file.parent / f"{name}.json") is not None for name in _names(manifest))
        raise ValueError(
            f"{file.parent} holds {done} of {manifest['num_shards']} shards: the command that "
            "wrote them was interrupted; run it again, it continues"
        )
    return manifest


def verify(folder: pathlib.Path) -> Iterator[tuple[str, str | None, int]]:
    """Reads everything in a finished split: yields (shard, what is wrong or None, its records).

    Wrong: a shard is missing, its bytes have another sha256, or it has another number of records,
    other keys or arrays of other shapes than the manifest says.

    Raises:
        FileNotFoundError, ValueError: there is no finished split.
    """
    manifest = read_manifest(folder.parent, folder.name)
    crops, shapes = manifest.get("crops"), manifest["arrays"]
    for name, about in manifest["shards"].items():
        yield name, _wrong(folder / name, about, crops, shapes), about["records"]


def _wrong(path: pathlib.Path, about: dict, crops: int | None, shapes: dict) -> str | None:
    if not path.is_file():
        return "it is missing"
    if (found := _sha256(path)) != about["sha256"]:
        return f"its sha256 is {found}, {about['sha256']} expected"
    if not about["records"]:
        return None
    records, keys = _open([path]), []
    for data in (records[i] for i in range(len(records))):
        record = from_bytes(data)
        keys.append(record.key)
        expected = {name: s and (crops, *s) for name, s in shapes.items()}
        found = {n: a.shape if expected.get(n) else None for n, a in record.arrays.items()}
        if found != expected:
            return f"{record.key} has arrays {found}, {expected} expected"
    beside = _about(path.with_suffix(".json"))
    if beside is None:
        return "its .json file is missing or damaged"
    if keys != beside["keys"]:
        return f"it holds {len(keys)} records whose keys are not those of its .json file"
    return None


def _open(files: list[pathlib.Path]):
    """Random access to the records of several files."""
    import grain  # Here, because a command that only draws asks for `manifests` and has no grain.

    return grain.sources.ArrayRecordDataSource([str(file) for file in files])


class ShardSource:
    """The records of one split as bytes (see records.py), in the order they were written.

    Attributes:
        manifest: see `write_split`; of "all" without a folder of that name: of the first split.
        classes: names of the labels, empty where they have none.
        text: (T, E): of the longest caption and of its embedding; None without text.
        null_text: float16 [T0, E], the embedding of the empty caption, None without text.
    """

    def __init__(self, path, split: str):
        """Opens DIR/SPLIT; "all": every split there is.

        Raises:
            FileNotFoundError, ValueError: it is missing, unfinished, damaged or holds no records;
                with the remedy.
        """
        root = pathlib.Path(path).expanduser()
        names = [split]
        if split == "all" and not (root / split).exists():
            names = [file.parent.name for file in manifests(root)] or names
        found = {root / name: read_manifest(root, name) for name in names}
        self.manifest = next(iter(found.values()))
        self._files, longest = [], 0
        for folder, manifest in found.items():
            for name, about in manifest["shards"].items():
                file = folder / name
                size = file.stat().st_size if file.is_file() else None
                if size != about["bytes"]:
                    raise ValueError(
                        f"{file} is damaged: {size} bytes, {about['bytes']} expected; run the "
                        "command that wrote it again, it repairs"
                    )
                longest = max(longest, about["max_text"])
                if about["records"]:
                    self._files.append((file, about["records"]))
        if not self._files:
            left_out = sum(len(manifest["unreadable"]) for manifest in found.values())
            raise ValueError(
                f"{root}, split {split!r}, holds no records ({left_out} images were left out as "
                "unreadable): delete it and make it again of other images"
            )
        self._ends = np.cumsum([count for _, count in self._files])
        self._records = _open([file for file, _ in self._files])
        self.classes = self.manifest.get("classes") or []
        self.text, self.null_text = None, None
        if (root / NULL_TEXT).is_file():
            self.null_text = np.load(root / NULL_TEXT, allow_pickle=False)
            self.text = max(longest, len(self.null_text)), self.null_text.shape[1]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return self._records[index]

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, "right"))
        file, count = self._files[shard]
        return _keys(file.with_suffix(".json"))[index - int(self._ends[shard]) + count]


@functools.lru_cache(maxsize=4)
def _keys(path: pathlib.Path) -> list[str]:
    return storage.read_json(path)["keys"]


class ImageSource(ShardSource):
    """Packed images (`flextok data pack`) as examples; see sources.py."""

    def __getitem__(self, index: int) -> dict:
        record = from_bytes(self._records[index])
        image = record.arrays["image"].tobytes()
        return {"image": image, "label": record.label, "caption": record.caption}

    def embedding(self, index: int) -> np.ndarray | None:
        """float16 [T, E] of the caption, None where there is none."""
        return from_bytes(self._records[index]).embedding
