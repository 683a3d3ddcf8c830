"""CLIP agrees with transformers, and is read from published folders however they spell things."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from common import GOLDEN, last, relative
from safetensors.numpy import load_file
from test_sharding import BIG, MESH, boxes

from flextok_jax.io.formats import clip as files
from flextok_jax.io.formats.names import flatten
from flextok_jax.nn import clip, layout
from flextok_jax.nn.config import Compute
from flextok_jax.nn.images import to_float

KINDS = ("clip_gelu", "clip_quickgelu")
FEATURES = {
    name: jax.jit(getattr(clip, name), static_argnums=(1, 2))
    for name in ("text_features", "pixel_features", "image_features")
}


@functools.cache
def loaded(kind):
    """(the model, its prompts, the reference's numbers)."""
    place = GOLDEN / "text" / kind
    prompts = json.loads((place / "prompts.json").read_text())
    return files.load(place), prompts, load_file(place / "io.safetensors")


def features(model, name, inputs, compute=Compute()):
    return np.asarray(FEATURES[name](model.params, model.config, compute, inputs))


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("kind", KINDS)
def test_texts_agree_with_transformers(kind):
    model, prompts, io = loaded(kind)
    ids, mask = model.tokenize(prompts), io["mask"] == 1
    np.testing.assert_array_equal(ids[mask], io["ids"][mask])
    found = features(model, "text_features", ids)
    assert found.dtype == np.float32
    assert relative(found, io["text_embeds"]) < 1e-5
    short = ids[[1, 11], :16]  # What comes after the end has no effect.
    assert relative(features(model, "text_features", short), found[[1, 11]]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", ["a", "b"])
def test_images_agree_with_transformers(kind, group):
    model, _, io = loaded(kind)
    wanted = io[f"image_embeds_{group}"]
    found = features(model, "pixel_features", last(io[f"pixel_values_{group}"]))
    assert relative(found, wanted) < 1e-5
    logits = np.exp(model.params["logit_scale"]) * found @ io["text_embeds"].T
    assert relative(logits, io[f"logits_per_image_{group}"]) < 1e-5
    resized = features(model, "image_features", to_float(io[f"images_{group}"]))
    assert np.abs(resized - wanted).max() < 5e-3  # The reference rounds to 8 bits.
    assert (1 - (resized * wanted).sum(1)).max() < 1e-4


def test_bfloat16_stays_close():
    model, _, io = loaded("clip_gelu")
    half = features(model, "pixel_features", last(io["pixel_values_a"]), Compute("bfloat16"))
    assert half.dtype == np.float32 and (1 - (half * io["image_embeds_a"]).sum(1)).max() < 1e-2


def test_published_sizes_have_the_published_numbers_of_parameters():
    large = clip.CLIPConfig(
        text=clip.Tower(1024, 24, 16, 4096, "gelu"), vision=clip.Tower(1280, 32, 16, 5120, "gelu"),
        projection=1024, patch_size=14,
    )  # fmt: skip
    for cfg, count in ((clip.CLIPConfig(), 151_277_313), (large, 986_109_441)):
        shapes = clip.shapes(cfg)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
        for path, box in boxes(shapes).items():
            big = layout.is_box(box) and box.value.size > BIG
            assert not big or any(layout.spec(box, MESH)), path


def changed(out, config=None, preprocessor=None, without=()):
    """clip_quickgelu with other files."""
    shutil.copytree(GOLDEN / "text" / "clip_quickgelu", out)
    for name, change in ((files.CONFIG, config), (files.PREPROCESSOR, preprocessor)):
        found = json.loads((out / name).read_text())
        (change or dict)(found)
        (out / name).write_text(json.dumps(found))
    for name in without:
        (out / name).unlink()
    return out


def test_configurations_may_be_spelled_in_several_ways(tmp_path):
    model = loaded("clip_quickgelu")[0]

    def doubled(found):  # As old files have them: the second one counts.
        found["vision_config_dict"] = dict(found["vision_config"])
        found["vision_config"]["num_attention_heads"] = 4

    def short(found):  # What has its default is left out.
        for part in ("text_config", "vision_config"):
            for key in ("hidden_act", "layer_norm_eps", "hidden_size", "intermediate_size"):
                del found[part][key]

    def as_dictionary(found):
        found |= {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}

    for i, (config, preprocessor) in enumerate([(doubled, None), (short, as_dictionary)]):
        again = files.load(changed(tmp_path / str(i), config, preprocessor))
        assert again.config == model.config
    for path, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[path])


def wrong(found):
    found["text_config"] |= {"hidden_act": "silu", "hidden_size": 31}
    found["vision_config"] |= {"num_attention_heads": 7, "image_size": 32}


def test_what_is_not_understood_is_refused_with_every_reason(tmp_path):
    with pytest.raises(ValueError) as error:
        files.load(changed(tmp_path / "a", wrong))
    for part in ("'silu'", "hidden_size=31", "num_attention_heads=7", "image_size=32"):
        assert part in str(error.value)
    spoil = lambda found: found.update(resample=2, crop_size=20)  # noqa: E731
    with pytest.raises(ValueError, match="(?s)resample=2.*crop_size=20"):
        files.load(changed(tmp_path / "b", None, spoil))
    with pytest.raises(FileNotFoundError, match="tokenizer.json.*openai/clip"):
        files.load(changed(tmp_path / "c", without=["tokenizer.json"]))
    with pytest.raises(ValueError, match="'t5', no CLIP"):
        files.load(GOLDEN / "text" / "t5_a")
