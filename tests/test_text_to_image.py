"""Prompts to tokens to images: in Python, by `flextok generate`, and `flextok embed`."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from common import GOLDEN, tiny_generator, tiny_tokenizer
from PIL import Image
from test_ar import random_params
from test_generator import YAML, golden

from flextok_jax import ImageGenerator, TextEncoder, cli
from flextok_jax.commands.text import slug
from flextok_jax.data import shards, sources
from flextok_jax.io.formats import flexar
from flextok_jax.nn.ar_config import ARConfig

T5 = GOLDEN / "text" / "t5_a"  # 40 channels.
CLIP = GOLDEN / "text" / "clip_gelu"
CFG = ARConfig(
    200, 16, 64, 2, head_dim=32, mlp_hidden=96, text_dim=40, text_hidden=24, guidance_scale=3.0
)
PROMPTS = ["a red cube on a blue sphere", "two cats", "a cat", "snow"]


@functools.cache
def encoder():
    return TextEncoder.from_pretrained(T5)


@functools.cache
def generator():
    return ImageGenerator(CFG, random_params(CFG), tiny_tokenizer(), text_encoder=encoder())


def test_prompts_are_their_embeddings(monkeypatch):
    gen, calls = generator(), []
    real = TextEncoder.encode

    def counted(self, prompts, *args):
        calls.append(list(prompts))
        return real(self, prompts, *args)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    embeddings, mask = encoder().encode(PROMPTS)
    given = dict(text_embeddings=embeddings, text_mask=mask)
    null = dict(zip(("null_embeddings", "null_mask"), encoder().null))
    plain = dataclasses.replace(gen, text_encoder=None)
    how = dict(key=0, steps=1, image_guidance_scale=1)
    images = gen.generate(text=PROMPTS, **how)
    np.testing.assert_array_equal(images, plain.generate(**given, **null, **how))
    tokens = gen.generate_tokens(text=PROMPTS, key=1)
    np.testing.assert_array_equal(tokens, plain.generate_tokens(**given, **null, key=1))
    kept = dataclasses.replace(plain, null_text=encoder().null)
    np.testing.assert_array_equal(tokens, kept.generate_tokens(**given, key=1))
    logits = gen.logits(tokens, text=PROMPTS)
    np.testing.assert_array_equal(logits, plain.logits(tokens, **given))
    np.testing.assert_array_equal(gen.logits(tokens), plain.logits(tokens, **null))
    assert np.abs(logits - gen.logits(tokens)).max() > 1e-3
    assert calls.count([""]) <= 1  # The null prompt is encoded once.


def test_prompts_that_do_not_suit_are_refused():
    gen = generator()
    embeddings, mask = encoder().encode(PROMPTS)
    plain = dataclasses.replace(gen, text_encoder=None)
    for model, arguments, message in (
        (tiny_generator(tiny_tokenizer().config), {"text": ["a cat"]}, "not a text model"),
        (gen, {"labels": [0]}, "a text model: give text"),
        (gen, {"text": PROMPTS, "text_embeddings": embeddings}, "one of them"),
        (gen, {"text": "a cat"}, "list of at least one text"),
        (plain, {"text": PROMPTS}, "google/flan-t5-xl"),
        (plain, {"text_embeddings": embeddings}, "null_embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_tokens(**arguments)
    with pytest.raises(ValueError, match="48 channels; the text encoder .*t5_a makes 40"):
        dataclasses.replace(golden("t2i")[0], text_encoder=encoder())


def test_defaults_of_released_models_come_from_their_configuration(tmp_path):
    shutil.copy(GOLDEN / "ar_c2i" / "model.safetensors", tmp_path)
    more = "timesteps: 25, tokenizer_cfg_factor: 7.5, tokenizer_perform_norm_guidance: true"
    (tmp_path / "config.yaml").write_text(
        YAML.replace("cfg_factor: 4.5,", f"cfg_factor: 4.5, {more},")
    )
    gen = ImageGenerator.from_pretrained(tmp_path)
    assert gen.decoding == {"steps": 25, "guidance_scale": 7.5, "norm_guidance": True}
    assert gen.config.guidance_scale == 4.5
    gen.save_pretrained(tmp_path / "out")
    assert ImageGenerator.from_pretrained(tmp_path / "out").decoding == gen.decoding
    text = GOLDEN / "text" / "ar_t2i_gelu"
    shutil.copy(text / "model.safetensors", tmp_path)
    shutil.copy(text / "reference.yaml", tmp_path / "config.yaml")
    about = flexar.about(tmp_path)
    assert about["text"] and about["text_encoder"] == {
        "source": "google/flan-t5-xl", "max_length": 7,
    }  # fmt: skip
    assert ImageGenerator.from_pretrained(tmp_path).text_encoder_source == "google/flan-t5-xl"


def test_images_are_decoded_as_the_file_says(monkeypatch):
    gen, asked = generator(), {}
    file = flexar.LoadedAR(gen.config, {}, {"decoding": {"steps": 3, "guidance_scale": 1.0}})
    gen = dataclasses.replace(gen, _file=file)
    monkeypatch.setattr(type(gen.tokenizer), "detokenize", lambda *_, **how: asked.update(how))
    gen.generate(text=["a cat"], num_tokens=2)
    assert (asked["steps"], asked["guidance_scale"]) == (3, 1.0)
    gen.generate(text=["a cat"], num_tokens=2, steps=5)
    assert (asked["steps"], asked["guidance_scale"]) == (5, 1.0)


def test_info_says_what_was_read_and_what_was_assumed(tmp_path, capsys):
    assert cli.main(["info", str(GOLDEN / "ar_t2i"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["guidance_scale", "head_dim", "norm_eps", "text_gelu_tanh"]
    assert sorted(found["assumed"]) == names and "config.yaml" not in found
    text = GOLDEN / "text" / "ar_t2i_gelu"
    shutil.copy(text / "model.safetensors", tmp_path)
    yaml = (text / "reference.yaml").read_text()
    (tmp_path / "config.yaml").write_text(yaml)
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumed"] == "nothing"
    assert found["config.yaml"]["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]
    (tmp_path / "config.yaml").write_text(yaml.replace("ffn.MLP", "ffn.Strange"))
    assert cli.main(["info", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "ffn.Strange" in shown.out and "fc1.weight" in shown.out and "ffn.Strange" in shown.err
    assert cli.main(["info", str(T5)]) == 0
    assert "t5" in capsys.readouterr().out


# The command.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The arguments that name a text model, its tokenizer and its text encoder, as files."""
    folder = tmp_path_factory.mktemp("models")
    generator().save_pretrained(folder / "ar")
    generator().tokenizer.save_pretrained(folder / "tokenizer")
    names = ["--model", str(folder / "ar"), "--tokenizer", str(folder / "tokenizer")]
    return [*names, "--steps", "1", "--guidance", "1", "--num-tokens", "2"]


