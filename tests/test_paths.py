"""Paths and addresses, atomic writes, and the comparing of settings."""

import errno
import pathlib

import numpy as np
import pytest

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path


@pytest.mark.parametrize("text", ["", "  ", "http://a/b", "s3:/bucket/x"])
def test_what_is_no_path_or_known_address_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        storage.write_json(text, {})
    assert not list(tmp_path.iterdir())


def test_an_address_whose_package_is_missing_names_the_package(monkeypatch):
    import fsspec

    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match="gs://bucket/a.*gcsfs"):
        as_path("gs://bucket/a")


def test_local_paths():
    assert as_path("~/x") == pathlib.Path.home() / "x"
    assert as_path(pathlib.Path("a/b")) == pathlib.Path("a/b")


def test_files_behind_an_address(monkeypatch):
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "gs"
        store, pseudo_dirs = {}, [""]

        def __init__(self, **options):
            super().__init__()

    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: Bucket)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    path = as_path("gs://bucket/run") / "config.json"
    storage.write_json(path, {"a": 1})
    assert storage.read_json("gs://bucket/run/config.json") == {"a": 1}
    with pytest.raises(ValueError, match="a: 1 there, 2 now"):
        storage.same_or_refuse(path, {"a": 2}, "tokens")

    storage.write("gs://bucket/run/x.safetensors", {"t": np.arange(3)}, {"k": "v"})
    tensors, metadata = storage.read("gs://bucket/run/x.safetensors")
    assert tensors["t"].tolist() == [0, 1, 2] and metadata == {"k": "v"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), storage.atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert storage.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="is a folder"):
        storage.write_json(tmp_path, {})
    with pytest.raises(ValueError, match="is a file"):
        storage.write_json(path / "y.json", {})


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, storage.FULL), RuntimeError(f"write() failed: {storage.FULL}; x")],
)
def test_a_full_disk_is_named_whoever_writes(error, tmp_path):
    with pytest.raises(OSError, match="x.json .*disk is full"):
        with storage.atomic(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_differences():
    old = {"a": {"b": 1, "c": [1, 2]}, "gone": True, "x": {}}
    new = {"a": {"b": 2, "c": (1, 2)}, "new": None, "x": {}}
    assert storage.differences(old, old) == []
    assert storage.differences(old, new) == [
        "a.b: 1 there, 2 now",
        "gone: True there, '(absent)' now",
        "new: '(absent)' there, None now",
    ]
    assert storage.differences(old, new, ignore=r"a\..*|gone|new") == []
    absent = {"a": {"b": 2}, "new": None, "newer": 3}
    assert storage.differences(old, new, ignore=r"gone", absent=absent) == ["a.b: 1 there, 2 now"]


def test_same_or_refuse(tmp_path):
    path = tmp_path / "out" / "settings.json"
    storage.same_or_refuse(path, {"steps": 5, "k": (1, 2)}, "pictures")
    before = path.read_bytes()
    storage.same_or_refuse(path, {"steps": 5, "k": (1, 2)}, "pictures")
    with pytest.raises(ValueError, match="steps: 5 there, 20 now"):
        storage.same_or_refuse(path, {"steps": 20, "k": (1, 2)}, "pictures")
    assert path.read_bytes() == before
