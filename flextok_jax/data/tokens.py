"""Images that are tokens already: ArrayRecord shards and the manifest that says what they are.

    DIR/train/manifest.json                     what the tokens are: made by whom, of what, how
    DIR/train/tokens-00000-of-00040.array_record
    DIR/test/...                                another split, of the same tokenizer

A record is one image: a safetensors blob (no code, no pickle) with

    tokens      uint16 or uint32 [crops, k]; crop 0 is the plain one, without randomness
    label       int32 [], -1 unknown
    caption     uint8 [n], UTF-8, where there is one
    embedding   float16 [T, E], of the caption, where the data set has text
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable

import grain
import numpy as np

from flextok_jax.interop import tensor_file

MANIFEST, NULL_TEXT = "manifest.json", "null_text.npy"
PROGRESS = ("shards", "unreadable")  # What the manifest gathers; all else is a setting.
NAMES = ("tokenizer.source", "tokenizer.origin")  # Words for a tokenizer; its sha256 decides.

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Record:
    """One image.

    Attributes:
        tokens: int [crops, k].
        label: the class, -1 unknown.
        caption: None where there is none.
        embedding: float [T, E], of the caption, without padding; None where there is none.
    """

    tokens: np.ndarray
    label: int
    caption: str | None = None
    embedding: np.ndarray | None = None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def to_bytes(record: Record, vocab_size: int) -> bytes:
    """A record as it is stored.

    Raises:
        ValueError: an id is out of range.
    """
    from safetensors.numpy import save

    tokens = np.asarray(record.tokens)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"token id {wrong}: must be in 0..{vocab_size - 1}")
    arrays = {
        "tokens": np.ascontiguousarray(tokens, token_dtype(vocab_size)),
        "label": np.array(record.label, np.int32),
    }
    if record.caption is not None:
        arrays["caption"] = np.frombuffer(record.caption.encode(), np.uint8)
    if record.embedding is not None:
        arrays["embedding"] = np.ascontiguousarray(record.embedding, np.float16)
    return save(arrays)


def from_bytes(data: bytes) -> Record:
    """The inverse of `to_bytes`."""
    from safetensors.numpy import load

    arrays = load(data)
    caption = arrays.get("caption")
    return Record(
        arrays["tokens"],
        int(arrays["label"]),
        None if caption is None else caption.tobytes().decode(),
        arrays.get("embedding"),
    )


def write_split(
    folder,
    settings: dict,
    make_shard: Callable[[int], tuple[list[Record], dict[str, str]]],
    null_text: np.ndarray | None = None,
) -> dict:
    """Writes every shard that is not there yet; an interrupted run is continued by the same call.

    A shard is written to a temporary name and renamed; the manifest gains its line afterwards. What
    the manifest lists is read once and kept if its sha256 is right.

    Args:
        folder: DIR/SPLIT.
        settings: in JSON terms: "tokenizer" (a dictionary with "origin" and "fingerprint"),
            "vocab_size", "num_tokens" (k), "num_shards", and all else that decides the tokens.
        make_shard: index -> (its records, {name: reason} of the images it leaves out).
        null_text: float [T, E], the embedding of the empty caption, where the data set has text.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder, or another split beside it, holds tokens of another tokenizer, or
            made with other settings.
    """
    folder = pathlib.Path(folder)
    for other in sorted(folder.parent.glob(f"*/{MANIFEST}")):
        if other.parent != folder:
            check_same(*map(_tokenizer, (tensor_file.read_json(other), settings)), other.parent)
    path = folder / MANIFEST
    manifest = settings | {"shards": {}, "unreadable": {}}
    if path.exists():
        manifest = tensor_file.read_json(path)
        check_same({k: v for k, v in manifest.items() if k not in PROGRESS}, settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tokens-*"):  # of a killed run
        leftover.unlink()
    if null_text is not None:
        with tensor_file.atomic(folder / NULL_TEXT) as temporary:
            np.save(temporary, np.asarray(null_text, np.float16))
    _write_manifest(path, manifest)
    count = settings["num_shards"]
    for index in range(count):
        name = f"tokens-{index:05d}-of-{count:05d}.array_record"
        known = manifest["shards"].get(name)
        if known and (folder / name).is_file() and _sha256(folder / name) == known["sha256"]:
            continue
        if known:
            log.warning("%s is missing or damaged: it is made again", folder / name)
        records, unreadable = make_shard(index)
        manifest["shards"][name] = _write_shard(folder / name, records, settings["vocab_size"])
        manifest["shards"] = dict(sorted(manifest["shards"].items()))
        manifest["unreadable"] |= unreadable
        _write_manifest(path, manifest)
    return manifest


def _write_shard(path: pathlib.Path, records: list[Record], vocab_size: int) -> dict:
    from array_record.python.array_record_module import ArrayRecordWriter

    with tensor_file.atomic(path) as temporary:
        # One record per group: they are read one by one, in any order.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for record in records:
            writer.write(to_bytes(record, vocab_size))
        writer.close()
        about = {"sha256": _sha256(temporary), "bytes": temporary.stat().st_size}
    lengths = [len(r.embedding) for r in records if r.embedding is not None]
    return about | {
        "records": len(records),
        "max_label": max((r.label for r in records), default=-1),
        "max_text": max(lengths, default=0),
    }


def _write_manifest(path: pathlib.Path, manifest: dict):
    with tensor_file.atomic(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same(found: dict, wanted: dict, where) -> None:
    """Refuses tokens of two tokenizers, or made in two ways, in one place.

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
            f"{where} holds tokens of another tokenizer or other settings, which must not be "
            "mixed. Write to another folder, or set these back:\n  " + "\n  ".join(differences)
        )


