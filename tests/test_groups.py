"""Groups of images that keep about as many tokens: the same loss and gradients, at less cost."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import GOLDEN, ROOT
from test_tokenizer_stage import config as tokenizer_config
from test_tokenizer_stage import digits

from configs import lab
from flextok_jax.flow import path
from flextok_jax.nn.layout import unbox
from flextok_jax.nn.tokenizer_config import KEEP_MODES
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training import groups, memory
from flextok_jax.training.state import build
from flextok_jax.training.tokenizer_stage import TokenizerStage

REPA = dict(
    repa__weight=0.5, repa__source=str(GOLDEN / "dinov2"), repa__image_size=42, repa__width=24,
    model__decoder__depth=3,
)  # fmt: skip


def config(**changes):
    c = tokenizer_config("digits,width=32,enc_depth=1,dec_depth=1,batch=16")
    c.compute.scan = True
    c.optim.update(rule="adam", b1=0.0, grad_clip=None)  # So that the first moment is the gradient.
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c


# --- ranks ---


@pytest.mark.parametrize("size, parts", [(12, 1), (12, 3), (32, 4)])
def test_any_image_is_as_likely_to_have_any_rank(size, parts):
    keys, count = jax.random.split(jax.random.key(0), 4096), np.zeros((size, size))
    found = np.asarray(jax.vmap(lambda key: groups.ranks(key, size, parts))(keys))
    assert np.all(np.sort(found, axis=1) == np.arange(size))
    np.add.at(count, (np.arange(size)[None], found), 1)
    expected = len(keys) / size
    assert np.abs(count - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("size, parts, shards", [(32, 1, 4), (24, 3, 4), (12, 1, 1), (512, 16, 8)])
def test_every_device_has_an_equal_share_of_each_group(size, parts, shards):
    stage = TokenizerStage(config())
    runs = groups.plan(stage, size, parts, shards)
    assert sum(run.calls * run.images for run in runs) == size
    rank = groups.ranks(jax.random.key(1), size, parts)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    batch = {"rank": rank, "image": jnp.arange(size)}
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    found = groups.cut(batch, rank, runs, lambda leading: sharding)
    start = 0
    for run, part in zip(runs, found, strict=True):
        wanted = np.arange(start, start + run.calls * run.images)
        np.testing.assert_array_equal(np.sort(part["rank"], axis=None), wanted)
        calls = np.reshape(part["image"], (run.calls, run.images))
        devices = calls // (size // shards)
        # The images of a device lie together, in the order of devices: nothing has to move.
        wanted = np.repeat(np.arange(shards), run.images // shards)
        assert np.all(devices == wanted[None])
        start += run.calls * run.images


# --- kept tokens and lengths ---


def probabilities(mode, most, null):
    """{number of kept tokens: probability}, 0 for the null condition."""
    ks = {
        "pow2": [2**i for i in range(most.bit_length())],
        "uniform": range(1, most + 1),
        "uniform_pow2": [int(path.next_pow2(jnp.int32(k), most)) for k in range(1, most + 1)],
        "fixed": [most],
    }[mode]
    found = {0: null}
    for k in ks:
        found[k] = found.get(k, 0) + (1 - null) / len(ks)
    return found


@pytest.mark.parametrize("mode", KEEP_MODES)
def test_batches_hold_every_number_of_tokens_as_often_as_it_is_likely(mode):
    size, steps = 32, 400
    stage = TokenizerStage(config(model__tokens__keep=mode, model__target__flow__null_prob=0.2))

    @jax.vmap
    def draw(key):
        drawn = stage.draw(key, groups.ranks(key, size))
        return drawn["keep"], drawn["null"]

    keep, null = map(np.asarray, jax.jit(draw)(jax.random.split(jax.random.key(0), steps)))
    assert np.all(null == (keep == 0))
    expected = probabilities(mode, 16, 0.2)
    assert set(np.unique(keep)) <= set(expected)
    for k, p in expected.items():
        counts = np.sum(keep == k, axis=1)
        assert np.abs(counts - size * p).max() < 1 + 1e-3, k  # In every batch.
        noise = np.sqrt(p * (1 - p) / steps)
        assert np.abs(np.mean(keep == k, axis=0) - p).max() < 5 * noise + 1e-3, k  # Every image.


@pytest.mark.parametrize("mode", KEEP_MODES)
@pytest.mark.parametrize("most, count", [(64, 16), (12, 2)])
def test_no_image_keeps_more_tokens_than_its_group_computes(mode, most, count):
    if mode == "pow2" and most & (most - 1):
        return
    stage = TokenizerStage(config(model__tokens__keep=mode, model__tokens__count=most))
    lengths = stage.lengths(count)
    assert len(lengths) == count and len(set(lengths)) <= 4
    size = 4 * count
    draw = jax.vmap(lambda key: stage.draw(key, jnp.arange(size))["keep"])
    keep = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(2), 500)))
    assert np.all(keep.reshape(500, count, 4) <= np.array(lengths)[None, :, None])
    assert lengths[-1] == most and (lengths[0] < most or mode == "fixed")


def test_lengths_of_the_full_size_models_and_of_those_that_need_all_tokens():
    c = config(model__tokens__count=256, model__target__flow__null_prob=0.2)
    stage = TokenizerStage(c)
    assert stage.lengths(16) == (16,) * 10 + (64,) * 3 + (128,) + (256,) * 2
    assert TokenizerStage(c, grouped=False).lengths(16) == (256,) * 16
    for variant in set(lab.TOKENIZERS) - {"flow"}:
        # No causal order, or a bottleneck's loss of all tokens.
        of_lab = lab.get_config(variant)
        assert set(TokenizerStage(of_lab).lengths(8)) == {of_lab.model.tokens.count}
    c.compute.scan = False
    assert TokenizerStage(c).lengths(16) == (64,) * 13 + (256,) * 3
    assert groups.few([3, 1, 2, 3, 9], 4) == (3, 1, 2, 3, 9)
    assert groups.few([3, 1, 2, 3, 9], 2) == (3, 3, 3, 3, 9)
    assert groups.few([5, 5], 3) == (5, 5)


# --- a step ---


def first_step(config, grouped, sizes=(1, 1, 1)):
    """(metrics, gradients) of a step from parameters without zeros, on a mesh."""
    stage = TokenizerStage(config, grouped=grouped)
    mesh = make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
    program, rng = build(stage, config, mesh), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), program.shapes.params
    )
    frozen, batch = unbox(stage.load_frozen()), digits(config.batch_size)
    with jax.set_mesh(mesh):
        state, metrics = program.step(program.init_from(params), frozen, batch)
    found = {name: jax.device_get(metric.compute()) for name, metric in metrics.items()}
    return found, jax.device_get(optax.tree.get(state.opt_state, "mu"))


def agree(found, wanted):
    """Metrics, and gradients relative to the largest."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, found[0], wanted[0])
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def rounds(jaxpr) -> int:
    """How often a program rounds, as FSQ does in each body of the loss."""
    values = (value for eqn in jaxpr.eqns for value in eqn.params.values())
    inside = sum(rounds(x) for value in values for x in memory._programs(value))
    return inside + sum(eqn.primitive.name == "round" for eqn in jaxpr.eqns)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_a_step_has_one_body_for_each_length(parts):
    c = config(optim__accumulate=parts)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])

    def found(stage):
        program = build(stage, c, mesh)
        traced = program.step.trace(program.shapes, unbox(stage.load_frozen()), digits(16))
        return rounds(traced.jaxpr.jaxpr)

    stage = TokenizerStage(c)
    assert len(set(stage.lengths(16))) == 4
    assert found(stage) == 4 * found(TokenizerStage(c, grouped=False)) > 0


