"""PyTorch files are read as tensors, and can do no harm."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from common import GOLDEN

from flextok_jax.io.formats import torch_pickle

FILES = [GOLDEN / "lpips" / name for name in ("new.pth", "old.pth")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_both_layouts_are_read_and_damaged_ones_refused(path, tmp_path):
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "weight": grid,
        "transposed": grid.T,
        "part": grid[1:, 1:3],
        "half": np.array([1.5, -2], np.float16),
        "count": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
    }
    tensors = torch_pickle.read(path)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert tensors[key].dtype == value.dtype and tensors[key].flags.owndata
        np.testing.assert_array_equal(tensors[key], value)
    whole = path.read_bytes()
    for cut in (0, len(whole) // 2, len(whole) - 5):
        (tmp_path / path.name).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=path.name):
            torch_pickle.read(tmp_path / path.name)


def read(folder, content: bytes):
    """What is read of an archive with this pickle and a storage of 4 numbers."""
    with zipfile.ZipFile(folder / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", np.zeros(4, np.float32).tobytes())
    return torch_pickle.read(folder / "x.pth")


class Harmful:
    """What a pickle can do: call anything when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


@pytest.mark.parametrize("protocol", [0, 2])
def test_nothing_in_a_file_is_called(protocol, tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    content = pickle.dumps({"a": Harmful()}, protocol)
    with pytest.raises(ValueError, match="x.pth"):
        read(tmp_path, content)
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)  # It would have been.
    assert (tmp_path / "harm").exists()


def number(value):
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)


def tensor(offset=0, shape=(2,), strides=(1,), numel=4, dtype="FloatStorage", more=b""):
    """A pickle of {"a": a tensor}, by hand."""

    def ints(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(U\x07storagectorch\n%s\nU\x010U\x03cpu%st" % (dtype.encode(), number(numel))
    arguments = b"(" + storage + b"Q" + ints([offset])[1:-1] + ints(shape) + ints(strides) + b"t"
    return b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor\n" + arguments + b"Rs" + more + b"."


@pytest.mark.parametrize(
    "content",
    [
        tensor(1, (2, 2), (2, 1)),
        tensor(0, (2, 2), (1000, 1)),
        tensor(offset=-1),
        tensor(strides=(-1,)),
        tensor(0, (2, 2), (1,)),
        tensor(shape=(8,), numel=8),
        tensor(dtype="QInt8Storage"),
        tensor(more=b"c__builtin__\neval\n)R"),
        tensor(0, (2**30, 2**30), (0, 0)),
        tensor(0, (1,), (2**70,)),
        b"\x80\x02]U\x01aK\x01s.",
        b"\x80\x02}K\x01a.",
    ],
)
def test_an_odd_pickle_is_refused(content, tmp_path):
    assert read(tmp_path, tensor(0, (2, 2), (2, 1)))["a"].shape == (2, 2)
    with pytest.raises(ValueError, match="x.pth"):
        read(tmp_path, content)


def test_a_storage_of_announced_size_beyond_the_file_is_refused(tmp_path):
    count = 2**60
    old = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    keys = pickle.dumps(["0"], 2) + struct.pack("<q", count)
    (tmp_path / "x.pth").write_bytes(old + tensor(numel=count) + keys)
    with pytest.raises(ValueError, match="x.pth"):
        torch_pickle.read(tmp_path / "x.pth")
