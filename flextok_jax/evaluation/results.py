"""Folders for results: empty, or recorded as made with the same settings."""

import contextlib
import os
from collections.abc import Iterable, Iterator

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, is_remote

SETTINGS = "settings.json"


@contextlib.contextmanager
def results_folder(out, settings: dict, inputs: Iterable = (), record: str = SETTINGS) -> Iterator:
    """The folder `out`, ready to be written into; open it before the work begins.

    Where the block fails before anything is written, nothing remains.

    Args:
        out: a folder that is empty or missing, or one that an earlier call with equal settings
            recorded: then files that are there already may be kept, and the work goes on.
        settings: all that the results depend on, in JSON terms.
        inputs: the paths that are read; those that do not exist are ignored.
        record: the name of the file that keeps the settings; it ends in "settings.json".

    Yields:
        A path object.

    Raises:
        ValueError: `out` is a file or a link, overlaps an input, holds files of something else, or
            results of other settings.
    """
    out = check_folder(out, inputs)
    there, recorded = out.exists(), (out / record).exists()
    storage.same_or_refuse(out / record, settings, "results")
    try:
        yield out
    except BaseException:
        if not recorded and [path.name for path in out.iterdir()] == [record]:
            (out / record).unlink()
            if not there:
                out.rmdir()
        raise


def check_folder(out, inputs: Iterable = ()):
    """The path of `out`, which `results_folder` would accept but for the settings.

    Commands call it before they load a model. Raises as `results_folder`, and PermissionError where
    nothing can be written.
    """
    out = as_path(out)
    remedy = "Pass another folder with --out"
    if not is_remote(out):
        if out.is_symlink():
            raise ValueError(f"{out} is a link to {out.resolve()}. {remedy}, or the real folder")
        for path in map(as_path, inputs):
            if is_remote(path) or not path.exists():
                continue
            ours, theirs = out.resolve(), path.resolve()
            if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
                raise ValueError(f"{out} overlaps the input {path}. {remedy}, apart from the input")
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file. {remedy}")
    writable(out)
    if out.exists() and not any(out.glob(f"*{SETTINGS}")):
        found = sorted(path.name for path in out.iterdir())
        if found:
            more = ", ..." if len(found) > 3 else ""
            raise ValueError(
                f"{out} is not empty ({', '.join(found[:3])}{more}) and has no {SETTINGS} of an "
                f"earlier run. {remedy}"
            )
    return out


def writable(path):
    """The path object, if a file or a folder can be made there.

    Raises:
        ValueError, PermissionError: a folder above is a file, or cannot be written.
    """
    if not is_remote(path):
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if there != path and not there.is_dir():
            raise ValueError(f"--out {path}: {there} is a file, not a folder")
        if not os.access(there, os.W_OK):
            raise PermissionError(f"--out {path}: {there} cannot be written")
    return path
