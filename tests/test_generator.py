"""ImageGenerator as a user holds it: released files, the contract, and what it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, TINY, relative, tiny_tokenizer
from safetensors.numpy import load_file, save_file
from test_ar import random_params

from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.io import storage
from flextok_jax.io.formats import flexar
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.parallel.mesh import make_mesh

C2I, T2I = GOLDEN / "ar_c2i", GOLDEN / "ar_t2i"
CFG = ARConfig(200, 16, 64, 2, head_dim=32, mlp_hidden=96, num_classes=5)


@functools.cache
def golden(kind):
    """(the model, the reference's numbers, conditions by keyword, the null branch's)."""
    gen = ImageGenerator.from_pretrained(GOLDEN / f"ar_{kind}")
    io = load_file(GOLDEN / f"ar_{kind}" / "io.safetensors")
    if kind == "c2i":
        return gen, io, {"labels": io["labels"]}, {}
    null = {name: io[name] for name in ("null_embeddings", "null_mask")}
    return gen, io, {name: io[name] for name in ("text_embeddings", "text_mask")}, null


@functools.cache
def tiny(**fields):
    cfg = dataclasses.replace(CFG, **fields)
    return ImageGenerator(cfg, random_params(cfg), tiny_tokenizer())


@pytest.mark.parametrize("kind", ("c2i", "t2i"))
def test_logits_agree_with_the_reference(kind):
    gen, io, condition, null = golden(kind)
    assert relative(gen.logits(io["tokens"], **condition), io["logits"]) < 1e-5
    assert relative(gen.logits(io["tokens"], **null), io["logits_null"]) < 1e-5
    assert relative(io["logits"], io["logits_null"]) > 1e-2


@pytest.mark.parametrize("kind", ("c2i", "t2i"))
def test_greedy_tokens_with_guidance_equal_the_reference(kind):
    gen, io, condition, null = golden(kind)
    found = gen.generate_tokens(**condition, **null, temperature=0)  # the default guidance
    np.testing.assert_array_equal(found, io["greedy_tokens"])


def test_guidance_defaults_are_those_of_the_kind_of_model():
    assert golden("c2i")[0].config.guidance_scale == 1.5
    assert golden("t2i")[0].config.guidance_scale == 3.0


@pytest.mark.parametrize("folder", (C2I, T2I), ids=("c2i", "t2i"))
def test_saving_a_released_model_returns_its_tensors(folder, tmp_path):
    gen = ImageGenerator.from_pretrained(folder)
    gen.save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    again = ImageGenerator.from_pretrained(tmp_path)
    assert (again.config, again.fingerprint) == (gen.config, gen.fingerprint)


def test_a_model_of_ours_round_trips_with_what_no_tensor_says(tmp_path):
    gen = tiny(guidance_scale=2.5, norm_eps=1e-5, qk_norm=True)
    gen.save_pretrained(tmp_path)
    again = ImageGenerator.from_pretrained(tmp_path, tokenizer=gen.tokenizer)
    assert (again.config, again.fingerprint) == (gen.config, gen.fingerprint)
    _, metadata = storage.read(tmp_path / "model.safetensors")
    about = json.loads(metadata[flexar.METADATA])["tokenizer"]
    assert about == {"fingerprint": gen.tokenizer.fingerprint}
    other = FlexTok(TINY, jax.tree.map(lambda p: p + 1, gen.tokenizer.params))
    for attach in (
        lambda: ImageGenerator.from_pretrained(tmp_path, tokenizer=other),
        lambda: dataclasses.replace(again, tokenizer=other),
    ):
        with pytest.warns(UserWarning, match="not of") as told:
            attach()
        assert told[0].filename == __file__


def rewritten(folder, out, change, text=None):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    if text is not None:
        (out / "config.yaml").write_text(text)
    return out


def test_other_networks_in_a_file_are_skipped(tmp_path):
    def add(tensors):
        tensors["models.image_tokenizer.x.weight"] = np.ones(3, np.float32)
        tensors["models.text_encoder.t5_embedder.y"] = np.ones(3, np.float32)

    found = ImageGenerator.from_pretrained(rewritten(C2I, tmp_path, add))
    assert found.fingerprint == golden("c2i")[0].fingerprint


def test_one_error_lists_all_that_is_not_understood(tmp_path):
    block = "models.ar_image_model.trunk.blocks.1."

    def spoil(tensors):
        del tensors[block + "mlp.fc2.weight"]
        tensors[block + "norm_1.bias"] = np.zeros(128, np.float32)
        tensors[block + "attn.qkv.weight"] = np.zeros((100, 128), np.float32)

    with pytest.raises(ValueError) as error:
        ImageGenerator.from_pretrained(rewritten(C2I, tmp_path, spoil))
    for line in (
        "missing tensor " + block + r"mlp.fc2.weight of shape (128, 341)",
        "unknown tensor " + block + "norm_1.bias",
        f"tensor {block}attn.qkv.weight has shape (100, 128), expected (384, 128)",
    ):
        assert line in str(error.value)


YAML = """
constants: {width: 128}
generation: {cfg_factor: 4.5, model_type: ar_label_to_image_model}
model:
  meta_model:
    _target_: l3m.model.meta_models.InSeriesMetaModels
    models:
      image_tokenizer: {_target_: flextok_ar.model.integration.ImageResamplerTokenizer}
      ar_image_model:
        _target_: l3m.model.meta_models.MetaModel
        preprocessor:
          _target_: flextok_ar.model.preprocessors.ARImageEmbedPreprocessor
          codebook_size: 360
          embed_dim: ${constants.width}
          num_classes: 10
          pos_embed_type: absolute
          token_grid_size: [16, 1]
        trunk:
          _target_: l3m.model.trunks.transformer.Transformer
          embed_dim: ${constants.width}
          num_blocks: 2
          use_bias: false
          post_trunk_norm: true
          norm_layer:
            _target_: l3m.model.layers.normalization.RMSNorm
            _partial_: true
            eps: 1.0e-5
          attn_target:
            _target_: l3m.model.layers.attention.EfficientAttention
            _partial_: true
            dim: ${constants.width}
            num_heads: 4
            is_causal: true
          ffn_target: {_target_: l3m.model.layers.ffn.SwiGLUFFN, _partial_: true}
        head:
          _target_: l3m.model.heads.classifier.LinearClassifier
          in_features: ${constants.width}
          out_features: 360
          use_bias: false
