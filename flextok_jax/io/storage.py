"""Files: whole reads, atomic writes, comparing settings, and the identity of parameters."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from flextok_jax.io.formats.names import flatten
from flextok_jax.io.paths import as_path, download, is_remote, local_copy, upload

log = logging.getLogger(__name__)
FULL = os.strerror(errno.ENOSPC)
_unfinished: set[pathlib.Path] = set()  # The temporary files of `atomic`.
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}  # Of lazy tensors.


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: the file is damaged, is no safetensors file, or holds a type we cannot read.
    """
    with _opened(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except (AttributeError, KeyError, TypeError) as error:  # From NumPy, which lacks the type.
            raise ValueError(f"{path} holds a type that cannot be read: {error}") from error


def sha256(path) -> str:
    """The sha256 of a file's bytes."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path) -> tuple[list[str], dict[str, str]]:
    """The names and the metadata of a safetensors file; no tensor is read. Raises as `read`."""
    with _opened(path) as file:
        return list(file.keys()), file.metadata() or {}


class Lazy:
    """A tensor of an open safetensors file, which is read when NumPy asks for it."""

    def __init__(self, file, name: str):
        view = file.get_slice(name)
        if (kind := view.get_dtype()) not in _TYPES:
            raise ValueError(f"the tensor {name} has the type {kind}, not {', '.join(_TYPES)}")
        self._file, self._name = file, name
        self.shape, self.dtype = tuple(view.get_shape()), np.dtype(_TYPES[kind])
        self.ndim = len(self.shape)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._file.get_tensor(self._name), dtype)


@contextlib.contextmanager
def opened(paths, wanted: Callable[[str], bool]) -> Iterator[dict[str, Lazy]]:
    """The wanted tensors of several safetensors files by name, while the block runs.

    Raises:
        ValueError: as `read`, or a wanted tensor is neither float32, float16 nor bfloat16.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in paths]
        yield {name: Lazy(file, name) for file in files for name in file.keys() if wanted(name)}


def read_shapes(path) -> dict[str, str]:
    """Type and shape of every tensor of a safetensors file, such as "F32 [3, 4]"."""
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}
        return {name: f"{x.get_dtype()} {x.get_shape()}" for name, x in views.items()}


@contextlib.contextmanager
def _opened(path):
    from safetensors import SafetensorError, safe_open

    try:
        with local_copy(path) as local, safe_open(str(local), framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def write(path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata or None)


def read_array(path) -> np.ndarray:
    """The numbers in an .npy file, float32. Raises ValueError: the file holds something else."""
    with as_path(path).open("rb") as file:
        try:
            return np.load(file, allow_pickle=False).astype(np.float32)
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file of numbers: {error}") from error


def read_json(path) -> dict:
    """The dictionary in a JSON file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(as_path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object")
    return found


def write_json(path, content) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path, text: str) -> None:
    """Writes a text file (UTF-8), whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic(path) -> Iterator[pathlib.Path]:
    """A temporary local file that becomes `path` if the block succeeds, else it is removed.

    Raises:
        ValueError: `path` is a folder, or its folder is a file.
        OSError: the disk is full, as whichever library writes the file says it.
    """
    path = as_path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the name of a file")
    if path.parent.is_file():
        raise ValueError(f"{path.parent} is a file: pass a folder")
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    _unfinished.add(temporary)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # On the disk before it gets its name.
        os.replace(temporary, path)
    except Exception as error:
        if FULL in str(error):
            raise OSError(f"{path} cannot be written: the disk is full") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def cached(path, key: str) -> pathlib.Path:
    """A copy of the file of an address that stays in this machine's cache, in the folder `key`."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    copy = home / "flextok_jax" / key / path.name
    if not copy.exists():
        log.info("copying %s to %s", path, copy.parent)
        with atomic(copy) as temporary:
            download(path, temporary)
    return copy


def discard_unfinished() -> None:
    """Removes what `atomic` has begun and not finished, for a process that ends at once."""
    for temporary in tuple(_unfinished):
        temporary.unlink(missing_ok=True)


def differences(
    old: dict,
    new: dict,
    ignore: str = "",
    words: tuple[str, str] = ("there", "now"),
    absent: dict | None = None,
) -> list[str]:
    """One line "a.b: OLD there, NEW now" for each key whose values differ.

    Args:
        old: what a file holds; nested dictionaries in JSON terms.
        new: what is wanted now; tuples equal lists.
        ignore: a regular expression of whole keys ("a.b") that may differ.
        words: after the old and the new value.
        absent: nested as they are; what keys of `new` stand for that `old` lacks.
    """
    new, absent = (dotted(json.loads(json.dumps(tree))) for tree in (new, absent or {}))
    old = {key: value for key, value in absent.items() if key in new} | dotted(old)
    return [
        f"{key}: {old.get(key, '(absent)')!r} {words[0]}, {new.get(key, '(absent)')!r} {words[1]}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...) and not re.fullmatch(ignore, key)
    ]


def same_or_refuse(path, settings: dict, what: str) -> None:
    """Writes `settings` (in JSON terms) where no file is; returns where the same is there.

    Raises:
        ValueError: the file holds other settings; every difference is named. `what` says what the
            settings made, such as "shards".
    """
    path = as_path(path)
    if not path.exists():
        return write_json(path, settings)
    if found := differences(read_json(path), settings):
        raise ValueError(
            f"{path.parent} holds {what} of other settings ({path.name}). Use another folder, or "
            "set these back:\n  " + "\n  ".join(found)
        )


def dotted(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty dictionary is a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fingerprint(params) -> str:
    """The sha256 over all parameters: path, type, shape and bytes of each, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