def _tokenizer(manifest: dict) -> dict:
    return {"tokenizer": manifest["tokenizer"]}


def _flatten(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in json.loads(json.dumps(tree)).items():
        nested = isinstance(value, dict)
        out |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out


def read_manifest(path, split: str) -> dict:
    """The manifest of a finished split.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the split is not finished.
    """
    file = pathlib.Path(path).expanduser() / split / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: `flextok tokenize --model MODEL --data IMAGES --split {split} "
            f"--out {path}` makes it"
        )
    manifest = tensor_file.read_json(file)
    done, wanted = len(manifest["shards"]), manifest["num_shards"]
    if done != wanted:
        raise ValueError(
            f"{file.parent} holds {done} of {wanted} shards: the `flextok tokenize` that wrote "
            "them was interrupted; run it again, it continues"
        )
    return manifest


class TokenSource:
    """The records of one split as bytes (see `from_bytes`), in the order they were written.

    Attributes:
        manifest: see `write_split`.
        text: (T, E): of the longest caption and of its embedding; None without text.
        null_text: float16 [T0, E], the embedding of the empty caption, None without text.
    """

    def __init__(self, path, split: str):
        """Opens DIR/SPLIT.

        Raises:
            FileNotFoundError, ValueError: it is missing, unfinished or damaged; with the remedy.
        """
        self.manifest = read_manifest(path, split)
        folder = pathlib.Path(path).expanduser() / split
        shards = self.manifest["shards"]
        for name, about in shards.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != about["bytes"]:
                raise ValueError(
                    f"{folder / name} is damaged: {size} bytes, {about['bytes']} expected; run the "
                    "`flextok tokenize` that wrote it again, it repairs"
                )
        self._title = str(folder)
        files = [str(folder / name) for name, about in shards.items() if about["records"]]
        self._records = grain.sources.ArrayRecordDataSource(files)
        self.text, self.null_text = None, None
        if (folder / NULL_TEXT).is_file():
            self.null_text = np.load(folder / NULL_TEXT, allow_pickle=False)
            longest = max(about["max_text"] for about in shards.values())
            self.text = max(longest, len(self.null_text)), self.null_text.shape[1]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return self._records[index]

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"


@dataclasses.dataclass(frozen=True)
class Crops:
    """From records to batches (see `pipeline.Examples`): one crop of each image.

    A batch holds "tokens" int32 [B, k], "label" int32 [B], and for a data set with text "text"
    float16 [B, T, E], "text_mask" bool [B, T].

    Attributes:
        num_tokens: k.
        text: (T, E), or None.
        random: choose the crop by the draw; otherwise it is crop 0, the plain one.
    """

    num_tokens: int
    text: tuple[int, int] | None
    random: bool = True
    num_draws = 1

    def without_randomness(self) -> "Crops":
        return dataclasses.replace(self, random=False)

    def decode(self, item: bytes) -> Record:
        return from_bytes(item)

    def read(self, record: Record, draws: np.ndarray) -> dict:
        crop = int(draws[0] * len(record.tokens)) if self.random else 0
        out = {
            "tokens": record.tokens[crop].astype(np.int32),
            "label": np.int32(record.label),
        }
        return out if self.text is None else out | padded_text(record.embedding, self.text)

    def padding(self) -> dict:
        out = {"tokens": np.zeros(self.num_tokens, np.int32), "label": np.int32(-1)}
        return out if self.text is None else out | padded_text(None, self.text)

    def augment(self, batch: dict, draws: np.ndarray) -> dict:
        return batch


def padded_text(embedding: np.ndarray | None, shape: tuple[int, int]) -> dict:
    """"text": float16 [T, E] and "text_mask": bool [T]; None: all padding."""
    text, count = np.zeros(shape, np.float16), 0 if embedding is None else len(embedding)
    if count:
        text[:count] = embedding
    return {"text": text, "text_mask": np.arange(shape[0]) < count}
