"""Long work in chunks, each in a file of its own until all of them are there.

A chunk is a file that is there whole or not at all, so work that was killed goes on with those that
are missing, and several processes that see one folder share them by their numbers.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from flextok_jax.io import storage

SIZE = 512  # Places in a chunk: what a kill costs at most, and small enough to be held in memory.


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Arrays about `count` things, `SIZE` of them in a file.

    Attributes:
        folder: where the files are; made when the first one is written.
        count: how many things there are.
    """

    folder: pathlib.Path
    count: int

    def __len__(self) -> int:
        return -(-self.count // SIZE)

    def places(self, index: int) -> range:
        """Which of the things chunk `index` is about."""
        return range(index * SIZE, min((index + 1) * SIZE, self.count))

    def there(self, process: tuple[int, int] = (0, 1)) -> list[int]:
        """The chunks that are there, of those that process (i, of n) makes."""
        return [i for i in self._of(process) if self._path(i).exists()]

    def missing(self, process: tuple[int, int] = (0, 1)) -> list[int]:
        """Those that are not."""
        return [i for i in self._of(process) if not self._path(i).exists()]

    def _of(self, process) -> range:
        first, step = process
        return range(first, len(self), step)

    def write(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes a whole chunk or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with storage.atomic(self._path(index)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a chunk that is there."""
        with np.load(self._path(index), allow_pickle=False) as file:
            return dict(file)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.read(index) for index in range(len(self)))

    def joined(self, name: str) -> np.ndarray:
        """One array of all chunks, in order."""
        parts = []
        for index in range(len(self)):
            with np.load(self._path(index), allow_pickle=False) as file:
                parts.append(file[name])
        return np.concatenate(parts)

    def forget(self, index: int) -> None:
        """Removes a chunk, to be made again."""
        self._path(index).unlink(missing_ok=True)

    def delete(self) -> None:
        """Removes all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> pathlib.Path:
        return self.folder / f"chunk_{index:05d}.npz"
