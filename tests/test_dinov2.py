"""DINOv2 agrees with transformers, and is read from its published folder."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, last, relative
from safetensors.numpy import load_file, save_file

from flextok_jax.io.formats import networks
from flextok_jax.nn import dinov2
from flextok_jax.nn.config import Compute

FOLDER = GOLDEN / "dinov2"
SPEC = importlib.util.spec_from_file_location("make_dinov2", FOLDER / "make.py")
MAKE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MAKE)


@pytest.fixture(scope="module")
def model():
    return networks.load_dinov2(FOLDER)


features_of = jax.jit(dinov2.patch_features, static_argnums=(1, 2))


@pytest.mark.parametrize("name", MAKE.SIZES)
def test_patch_features_agree_with_transformers(name, model):
    """At the size of its positions, and at others, where they are interpolated."""
    cfg, params = model
    features = features_of(params, cfg, Compute(), last(MAKE.images()[name]))
    assert features.dtype == jnp.float32
    assert relative(features, load_file(FOLDER / "io.safetensors")[name]) < 1e-5


def test_bfloat16_stays_close(model):
    cfg, params = model
    compute = Compute(dtype="bfloat16", scan=False)
    features = features_of(params, cfg, compute, last(MAKE.images()["native"]))
    assert features.dtype == jnp.float32
    assert relative(features, load_file(FOLDER / "io.safetensors")["native"]) < 0.05


def test_positions_of_an_equal_grid_stay_as_they_are(model):
    positions = model[1]["pos"]
    np.testing.assert_array_equal(dinov2.interpolate(positions, 5, 5), positions)


def test_published_configurations_give_the_published_sizes(tmp_path):
    published = json.loads((FOLDER / "config.json").read_text()) | {"image_size": 518}
    sizes = {384: (12, 6, 22_056_576), 768: (12, 12, 86_580_480), 1024: (24, 16, 304_368_640)}
    for width, (depth, heads, count) in sizes.items():
        fields = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads)
        (tmp_path / "config.json").write_text(json.dumps(published | fields))
        (tmp_path / "model.safetensors").touch()
        cfg = networks.dinov2_config(tmp_path)
        found = sum(leaf.size for leaf in jax.tree.leaves(dinov2.shapes(cfg)))
        assert found + width == count, width  # without the mask token
    assert cfg == dinov2.DINOv2Config()


def test_what_is_not_dinov2_is_refused_with_every_reason(model, tmp_path):
    with pytest.raises(ValueError, match="70 x 71 pixels.*multiples of 14"):
        dinov2.patch_features(model[1], model[0], Compute(), jnp.zeros((1, 70, 71, 3)))
    shutil.copytree(FOLDER, tmp_path / "a")
    tensors = load_file(FOLDER / "model.safetensors")
    tensors["extra"] = tensors.pop("layernorm.bias")
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        networks.load_dinov2(tmp_path / "a")
    for reason in ("missing tensor layernorm.bias of shape (24,)", "unknown tensor extra"):
        assert reason in str(error.value)
    published = json.loads((FOLDER / "config.json").read_text())
    published |= {"model_type": "dinov2_with_registers", "use_swiglu_ffn": True}
    del published["hidden_size"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError) as error:
        networks.dinov2_config(tmp_path / "a")
    for reason in ("model_type='dinov2_with_registers'", "use_swiglu_ffn=True", "hidden_size=None"):
        assert reason in str(error.value)
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        networks.load_dinov2(tmp_path / "a")
