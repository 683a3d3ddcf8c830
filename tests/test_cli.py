"""The `flextok` command: what it writes, what it refuses, and how it ends."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from common import ROOT, TINY, random_params, tiny_tokenizer
from PIL import Image

from flextok_jax import FlexTok, cli
from flextok_jax.evaluation import metrics, reconstruction
from flextok_jax.evaluation.pictures import from_uint8
from flextok_jax.io.checkpoint import Checkpoints

COMMANDS = (
    "reconstruct", "tokenize", "detokenize", "encode", "generate", "evaluate", "convert", "info",
    "data check", "data pack",
)  # fmt: skip
FAST = ["--steps", "2", "--guidance", "1.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A released file of a model with random weights, 8 x 8 pixels and 16 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five images of several sizes, one of them in a subfolder, and a broken one."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "été").mkdir()
    rng = np.random.RandomState(0)
    for name, height, width in (
        ("a.png", 8, 8), ("b.png", 30, 20), ("c.png", 17, 9), ("e.png", 8, 16), ("été/f.png", 9, 9),
    ):  # fmt: skip
        Image.fromarray(rng.randint(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"this is no image")
    return str(folder)


def refused(capsys, *arguments) -> str:
    """Runs a command that fails for a reason a person can put right; returns the reason."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "Traceback" not in err and not out
    return err


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    example = shlex.split(text[text.index("example:") :].splitlines()[1])
    assert " ".join(example).startswith(f"flextok {command} ")
    assert cli._parser().parse_args(example[1:]).function


