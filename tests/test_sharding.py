"""Sharding: every parameter says its axes, and nothing big is whole on every device.

At full size, by shapes alone, for every shipped configuration.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import CONFIGS, shipped

from flextok_jax.io.formats.names import flatten
from flextok_jax.nn import dinov2, layout, repa
from flextok_jax.parallel import mesh, sharding
from flextok_jax.parallel.mesh import AXES, make_mesh
from flextok_jax.training.optimizer import trainable_paths
from flextok_jax.training.state import build

MESH = jax.sharding.AbstractMesh((1, 4, 2), AXES)
BIG = 1_000_000
# Networks that are whole on every device: convolutions, and small against the others.
WHOLE = ("vae", "discriminator", "lpips")


@pytest.fixture(scope="module", params=[(f, v) for f in CONFIGS for v in CONFIGS[f].VARIANTS])
def run(request):
    """(the stage, its configuration, its training state's shapes with their shardings on MESH)."""
    stage, config = shipped(*request.param)
    return stage, config, build(stage, config, MESH).shapes


def boxes(tree) -> dict:
    """{"a/b/c": box or array}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=layout.is_box)
    return {layout.path_string(path): leaf for path, leaf in leaves}


def local_size(leaf) -> int:
    """How many of its elements one device holds."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def test_every_parameter_says_its_axes_and_lies_with_its_average_and_slots(run):
    stage, config, state = run
    for path, box in boxes(jax.eval_shape(stage.init, jax.random.key(0))).items():
        if path.split("/")[0] not in WHOLE:
            assert layout.is_box(box) and len(box.names) == len(box.value.shape), path
    params, averages = flatten(state.params), flatten(state.ema)
    assert params.keys() == averages.keys()
    for path, leaf in params.items():
        assert averages[path].sharding == leaf.sharding, path
    found = set()
    for path, leaf in flatten(state.opt_state).items():
        if leaf.shape and not path.endswith("/ns_coeffs"):  # three numbers of Muon
            parameter = re.sub(r"^.*?(mu|nu)/", "", path)
            assert leaf.sharding == params[parameter].sharding, path
            found.add(parameter)
    assert found == trainable_paths(state.params, stage.trainable, config.freeze)


def test_nothing_big_is_whole_on_every_device(run):
    _, config, state = run
    if config.stage == "vae":
        return
    for path, leaf in flatten(state).items():
        assert leaf.size <= BIG or local_size(leaf) < leaf.size, path
    total, local = (sum(map(f, flatten(state).values())) for f in (lambda x: x.size, local_size))
    if total > 500 * BIG:  # The full-size models; MESH has 8 devices.
        assert local < total / 8 * 1.05


def test_networks_of_repa_are_spread():
    projection = jax.eval_shape(lambda: repa.init(1792, 1024, jax.random.key(0)))
    networks = {"repa": projection, "dinov2": dinov2.shapes(dinov2.DINOv2Config())}
    for path, box in boxes(networks).items():
        assert box.value.size <= BIG or any(layout.spec(box, MESH)), path


def test_what_has_no_axes_is_replicated_and_what_does_not_divide_stays_whole():
    tree = {
        "plain": jnp.zeros((4, 4)),
        "even": layout.Axes(jnp.zeros((4, 8)), ("embed", "hidden")),
        "odd": layout.Axes(jnp.zeros((3, 8, 5)), (None, "embed", "hidden")),
    }
    specs = {name: tuple(s.spec) for name, s in sharding.param_shardings(MESH, tree).items()}
    assert specs == {"plain": (), "even": ("fsdp", "tensor"), "odd": (None, "fsdp", None)}
    with pytest.raises(ValueError, match="one name per dimension"):
        layout.spec(layout.Axes(jnp.zeros(3), ("embed", None)), MESH)
    again = layout.box(layout.unbox(tree), tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_the_devices_are_named_and_a_cpu_in_place_of_a_gpu_is_a_warning(monkeypatch, caplog):
    assert mesh.describe(dtype="bfloat16") == "1 x cpu, bfloat16"
    assert not caplog.records
    monkeypatch.setattr(mesh, "_installed", lambda package: package == "jax-cuda13-plugin")
    assert mesh.describe() == "1 x cpu, float32" and not caplog.records  # The CPU was asked for.
    with jax.default_matmul_precision("tensorfloat32"):
        jax.config.update("jax_platforms", None)
        try:
            assert mesh.describe() == "1 x cpu, float32 (matrix products in tensorfloat32)"
        finally:
            jax.config.update("jax_platforms", "cpu")
    assert "CUDA" in caplog.text


def test_mesh_sizes_that_do_not_fit_are_refused():
    devices = jax.devices()
    assert make_mesh(devices=devices).shape == {"data": len(devices), "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="data=3, fsdp=5, tensor=1"):
        make_mesh(3, 5, 1)
    with pytest.raises(ValueError, match="data=-1, fsdp=-1"):
        make_mesh(-1, -1)