def test_generate_draws_prompts(models, tmp_path):
    encoder = ["--text-encoder", str(T5)]
    (tmp_path / "prompts.txt").write_text("a red cube?\ntwo cats\n")
    arguments = [*encoder, "--prompts", str(tmp_path / "prompts.txt"), "--per-label", "2"]
    assert cli.main(["generate", *models, *arguments, "--out", str(tmp_path / "out")]) == 0
    pictures = sorted((tmp_path / "out" / "k0002").iterdir())
    assert [p.name for p in pictures] == [
        "000000_a-red-cube.png", "000001_a-red-cube.png",
        "000002_two-cats.png", "000003_two-cats.png",
    ]  # fmt: skip
    with Image.open(pictures[2]) as image:
        assert image.text["prompt"] == "two cats" and image.text["token_guidance"] == "3.0"
    saved = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert saved["prompts"] == ["a red cube?", "two cats"] and saved["count"] == 4
    assert saved["text_encoder"]["fingerprint"] == TextEncoder.from_pretrained(T5).fingerprint
    alone = ["generate", *models, *encoder, "--text", "a red cube?", "--out", str(tmp_path / "one")]
    assert cli.main(alone) == 0
    both = [np.load(tmp_path / out / "tokens.npz")["tokens"] for out in ("one", "out")]
    np.testing.assert_array_equal(both[0][0], both[1][0])