def test_importing_and_help_are_cheap():
    code = (
        "import json, sys, flextok_jax.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(json.dumps(list(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "reconstruct" in done.stdout
    imported = json.loads(done.stdout.splitlines()[-1])
    assert {"jax", "numpy", "PIL", "safetensors"}.isdisjoint(imported)


# What is written.


def test_reconstruct_writes_a_grid_pictures_with_their_origin_and_metrics(
    model, images, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ["reconstruct", "--model", model, "--images", images, "--out", str(out), *FAST]
    assert cli.main([*arguments, "--num-tokens", "1,16", "--seed", "4"]) == 0
    text, warning = capsys.readouterr()
    assert "warning: 1 of 6 images" in warning and "broken.jpg: UnidentifiedImageError" in warning
    assert "PSNR" in text
    result = json.loads((out / "metrics.json").read_text())
    tok = FlexTok.from_pretrained(model)
    assert result["count"] == 5 and list(result["unreadable"]) == ["broken.jpg"]
    assert result["model"] == {"origin": tok.origin, "fingerprint": tok.fingerprint}
    assert (result["num_tokens"], result["steps"], result["seed"]) == ([1, 16], 2, 4)
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    names = ["a.png", "b.png", "c.png", "e.png", "été/f.png"]
    pictures = [f"k{k:04d}/{name}" for k in (1, 16) for name in names]
    assert written == sorted(["grid.png", "metrics.json", *pictures])
    with Image.open(out / "k0016" / "a.png") as picture, Image.open(f"{images}/a.png") as original:
        assert picture.text == {
            "model": tok.origin, "fingerprint": tok.fingerprint, "num_tokens": "16", "steps": "2",
            "guidance": "1.5", "norm_guidance": "True", "seed": "4",
        }  # fmt: skip
        drawn, original = np.asarray(picture)[None], np.asarray(original)[None]
    assert drawn.shape == original.shape == (1, 8, 8, 3)
    with Image.open(out / "grid.png") as grid:
        assert grid.text["num_tokens"] == "1,16"
        assert grid.size == (8 + 3 * 104, 30 + 5 * 104)  # Columns and rows of 96 pixels.
        corner = np.asarray(grid)[30, [8, 112, 216]]
    np.testing.assert_array_equal(corner[0], original[0, 0, 0])
    np.testing.assert_array_equal(corner[2], drawn[0, 0, 0])


def test_the_metrics_are_those_of_the_written_pictures(model, images, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", model, "--images", images, "--num-tokens", "4", "--limit", "1"]
    assert cli.main(["reconstruct", *arguments, "--out", str(out), *FAST]) == 0
    result = json.loads((out / "metrics.json").read_text())
    read = [
        from_uint8(np.asarray(Image.open(path)))[None]
        for path in (out / "k0004" / "a.png", f"{images}/a.png")
    ]
    assert result["psnr"]["4"] == pytest.approx(metrics.psnr(*read)[0], abs=0.02)
    assert result["mae"]["4"] == pytest.approx(metrics.mae(*read)[0], abs=0.004)


def test_tokenize_then_detokenize_draws_what_reconstruct_draws(model, images, tmp_path):
    tokens, there, back = (tmp_path / name for name in ("tokens.npz", "there", "back"))
    common = ["--model", model]
    steps = [
        ["reconstruct", *common, "--images", images, "--out", there, "--batch-size", 2, *FAST],
        ["tokenize", *common, "--images", images, "--out", tokens, "--batch-size", 2],
        ["detokenize", *common, "--tokens", tokens, "--out", back, "--batch-size", 3, *FAST],
    ]
    for step in steps:
        assert cli.main([str(part) for part in [*step, "--num-tokens", 5]]) == 0
    compared = 0
    for path in back.rglob("*.png"):
        with Image.open(path) as a, Image.open(there / path.relative_to(back)) as b:
            difference = np.asarray(a).astype(int) - np.asarray(b)
            assert np.abs(difference).max() <= 1 and a.text == b.text
        compared += 1
    assert compared == 5
    with np.load(tokens) as saved:
        tok = FlexTok.from_pretrained(model)
        assert saved["tokens"].dtype == np.int32 and saved["tokens"].shape == (5, 5)
        assert saved["names"].tolist() == ["a.png", "b.png", "c.png", "e.png", "été/f.png"]
        assert str(saved["fingerprint"]) == tok.fingerprint
        assert saved["levels"].tolist() == [8, 5, 5] and saved["num_tokens"] == 16
        first = np.asarray(tok.tokenize(np.asarray(Image.open(f"{images}/a.png"))[None]))
        np.testing.assert_array_equal(saved["tokens"][0], first[0, :5])


def test_evaluate_measures_what_can_be_read_and_names_what_cannot(model, images, tmp_path, capsys):
    out = tmp_path / "evaluation"
    arguments = ["--model", model, "--data", images, "--num-tokens", "16", "--out", str(out)]
    assert cli.main(["evaluate", *arguments, *FAST]) == 0
    (file,) = (out / "points").glob("k0016_*.json")
    result = json.loads(file.read_text())
    assert result["metrics"]["count"] == 5 and len(result["metrics"]["codes"]["perplexity"]) == 16
    assert 0 < result["metrics"]["codebook_usage"] <= 1 and "fid" not in result["metrics"]
    noted = capsys.readouterr().err
    assert "broken.jpg" in noted and "no feature network" in noted


# What a model is.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of training, as far as inference reads it."""
    folder = tmp_path_factory.mktemp("workdir")
    params = {k: v for k, v in random_params(TINY).items() if k != "vae"}
    with Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(7, {"ema": params, "params": jax.tree.map(np.zeros_like, params)})
    about = {"kind": "flextok", "config": dataclasses.asdict(TINY), "vae_source": "identity"}
    (folder / "config.json").write_text(json.dumps({"model": about}))
    return folder


def test_info_tells_configuration_counts_and_hash(model, workdir, capsys):
    assert cli.main(["info", model, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    tok = tiny_tokenizer()
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in tok.params.items()}
    assert about["parameters"] == {"vae": 0, **count, "total": sum(count.values())}
    assert about["sha256"] == tok.fingerprint and about["step"] is None
    assert about["config"]["num_tokens"] == 16 and about["config"]["vae"]["kind"] == "identity"
    assert (about["image_size"], about["vocab_size"]) == ([8, 8], 200)
    assert cli.main(["info", str(workdir)]) == 0
    text = capsys.readouterr().out
    assert tok.fingerprint in text and f"{sum(count.values()):,} parameters" in text
    assert cli.main(["info", str(workdir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 7


def test_convert_writes_the_averaged_weights_of_a_workdir(workdir, tmp_path, capsys):
    assert cli.main(["convert", "--model", str(workdir), "--out", str(tmp_path / "released")]) == 0
    converted = FlexTok.from_pretrained(tmp_path / "released")
    assert converted.fingerprint == tiny_tokenizer().fingerprint
    assert converted.fingerprint in capsys.readouterr().out
    assert converted.config == TINY


# What is refused.


def test_tokens_of_another_model_are_refused(model, images, tmp_path, capsys):
    tokens, other, out = tmp_path / "tokens.npz", tmp_path / "other", tmp_path / "out"
    assert cli.main(["tokenize", "--model", model, "--images", images, "--out", str(tokens)]) == 0
    FlexTok(TINY, random_params(TINY, seed=1)).save_pretrained(other)
    error = refused(capsys, "detokenize", "--model", other, "--tokens", tokens, "--out", out)
    assert "made by another model" in error
    for tok in (FlexTok.from_pretrained(other), FlexTok.from_pretrained(model)):
        assert tok.fingerprint in error and tok.origin in error
    assert not out.exists()


def test_what_is_no_file_of_tokens_is_refused(model, tmp_path, capsys):
    good = {
        "tokens": np.zeros((1, 2), np.int32), "names": np.array(["a.png"]), "origin": "x",
        "fingerprint": "x", "levels": np.array([8]), "num_tokens": 16,
    }  # fmt: skip
    files = {
        "garbage.npz": b"garbage", "empty.npz": b"", "array.npz": None,
        "missing.npz": {"tokens": good["tokens"]},
        "float.npz": good | {"tokens": np.zeros((1, 2))},
        "names.npz": good | {"names": np.array(["a", "b"])},
        "pickle.npz": good | {"names": np.array([{}], dtype=object)},
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is None:
            with path.open("wb") as file:
                np.save(file, good["tokens"])
        else:
            np.savez(path, **content)
        arguments = ["--model", model, "--tokens", path, "--out", tmp_path / "out"]
        assert "is no file of tokens" in refused(capsys, "detokenize", *arguments), name
    for name in ("../a.png", "/a.png", "a/../../b.png", "..\\a.png"):
        np.savez(tmp_path / "leads_out.npz", **good | {"names": np.array([name])})
        arguments = ["--model", model, "--tokens", tmp_path / "leads_out.npz", "--out", tmp_path]
        assert "outside of the output folder" in refused(capsys, "detokenize", *arguments)


def test_numbers_of_tokens_that_there_are_not_are_refused(model, images, tmp_path, capsys):
    out, tokens = tmp_path / "out", tmp_path / "tokens.npz"
    common = ["--model", model, "--images", images]
    error = refused(capsys, "reconstruct", *common, "--num-tokens", "1,17", "--out", out)
    assert "num_tokens=17" in error and "1 to 16" in error and not out.exists()
    assert "17" in refused(capsys, "tokenize", *common, "--num-tokens", "17", "--out", tokens)
    assert not tokens.exists()
    assert cli.main(["tokenize", *common, "--num-tokens", "3", "--out", str(tokens)]) == 0
    arguments = ["--model", model, "--tokens", tokens, "--num-tokens", "4", "--out", out]
    assert "there are 3 tokens per image" in refused(capsys, "detokenize", *arguments)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--num-tokens", "0"), ("--num-tokens", "1,x"), ("--steps", "0"), ("--seed", "-1"),
        ("--seed", str(2**32)), ("--guidance", "nan"), ("--batch-size", "2.5"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named_with_what_is_allowed(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["reconstruct", "--model", "m", "--images", "i", "--out", "o", option, value])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert option in error and "is not a" in error


def test_missing_and_misplaced_folders_are_told_without_a_traceback(
    model, images, workdir, tmp_path, capsys
):
    def reconstruct(model=model, images=images, out=tmp_path / "out", *more):
        return refused(
            capsys, "reconstruct", "--model", model, "--images", images, "--out", out, *more
        )

    (tmp_path / "file").write_text("")
    (tmp_path / "no_images").mkdir()
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "a.jpg").write_text("")
    (tmp_path / "untrained" / "checkpoints").mkdir(parents=True)
    assert "does not exist" in reconstruct(images=tmp_path / "nowhere")
    assert "holds no images" in reconstruct(images=tmp_path / "no_images")
    assert "none of the 1 images" in reconstruct(images=tmp_path / "unreadable")
    assert "nowhere" in reconstruct(model=tmp_path / "nowhere")
    assert "holds no checkpoint" in reconstruct(model=tmp_path / "untrained")
    assert "is a file" in reconstruct(out=tmp_path / "file")
    assert "lies in the image folder" in reconstruct(out=f"{images}/out")
    cudnn = ("--attention", "cudnn", "--dtype", "bfloat16")
    assert "CUDA GPUs" in reconstruct(model, images, tmp_path / "out", *cudnn)
    assert not (tmp_path / "out").exists()


# How it ends.


def test_ctrl_c_ends_with_130_and_leaves_nothing_behind(
    model, images, tmp_path, monkeypatch, capsys
):
    def interrupt(*_):
        raise KeyboardInterrupt("decoding with 'cp437' codec failed")

    monkeypatch.setattr(reconstruction, "draw", interrupt)
    out = tmp_path / "out"
    arguments = ["reconstruct", "--model", model, "--images", images, "--out", str(out)]
    assert cli.main(arguments) == 130
    assert "interrupted: nothing half-written is left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_text_are_printed(tmp_path, capsys):
    for name in (os.fsdecode(b"caf\xe9.png"), "a.png"):
        (tmp_path / name).write_bytes(b"no image")
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    assert r"unreadable: caf\udce9.png: Unidentified" in capsys.readouterr().out
    assert cli.main(["data", "pack", str(tmp_path), "--split", "all", "--out", f"{tmp_path}x"]) == 2
    assert r"caf\udce9.png (Unidentified" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(model, monkeypatch):
    def fault(_):
        raise RuntimeError("a fault")

    monkeypatch.setattr("flextok_jax.io.models.load", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["info", model])


def test_released_files_need_no_library_of_training(model, images, tmp_path):
    code = """
import sys
for name in ("grain", "clu", "ml_collections", "tensorflow_datasets", "orbax", "optax", "sklearn",
             "tensorboardX"):
    sys.modules[name] = None  # Importing it fails.
from flextok_jax.cli import main
model, images, out = sys.argv[1:]
fast = ["--num-tokens", "2", "--steps", "1", "--limit", "2", "--guidance", "1"]
tokens = f"{out}/tokens.npz"
assert main(["info", model]) == 0
assert main(["convert", "--model", model, "--out", f"{out}/model"]) == 0
assert main(["reconstruct", "--model", model, "--images", images, "--out", f"{out}/a", *fast]) == 0
assert main(["tokenize", "--model", model, "--images", images, "--out", tokens]) == 0
assert main(["detokenize", "--model", model, "--tokens", tokens, "--out", f"{out}/b"]) == 0
"""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, "-c", code, model, images, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
