"""Paths that a person gives: local ones, gs:// and s3:// addresses."""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def as_path(text):
    """The path object of an argument or a setting; nothing is opened.

    A local path becomes a `pathlib.Path` ("~" is the home folder), an address an
    `etils.epath.Path`.

    Raises:
        ValueError: the text is empty, or an address of a kind that cannot be opened here.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ValueError("a path is empty: name a file or a folder")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)  # Two letters or more: "C:/" is a drive.
    if found is None:
        return pathlib.Path(text).expanduser()
    package = _PACKAGES.get(found[1])
    if package is None or not text.startswith(f"{found[1]}://"):
        raise ValueError(f"{text!r} cannot be opened: pass a local path, gs://… or s3://…")
    import fsspec

    try:
        fsspec.get_filesystem_class(found[1])
    except ImportError as error:
        raise ValueError(f"{text} cannot be opened: `pip install {package}`") from error
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
        copy.write_bytes(path.read_bytes())
        yield copy
