"""Files with the weights of the networks that judge images, which a person names.

Most are published as PyTorch files (`.pth`): they are read as tensors and nothing else. `keep`
writes the same tensors as safetensors, which is read from then on.
"""

import hashlib
import pathlib
import re

import numpy as np

from flextok_jax.interop import tensor_file, torch_tensors

# The first digits of its own sha256, which published PyTorch files carry in their names.
_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(pth|pt)")


def read(path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors or PyTorch file, name -> array.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or holds anything else but tensors, numbers and texts.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return tensor_file.read(path)[0]
    return torch_tensors.read(path)


def sha256(path) -> str:
    """The sha256 of a file's bytes, compared with what its name says, where that says something.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: the name ends in "-XXXXXXXX.pth", and these are not the sha256's first digits.
    """
    path = _existing(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    said = _IN_NAME.search(path.name)
    if said and not digest.startswith(said[1]):
        raise ValueError(
            f"{path} is not the file that its name says: its sha256 begins with "
            f"{digest[: len(said[1])]}, not {said[1]}. Fetch it again, or rename it if that is no "
            "hash"
        )
    return digest


def keep(path, folder=None) -> pathlib.Path:
    """Writes NAME.safetensors with a file's tensors; its metadata tell the file's name and sha256.

    Args:
        path: a file that `read` reads.
        folder: where to; beside the file by default.

    Returns:
        The path of what was written; `path` itself if it is a safetensors file already.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return path
    about = {"made_from": path.name, "made_from_sha256": sha256(path)}
    target = (path.parent if folder is None else pathlib.Path(folder)) / f"{path.stem}.safetensors"
    tensor_file.write(target, read(path), about)
    return target


def _existing(path) -> pathlib.Path:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a .safetensors or .pth file")
    return path
