"""LPIPS agrees with the package lpips."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, last, relative
from safetensors.numpy import load_file, save_file

from flextok_jax.io.formats import networks
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
    heads = {
        name: jax.tree.map(lambda x, i=i: np.eye(5)[i][:, None, None, None, None] * x, params[name])
        for i, name in enumerate(f"lin{i}" for i in range(5))
    }
    one = jax.vmap(lambda heads, *args: lpips.lpips(args[0] | heads, *args[1:]), (0, *[None] * 3))
    levels = jax.jit(one)(heads, params, a, b)
    for found, expected in zip(levels, io["levels"], strict=True):
        assert relative(found, expected) < 1e-5


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
