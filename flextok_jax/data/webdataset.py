"""WebDataset-style tar shards with random access, by an index that is built once.

The files of a shard that share a name up to its first dot are one example (the convention of
github.com/webdataset/webdataset): `n01440764_18.jpg` the image, `.cls` its label as text, `.txt`
the caption, `.npy` the caption's embedding, `.json` a dictionary with `label`, `caption` or `text`.
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

import numpy as np

from flextok_jax.data.folder import HELD_OUT, IMAGE_SUFFIXES, check_split, hold_out
from flextok_jax.interop import tensor_file

FIELDS = ("image", "cls", "txt", "json", "npy")
CACHE = pathlib.Path("~/.cache/flextok_jax/tar")  # Of indices that cannot lie beside their shard.

log = logging.getLogger(__name__)


class WebDatasetSource:
    """The examples of all tar files below a folder, or of one tar file, in their order.

    The splits "train" and "test" are the subfolders train/ and test/ (or val/, validation/) or the
    files whose name has such a word ("imagenet-train-0001.tar"), where there are both; otherwise
    examples are held out as in an image folder, by a hash of their key, "SHARD.tar/NAME".

    Reading SHARD.tar the first time writes .SHARD.tar.index.npz beside it (in ~/.cache/flextok_jax
    where the folder is read-only); it is made again when the shard's size or time has changed.

    Attributes:
        classes: empty; labels are numbers.
    """

    classes: list[str] = []

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
        if by_name and split != "all":
            chosen = [i for i, part in enumerate(parts) if part == split]
            files, names = ([x[i] for i in chosen] for x in (files, names))
        self._files = files
        indices = [read_index(file) for file in files]
        keys = [
            f"{name}/{key.decode('utf-8', 'surrogateescape')}"
            for name, (found, _) in zip(names, indices)
            for key in found
        ]
        shard = np.repeat(np.arange(len(files)), [len(found) for found, _ in indices])
        places = np.concatenate([places for _, places in indices])
        if not by_name and split != "all":
            wanted = np.array(hold_out(keys), bool) == (split == "test")
            keys = [key for key, keep in zip(keys, wanted) if keep]
            shard, places = shard[wanted], places[wanted]
        if not keys:
            raise ValueError(f"The tar files in {str(root)!r} hold no images for split {split!r}.")
        self._keys, self._shard, self._places = keys, shard, places

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict:
        found = self._read(index, FIELDS[:-1])
        about = json.loads(found.get("json", b"{}"))
        about = about if isinstance(about, dict) else {}  # A list of boxes, for example.
        label, caption = about.get("label"), about.get("caption") or about.get("text")
        if "cls" in found:
            label = found["cls"].decode()
        if "txt" in found:
            caption = found["txt"].decode().strip()
        label = -1 if label is None else int(label)
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
    """"train", "test" or "" by the words of a shard's path below the folder."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word == "train" or word in HELD_OUT:
            return "train" if word == "train" else "test"
    return ""


def read_index(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The examples with an image in one tar file; makes the index file if it is not there.

    Returns:
        keys: bytes [N], UTF-8, in the file's order; places: int64 [N, FIELDS, (start, size)], of
        each field's bytes, start -1 where the example has none.

    Raises:
        ValueError: it is no whole tar file.
    """
    stat = path.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    beside = path.with_name(f".{path.name}.index.npz")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    for file in (beside, CACHE.expanduser() / f"{name}.npz"):
        try:
            with np.load(file, allow_pickle=False) as found:
                if (found["stamp"] == stamp).all():
                    return found["keys"], found["places"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # Absent or damaged: it is only a cache.
    log.info("building the index of %s", path)
    keys, places = _scan(path)
    for file in (beside, CACHE.expanduser() / f"{name}.npz"):
        try:
            with tensor_file.atomic(file) as temporary:
                np.savez(temporary, stamp=stamp, keys=keys, places=places)
            break
        except OSError:
            continue
    return keys, places


def _scan(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """`read_index` by a pass over the headers."""
    examples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                field = "image" if dot + suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
                if member.isfile() and stem and field in FIELDS:
                    key = f"{folder}/{stem}" if folder else stem
                    examples.setdefault(key, {})[field] = (member.offset_data, member.size)
                tar.members = []  # Or it keeps them all.
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar file ({error}); fetch it again") from error
    examples = {key: fields for key, fields in examples.items() if "image" in fields}
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in examples], np.bytes_)
    places = [[fields.get(name, (-1, 0)) for name in FIELDS] for fields in examples.values()]
    return keys, np.array(places, np.int64).reshape(-1, len(FIELDS), 2)
