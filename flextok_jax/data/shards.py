"""Data sets in ArrayRecord shards, with a manifest that says what they are.

    DIR/train/manifest.json                              models, settings, and all shards
    DIR/train/records-00000-of-00040.array_record        see records.py
    DIR/train/records-00000-of-00040.json                sha256, count, keys and labels of the shard
    DIR/test/...                                         another split, of the same models
    DIR/null_text.npy                                    where there are embeddings of captions

A shard gets its name when it is whole, after its .json, so one that exists is not made again. Any
number of processes may each write their own shards; whoever finds all there completes the manifest.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from flextok_jax.data import source
from flextok_jax.data.reader import Unreadable, UnreadableCount
from flextok_jax.data.records import NULL_TEXT, Record, from_bytes, to_bytes
from flextok_jax.data.source import Example, Source
from flextok_jax.io import paths, storage

MANIFEST = "manifest.json"
FORMAT = 2  # Of manifest and records.
MAX_TEXT = 512  # Tokens of a caption in a batch: one long caption must not pad all others.
MODELS = ("tokenizer", "vae", "dinov2")  # Keys of a manifest: the models that made the arrays.
RESULTS = ("shards", "unreadable")  # Of a manifest; all else is a setting.
WHERE = rf"({'|'.join(MODELS)})\.(source|origin)"  # Where a model lies; its sha256 decides.


def write_split(
    folder,
    settings: dict,
    make_shard: Callable[[int], Iterable[Record | Unreadable]],
    null_text: np.ndarray | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict:
    """Writes every shard that is not there yet.

    Args:
        folder: DIR/SPLIT.
        settings: in JSON terms: "num_shards", those of `source_settings`, "arrays" ({name: shape of
            one crop, None: bytes of a file}), those of MODELS (dictionaries with "origin" and
            "fingerprint"), of tokens "vocab_size", "num_tokens" and perhaps "lengths" (which: then
            records have one), and all else that decides.
        make_shard: index -> what becomes of its images, in order; each record is written before
            the next is asked for, because a shard of features is larger than memory.
        null_text: float16 [T, E], the embedding of the empty caption, where the data set has text.
        part: (i, n): write the shards i, i + n, i + 2n, ...

    Returns:
        The manifest so far; other parts may be missing.

    Raises:
        ValueError: the folder, or another split beside it, was made by other models or settings.
        OSError: more than a tenth of all images are unreadable.
    """
    folder, settings = source.place(folder), json.loads(json.dumps({"format": FORMAT} | settings))
    for other in manifests(folder.parent):
        part_of = _settings if other.parent == folder else models
        check_same(part_of(open_manifest(other)), part_of(settings), other.parent)
    path = folder / MANIFEST
    if null_text is not None:
        _write_null_text(folder.parent / NULL_TEXT, null_text)
    if not path.exists():
        storage.write_json(path, settings | {"shards": {}, "unreadable": {}})
    unreadable = UnreadableCount(settings["num_images"])
    for index in range(part[0], settings["num_shards"], part[1]):
        shard = _shard(folder, settings, index)
        if not shard.is_file():
            channels = None if null_text is None else null_text.shape[1]
            _write_shard(shard, make_shard(index), unreadable, channels)
    shards, unreadable = {}, UnreadableCount(settings["num_images"])
    for index in range(settings["num_shards"]):
        shard = _shard(folder, settings, index)
        if shard.is_file():
            info = _info(shard)
            unreadable.update(info.pop("unreadable"))
            shards[shard.name] = {k: v for k, v in info.items() if k not in ("keys", "labels")}
    manifest = settings | {"shards": shards, "unreadable": dict(unreadable)}
    if len(shards) == settings["num_shards"]:
        unreadable.check()
        storage.write_json(path, manifest)
    return manifest


def _write_null_text(file, embedding: np.ndarray) -> None:
    """Raises ValueError where the file holds another embedding."""
    if not file.exists():
        with storage.atomic(file) as temporary:
            np.save(temporary, embedding)
    elif not np.array_equal(null_text(file.parent), embedding.astype(np.float16)):
        raise ValueError(f"{file} is of another text encoder: write to another folder")


def source_settings(examples: Source, count: int) -> dict:
    """The part of `settings` that says which images there are: the first `count` of a source.

    "keys_sha256" is over their keys in order: interrupted work goes on with the same images only.
    """
    classes, keys = list(examples.classes), source.keys_sha256(examples, count)
    return {"num_images": count, "keys_sha256": keys, "classes": classes}


def _shard(folder, settings: dict, index: int):
    return folder / f"records-{index:05d}-of-{settings['num_shards']:05d}.array_record"


def _info(shard) -> dict:
    if not (file := shard.with_suffix(".json")).exists():
        raise ValueError(f"{shard} has no {file.name} beside it: delete it, to write it again")
    return storage.read_json(file)


def _write_shard(path, made, count: UnreadableCount, channels: int | None):
    from array_record.python.array_record_module import ArrayRecordWriter

    if not paths.is_remote(path):
        for leftover in path.parent.glob(f".{path.stem}.*"):  # Of a killed run.
            leftover.unlink()
    keys, labels, unreadable, longest, texts = [], [], {}, 0, 0
    with storage.atomic(path) as temporary:
        # One record per group: they are read one by one, in any order.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for record in made:
                if isinstance(record, Unreadable):
                    count[record.key] = unreadable[record.key] = record.reason
                    count.check()
                    continue
                if record.embedding is not None:
                    length, width = record.embedding.shape
                    longest, texts = max(longest, length), texts + 1
                    if channels not in (None, width):
                        raise ValueError(f"{record.key}: {width} channels, {NULL_TEXT} {channels}")
                writer.write(to_bytes(record))
                keys.append(record.key)
                labels.append(int(record.label))
        finally:
            writer.close()
        info = {
            "sha256": storage.sha256(temporary),
            "bytes": temporary.stat().st_size,
            "records": len(keys),
            "max_label": max(labels, default=-1),
            "max_text": longest,
            "texts": texts,
            "unreadable": unreadable,
            "keys": keys,
            "labels": labels,
        }
        storage.write_json(path.with_suffix(".json"), info)


def models(manifest: dict) -> dict:
    """The part of a manifest that says which models made the arrays."""
    return {name: manifest[name] for name in MODELS if name in manifest}


def _settings(manifest: dict) -> dict:
    return {key: value for key, value in manifest.items() if key not in RESULTS}


def check_same(found: dict, wanted: dict, where) -> None:
    """Raises ValueError where (parts of) two manifests differ; it names both sides."""
    if storage.differences(found, wanted, ignore=WHERE):
        lines = "\n  ".join(storage.differences(found, wanted))
        raise ValueError(
            f"{where} was made by another model or with other settings. Write to another folder, "
            f"or set these back:\n  {lines}"
        )


def manifests(path) -> list:
    """The manifests of all splits in DIR, finished or not."""
    return sorted(source.place(path).glob(f"*/{MANIFEST}"))


def open_manifest(file) -> dict:
    """A manifest, of a finished split or not. Raises ValueError for one of another format."""
    manifest = storage.read_json(file)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {manifest.get('format')}, this version reads {FORMAT}: encode (or "
            "pack) the images again, to another folder"
        )
    return manifest


def read_manifest(path, split: str) -> dict:
    """The manifest of a finished split; "validation", "val" and "test" are synonyms.

    Raises:
        FileNotFoundError, ValueError: no such split, or it is not finished, or has another format.
    """
    return _finished(path, split)[1]


def _finished(path, split: str) -> tuple:
    """(DIR/SPLIT, its manifest)."""
    found = {file.parent.name: file for file in manifests(path)}
    if not found:
        raise FileNotFoundError(
            f"{path} holds no {MANIFEST}; `flextok encode` or `flextok data pack` with --split "
            f"{split} --out {path} makes it"
        )
    name = split if split in found else source.resolve_split(split, found, str(path))
    file = found.get(name) or next(iter(found.values()))  # "all" without a folder of that name.
    manifest = open_manifest(file)
    if len(manifest["shards"]) != manifest["num_shards"]:
        done = len(list(file.parent.glob("records-*.array_record")))
        raise ValueError(
            f"{file.parent} holds {done} of {manifest['num_shards']} shards: run the command that "
            "wrote them again, it continues"
        )
    return file.parent, manifest


def verify(folder) -> Iterator[tuple[str, str | None, int]]:
    """Reads every byte of a finished split: yields (shard, what is wrong or None, its records)."""
    for name, info in read_manifest(folder.parent, folder.name)["shards"].items():
        path, wrong = folder / name, None
        if not path.is_file():
            wrong = "it is missing"
        elif (found := storage.sha256(path)) != info["sha256"]:
            wrong = f"its sha256 is {found}, {info['sha256']} expected"
        yield name, wrong, info["records"]


class ShardSource(Source):
    """Packed images, or what models made of images, in the order in which they were written.

    Attributes:
        manifest: see `write_split`; of "all" without a folder of that name: of the first split.
        has_lengths: whether tokens have a length for each image.
        text: (T, E): tokens of the longest caption (at most MAX_TEXT), channels; None without text.
        null_text: float16 [T0, E], the embedding of the empty caption, None without text.
        without_text: how many examples have no embedding of a caption.
    """

    def __init__(self, path, split: str):
        """Opens DIR/SPLIT; "all": every split there is.

        Raises:
            FileNotFoundError, ValueError: it is missing, unfinished, damaged or holds no records.
        """
        import grain  # Here, because commands that need manifests only may have no grain.

        super().__init__()
        root = source.place(path)
        splits = [file.parent.name for file in manifests(root)]
        if split != source.ALL or split in splits or not splits:
            splits = [split]
        opened = dict(_finished(root, name) for name in splits)
        self.manifest = next(iter(opened.values()))
        self.classes = self.manifest.get("classes", [])
        if any(manifest.get("classes", []) != self.classes for manifest in opened.values()):
            raise ValueError(f"{root}: its splits have different classes; name one of {splits}")
        self.has_lengths = any(manifest.get("lengths") for manifest in opened.values())
        files, labels, longest, self._keys, self.without_text = [], [], 0, [], 0
        for folder, manifest in opened.items():
            for key, reason in manifest["unreadable"].items():
                self.skipped.add(f"left out when the shards were written: {reason}", key)
            for name, info in manifest["shards"].items():
                file = folder / name
                size = paths.version(file)[0] if file.is_file() else None
                if size != info["bytes"]:
                    raise ValueError(
                        f"{file} has {size} bytes, {info['bytes']} expected; delete it and run the "
                        "command that wrote it again"
                    )
                longest = max(longest, info["max_text"])
                self.without_text += info["records"] - info.get("texts", info["records"])
                if info["max_text"] > MAX_TEXT:
                    self.skipped.add(f"captions are cut after {MAX_TEXT} tokens", str(file))
                if info["records"]:
                    files.append(_readable(file, info["sha256"]))
                    details = _info(file)
                    self._keys += details["keys"]
                    labels.append(details.get("labels"))
        if not files:
            lines = [f"{root}, split {split!r}, holds no records", *self.skipped.lines()]
            raise ValueError("\n  ".join(lines))
        self.labels = None if None in labels else np.concatenate(labels).astype(np.int32)
        self._records = grain.sources.ArrayRecordDataSource(files)
        self.text, self.null_text = None, null_text(root)
        if self.null_text is not None:
            longest = max(longest, len(self.null_text))
            self.text = min(longest, MAX_TEXT), self.null_text.shape[1]

    def record(self, index: int) -> Record:
        """What is stored of an example."""
        return from_bytes(self._records[index])

    def read(self, index: int) -> Example:
        """A packed image (`flextok data pack`)."""
        record = self.record(index)
        image = record.arrays["image"].tobytes()
        return Example(image, record.label, record.caption, record.key)

    def caption(self, index: int) -> str | None:
        return self.record(index).caption

    def embedding(self, index: int) -> np.ndarray | None:
        return self.record(index).embedding


def _readable(file, sha256: str) -> str:
    """What ArrayRecord opens: local files and gs://. Of s3:// a copy that stays on this machine."""
    return str(storage.cached(file, sha256) if str(file).startswith("s3://") else file)


def null_text(path) -> np.ndarray | None:
    """float16 [T, E]: the embedding of the empty caption, in a data set with text."""
    file = source.place(path) / NULL_TEXT
    try:
        if not file.is_file():
            return None
        return source.read_embedding(io.BytesIO(paths.read(file)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
