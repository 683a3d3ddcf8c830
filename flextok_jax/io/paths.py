"""Paths that a person gives: local ones, gs:// and s3:// addresses."""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # Two letters or more: "C:/" is a drive.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def as_path(text):
    """The path object of an argument or a setting; nothing is opened.

    A local path becomes a `pathlib.Path`, an address an `etils.epath.Path`. Use what both have:
    open, exists, is_file, is_dir, iterdir, glob, mkdir, read_text, write_text, read_bytes,
    write_bytes, unlink, /, name, stem, suffix and parent.

    Args:
        text: a text or a path object; "~" is the home folder.

    Raises:
        ValueError: the text is empty, or an address of a kind that cannot be opened here.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ValueError("a path is empty: name a file or a folder")
    found = _ADDRESS.match(text)
    if found is None:
        return pathlib.Path(text).expanduser()
    scheme = found[1]
    if scheme not in _PACKAGES or not text.startswith(f"{scheme}://"):
        raise ValueError(
            f"{text!r} cannot be opened: allowed are local paths, gs://BUCKET/PATH and "
            "s3://BUCKET/PATH"
        )
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = _PACKAGES[scheme]
        raise ValueError(
            f"{text} cannot be opened: the package {package} is not installed. "
            f"`pip install {package}`, or use a local path"
        ) from error
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath

    return epath.Path(text)


def is_remote(path) -> bool:
    """Whether a path that `as_path` made is an address."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def local_copy(path) -> Iterator[pathlib.Path]:
    """A local file with the content of `path`, for libraries that open files themselves."""
    path = as_path(path)
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        copy_file(path, copy)
        yield copy


def copy_file(source, target) -> None:
    """Copies the bytes of one file, where either may be an address."""
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing)


def as_folder(text):
    """`as_path` of a folder to write into, which need not exist.

    Raises:
        ValueError: as `as_path`, or it is a file.
    """
    path = as_path(text)
    if path.is_file():
        raise ValueError(f"{path} is a file: pass a folder")
    return path
