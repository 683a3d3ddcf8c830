"""Images as an .npz file with the one array `arr_0`, as the evaluator of ADM reads samples."""

import zipfile
from collections.abc import Iterable

import numpy as np

from flextok_jax.io import storage

NAME = "arr_0.npy"


def write(path, parts: Iterable[np.ndarray], count: int) -> None:
    """Writes parts after each other, so that they are never in memory together.

    Args:
        path: the file; there whole or not at all.
        parts: uint8 [n, H, W, 3] each.
        count: how many images they are together.

    Raises:
        ValueError: they are not.
    """
    written = 0
    with (
        storage.atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open(NAME, "w", force_zip64=True) as file,
    ):
        for i, part in enumerate(parts):
            if not i:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *part.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(part).data)
            written += len(part)
        if written != count:
            raise ValueError(f"{path}: {written} images to write, {count} were announced")
