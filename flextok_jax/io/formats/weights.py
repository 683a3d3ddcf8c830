"""The weights of a folder of transformers or diffusers: one file, or several with an index.

Of several files only those that hold a wanted tensor are fetched and opened.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from flextok_jax.io import sources, storage
from flextok_jax.io.formats import torch_pickle
from flextok_jax.io.paths import local_copy

TORCH = "pytorch_model.bin"
INDEX, TORCH_INDEX = f"{sources.WEIGHTS}.index.json", f"{TORCH}.index.json"
INDICES = (INDEX, TORCH_INDEX)


@contextlib.contextmanager
def opened(
    source,
    folder,
    wanted: Callable[[str], bool],
    revision: str | None = None,
    files: Sequence[str] = (sources.WEIGHTS, TORCH),
) -> Iterator[Mapping]:
    """The wanted tensors, arrays or `storage.Lazy`, from the best of the files there are.

    Args:
        source: a folder or a hub id.
        folder: where `sources.find` put it, with the indices (NAME.index.json) that it has.
        wanted: name -> whether a tensor is read.
        revision: branch, tag or commit of a hub id.
        files: names of the weights, best first.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a file is not understood.
    """
    for single in files:
        path = folder / f"{single}.index.json"
        if path.is_file():
            needed = storage.read_json(path).get("weight_map") or {}
            needed = sorted({file for name, file in needed.items() if wanted(name)})
            if not needed or any("/" in file or "\\" in file for file in needed):
                raise ValueError(f"{path} names no file beside it with a tensor that is needed")
        else:
            needed = [single]
            with contextlib.suppress(FileNotFoundError):
                folder = sources.find(source, (), (single,), revision)
            if not (folder / single).is_file():
                continue
        folder = sources.find(source, needed, revision=revision)
        read = _torch if single == TORCH else storage.opened
        with read([folder / file for file in needed], wanted) as tensors:
            yield tensors
        return
    raise FileNotFoundError(f"{folder} holds no {' or '.join(files)}, and no index of them")


@contextlib.contextmanager
def _torch(paths, wanted) -> Iterator[Mapping]:
    found: dict[str, np.ndarray] = {}
    for path in paths:
        with local_copy(path) as local:
            found |= torch_pickle.read(local, wanted)
    yield found
