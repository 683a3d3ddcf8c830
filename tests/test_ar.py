"""The AR Transformer: what a position may see, its variants, and where its parameters lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from flax import traverse_util

from flextok_jax.io.formats.flexar import shapes
from flextok_jax.io.formats.names import flatten
from flextok_jax.nn import ar, layout
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.parallel.mesh import AXES

CLASS = ARConfig(50, 12, 64, 2, head_dim=32, mlp_hidden=96, num_classes=5)
TEXT = dataclasses.replace(CLASS, num_classes=0, text_dim=24, text_hidden=40, qk_norm=True)
PLAIN = dataclasses.replace(CLASS, num_classes=0)
GROUPS = dataclasses.replace(CLASS, depth=1, group=3)
FOLDED = dataclasses.replace(CLASS, depth=1, group=4, folded=True)
DOUBLING = dataclasses.replace(TEXT, num_tokens=16, depth=1, group=0)
KINDS = pytest.mark.parametrize("cfg", (CLASS, TEXT, PLAIN), ids=("class", "text", "plain"))


def random_params(cfg: ARConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path.endswith("scale"):
            return 1 + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        scale = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 1
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    flat = {path: draw(path, leaf) for path, leaf in flatten(shapes(cfg)).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def condition(cfg: ARConfig, batch: int = 3, seed: int = 0) -> ARCondition:
    rng = np.random.default_rng(seed)
    if cfg.text_dim:
        text = rng.standard_normal((batch, 4, cfg.text_dim)).astype(np.float32)
        return ARCondition(text=text, text_mask=np.arange(4) < rng.integers(1, 4, (batch, 1)))
    return ARCondition(np.arange(batch, dtype=np.int32) if cfg.num_classes else None)


def tokens(cfg: ARConfig, batch: int = 3, seed: int = 0):
    shape = (batch, cfg.num_tokens)
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape, dtype=np.int32)


logits = jax.jit(ar.logits, static_argnames=("cfg", "compute"))


@pytest.mark.parametrize("cfg", (CLASS, TEXT, PLAIN, GROUPS, FOLDED, DOUBLING))
def test_a_position_sees_the_tokens_of_groups_before_its_own_and_no_others(cfg):
    params, ids = random_params(cfg), tokens(cfg)
    later = {1: 8, 3: 9, 4: 8, 0: 8}[cfg.group]  # Where the group after token 7 begins.
    whole = np.asarray(logits(params, cfg, Compute(), ids, condition(cfg)))
    other = ids.copy()
    other[:, 7] = (other[:, 7] + 1) % cfg.vocab_size
    changed = np.asarray(logits(params, cfg, Compute(), other, condition(cfg)))
    np.testing.assert_array_equal(changed[:, :later], whole[:, :later])
    assert (np.abs(changed[:, later:] - whole[:, later:]).max(axis=-1) > 1e-3).all()
    short = logits(params, cfg, Compute(), ids[:, :5], condition(cfg))
    assert relative(short, whole[:, :5]) < 1e-5


def test_a_group_reads_as_many_tokens_before_it():
    ids = np.arange(10, 26)[None]

    def read(cfg):
        return np.asarray(ar.read_by(cfg, ids[:, : cfg.num_tokens]))[0].tolist()

    assert read(CLASS) == [ar.SOS, *range(10, 21)]
    assert CLASS.ranks == tuple(range(12)) and CLASS.runs == ((0, 1, 12),)
    assert read(GROUPS) == [ar.SOS] * 3 + list(range(10, 19))
    assert GROUPS.ranks == (0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9)
    assert read(DOUBLING) == [ar.SOS, 10, 10, 11, *range(10, 14), *range(10, 18)]
    assert DOUBLING.ranks == (0, 1, 2, 2, *[4] * 4, *[8] * 8)
    assert len(dataclasses.replace(DOUBLING, num_tokens=256).runs) == 9
    assert dataclasses.replace(CLASS, num_tokens=1, group=0).ranks == (0,)


def test_the_class_is_added_to_the_start_and_a_negative_label_adds_nothing():
    params = random_params(CLASS)
    first = np.full((3, 2), ar.SOS, np.int32)
    first[:, 1] = 4
    labels = np.array([2, -1, -7], np.int32)
    x = ar.embed(params, CLASS, jnp.float32, first, 0, labels)
    p = params["ar"]
    np.testing.assert_allclose(x[0, 0], p["sos"] + p["classes"][2] + p["pos"][0], rtol=1e-5)
    np.testing.assert_allclose(x[1, 0], p["sos"] + p["pos"][0], rtol=1e-5)
    np.testing.assert_array_equal(x[1], x[2])
    np.testing.assert_allclose(x[:, 1], np.tile(p["embed"][4] + p["pos"][1], (3, 1)), rtol=1e-5)


def test_padding_of_a_text_has_no_effect():
    params, ids, given = random_params(TEXT), tokens(TEXT), condition(TEXT)
    noise = np.random.default_rng(1).standard_normal(given.text.shape).astype(np.float32)
    padded = given._replace(text=np.where(given.text_mask[..., None], given.text, noise))
    assert (padded.text != given.text).any()
    a, b = (logits(params, TEXT, Compute(), ids, c) for c in (given, padded))
    np.testing.assert_array_equal(a, b)
    seen = given._replace(text=given.text + given.text_mask[..., None] * noise)
    assert relative(logits(params, TEXT, Compute(), ids, seen), a) > 1e-2


@KINDS
def test_how_it_is_run_does_not_change_the_result(cfg):
    params, ids, given = random_params(cfg), tokens(cfg), condition(cfg)
    whole = logits(params, cfg, Compute(), ids, given)
    assert relative(logits(params, cfg, Compute(scan=False), ids, given), whole) < 1e-5
    low = logits(params, cfg, Compute("bfloat16"), ids, given)
    assert low.dtype == jnp.float32
    assert 0 < relative(low, whole) < 0.05


def test_fresh_parameters_predict_nearly_uniformly():
    params = layout.unbox(jax.jit(ar.init, static_argnums=0)(CLASS, jax.random.key(0)))
    found = np.asarray(logits(params, CLASS, Compute(), tokens(CLASS), condition(CLASS)))
    assert 0.05 < found.std() < 1.5
    assert {path.split("/")[0] for path in flatten(params)} == {"ar"}
    for path, leaf in flatten(params).items():
        assert leaf.dtype == jnp.float32 and (leaf.std() > 0) != path.endswith("scale"), path


@KINDS
def test_every_parameter_has_one_sharding_rule_and_the_vocabulary_is_cut(cfg):
    mesh = jax.sharding.AbstractMesh((1, 2, 2), AXES)
    wide = dataclasses.replace(cfg, vocab_size=64000, width=768, head_dim=64, mlp_hidden=2048)
    boxes = jax.tree_util.tree_leaves_with_path(ar.shapes(wide), is_leaf=layout.is_box)
    for path, box in boxes:
        spec = layout.spec(box, mesh)
        if box.value.size > 1_000_000:
            assert {"fsdp", "tensor"} <= set(spec), (path, spec)
    assert tuple(layout.spec(ar.shapes(wide)["ar"]["embed"], mesh)) == ("tensor", "fsdp")


@pytest.mark.parametrize(
    "fields, message",
    (
        ({"width": 70}, "width=70"),
        ({"text_dim": 8, "text_hidden": 8}, "num_classes=5 and text_dim=8"),
        ({"num_classes": 0, "text_dim": 8}, "text_hidden=0"),
        ({"depth": 0}, "depth=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"group": 5}, "group=5: num_tokens must be a multiple of 5"),
        ({"group": 0}, "group=0: num_tokens must be a power of two"),
        ({"group": -1}, "group=-1"),
        ({"folded": True}, "group=1"),
        ({"folded": True, "group": 3}, "group=3 and width=64"),
    ),
)
def test_configurations_without_a_model_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLASS, **fields)
