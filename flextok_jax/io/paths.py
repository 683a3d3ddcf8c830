"""Paths that a person gives: local ones, gs:// and s3:// addresses."""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
ADDRESSES = tuple(f"{kind}://" for kind in _PACKAGES)  # How they begin.


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
    # What other processes write and remove must be seen.
    fsspec.config.conf.setdefault(found[1], {}).setdefault("use_listings_cache", False)
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath

    return epath.Path(text)


def is_remote(path) -> bool:
    """Whether a path that `as_path` made is an address."""
    return "://" in os.fspath(path)


def resolved(path):
    """The path that leads there from any folder, links followed."""
    return path if is_remote(path) else path.resolve()


def reached(path):
    """The path, whose bucket has answered. Raises ValueError: it did not (name, rights, network).

    Asked before anything is written, because some stores make a bucket that is not there.
    """
    if is_remote(path):
        _reach("/".join(str(path).split("/")[:3]))
    return path


@functools.cache
def _reach(bucket: str) -> None:
    try:
        store(bucket).ls(bucket, detail=False)
    except Exception as error:  # Each store has its own.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{bucket} cannot be reached ({reason}): check the name, the credentials and the rights"
        ) from error


def store(path):
    """The fsspec file system of an address."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(path)


def read(path, start: int | None = None, size: int | None = None) -> bytes:
    """A file, or `size` bytes of it from `start` on; of an address by one request."""
    if size == 0:
        return b""
    if is_remote(path):
        end = None if start is None else start + size
        return store(path).cat_file(str(path), start=start, end=end)
    if start is None:
        return path.read_bytes()
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def below(folder) -> list[str]:
    """The names of all files below the folder of an address ("a/b.png"), sorted as paths are."""
    start = str(folder).partition("://")[2] + "/"
    names = (file.removeprefix(start) for file in store(folder).find(str(folder)))
    return sorted(names, key=lambda name: name.split("/"))


def upload(local: pathlib.Path, path) -> None:
    """Copies a local file to an address, where it appears when it is whole."""
    store(path).put_file(str(local), str(path))


def version(path) -> tuple[int, int]:
    """(size in bytes, a number that changes with the file)."""
    if is_remote(path):
        system = store(path)
        mark = hashlib.sha256(str(system.ukey(str(path))).encode()).digest()
        return system.size(str(path)), int.from_bytes(mark[:7])
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def local_copy(path) -> Iterator[pathlib.Path]:
    """A local file with the content of `path`, for libraries that open files themselves."""
    path = as_path(path)
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        download(path, copy)
        yield copy


def download(path, local: pathlib.Path) -> None:
    """Copies the file of an address to a local one."""
    store(path).get_file(str(path), str(local))
