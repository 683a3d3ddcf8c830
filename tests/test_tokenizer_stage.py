"""The tokenizer stage: the shipped configs train, resume bitwise, fine-tune, and load again."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN

from configs import tokenizer as CONFIGS
from examples.digits import arrays
from flextok_jax import FlexTok
from flextok_jax.io import models
from flextok_jax.nn.config import from_dict
from flextok_jax.nn.layout import unbox
from flextok_jax.nn.tokenizer_config import TokenizerConfig
from flextok_jax.training.loop import train
from flextok_jax.training.tokenizer_stage import TokenizerStage

STEPS = {"model__target__flow__sampler__steps": 2}
IMAGENET = ("d12_d12", "d18_d18", "d18_d28")


def config(variant="digits,width=64,enc_depth=1,dec_depth=1,batch=6", **changes):
    c = CONFIGS.get_config(variant)
    c.update(total_steps=4, log_every=2, eval_every=0)
    c.checkpoint.every = 2
    c.evaluation.num_images = 0
    c.mesh.data = 1
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


def digits(count=8):
    images, labels = arrays("train")
    return {"image": images[:count], "label": labels[:count]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with its last evaluation: (workdir, outcome)."""
    workdir = tmp_path_factory.mktemp("run")
    c = config(
        evaluation__num_images=20, evaluation__batch_size=10, model__target__flow__sampler__steps=2
    )
    return workdir, train(TokenizerStage(c), c, workdir)


