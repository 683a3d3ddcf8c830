"""LPIPS agrees with the package lpips, and its weights come from files that can do no harm."""

import importlib.util
import os
import pickle
import re
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, last, relative
from safetensors.numpy import load_file, save_file

from flextok_jax.io.formats import networks, torch_pickle
from flextok_jax.nn import lpips

FOLDER = GOLDEN / "lpips"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The golden's random weights, as safetensors: (VGG16 with a classifier, heads)."""
    spec = importlib.util.spec_from_file_location("make_lpips", FOLDER / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    vgg, heads = make.random_weights()
    folder = tmp_path_factory.mktemp("lpips")
    save_file(vgg | {"classifier.0.bias": np.zeros(4, np.float32)}, folder / "vgg.safetensors")
    save_file(heads, folder / "heads.safetensors")
    return folder / "vgg.safetensors", folder / "heads.safetensors"


@pytest.fixture(scope="module")
def params(files):
    return networks.load_lpips(*files)


def test_distances_agree_with_the_package(params):
    io = load_file(FOLDER / "io.safetensors")
    a, b = last(io["a"]), last(io["b"])
    distance = jax.jit(lpips.lpips)(params, a, b)
    assert io["distance"][0] > 0.1 and io["distance"][2] > 0.1
    assert relative(distance, io["distance"]) < 1e-5
    assert distance[1] < 1e-10
    # Each level alone: the heads of the others are zero.
    for level, expected in enumerate(io["levels"]):
        others = {f"lin{i}": params[f"lin{i}"] for i in range(5) if i != level}
        only = params | jax.tree.map(np.zeros_like, others)
        assert relative(jax.jit(lpips.lpips)(only, a, b), expected) < 1e-5, level


def test_gradients_are_finite_where_features_vanish():
    features = jnp.stack([jnp.zeros(8), jnp.arange(8.0)])
    gradient = jax.grad(lambda x: jnp.sum(lpips._unit(x) ** 3))(features)
    assert np.isfinite(gradient).all() and not np.any(gradient[0]) and np.any(gradient[1])


def test_bfloat16_stays_close(params):
    io = load_file(FOLDER / "io.safetensors")
    run = jax.jit(lpips.lpips, static_argnums=3)
    distance = run(params, last(io["a"]), last(io["b"]), jnp.bfloat16)
    assert distance.dtype == jnp.float32 and relative(distance, io["distance"]) < 0.02


def test_wrong_files_are_refused_with_every_reason(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        networks.load_lpips("nowhere.pth", files[1])
    with pytest.raises(ValueError) as error:
        networks.load_lpips(FOLDER / "old.pth", files[1])
    for reason in ("missing tensor features.28.weight", "unknown tensor transposed"):
        assert reason in str(error.value)


@pytest.mark.parametrize("name", ["new.pth", "old.pth"])
def test_both_layouts_of_torch_files_are_read(name):
    tensors = torch_pickle.read(FOLDER / name)
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "weight": grid,
        "transposed": grid.T,
        "part": grid[1:, 1:3],
        "half": np.array([1.5, -2], np.float16),
        "count": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert tensors[key].dtype == value.dtype
        np.testing.assert_array_equal(tensors[key], value)
        assert tensors[key].flags.owndata


class Harmful:
    """What a pickle can do: call anything when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


def write(path, content: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", np.zeros(4, np.float32).tobytes())
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_file_is_called(protocol, tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    content = pickle.dumps({"a": Harmful()}, protocol)
    with pytest.raises(ValueError, match="no part of a dictionary|not part of a dictionary"):
        torch_pickle.read(write(tmp_path / "x.pth", content))
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)  # It would have been.
    assert (tmp_path / "harm").exists()


def number(value):
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)


def tensor(offset, shape, strides, numel=4, dtype="FloatStorage", more=b""):
    """A pickle of {"a": a tensor}, by hand."""

    def ints(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(U\x07storagectorch\n%s\nU\x010U\x03cpu%st" % (dtype.encode(), number(numel))
    arguments = b"(" + storage + b"Q" + ints([offset])[1:-1] + ints(shape) + ints(strides) + b"t"
    return b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor\n" + arguments + b"Rs" + more + b"."


def test_views_stay_inside_their_storage(tmp_path):
    def read(*args, **kwargs):
        return torch_pickle.read(write(tmp_path / "x.pth", tensor(*args, **kwargs)))

    assert read(0, (2, 2), (2, 1))["a"].shape == (2, 2)
    for wrong, reason in (
        (dict(offset=1, shape=(2, 2), strides=(2, 1)), "beyond its storage"),
        (dict(offset=0, shape=(2, 2), strides=(1000, 1)), "beyond its storage"),
        (dict(offset=-1, shape=(2,), strides=(1,)), "offset -1"),
        (dict(offset=0, shape=(2,), strides=(-1,)), "strides"),
        (dict(offset=0, shape=(2, 2), strides=(1,)), "number of strides"),
        (dict(offset=0, shape=(8,), strides=(1,), numel=8), "cut short"),
        (dict(offset=0, shape=(2,), strides=(1,), dtype="QInt8Storage"), "QInt8Storage"),
        (dict(offset=0, shape=(2,), strides=(1,), more=b"c__builtin__\neval\n)R"), "eval"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            read(**wrong)


@pytest.mark.parametrize(
    "content, reason",
    [
        (tensor(0, (2**30, 2**30), (0, 0)), "of a storage of 4 elements"),
        (tensor(0, (5,), (0,)), "of a storage of 4 elements"),
        (tensor(0, (2**70,), (0,)), "a tensor of shape .1180591620717411303424,"),
        (tensor(0, (0, 2**70), (1, 1)), "a tensor of shape .0, 1180591620717411303424"),
        (tensor(0, (1,), (2**70,)), "strides .1180591620717411303424"),
        (b"\x80\x02]U\x01aK\x01s.", "it fills a list as if it were a dict"),
        (b"\x80\x02](U\x01aK\x01u.", "it fills a list as if it were a dict"),
        (b"\x80\x02}K\x01a.", "it fills a dict as if it were a list"),
        (b"\x80\x02}(K\x01e.", "it fills a dict as if it were a list"),
    ],
)
def test_an_odd_pickle_is_refused_for_what_it_does(content, reason, tmp_path):
    with pytest.raises(ValueError, match=f"x.pth: .*{reason}"):
        torch_pickle.read(write(tmp_path / "x.pth", content))


def test_a_tensor_without_elements_reaches_nowhere(tmp_path):
    path = write(tmp_path / "x.pth", tensor(0, (0, 3), (3, 1)))
    assert torch_pickle.read(path)["a"].shape == (0, 3)


def test_an_archive_of_two_pickles_is_refused(tmp_path):
    path = write(tmp_path / "x.pth", tensor(0, (2,), (1,)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"")
    with pytest.raises(ValueError, match="x.pth: an archive with 2 files data.pkl"):
        torch_pickle.read(path)


def test_an_announced_size_beyond_the_file_is_refused_before_it_is_read(tmp_path):
    count = 2**60
    old = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    value = tensor(0, (2,), (1,), numel=count)
    keys = pickle.dumps(["0"], 2)
    (tmp_path / "x.pth").write_bytes(old + value + keys + struct.pack("<q", count))
    with pytest.raises(ValueError, match="x.pth: a storage is missing or cut short"):
        torch_pickle.read(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["new.pth", "old.pth"])
def test_a_damaged_file_is_refused(name, tmp_path):
    whole = (FOLDER / name).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=name):
            torch_pickle.read(tmp_path / name)
