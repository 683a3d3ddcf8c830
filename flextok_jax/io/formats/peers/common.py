"""What the readers of other projects' files share."""

import contextlib

import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.formats import names, torch_pickle
from flextok_jax.nn import flextok, layout
from flextok_jax.nn.tokenizer_config import TokenizerConfig

_WEIGHTS, _TORCH = "model.safetensors", (".pt", ".pth", ".bin")


def weights(path, *wanted: str):
    """The file of weights in a folder, or the file itself, if it holds all `wanted` tensors."""
    path = path / _WEIGHTS if path.is_dir() else path
    if not path.is_file() or path.suffix not in (".safetensors", *_TORCH):
        return None
    there: list[str] = []
    if path.suffix in _TORCH:
        with contextlib.suppress(ValueError):  # It is no file of tensors.
            torch_pickle.read(path, there.append)  # Which wants none of them.
    else:
        there = storage.read_header(path)[0]
    return path if set(there).issuperset(wanted) else None


def read(path) -> dict[str, np.ndarray]:
    """All tensors of such a file."""
    return torch_pickle.read(path) if path.suffix in _TORCH else storage.read(path)[0]


def tokenizer(path, cfg: TokenizerConfig, tensors, name_of) -> dict:
    """Nested float32 parameters of PyTorch's tensors, and an empty VAE.

    Args:
        name_of: our path -> the name in the file, see `names.entries`.

    Raises:
        ValueError: see `names.to_params`.
    """
    entries = names.entries(shapes(cfg), name_of, names.linear)
    return {"vae": {}} | names.to_params(entries, plain(entries, tensors), path)


def shapes(cfg: TokenizerConfig) -> dict:
    """Those of the parameters in files: all but the VAE's."""
    found = layout.unbox(flextok.shapes(cfg))
    return {name: part for name, part in found.items() if name != "vae"}


def plain(entries, tensors) -> dict[str, np.ndarray]:
    """Tensors with the dimensions that `names.to_params` expects.

    1x1 convolutions become matrices, those of whole patches matrices of flat patches (row, column,
    channel), and vectors lose dimensions of size 1. Others stay as they are.
    """
    wanted = {entry.name: entry.shape for entry in entries}

    def one(name, x):
        shape = wanted.get(name, x.shape)
        if x.ndim == 4 and len(shape) == 2:
            return x.transpose(0, 2, 3, 1).reshape(len(x), -1)
        if x.ndim > len(shape) and x.size == np.prod(shape, dtype=int):
            return x.reshape(shape)
        return x

    return {name: one(name, x) for name, x in tensors.items()}
