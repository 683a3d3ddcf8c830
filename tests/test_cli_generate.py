"""`flextok generate`: what it writes, what it refuses, and how it goes on after an interruption."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT, TINY, ar_params, tiny_generator
from PIL import Image

from flextok_jax import cli
from flextok_jax.commands.images import read_labels
from flextok_jax.evaluation import reconstruction
from flextok_jax.io.formats import flexar

FAST = ["--steps", "1", "--guidance", "1", "--token-guidance", "1.5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the arguments that name an AR model and its tokenizer, as files)."""
    folder = tmp_path_factory.mktemp("models")
    gen = tiny_generator(TINY)
    names = {"classes": ["cat", "dog", "big dog", "bird", *"456789"]}
    gen = dataclasses.replace(gen, _file=flexar.LoadedAR(gen.config, {}, names))
    gen.save_pretrained(folder / "ar")
    gen.tokenizer.save_pretrained(folder / "tokenizer")
    return ["--model", str(folder / "ar"), "--tokenizer", str(folder / "tokenizer"), *FAST]


def run(*arguments) -> int:
    return cli.main(["generate", *map(str, arguments)])


def pixels(folder) -> dict:
    """{path: uint8 [H, W, 3]} of all its pictures."""
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path).convert("RGB"))
        for path in sorted(folder.rglob("*.png"))
    }


@pytest.fixture(scope="module")
def samples(models, tmp_path_factory):
    """Three samples, from 2 and from 8 of their tokens."""
    out = tmp_path_factory.mktemp("samples")
    assert run(*models, "--labels", "bird,0-1", "--num-tokens", "8,2", "--out", out) == 0
    return out


def test_generate_writes_pictures_that_say_what_they_are(samples):
    names = ["000000_class3.png", "000001_class0.png", "000002_class1.png"]
    pictures = [f"k000{k}/{name}" for k in (2, 8) for name in names]
    files = [p.relative_to(samples).as_posix() for p in samples.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(
        [*pictures, "generation.json", "grid.png", "settings.json", "tokens.npz"]
    )
    with Image.open(samples / pictures[0]) as image:
        assert image.size == (8, 8) and image.text["label"] == "3"
        assert image.text["class"] == "bird"
        assert image.text["num_tokens"] == "2" and image.text["token_guidance"] == "1.5"
    saved = json.loads((samples / "generation.json").read_text())
    assert saved["labels"] == [3, 0, 1] and saved["count"] == 3


def test_the_tokens_of_samples_decode_to_them_again(models, samples, tmp_path):
    arguments = ["--model", models[3], "--tokens", str(samples / "tokens.npz"), *FAST[:4]]
    arguments += ["--num-tokens", "2,8", "--out", str(tmp_path)]
    assert cli.main(["detokenize", *arguments]) == 0
    again, before = pixels(tmp_path), pixels(samples)
    assert len(again) == 6
    for name, image in again.items():
        assert np.abs(image.astype(int) - before[name]).max() <= 1


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_samples(models, tmp_path, monkeypatch):
    arguments = [*models, "--labels", "0-4", "--num-tokens", 2]
    assert run(*arguments, "--batch-size", 5, "--out", tmp_path / "whole") == 0
    real, calls = reconstruction.decode, []

    def third_fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reconstruction, "decode", third_fails)
    parts = [*arguments, "--batch-size", 2, "--out", tmp_path / "parts"]
    assert run(*parts) == 130
    assert run(*parts) == 0 and len(calls) == 4  # One batch was left.
    whole, parts = pixels(tmp_path / "whole"), pixels(tmp_path / "parts")
    assert whole.keys() == parts.keys() and len(whole) == 6
    for name in whole:
        assert np.abs(whole[name].astype(int) - parts[name]).max() <= 1


@pytest.mark.parametrize(
    "text, labels",
    [
        ("all", [0, 1, 2, 3]), ("2", [1]), ("0-2,1", [0, 1, 2, 2]), (" 3 , 0", [3, 0]),
        ("big dog,1,cat", [3, 2, 0]),
    ],
)  # fmt: skip
def test_labels_are_numbers_ranges_names_or_all(text, labels):
    assert read_labels(text, 4, ("cat", "2", "1", "big dog")).tolist() == labels


def test_labels_may_come_from_a_file(tmp_path):
    (tmp_path / "labels.txt").write_text("1\nbig dog\n1\n")
    names = ("cat", "house", "tree", "big dog")
    assert read_labels(str(tmp_path / "labels.txt"), 4, names).tolist() == [1, 3, 1]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--labels", "0-10"], "10"),
        (["--labels", "0-99999999999999"], "99999999999999"),
        (["--labels", "3-1"], "3-1"),
        (["--labels", "horse"], "horse"),
        (["--num-tokens", "17"], "17"),
        (["--top-p", "2"], "'2'"),
    ],
)
def test_what_cannot_be_generated_is_refused(models, tmp_path, capsys, arguments, named):
    assert run(*models, *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_model_that_names_no_tokenizer_asks_for_one(models, tmp_path, capsys):
    folder = tmp_path / "ar"
    shutil.copytree(models[1], folder)
    assert run("--model", folder, "--out", tmp_path / "out") == 2
    assert "--tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_script_runs_a_bulk_job_without_a_gpu(models, tmp_path):
    """The script itself, on the CPU, in an environment that counts as installed."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    flextok = binaries / "flextok"
    flextok.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flextok_jax.cli "$@"\n')
    flextok.chmod(0o755)
    checksum = subprocess.check_output(["cksum", "setup.py"], cwd=ROOT, text=True).strip()
    (tmp_path / "venv" / ".installed").write_text(f"{checksum} \n")
    out = tmp_path / "out"
    job = ["generate", *models, "--labels", "0-1", "--num-tokens", "1", "--out", str(out)]
    done = subprocess.run(
        [str(ROOT / "launch" / "gpu.sh"), *job],
        env=os.environ | {"VENV": str(tmp_path / "venv"), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "generation.json").read_text())["dtype"] == "bfloat16"
    assert len(pixels(out)) == 3


def test_a_model_without_conditions_generates(models, tmp_path, capsys):
    gen = tiny_generator(TINY)
    cfg = dataclasses.replace(gen.config, num_classes=0)
    params = ar_params(cfg)
    dataclasses.replace(gen, config=cfg, params=params).save_pretrained(tmp_path / "ar")
    given = ["--model", tmp_path / "ar", *models[2:], "--per-label", "3"]
    assert run(*given, "--num-tokens", "2", "--out", tmp_path / "out") == 0
    names = sorted(pixels(tmp_path / "out"))
    assert names == ["grid.png", *(f"k0002/00000{i}_sample.png" for i in range(3))]
    assert len(np.unique(np.load(tmp_path / "out" / "tokens.npz")["tokens"], axis=0)) == 3
    assert run(*given, "--labels", "0", "--out", tmp_path / "other") == 2
    assert "no classes" in capsys.readouterr().err


def test_passes_are_of_a_masked_model(models, tmp_path):
    gen = tiny_generator(TINY)
    gen = dataclasses.replace(gen, config=dataclasses.replace(gen.config, masked=True))
    gen.save_pretrained(tmp_path / "ar")
    asked = [*models[2:], "--labels", "0", "--num-tokens", "4", "--passes", "3"]
    assert run("--model", tmp_path / "ar", *asked, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["passes"] == 3
    assert run(*models[:2], *asked, "--out", tmp_path / "other") == 2
