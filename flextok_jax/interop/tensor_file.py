"""safetensors files: whole reads, atomic writes, and the identity of parameters."""

import hashlib
import os
import pathlib
import tempfile

import numpy as np

from flextok_jax.interop.names import flatten


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
        ValueError: the file is damaged, or is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from (
            error
        )


def write(path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes to a temporary name in the same folder, then renames: never half a file."""
    from safetensors.numpy import save_file

    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata or None)


class atomic:
    """A context manager: a temporary path beside `path`, moved onto it if the block succeeds."""

    def __init__(self, path):
        self._path = pathlib.Path(path)

    def __enter__(self) -> pathlib.Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{self._path.stem}.", suffix=self._path.suffix, dir=self._path.parent
        )
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        self._temporary = pathlib.Path(name)
        return self._temporary

    def __exit__(self, kind, *_):
        if kind is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def fingerprint(params) -> str:
    """The sha256 over all parameters: path, type, shape and bytes of each, in order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
