"""Small data sets and the quickstart. Not installed: run from the repository's root."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


def image_folder(name: str, images: Callable[[], Iterable[tuple[str, np.ndarray | str]]]) -> str:
    """A folder of PNG files, of texts and arrays beside them, written on first use.

    It lies in `.cache/examples` of the repository, or in the folder that the environment variable
    FLEXTOK_EXAMPLES names. It appears as a whole or not at all, so several processes may ask at
    the same time.

    Args:
        name: of the folder.
        images: yields (path below the folder, uint8 [H, W, 3] or a text; of NAME.npy any array).

    Returns:
        its absolute path.
    """
    parent = pathlib.Path(os.environ.get("FLEXTOK_EXAMPLES") or ROOT / ".cache" / "examples")
    folder = parent.expanduser().absolute() / name
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for path, image in images():
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image, str):
                file.write_text(image, encoding="utf-8")
            elif file.suffix == ".npy":
                np.save(file, image)
            else:
                Image.fromarray(image).save(file)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # Otherwise another process was faster.
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)
