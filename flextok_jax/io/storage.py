"""Files: whole reads, atomic writes, and the identity of parameters."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from flextok_jax.io.formats.names import flatten


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
        ValueError: the file is damaged, is no safetensors file, or holds a type we cannot read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); fetch it again"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # from NumPy, which lacks the type
        raise ValueError(
            f"{path} holds tensors of a type that cannot be read ({error}); convert them to "
            "float32, float16 or bfloat16"
        ) from error


def tensor_names(path) -> list[str]:
    """The names in a safetensors file; none of its tensors is read. Raises as `read` does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); fetch it again"
        ) from error


def read_json(path) -> dict:
    """The dictionary in a JSON file.

    Raises:
        ValueError: the file holds something else.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object")
    return found


def write(path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes to a temporary name in the same folder, then renames: never half a file."""
    from safetensors.numpy import save_file

    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata or None)


@contextlib.contextmanager
def atomic(path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, moved onto it if the block succeeds, else removed.

    Its bytes are on the disk before it gets its name: a machine that is lost leaves all or nothing.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # private until here
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(params) -> str:
    """The sha256 over all parameters: path, type, shape and bytes of each, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
