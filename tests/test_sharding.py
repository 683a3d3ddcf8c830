"""Sharding: every parameter of every shipped configuration has one rule, and nothing big is whole.

At full size, by shapes alone.
"""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import pytest
from common import ROOT, TINY, random_params, small_vae

from flextok_jax.io import models, storage
from flextok_jax.io.formats import flexar, names, vae_files
from flextok_jax.nn import dinov2, layout, repa
from flextok_jax.nn.config import ARConfig, FlexTokConfig, VAEConfig
from flextok_jax.parallel import sharding
from flextok_jax.parallel.mesh import AXES, make_mesh
from flextok_jax.training.optimizer import trainable_paths
from flextok_jax.training.state import build
from flextok_jax.training.tokenizer_stage import TokenizerStage

MESH = jax.sharding.AbstractMesh((1, 4, 2), AXES)
BIG = 1_000_000
# Whole on every device although big: a frozen VAE (84 M parameters) is read by every step of
# every image, and gathering it would cost more than its memory.
WHOLE = r"vae/.*"


def shipped():
    """configs/tokenizer.py as a module."""
    spec = importlib.util.spec_from_file_location("tokenizer", ROOT / "configs" / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A small VAE with 16 latent channels and a reduction of 8, as the ImageNet variants need."""
    cfg = dataclasses.replace(small_vae(16), block_out=(32, 32, 32, 32), scaling_factor=0.88)
    params = random_params(dataclasses.replace(TINY, vae=cfg))["vae"]
    folder = tmp_path_factory.mktemp("vae")
    tensors = names.to_tensors(names.entries(params, names.vae_name), params)
    storage.write(folder / vae_files.WEIGHTS, tensors, {})
    (folder / "config.json").write_text(json.dumps({"scaling_factor": 0.88}))
    return folder


@pytest.fixture(scope="module", params=shipped().VARIANTS)
def run(request, vae_folder):
    """(the stage, its configuration, its training state's shapes with their shardings on MESH)."""
    config = shipped().get_config(request.param)
    if config.vae.source != models.IDENTITY:
        config.vae.source = str(vae_folder)
    stage = TokenizerStage(config)
    return stage, config, build(stage, config, MESH).shapes


def leaves(tree) -> dict:
    """{"a/b/c": leaf}."""
    return names.flatten(tree)


def local_size(leaf) -> int:
    """How many of its elements one device holds."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def rules_of(path) -> list[str]:
    return [pattern for pattern, _ in layout.PARAMETER_RULES if re.fullmatch(pattern, path)]


def test_every_parameter_average_and_optimizer_slot_has_one_rule(run):
    stage, config, state = run
    params, averages = leaves(state.params), leaves(state.ema)
    assert params.keys() == averages.keys()
    for path, leaf in params.items():
        assert len(rules_of(path)) == 1, (path, rules_of(path))
        assert averages[path].sharding == leaf.sharding, path
    trained = trainable_paths(state.params, stage.trainable, config.freeze)
    assert trained == {path for path in params if not path.endswith("sincos")}
    slots = {path: leaf for path, leaf in leaves(state.opt_state).items() if leaf.shape}
    for path, leaf in slots.items():  # "1/mu/decoder/head/kernel": the parameter's path follows.
        parameter = re.sub(r"^.*?(mu|nu)/", "", path)
        assert parameter in trained and leaf.sharding == params[parameter].sharding, path
    assert len(slots) == 2 * len(trained)


def test_nothing_big_is_whole_on_every_device(run):
    _, _, state = run
    for path, leaf in leaves(state).items():
        assert leaf.size <= BIG or local_size(leaf) < leaf.size, path


def test_a_full_size_state_is_spread_evenly(run):
    _, config, state = run
    total, local = (sum(map(f, leaves(state).values())) for f in (lambda x: x.size, local_size))
    if config.data.source == "tfds":  # The ImageNet models; MESH has 8 devices.
        assert local < total / 8 * 1.05


def test_the_full_size_models_are_those_of_the_released_sizes(run):
    _, config, state = run
    counts = {"d12_d12": 257_830_726, "d18_d18": 865_913_542, "d18_d28": 2_457_061_830}
    variant = f"d{config.model.enc_depth}_d{config.model.dec_depth}"
    if variant in counts:
        assert sum(leaf.size for leaf in leaves(state.params).values()) == counts[variant]


def test_frozen_networks_and_loaded_models_have_rules_too():
    cfg = FlexTokConfig(vae=VAEConfig())
    for path, leaf in leaves(models.shapes(cfg)).items():
        assert len(rules_of(path)) == 1, path
        spec = layout.param_spec(path, leaf.shape, MESH)
        if leaf.size > BIG and not re.fullmatch(WHOLE, path):
            assert any(spec), path
    frozen = {"vae": models.shapes(cfg)["vae"]}  # As the loop places it.
    placed = leaves(sharding.param_shardings(MESH, frozen)).values()
    assert all(s.is_fully_replicated for s in placed)


def for_repa():
    """The projection of the largest model, and the frozen DINOv2-L."""
    projection = jax.eval_shape(lambda: repa.init(1792, 1024, jax.random.key(0)))
    return {"repa": projection, "dinov2": dinov2.shapes(dinov2.DINOv2Config())}


def test_networks_of_repa_have_rules_and_are_spread():
    for path, leaf in leaves(for_repa()).items():
        assert len(rules_of(path)) == 1, path
        assert leaf.size <= BIG or any(layout.param_spec(path, leaf.shape, MESH)), path


def test_every_rule_is_used():
    sizes = dict(vocab_size=8, num_tokens=4, width=64, depth=1, mlp_hidden=64, qk_norm=True)
    models = (ARConfig(**sizes, num_classes=2), ARConfig(**sizes, text_dim=8, text_hidden=8))
    paths = {*leaves(models.shapes(FlexTokConfig(vae=VAEConfig()))), "null_text/text"}
    paths |= {*leaves(for_repa())}
    paths |= {path for cfg in models for path in leaves(flexar.shapes(cfg))}
    for pattern, _ in layout.PARAMETER_RULES:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


def test_a_path_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="0 sharding rules match the parameter 'decoder/new'"):
        layout.logical_axes("decoder/new")


def test_an_axis_that_does_not_divide_stays_whole():
    spec = layout.param_spec("decoder/blocks/mlp/fc1/kernel", (28, 1792, 4779), MESH)
    assert tuple(spec) == (None, "fsdp", None)


def test_mesh_sizes_that_do_not_fit_are_refused():
    devices = jax.devices()
    assert make_mesh(devices=devices).shape == {"data": len(devices), "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="data=3, fsdp=5, tensor=1 does not fit"):
        make_mesh(3, 5, 1)
    with pytest.raises(ValueError, match="data=-1, fsdp=-1"):
        make_mesh(-1, -1)
