"""AR models with another norm or MLP, or with normalised queries, agree with the reference."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
from common import GOLDEN, relative
from safetensors.numpy import load_file, save_file

from flextok_jax import ImageGenerator
from flextok_jax.io.formats import flexar, flexar_config

TEXT = GOLDEN / "text"
VARIANTS = {
    "gelu": dict(norm="rms", mlp="gelu", qk_norm=False, mlp_hidden=128),
    "layernorm": dict(norm="affine", mlp="swiglu", qk_norm=False, mlp_hidden=48),
    "qknorm": dict(norm="rms", mlp="swiglu", qk_norm=True, mlp_hidden=48),
}
NAMES = [f"ar_{kind}_{variant}" for kind in ("c2i", "t2i") for variant in VARIANTS]


@functools.cache
def loaded(name):
    """(the model, the reference's numbers, the condition by keyword, the null condition's)."""
    gen, io = ImageGenerator.from_pretrained(TEXT / name), load_file(TEXT / name / "io.safetensors")
    if "c2i" in name:
        return gen, io, {"labels": io["labels"]}, {}
    null = {key: io[key] for key in ("null_embeddings", "null_mask")}
    return gen, io, {key: io[key] for key in ("text_embeddings", "text_mask")}, null


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_equal_the_reference(name):
    gen, io, condition, null = loaded(name)
    assert relative(gen.logits(io["tokens"], **condition), io["logits"]) < 1e-5
    assert relative(gen.logits(io["tokens"], **null), io["logits_null"]) < 1e-5
    found = gen.generate_tokens(**condition, **null, temperature=0)  # the default guidance
    np.testing.assert_array_equal(found, io["greedy_tokens"])


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_config_yaml_say_the_same(name, tmp_path):
    cfg = flexar.load(TEXT / name).config
    expected = VARIANTS[name.rpartition("_")[2]]
    assert {key: getattr(cfg, key) for key in expected} == expected and cfg.head_dim == 64
    shutil.copy(TEXT / name / "model.safetensors", tmp_path)
    shutil.copy(TEXT / name / "reference.yaml", tmp_path / "config.yaml")
    assert flexar.load(tmp_path).config == cfg


@pytest.mark.parametrize("name", ["ar_c2i_gelu", "ar_t2i_layernorm", "ar_t2i_qknorm"])
def test_saving_returns_the_tensors(name, tmp_path):
    flexar.save(tmp_path, flexar.load(TEXT / name))
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, TEXT / name))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert flexar.load(tmp_path).config == flexar.load(TEXT / name).config


def facts(name, *changes):
    text = (TEXT / name / "reference.yaml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    found, others, problems = flexar_config.read(text, TEXT / name / "config.yaml")
    return found, others, "\n".join(problems)


def test_what_config_yaml_says_beside_the_tensors():
    eps = "            eps: 1.0e-06\n"
    layer = "norm_layer:\n            _target_: {}\n            _partial_: true\n"
    old = layer.format("l3m.model.layers.normalization.RMSNorm") + eps
    for target, expected in (
        ("l3m.model.layers.normalization.LayerNormFP32", ("affine", 1e-5)),
        ("torch.nn.LayerNorm", ("affine", 1e-5)),
        ("l3m.model.layers.normalization.RMSNorm", ("rms", 1e-6)),
    ):
        found, _, problems = facts("ar_c2i_gelu", (old, layer.format(target)))
        assert (found["norm"], found["norm_eps"]) == expected and not problems, target
    tanh = ("MLP\n            _partial_: true\n", """MLP
            _partial_: true
            act_layer: {_target_: torch.nn.GELU, _partial_: true, approximate: tanh}
""")  # fmt: skip
    assert facts("ar_c2i_gelu", tanh)[0]["mlp"] == "gelu_tanh"
    silu = (tanh[0], tanh[1].replace("torch.nn.GELU", "torch.nn.SiLU"))
    assert "torch.nn.SiLU" in facts("ar_c2i_gelu", silu)[2]
    assert facts("ar_t2i_gelu")[1] == {
        "text_encoder": {"source": "google/flan-t5-xl", "max_length": 7}
    }
    qk = ("qk_norm:\n              _target_: l3m.model.layers.normalization.RMSNorm",
          "qk_norm:\n              _target_: torch.nn.LayerNorm")  # fmt: skip
    assert "qk_norm is a LayerNorm" in facts("ar_c2i_qknorm", qk)[2]


def test_a_file_and_its_config_yaml_that_differ_are_refused(tmp_path):
    folder = TEXT / "ar_c2i_layernorm"
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if not n.endswith(".bias")},
        tmp_path / "model.safetensors",
    )
    shutil.copy(folder / "reference.yaml", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="norm='affine'"):
        flexar.load(tmp_path)
    (tmp_path / "config.yaml").unlink()
    assert flexar.load(tmp_path).config == dataclasses.replace(
        flexar.load(folder).config, norm="rms"
    )
