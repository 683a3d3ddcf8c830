"""A text encoder that is trained with an AR model, on captions of its data."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import new_params, stage_params, tiny_tokenizer
from PIL import Image

from configs import ar as CONFIGS
from examples.digits import arrays, captions_of
from flextok_jax import ImageGenerator, TextEncoder, cli
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.io import storage
from flextok_jax.io.formats import flexar
from flextok_jax.io.formats.names import flatten
from flextok_jax.nn import layout
from flextok_jax.training.ar_stage import ARStage
from flextok_jax.training.loop import train

PROMPTS = ["a seven", "SOMETHING", ""]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """(a folder of images whose captions say what is seen, a tokenizer of them)."""
    folder = tmp_path_factory.mktemp("captioned")
    digits, labels = arrays("train")
    for i in range(24):
        path = folder / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits[i]).save(path)
        if i:  # One has no caption.
            path.with_suffix(".txt").write_text(captions_of(int(labels[i]))[i % 6])
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def own_text(captioned, **changes):
    c = CONFIGS.get_config("digits_text,width=64,depth=1,batch=8")
    c.update(total_steps=2, log_every=1, eval_every=0)
    c.checkpoint.every = 2
    c.mesh.data = 1
    c.tokenizer.source = str(captioned / "tokenizer")
    c.data.update(
        path=str(captioned / "images"), split="all", eval_split="all", image_size=8,
        crop="center", rotate=0.0, zoom=0.0,
    )  # fmt: skip
    c.model.update(text_dim=16, text_hidden=16)
    c.text_encoder.update(depth=1, num_heads=2, head_dim=8, mlp_hidden=16, length=8)
    c.loss.chunk = 5
    c.evaluation.update(num_images=8, batch_size=8)
    for key, value in changes.items():
        owner, _, name = key.rpartition("__")
        (c[owner] if owner else c)[name] = value
    return c


def saved(stage, params, folder):
    """The file of such a model."""
    info = {key: x for key, x in stage.export_config().items() if key not in ("kind", "config")}
    params = jax.tree.map(np.asarray, params)
    return flexar.save(folder, flexar.LoadedAR(stage.model, params, info))


@pytest.mark.slow
def test_a_text_encoder_learns_with_the_model_and_lies_in_its_file(captioned, tmp_path):
    stage = ARStage(own_text(captioned, condition__null_prob=0.0))
    params = new_params(stage.init)
    data = own_text(captioned).data
    batch = make_pipeline(data, seed=0, batch_size=8, train=True, text=stage.captions)[0]
    frozen = layout.unbox(stage.load_frozen())
    loss = functools.partial(stage.loss, key=jax.random.key(1), step=jnp.int32(0))
    batch = jax.tree.map(jnp.asarray, batch)
    grads = jax.jit(jax.grad(lambda p: loss(p, frozen, batch)[0]))(params)
    text = flatten(grads["text_encoder"])
    assert len(text) == 12 and all(np.abs(leaf).max() > 0 for leaf in text.values())

    saved(stage, params, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    names, _ = storage.read_header(tmp_path / "model.safetensors")
    assert "models.text_encoder.t5_embedder.model.shared.weight" in names
    gen = ImageGenerator.from_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    tokens = gen.generate_tokens(text=PROMPTS, num_tokens=4, key=0)
    gen.save_pretrained(tmp_path / "again")
    again = ImageGenerator.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again.generate_tokens(text=PROMPTS, num_tokens=4, key=0), tokens)
    assert again.text_encoder.fingerprint == storage.fingerprint(params["text_encoder"])
    alone = TextEncoder.from_pretrained(tmp_path)
    for found, wanted in zip(alone.encode(PROMPTS), gen.text_encoder.encode(PROMPTS)):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="its own text encoder"):
        ImageGenerator.from_pretrained(tmp_path, text_encoder=alone)
    with pytest.raises(ValueError, match="taken away"):
        dataclasses.replace(gen, text_encoder=None).save_pretrained(tmp_path / "third")
    with pytest.raises(ValueError, match="holds no text encoder"):
        TextEncoder.from_pretrained("demo-digits-ar")
    # The same captions give the same tokenizer, or a run could not be continued.
    assert ARStage(own_text(captioned)).export_config() == stage.export_config()


@pytest.mark.slow
def test_a_run_with_a_text_encoder_continues_and_draws_prompts(captioned, tmp_path):
    for steps in (2, 4):
        c = own_text(captioned, total_steps=steps)
        state = train(ARStage(c), c, tmp_path / "run").state
    assert int(state.skipped) == 0 and int(state.step) == 4
    assert set(state.params) == {"ar", "text_encoder"}
    found = ImageGenerator.from_pretrained(tmp_path / "run")
    assert found.text_encoder.fingerprint == storage.fingerprint(state.ema["text_encoder"])
    source = ARStage(own_text(captioned)).init_from(str(tmp_path / "run"))
    assert storage.fingerprint(source) == storage.fingerprint(state.ema)
    command = ["generate", "--model", str(tmp_path / "run"), "--text", "a seven", "--steps", "1"]
    assert cli.main([*command, "--num-tokens", "2", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "k0002" / "000000_a-seven.png").exists()
    assert cli.main([*command, "--text-encoder", "x", "--out", str(tmp_path / "other")]) == 2


def test_captions_become_ids_and_absent_ones_the_empty_caption(captioned, tmp_path):
    stage = ARStage(own_text(captioned, condition__null_prob=0.0))
    (batch,) = itertools.islice(
        make_pipeline(
            own_text(captioned).data, seed=0, batch_size=24, train=False, text=stage.captions
        ).eval_batches(24),
        1,
    )
    assert batch["text_ids"].shape == (24, 8) and batch["text_ids"].dtype == np.int32
    lengths = batch["text_mask"].sum(1)
    assert sorted(lengths)[0] == 1 and (np.sort(lengths)[1:] > 1).all()  # One has no caption.
    ends = batch["text_ids"][np.arange(24), lengths - 1]
    assert (ends == 1).all() and stage.captions("x " * 50)["text_ids"][-1] == 1
    params = stage_params(stage)
    everywhere = stage._condition(params, {}, batch, np.ones(24, bool))
    nowhere = stage._condition(params, {}, batch, np.zeros(24, bool))
    assert everywhere.text_mask.sum() == 24
    (bare,) = np.flatnonzero(lengths == 1)
    np.testing.assert_allclose(nowhere.text[bare, 0], everywhere.text[0, 0], rtol=1e-5)
    for path in (captioned / "images").glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="no image has a caption"):
        ARStage(own_text(captioned, data__path=str(tmp_path)))