"""


def test_config_yaml_says_what_tensors_do_not_and_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    found = ImageGenerator.from_pretrained(rewritten(C2I, tmp_path / "in", lambda t: None, YAML))
    base = golden("c2i")[0].config
    expected = dataclasses.replace(base, head_dim=32, norm_eps=1e-5, guidance_scale=4.5)
    assert found.config == expected
    found.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").read_text() == YAML
    assert ImageGenerator.from_pretrained(tmp_path / "out").config == expected


def test_config_yaml_with_other_mathematics_is_refused_in_one_error(tmp_path):
    text = YAML.replace("SwiGLUFFN", "GeGELU").replace("is_causal: true", "is_causal: false")
    text = text.replace("num_blocks: 2", "num_blocks: 3").replace("codebook_size", "codes")
    with pytest.raises(ValueError) as error:
        ImageGenerator.from_pretrained(rewritten(C2I, tmp_path, lambda t: None, text))
    for part in ("ffn.GeGELU", "is_causal=False", "depth=3", "codes=360"):
        assert part in str(error.value), part
    with pytest.raises(ValueError, match="no configuration of a FlexAR model"):
        ImageGenerator.from_pretrained(rewritten(C2I, tmp_path, lambda t: None, "a: [b"))


def test_a_workdir_of_training_gives_its_averaged_weights(tmp_path, monkeypatch):
    from flextok_jax.io import checkpoint

    gen, about = tiny(), {"source": "demo-digits", "fingerprint": "0" * 64, "levels": [8, 5, 5]}
    (tmp_path / "checkpoints").mkdir()
    model = {"kind": "ar", "config": dataclasses.asdict(CFG), "tokenizer": about}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    monkeypatch.setattr(
        checkpoint, "restore_ema", lambda path: checkpoint.Averaged(gen.params, {}, 7, {})
    )
    found = ImageGenerator.from_pretrained(tmp_path)
    assert (found.config, found.fingerprint) == (CFG, gen.fingerprint)
    assert found.origin.endswith("step 7") and found.tokenizer_source == "demo-digits"
    found.save_pretrained(tmp_path / "out")
    assert ImageGenerator.from_pretrained(tmp_path / "out").tokenizer_source == "demo-digits"


def test_a_tokenizer_with_other_ids_is_refused():
    cfg = dataclasses.replace(CFG, vocab_size=201)
    with pytest.raises(ValueError, match="201 ids.*200 ids"):
        ImageGenerator(cfg, {}, tiny_tokenizer())
    with pytest.raises(ValueError, match="17 positions.*16 tokens"):
        ImageGenerator(dataclasses.replace(CFG, num_tokens=17), {}, tiny_tokenizer())


def test_shapes_and_types_are_those_of_the_contract():
    gen = tiny()
    tokens = gen.generate_tokens(labels=[1, 4, 0], num_tokens=5)
    assert (tokens.shape, tokens.dtype) == ((3, 5), jnp.int32)
    logits = gen.logits(tokens, labels=[1, 4, 0])
    assert (logits.shape, logits.dtype) == ((3, 5, 200), jnp.float32)
    assert gen.num_tokens == 16
    images = gen.generate(labels=[1, 4], num_tokens=4, steps=2)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), jnp.float32)
    np.testing.assert_array_equal(gen.generate_tokens([1, 4, 0], num_tokens=5, key=0), tokens)
    assert gen.generate_tokens(prefix=np.zeros((3, 0), int), num_tokens=2).shape == (3, 2)


def test_a_sample_depends_on_its_own_key_alone():
    gen = tiny()
    batch = gen.generate_tokens([1, 2, 3], num_tokens=8, key=[7, 8, 9])
    np.testing.assert_array_equal(gen.generate_tokens([2], num_tokens=8, key=[8])[0], batch[1])
    one_key = gen.generate_tokens([1, 2, 3], num_tokens=8, key=jax.random.key(5))
    np.testing.assert_array_equal(gen.generate_tokens([1], num_tokens=8, key=5)[0], one_key[0])
    assert (np.asarray(batch) != np.asarray(one_key)).any()
    images = gen.generate([1, 2], num_tokens=4, steps=1, key=[3, 4])
    alone = gen.generate([2], num_tokens=4, steps=1, key=[4])
    assert relative(alone[0], images[1]) < 1e-5


TEXT = golden("t2i")[2]
ONES = np.ones((2, 3), int)
REFUSED = {
    "label": ({"labels": [5]}, "label 5: must be in 0..4"),
    "negative": ({"labels": [-1]}, "label -1"),
    "float labels": ({"labels": [0.5]}, "integers"),
    "no labels": ({"labels": []}, "B >= 1"),
    "num_tokens": ({"labels": [0], "num_tokens": 17}, "1..16"),
    "zero tokens": ({"labels": [0], "num_tokens": 0}, "1..16"),
    "prefix as long": ({"labels": [0, 1], "prefix": ONES, "num_tokens": 3}, "4..16"),
    "prefix ids": ({"labels": [0, 1], "prefix": 200 * ONES}, "token id 200 in prefix"),
    "prefix batch": ({"labels": [0], "prefix": ONES}, "1 conditions and 2 token"),
    "guidance": ({"labels": [0], "guidance_scale": [1.0, 2.0]}, "guidance_scale"),
    "guidance negative": ({"labels": [0], "guidance_scale": -2}, "from 0 on"),
    "guidance nan": ({"labels": [0], "guidance_scale": lambda i: np.nan}, "finite"),
    "temperature": ({"labels": [0], "temperature": -1.0}, "temperature=-1.0"),
    "top_k": ({"labels": [0], "top_k": 1.5}, "top_k=1.5"),
    "top_p": ({"labels": [0], "top_p": 1.5}, "top_p=1.5"),
    "keys": ({"labels": [0], "key": [1, 2]}, "one per sample"),
    "text": ({"text": ["a cat"]}, "not a text model"),
    "embeddings": (TEXT, "not a text model"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_suit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate_tokens(**arguments)


def test_logits_that_are_not_finite_make_no_tokens():
    gen = tiny()
    head = gen.params["ar"] | {"head": jax.tree.map(lambda x: x * np.nan, gen.params["ar"]["head"])}
    gen = dataclasses.replace(gen, params={"ar": head}, origin="MODEL")
    with pytest.raises(ValueError, match="MODEL: the logits are not finite, for 2 of 2"):
        gen.generate_tokens([0, 1], num_tokens=2)


def test_text_models_refuse_what_does_not_suit():
    gen, io, condition, null = golden("t2i")
    for arguments, message in (
        (condition, "null_embeddings"),
        ({"labels": [0]}, "a text model"),
        (condition | {"text_mask": io["text_mask"] * 0} | null, "row 0 is padding only"),
        (condition | {"text_mask": io["text_mask"] + 1}, "0/1"),
        ({"text_embeddings": io["text_embeddings"][..., 1:]}, r"\[B, T, 48\]"),
        ({"text_embeddings": io["text_embeddings"] * np.nan}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            gen.generate_tokens(**arguments)
    with pytest.raises(ValueError, match="no tokenizer"):
        gen.generate(**condition, **null)


def test_a_mesh_does_not_change_the_tokens():
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    gen = ImageGenerator.from_pretrained(C2I, mesh=mesh)
    io = golden("c2i")[1]
    found = gen.generate_tokens(io["labels"], temperature=0)
    np.testing.assert_array_equal(found, io["greedy_tokens"])