STEPS = {
    "slices": {},
    "accumulated": {"optim__accumulate": 4},
    "accumulated, uniform": {"optim__accumulate": 8, "model__tokens__keep": "uniform"},
    "REPA": {**REPA, "optim__accumulate": 2},
    "REPA, slices": {**REPA, "batch_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_groups_is_the_step_at_full_length(name):
    agree(first_step(config(**STEPS[name]), True), first_step(config(**STEPS[name]), False))


ON_EIGHT = """
import conftest
import jax
from test_groups import agree, config, first_step

assert jax.device_count() == 8
for parts, sizes in ((1, (8, 1, 1)), (2, (2, 2, 2))):
    c = config(batch_size=32, optim__accumulate=parts)
    agree(first_step(c, True, sizes), first_step(c, False))
"""


@pytest.mark.slow
def test_on_eight_devices_too():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_evaluation_computes_about_as_many_tokens_as_it_decodes(monkeypatch):
    stage = TokenizerStage(config(evaluation__num_images=4, evaluation__batch_size=4))
    seen = []

    def decoded(params, frozen, images, text, key, k, count):
        seen.append((int(k), count))
        return images

    monkeypatch.setattr(stage, "_decoded", decoded)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    found = dict(stage.evaluators()["reconstruction"](None, None, mesh))
    assert seen == [(1, 1), (2, 4), (4, 4), (8, 16), (16, 16)]
    assert all(found[f"mae/{k}"] == 0 for k, _ in seen)
