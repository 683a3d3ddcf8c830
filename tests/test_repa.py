"""REPA changes the loss that it should, and nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN
from test_tokenizer_stage import config as tokenizer_config
from test_tokenizer_stage import digits

from flextok_jax import FlexTok
from flextok_jax.io.formats import names
from flextok_jax.nn import repa
from flextok_jax.nn.layout import unbox
from flextok_jax.training.loop import train
from flextok_jax.training.tokenizer_stage import TokenizerStage

SOURCE = str(GOLDEN / "dinov2")
ON = dict(repa__weight=0.5, repa__source=SOURCE, repa__image_size=42, repa__width=24)
KEY, STEP = jax.random.key(1), jnp.int32(0)


def config(**changes):
    c = tokenizer_config("digits,width=32,enc_depth=1,dec_depth=3,batch=8", **changes)
    c.compute.scan = True
    return c


def recipe():
    """A run of 20 steps."""
    c = config(**ON, total_steps=20, log_every=1, checkpoint__every=0)
    c.optim.update(lr=1e-3, warmup_steps=1)
    return c


def batch():
    return jax.tree.map(jnp.asarray, digits())


@pytest.fixture(scope="module")
def stage():
    return TokenizerStage(config(**ON))


@pytest.fixture(scope="module")
def gradient(stage):
    """(with REPA, without): (params, frozen, batch, key, step) -> ((loss, metrics), gradient)."""
    stages = (stage, TokenizerStage(config()))
    return [jax.jit(jax.value_and_grad(s.loss, has_aux=True)) for s in stages]


@pytest.fixture(scope="module")
def moved(stage):
    """Parameters without the zeros of a start."""
    return jax.tree.map(
        lambda x: (0.1 * np.random.RandomState(x.size).randn(*x.shape)).astype(np.float32),
        unbox(jax.eval_shape(stage.init, KEY)),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, outcome)"""
    workdir = tmp_path_factory.mktemp("repa")
    c = recipe()
    return workdir, train(TokenizerStage(c), c, workdir)


def test_similarity_is_the_mean_cosine_on_the_targets_grid():
    random = np.random.default_rng(0)
    features, targets = (random.standard_normal((2, *s)).astype("f4") for s in ((4, 8), (16, 6)))
    params = unbox(repa.init(8, 6, KEY))
    assert not np.any(params["fc3"]["kernel"])
    params["fc3"]["kernel"] = jax.random.normal(KEY, (32, 6))
    found = repa.similarity(params, features, targets, jnp.float32)
    made = repa.Projection(6, jnp.float32).apply({"params": params}, features)
    made = jax.image.resize(made.reshape(2, 2, 2, 6), (2, 4, 4, 6), "linear").reshape(2, 16, 6)
    lengths = np.linalg.norm(made, axis=-1) * np.linalg.norm(targets, axis=-1)
    expected = np.mean(np.sum(made * targets, axis=-1) / lengths, axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert np.all(repa.similarity(params, features, 3 * made, jnp.float32) > 0.999)
    for wrong in (targets[:, :15], targets[..., :5]):
        with pytest.raises(ValueError, match="repa.width"):
            repa.similarity(params, features, wrong, jnp.float32)


def test_without_a_weight_nothing_is_read_made_or_computed():
    """The same program with weight 0 and a source that does not exist, and without a source."""
    programs = []
    for changes in ({}, {"repa__source": "nowhere", "repa__width": 3}):
        off = TokenizerStage(config(**changes))
        assert off.load_frozen() == {}
        params = unbox(jax.eval_shape(off.init, KEY))
        assert params.keys() == {"encoder", "decoder"}
        grad = jax.jit(jax.value_and_grad(off.loss, has_aux=True))
        programs.append(grad.lower(params, {}, batch(), KEY, STEP).as_text())
    assert programs[0] == programs[1] and len(programs[0]) > 1000


@pytest.mark.slow
def test_the_model_and_the_loss_of_the_flow_start_as_without(stage, gradient):
    with_repa, without = gradient
    off = TokenizerStage(config())
    first, params = jax.jit(lambda key: unbox((stage.init(key), off.init(key))))(KEY)
    assert first.keys() - params.keys() == {"repa"}
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves({k: first[k] for k in params})):
        np.testing.assert_array_equal(a, b)
    (loss, _), flow = without(params, {}, batch(), KEY, STEP)
    (total, logged), both = with_repa(first, unbox(stage.load_frozen()), batch(), KEY, STEP)
    assert logged["loss_flow"].compute() == pytest.approx(float(loss), rel=1e-5)
    assert logged["loss_repa"].compute() == 0  # the projection begins at zero
    assert total == pytest.approx(float(loss), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(flow))
    for a, b in zip(jax.tree.leaves(flow), jax.tree.leaves({k: both[k] for k in flow})):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    assert np.any(both["repa"]["fc3"]["kernel"])


@pytest.mark.slow
def test_only_what_comes_before_the_third_block_feels_it(stage, gradient, moved):
    """The gradient of the whole loss, less that of the flow, is REPA's alone."""
    with_repa, without = gradient
    _, both = with_repa(moved, unbox(stage.load_frozen()), batch(), KEY, STEP)
    _, flow = without({k: moved[k] for k in ("encoder", "decoder")}, {}, batch(), KEY, STEP)
    alone = {k: jax.tree.map(lambda a, b: np.abs(a - b), both[k], flow[k]) for k in flow}
    for path, difference in names.flatten(alone["decoder"]["blocks"]).items():
        first, second, third = difference.reshape(3, -1).max(1)
        assert min(first, second) > 20 * third, path
    largest = {path: x.max() for path, x in names.flatten(alone).items()}
    for path in ("encoder/head/kernel", "decoder/register_pos", "decoder/patch_emb/kernel"):
        assert largest[path] > 10 * largest["decoder/head/kernel"], path


@pytest.mark.slow
def test_training_aligns_the_features(trained):
    records = [json.loads(x) for x in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss_repa"] for record in records]
    assert losses[0] == 0 and losses[-1] < -0.2
    for record in records:
        total = record["loss_flow"] + 0.5 * record["loss_repa"]
        assert record["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_a_trained_model_leaves_the_projection_behind(trained, tmp_path):
    workdir, outcome = trained
    assert "repa" in outcome.state.ema
    tok = FlexTok.from_pretrained(workdir)
    assert tok.params.keys() == {"encoder", "decoder", "vae"}
    tok.save_pretrained(tmp_path / "saved")
    assert FlexTok.from_pretrained(tmp_path / "saved").fingerprint == tok.fingerprint
    c = config(**ON, init_from=str(workdir))
    first = TokenizerStage(c).init_from(str(workdir))
    assert not np.any(first["repa"]["fc3"]["kernel"])
    np.testing.assert_array_equal(
        first["decoder"]["head"]["kernel"], outcome.state.ema["decoder"]["head"]["kernel"]
    )


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 blocks.*decoder.depth=1"):
        TokenizerStage(config(**ON, model__decoder__depth=1))
    with pytest.raises(ValueError, match="features of 24 channels.*repa.width=1024"):
        TokenizerStage(config(**ON | {"repa__width": 1024}))
    with pytest.raises(ValueError, match="repa.image_size=40"):
        TokenizerStage(config(**ON | {"repa__image_size": 40}))
    with pytest.raises(ValueError, match="repa.source=''"):
        TokenizerStage(config(**ON | {"repa__source": ""}))