def test_a_run_logs_what_the_field_looks_at(trained):
    lines = (trained[0] / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 4
    bins = [f"loss_by_time/{x}" for x in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")]
    keeps = [f"loss_by_tokens/{x}" for x in ("1", "2", "3-4", "5-8", "9-16")]
    psnr = [f"eval/reconstruction/psnr/{k}" for k in (1, 2, 4, 8, 16)]
    for name in [*bins, *keeps, *psnr, "loss", "loss_null", "grad_norm", "lr", "images_per_s"]:
        assert name in last, name
    assert len(last["codebook/usage"]) == len(last["codebook/perplexity"]) == 16
    assert all(5 < last[name] < 30 for name in psnr)
    for k in (1, 2, 4, 8, 16):
        assert 0 < last[f"eval/reconstruction/mae/{k}"] < 2
        assert -1 < last[f"eval/reconstruction/ssim/{k}"] < 1


def test_a_continued_run_is_bitwise_the_one_never_stopped(trained, tmp_path):
    workdir, outcome = trained
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    c = config(
        evaluation__num_images=20, evaluation__batch_size=10, model__target__flow__sampler__steps=2
    )
    again = train(TokenizerStage(c), c, tmp_path / "run")
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(outcome.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_workdir_loads_with_its_averaged_weights_and_converts(trained, tmp_path):
    workdir, outcome = trained
    tok = FlexTok.from_pretrained(workdir)
    assert "step 4" in tok.origin and tok.num_tokens == 16
    ema = {**outcome.state.ema, "vae": {}}
    for a, b in zip(jax.tree.leaves(tok.params), jax.tree.leaves(ema), strict=True):
        np.testing.assert_array_equal(a, b)
    tok.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert again.fingerprint == tok.fingerprint and again.config == tok.config
    images = digits()["image"]
    np.testing.assert_array_equal(again.tokenize(images), tok.tokenize(images))


@pytest.mark.slow
def test_fine_tuning_starts_from_the_source_and_leaves_frozen_parts_alone(trained, tmp_path):
    source = FlexTok.from_pretrained(trained[0])
    c = config(init_from=str(trained[0]), freeze=("encoder/.*",), total_steps=1)
    state = train(TokenizerStage(c), c, tmp_path).state
    for a, b in zip(
        jax.tree.leaves(state.params["encoder"]), jax.tree.leaves(source.params["encoder"])
    ):
        np.testing.assert_array_equal(a, b)
    moved = state.params["decoder"]["head"]["kernel"] - source.params["decoder"]["head"]["kernel"]
    assert 0 < np.abs(moved).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["d18_d28"])  # Cut down, the others are the same.
def test_full_recipes_take_a_real_step_when_cut_down(variant, tiny_tfds, tmp_path):
    """TFDS images, a frozen VAE with a sampled posterior, bfloat16, remat, muP."""
    c = config(f"{variant},enc_depth=1,dec_depth=2,width=64,batch=4,num_tokens=8,image=32")
    c.vae.source = str(GOLDEN / "vae")
    c.data.update(path=str(tiny_tfds), name="tiny_digits", eval_split="test")
    c.optim.warmup_steps = 1
    c.total_steps = 1
    stage = TokenizerStage(c)
    outcome = train(stage, c, tmp_path)
    assert int(outcome.state.skipped) == 0 and int(outcome.state.step) == 1
    tok = FlexTok.from_pretrained(tmp_path)
    image = tok.detokenize(tok.tokenize(np.zeros((1, 32, 32, 3), np.uint8), 3), steps=1)
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


@pytest.mark.parametrize("variant", CONFIGS.VARIANTS)
def test_full_size_configs_describe_the_paper_models(variant):
    c = CONFIGS.get_config(variant)
    cfg = from_dict(TokenizerConfig, c.model.to_dict())
    shapes = models.shapes(cfg)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    if variant in IMAGENET:
        expected = {"d12_d12": 341_651_737, "d18_d18": 949_734_553, "d18_d28": 2_540_882_841}
        assert count == expected[variant]
        assert (c.batch_size, c.data.image_size, c.data.source) == (2048, 256, "tfds")
    else:
        assert count > 0 and c.data.source == "folder"


@pytest.mark.slow
def test_the_time_shift_moves_the_images_of_a_batch_towards_noise():
    stage = TokenizerStage(config(time_shift=50.0))
    batch = jax.tree.map(jnp.asarray, digits(64))
    params = stage.init(jax.random.key(0))
    _, metrics = jax.jit(stage.loss)(params, {}, batch, jax.random.key(1), jnp.int32(0))
    assert metrics["loss_by_time/0.75-1.00"].count >= 60  # Without the shift about 16 of the 64.


@pytest.mark.slow
def test_loss_is_the_mean_of_its_bins_and_null_images_teach_the_encoder_nothing():
    stage = TokenizerStage(config(model__target__flow__null_prob=0.5))
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape),
        unbox(stage.init(jax.random.key(0))),
    )
    batch = jax.tree.map(jnp.asarray, digits(64))
    loss, metrics = jax.jit(stage.loss)(params, {}, batch, jax.random.key(1), jnp.int32(0))
    for prefix, more in (("loss_by_time/", ()), ("loss_by_tokens/", ("loss_null",))):
        parts = [m for name, m in metrics.items() if name.startswith(prefix) or name in more]
        assert sum(m.count for m in parts) == 64
        np.testing.assert_allclose(sum(m.total for m in parts) / 64, loss, rtol=1e-5)
    everything_null = TokenizerStage(config(model__target__flow__null_prob=0.99999))
    gradient = jax.grad(
        lambda p: everything_null.loss(p, {}, batch, jax.random.key(1), jnp.int32(0))[0]
    )(params)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient["encoder"]))
    assert np.any(gradient["decoder"]["null"]) and not np.any(gradient["decoder"]["mask"])


@pytest.mark.slow
def test_training_learns(tmp_path):
    c = config(total_steps=60, batch_size=16, log_every=10, checkpoint__every=0)
    c.optim.update(warmup_steps=10)
    train(TokenizerStage(c), c, tmp_path)
    losses = [json.loads(x)["loss"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]


def test_bad_configs_say_what_is_wrong():
    with pytest.raises(ValueError, match="image_size=18.*multiple of 4"):
        TokenizerStage(config(data__image_size=18))
    with pytest.raises(FileNotFoundError, match="by hand"):
        TokenizerStage(config(vae__source="nobody/no_vae"))
