"""Files with the weights of the networks that judge images, which a person names.

Most are published as PyTorch files (`.pth`): they are read as tensors and nothing else. `keep`
writes the same tensors as safetensors, which is read from then on.
"""

import hashlib
import pathlib
import re

import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.formats import torch_pickle

# The first digits of its own sha256, which published PyTorch files carry in their names, and so do
# those that `keep` makes of them.
_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(pth|pt|safetensors)")


def read(path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors or PyTorch file, name -> array.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or holds anything else but tensors, numbers and texts.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return storage.read(path)[0]
    return torch_pickle.read(path)


def sha256(path) -> str:
    """The sha256 of a file's bytes, compared with what its name says, where that says something.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: the name ends in "-XXXXXXXX.pth", and these are not the sha256's first digits.
    """
    path = _existing(path)
    with path.open("rb") as file:
        return _as_named(path, hashlib.file_digest(file, "sha256").hexdigest())


def published_sha256(path) -> str:
    """`sha256` of a file, or of the file that `keep` made it from, as it says itself."""
    path = _existing(path)
    made_from = _made_from(path)
    return _as_named(path, made_from) if made_from else sha256(path)


def _as_named(path: pathlib.Path, digest: str) -> str:
    said = _IN_NAME.search(path.name)
    if said and not digest.startswith(said[1]):
        raise ValueError(
            f"{path} is not the file that its name says: its sha256 begins with "
            f"{digest[: len(said[1])]}, not {said[1]}. Fetch it again, or rename it if that is no "
            "hash"
        )
    return digest


def keep(path) -> pathlib.Path:
    """NAME.safetensors beside a file, with its tensors; written where it is not there yet.

    Its metadata tell the file's name and sha256.

    Returns:
        The path of the safetensors file; `path` itself if it is one, or if none can be written.

    Raises:
        ValueError: another file has that name.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return path
    digest, target = sha256(path), path.with_suffix(".safetensors")
    if target.exists():
        if _made_from(target) != digest:
            raise ValueError(
                f"{target} was not made from {path}, whose tensors were to be kept there: name "
                "the one that is right, or move the other away"
            )
        return target
    about = {"made_from": path.name, "made_from_sha256": digest}
    try:
        storage.write(target, read(path), about)
    except OSError:  # Such as a folder that is read only.
        return path
    return target


def _made_from(path) -> str | None:
    """The sha256 of the file that `keep` made this one from."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("made_from_sha256")


def _existing(path) -> pathlib.Path:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a .safetensors or .pth file")
    return path