@pytest.mark.filterwarnings("ignore:the prompt")
def test_search_draws_prompts(models, tmp_path):
    """By CLIP; a prompt of 10,000 words is cut, an empty line refused."""
    (tmp_path / "prompts.txt").write_text("two cats\n" + "cat " * 10_000 + "\n")
    given = ["search", *models[: models.index("--num-tokens")], "--text-encoder", str(T5)]
    given += ["--prompts", str(tmp_path / "prompts.txt"), "--verifier", f"clip:{CLIP}"]
    given += ["--judge", "likelihood", "--beams", "1", "--candidates", "2", "--schedule", "1"]
    assert cli.main([*given, "--search-steps", "1", "--out", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "search.json").read_text())
    files = [one["files"][0] for one in saved["searches"]]
    assert files[0] == "000000_two-cats.png" and len(files) == 2
    with Image.open(tmp_path / "out" / files[0]) as image:
        assert image.text["prompt"] == "two cats" and image.text["verifier"] == "clip"
    assert all(np.isfinite(one["scores"][0]) for one in saved["searches"])
    (tmp_path / "prompts.txt").write_text("two cats\n\na cat\n")
    assert cli.main([*given, "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_names_of_pictures_are_safe():
    assert slug("A cat, 3/4 (photo)!") == "a-cat-3-4-photo" and slug("..//") == "prompt"
    assert slug("日本 語") == "日本-語" and len(slug("long " * 50)) <= 40


def v1_0(folder):
    """A T5 v1.0: its tensors say so."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(GOLDEN / "text" / "t5_b", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n.replace("wi_0", "wi"): t for n, t in tensors.items() if "wi_1" not in n},
        folder / "model.safetensors",
    )


def without_tokenizer(folder):
    shutil.copytree(T5, folder)
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--prompts", "gap.txt"], ["gap.txt", "line 2"]),
        (["--prompts", "nothing.txt"], ["nothing.txt", "the file is empty"]),
        (["--prompts", "gap.txt", "--text", "a"], ["--text and --prompts"]),
        (["--labels", "3"], ["--labels", "text model"]),
        ([], ["--text or --prompts"]),
        (["--text", "a"], ["--text-encoder"]),
        (["--text", "a", "--text-encoder", "v1_0"], ["v1.0", "Flan-T5"]),
        (["--text", "a", "--text-encoder", "none"], ["tokenizer.json", "google/flan-t5-small"]),
        (["--text", "a", "--text-encoder", "b"], ["32 channels", "reads 40"]),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_drawn_are_refused_in_a_line(
    models, tmp_path, monkeypatch, capsys, arguments, parts
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gap.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "nothing.txt").touch()
    if "v1_0" in arguments:
        v1_0(tmp_path / "v1_0")
    without_tokenizer(tmp_path / "none")
    (tmp_path / "b").symlink_to(GOLDEN / "text" / "t5_b")
    assert cli.main(["generate", *models, *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(part in error for part in parts), error
    assert error.startswith("error: ") and not (tmp_path / "out").exists()


def test_text_for_a_class_model_is_refused(tmp_path, capsys):
    for more in (["--text", "a cat"], ["--text-encoder", str(T5), "--prompts", "x"]):
        assert cli.main(["generate", "--model", "demo-digits-ar", *more, "--out", "out"]) == 2
        assert "no text model: give --labels" in capsys.readouterr().err


# Embeddings of captions.


@pytest.fixture
def photos(tmp_path):
    """Three images, two of them with captions."""
    for i, name in enumerate(("a.png", "in/b.c.png", "d.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    (tmp_path / "photos" / "a.txt").write_text("a red cube on a blue sphere")
    (tmp_path / "photos" / "in" / "b.c.txt").write_text("two cats")
    return tmp_path / "photos"


def test_embed_writes_what_training_reads(photos, capsys):
    command = ["embed", "--data", str(photos), "--text-encoder", str(T5)]
    assert cli.main(command) == 0
    assert "2 captions" in (out := capsys.readouterr().out) and "1 images have no" in out
    source = sources.make_source(sources.parse(str(photos)), "all")
    for key, caption in (("a.png", PROMPTS[0]), ("in/b.c.png", "two cats"), ("d.png", None)):
        (index,) = [i for i in range(3) if source.key(i) == key]
        found = source.embedding(index)
        if caption is None:
            assert found is None
        else:
            text, mask = encoder().encode([caption])
            assert found.shape == (mask.sum(), 40)
            np.testing.assert_allclose(found, text[mask], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(shards.null_text(photos), encoder().null[0][0], rtol=1e-3, atol=1e-3)
    before = (photos / "a.npy").stat().st_mtime_ns
    assert cli.main(command) == 0 and "2 were there" in capsys.readouterr().out
    assert (photos / "a.npy").stat().st_mtime_ns == before
    assert not source.skipped  # The record of the encoder is no foreign file.
    assert cli.main([*command[:-1], str(GOLDEN / "text" / "t5_b")]) == 2
    assert "text_encoder.fingerprint" in capsys.readouterr().err


def test_embed_needs_a_folder_of_images_with_captions(photos, tmp_path, capsys):
    for caption in photos.rglob("*.txt"):
        caption.unlink()
    assert cli.main(["embed", "--data", str(photos), "--text-encoder", str(T5)]) == 2
    assert "none of 3 images has a caption" in capsys.readouterr().err
    assert cli.main(["embed", "--data", f"webdataset:{photos}", "--text-encoder", str(T5)]) == 2
    assert "folder" in capsys.readouterr().err
