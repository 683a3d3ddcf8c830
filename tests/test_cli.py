"""The `flextok` command: what it writes, what it refuses, and how it ends."""

import dataclasses
import inspect
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import time

import jax
import numpy as np
import pytest
from common import GOLDEN, ROOT, TINY, changed, digits_folder, random_params, tiny_tokenizer
from PIL import Image

from flextok_jax import FlexTok, cli
from flextok_jax.commands import options
from flextok_jax.evaluation import metrics, reconstruction
from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.io import paths, storage
from flextok_jax.io.checkpoint import Checkpoints
from flextok_jax.io.models import load_vae
from flextok_jax.nn.images import to_float

FAST = ["--steps", "2", "--guidance", "1.5"]
NAMES = ["a.png", "b.png", "été/f.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A released file of a model with random weights, 8 x 8 pixels and 16 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images of several sizes, one of them in a subfolder, and a broken one."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "été").mkdir()
    rng = np.random.RandomState(0)
    for name, size in zip(NAMES, [(8, 8), (30, 20), (9, 9)]):
        Image.fromarray(rng.randint(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"this is no image")
    (folder / "c.psd").touch()
    return str(folder)


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def refused(capsys, *arguments) -> str:
    """Runs a command that fails for a reason a person can mend; returns the reason."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and not out
    return err


# Options and help.


@pytest.mark.parametrize("words", options.COMMANDS)
def test_help_fits_a_terminal_and_its_examples_parse(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*words.split(), "--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[1:])) <= 80 and "None" not in text
    examples = inspect.getdoc(options.COMMANDS[words][0]).split("example:\n")[1]
    examples = re.findall(r"^  flextok (.*)$", examples.replace("\\\n", ""), re.MULTILINE)
    assert examples and all(example.split()[0] in text for example in examples)
    for example in examples:
        argv = shlex.split(example)
        assert argv[: len(words.split())] == words.split()
        assert cli.parse(words, argv[len(words.split()) :])


def test_without_a_command_all_are_listed(capsys):
    for argv in ([], ["--help"], ["data"]):
        assert run(*argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {words} " in text for words in options.COMMANDS)
        assert max(map(len, text.splitlines())) <= 80
    assert "'reconstrct'" in refused(capsys, "reconstrct")
    assert "'data chek'" in refused(capsys, "data", "chek")
    assert run("--version") == 0


def test_values_of_options_arrive_as_their_types():
    needed = "--model m --images i --out o".split()
    plain = cli.parse("reconstruct", needed)
    assert (plain.steps, plain.guidance, plain.num_tokens, plain.norm_guidance) == (
        None, None, None, True,
    )  # fmt: skip
    given = "--num-tokens 4,1 --steps 5 --guidance 1.5 --no-norm-guidance --seed 3 --limit 2"
    given = cli.parse("reconstruct", [*needed, *given.split()])
    assert (given.num_tokens, given.steps, given.guidance) == ((4, 1), 5, 1.5)
    assert (given.norm_guidance, given.seed, given.limit) == (False, 3, 2)
    given = "--solver multistep --time-shift 0.5 --guidance-interval 0.1,0.9".split()
    given = cli.parse("detokenize", [*needed[:2], *needed[4:], "--tokens", "t.npz", *given])
    assert (given.solver, given.time_shift) == ("multistep", 0.5)
    assert given.guidance_interval == (0.1, 0.9)
    data = "--model m --data d --out o --flip --process 1/2".split()
    assert cli.parse("tokenize", data).flip and cli.parse("tokenize", data).process == (1, 2)
    sweep = "--model m --data d --out o --steps 5,10 --guidance 1,2.5".split()
    assert cli.parse("evaluate", sweep).guidance == (1.0, 2.5)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--num-tokens", "0"), ("--num-tokens", "1,x"), ("--steps", "0"), ("--seed", "-1"),
        ("--seed", str(2**32)), ("--guidance", "nan"), ("--batch-size", "2.5"), ("--dtype", "int8"),
        ("--guidance", "-2"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(option, value, capsys):
    needed = ["reconstruct", "--model", "m", "--images", "i", "--out", "o"]
    error = refused(capsys, *needed, option, value)
    assert option in error and value.split(",")[-1] in error


@pytest.mark.parametrize(
    "words",
    [
        *(f"evaluate --data i --{name}" for name in ("export", "inception", "reference")),
        *("generate --tokenizer", "generate --labels", "encode --data i --vae"),
        "reconstruct --images",
    ],
)
def test_an_empty_path_is_not_taken_for_none(words, capsys):
    error = refused(capsys, *words.split(), " ", "--model", "m", "--out", "o")
    assert words.split()[-1] in error and "empty" in error


def test_images_and_a_data_set_are_one_or_the_other(model, images, tmp_path, capsys):
    out = ["tokenize", "--model", model, "--out", tmp_path / "x.npz"]
    assert "--images" in refused(capsys, *out)
    assert "--images" in refused(capsys, *out, "--images", images, "--data", images)
    assert "--crops" in refused(capsys, *out, "--images", images, "--crops", 2)


@pytest.mark.slow
def test_help_imports_no_library_of_arrays():
    code = "import sys; from flextok_jax import cli; cli.main(['tokenize', '--help']); "
    code += "print({'jax', 'numpy', 'PIL', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.stdout.splitlines()[-1] == "set()"


ENV = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
}


# What is written.


def test_reconstruct_writes_a_grid_pictures_with_their_origin_and_metrics(
    model, images, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ["reconstruct", "--model", model, "--images", images, "--out", out, *FAST]
    how = "--num-tokens 1,4 --seed 4 --solver multistep --time-shift 0.5 --guidance-interval 0,0.7"
    assert run(*arguments, *how.split()) == 0
    text, err = capsys.readouterr()
    assert "cpu" in err.splitlines()[0] and "float32" in err.splitlines()[0]
    assert "broken.jpg: UnidentifiedImageError" in err and "PSNR" in text
    assert "skipped 1: no image by its ending .psd: c.psd" in err
    result = json.loads((out / "metrics.json").read_text())
    tok = FlexTok.from_pretrained(model)
    assert result["count"] == 3 and list(result["unreadable"]) == ["broken.jpg"]
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    assert found == sorted(["grid.png", *(f"k{k:04d}/{n}" for k in (1, 4) for n in NAMES)])
    with Image.open(out / "k0004" / "a.png") as picture:
        expected = {"model": tok.origin, "num_tokens": "4", "steps": "2", "guidance": "1.5"}
        expected |= {"solver": "multistep", "time_shift": "0.5", "guidance_interval": "[0.0, 0.7]"}
        assert picture.text | expected | {"seed": "4"} == picture.text
        assert picture.size == (8, 8)
    (batch,) = Pictures(images).batches(8, 8)  # The metrics are those of the written pictures.
    written = np.stack([np.asarray(Image.open(out / "k0004" / name)) for name in batch.names])
    psnr = metrics.psnr(to_float(written), to_float(batch.images))
    assert result["psnr"]["4"] == pytest.approx(float(np.mean(psnr)), abs=1e-3)


def test_tokenize_then_detokenize_writes_what_reconstruct_writes(model, images, tmp_path):
    tokens, there, back = (tmp_path / name for name in ("tokens.npz", "there", "back"))
    given, pictures = ["--model", model, "--num-tokens", 4], ["--images", images]
    assert run("reconstruct", *given, *pictures, "--out", there, *FAST) == 0
    assert run("tokenize", *given, *pictures, "--out", tokens) == 0
    more = ["--tokens", tokens, "--out", back, "--batch-size", 3]
    assert run("detokenize", *given, *more, *FAST) == 0
    for name in NAMES:
        with (
            Image.open(back / "k0004" / name) as a,
            Image.open(there / "k0004" / name) as b,
        ):
            difference = np.asarray(a).astype(int) - np.asarray(b)
            assert np.abs(difference).max() <= 1 and len(b.text.pop("image_sha256")) == 64
            assert a.text == b.text
    tok = FlexTok.from_pretrained(model)
    with np.load(tokens) as saved:
        assert saved["tokens"].dtype == np.int32 and saved["tokens"].shape == (3, 4)
        assert saved["names"].tolist() == NAMES and str(saved["fingerprint"]) == tok.fingerprint
        first = np.asarray(tok.tokenize(np.asarray(Image.open(f"{images}/a.png"))[None]))
        np.testing.assert_array_equal(saved["tokens"][0], first[0, :4])


# What a model is.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of training, as far as inference reads it."""
    folder = tmp_path_factory.mktemp("workdir")
    params = {k: v for k, v in random_params(TINY).items() if k != "vae"}
    with Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(7, {"ema": params, "params": jax.tree.map(np.zeros_like, params)})
    facts = {"kind": "flextok", "config": dataclasses.asdict(TINY), "vae_source": "identity"}
    (folder / "config.json").write_text(json.dumps({"model": facts}))
    return folder


def test_info_shows_configuration_counts_and_hash(model, workdir, capsys):
    assert run("info", model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    tok = tiny_tokenizer()
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in tok.params.items()}
    assert found["parameters"] == {"vae": 0, **count, "total": sum(count.values())}
    assert found["sha256"] == tok.fingerprint and found["kind"] == "tokenizer"
    assert (found["image_size"], found["vocab_size"]) == ([8, 8], 200)
    assert run("info", workdir) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sha256", tok.fingerprint] in lines and ["step", "7"] in lines


def test_convert_writes_the_averaged_weights_of_a_workdir(workdir, tmp_path, capsys):
    assert run("convert", "--model", workdir, "--out", tmp_path / "released") == 0
    converted = FlexTok.from_pretrained(tmp_path / "released")
    assert converted.fingerprint == tiny_tokenizer().fingerprint and converted.config == TINY
    assert converted.fingerprint in capsys.readouterr().out
    assert run("convert", "--model", workdir, "--out", tmp_path / "half", "--half") == 0
    half = FlexTok.from_pretrained(tmp_path / "half")
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), converted.params)
    assert half.fingerprint == storage.fingerprint(rounded) in capsys.readouterr().out
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("half", "released")]
    assert sizes[0] < 0.7 * sizes[1]
    scaled = ["--out", tmp_path / "vae", "--scaling-factor", "2"]
    assert "--scaling-factor" in refused(capsys, "convert", "--model", workdir, *scaled)
    assert run("convert", "--model", GOLDEN / "vae", *scaled) == 0
    (cfg, params), (old, same) = (load_vae(str(p)) for p in (tmp_path / "vae", GOLDEN / "vae"))
    assert cfg.scaling_factor == 2 and dataclasses.replace(old, scaling_factor=2) == cfg
    assert storage.fingerprint(params) == storage.fingerprint(same)
    about = json.loads((tmp_path / "vae" / "config.json").read_text()) | {"scaling_factor": None}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(about))
    assert "--scaling-factor" in refused(capsys, "info", tmp_path / "vae")
    assert run("info", tmp_path / "vae", "--scaling-factor", 0.5) == 0


# What is refused.


def test_tokens_of_another_model_are_refused(model, images, tmp_path, capsys):
    tokens, other, out = tmp_path / "tokens.npz", tmp_path / "other", tmp_path / "out"
    assert run("tokenize", "--model", model, "--images", images, "--out", tokens) == 0
    FlexTok(TINY, random_params(TINY, seed=1)).save_pretrained(other)
    error = refused(capsys, "detokenize", "--model", other, "--tokens", tokens, "--out", out)
    for tok in (FlexTok.from_pretrained(other), FlexTok.from_pretrained(model)):
        assert tok.fingerprint in error and tok.origin in error
    assert not out.exists()


@pytest.mark.slow
def test_tokens_of_a_continuous_model_are_floats_in_their_file(images, tmp_path):
    cfg = changed(TINY, bottleneck=dict(kind="kl", levels=(), dim=4))
    tiny_tokenizer(cfg).save_pretrained(tmp_path / "kl")
    given, tokens = ["--model", tmp_path / "kl"], tmp_path / "tokens.npz"
    assert run("tokenize", *given, "--images", images, "--num-tokens", 4, "--out", tokens) == 0
    with np.load(tokens) as saved:
        assert saved["tokens"].dtype == np.float32 and saved["tokens"].shape == (3, 4, 4)
    more = ["--tokens", tokens, "--out", tmp_path / "out", *FAST]
    assert run("detokenize", *given, *more) == 0
    assert len(list((tmp_path / "out" / "k0004").rglob("*.png"))) == 3


def test_what_is_no_file_of_tokens_is_refused(model, tmp_path, capsys):
    good = {
        "tokens": np.zeros((1, 2), np.int32), "names": np.array(["a.png"]), "origin": "x",
        "fingerprint": "x",
    }  # fmt: skip
    files = {
        "garbage.npz": b"garbage", "empty.npz": b"", "array.npz": good["tokens"],
        "missing.npz": {"tokens": good["tokens"]},
        "float.npz": good | {"tokens": np.zeros((1, 2))},
        "names.npz": good | {"names": np.array(["a", "b"])},
        "pickle.npz": good | {"names": np.array([{}], dtype=object)},
        **{f"leads_out{i}.npz": good | {"names": np.array([name])}
           for i, name in enumerate(("../a.png", "/a.png", "a/../../b.png", "..\\a.png"))},
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            with path.open("wb") as file:
                np.save(file, content)
        arguments = ["--model", model, "--tokens", path, "--out", tmp_path / "out"]
        assert name in refused(capsys, "detokenize", *arguments)
    assert not (tmp_path / "out").exists()


def test_numbers_of_tokens_that_there_are_not_are_refused(model, images, tmp_path, capsys):
    out, tokens = tmp_path / "out", tmp_path / "tokens.npz"
    given = ["--model", model, "--images", images]
    assert "17" in refused(capsys, "reconstruct", *given, "--num-tokens", "1,17", "--out", out)
    assert "17" in refused(capsys, "tokenize", *given, "--num-tokens", "17", "--out", tokens)
    assert not out.exists() and not tokens.exists()


def test_what_cannot_be_read_or_written_is_refused_before_the_work(
    model, images, workdir, tmp_path, capsys, monkeypatch
):
    def reconstruct(model=model, images=images, out=tmp_path / "out", *more):
        given = ["--model", model, "--images", images, "--out", out]
        return refused(capsys, "reconstruct", *given, *more)

    (tmp_path / "file").write_text("")
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "a.jpg").write_text("")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "nowhere" in reconstruct(images=tmp_path / "nowhere")
    assert "empty" in reconstruct(images=tmp_path / "empty")
    assert "a.jpg" in reconstruct(images=tmp_path / "unreadable")
    assert "nowhere" in reconstruct(model=tmp_path / "nowhere")
    assert "empty" in reconstruct(model=tmp_path / "empty")
    assert "CUDA" in reconstruct(model, images, tmp_path / "out", "--attention", "cudnn", "--dtype",
                                 "bfloat16")  # fmt: skip
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(FlexTok, "from_pretrained", None)  # Nothing is loaded.
    taken = tmp_path / "file"
    for wrong in (taken, taken / "below", f"{images}/out", "ftp://host/out", ""):
        data = ["--data", images, "--out", wrong]
        refused(capsys, "encode", "--model", model, *data)
        refused(capsys, "tokenize", "--model", model, *data)
        refused(capsys, "data", "pack", images, "--split", "all", "--out", wrong)
    for wrong in (tmp_path, taken / "below.npz", "ftp://host/out", ""):
        refused(capsys, "tokenize", "--model", model, "--images", images, "--out", wrong)
        refused(capsys, "data", "check", images, "--out", wrong)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for command in ("tokenize", "reconstruct"):
        given = ["--images", images, "--out", tmp_path / "new"]
        assert str(tmp_path) in refused(capsys, command, "--model", model, *given)


def test_pictures_of_other_images_are_not_taken_for_those_of_these(model, images, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(images, photos)
    command = ["reconstruct", "--model", model, "--images", photos, "--num-tokens", 1, *FAST]
    assert run(*command, "--out", out) == 0 == run(*command, "--out", out)
    made = (out / "k0001" / "a.png").read_bytes()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    assert "k0001/a.png is not what" in refused(capsys, *command, "--out", out)
    assert (out / "k0001" / "a.png").read_bytes() == made
    (out / "k0001" / "a.png").unlink()
    (out / "k0001" / "b.png").write_bytes(made[:50])
    assert "k0001/b.png is not what" in refused(capsys, *command, "--out", out)


def test_files_of_others_are_not_replaced(model, images, tmp_path, capsys):
    evaluate = ["evaluate", "--data", images, "--num-tokens", 1, "--out", tmp_path / "e", *FAST]
    commands = [
        (["tokenize", "--model", model, "--images", images, "--out"], True),
        (["data", "check", images, "--out"], True),
        ([*evaluate, "--model", model, "--export"], False),
    ]
    for number, (command, again) in enumerate(commands):
        file, own = tmp_path / f"cat{number}.png", tmp_path / f"own{number}.png"
        file.write_bytes(b"a cat")
        assert str(file) in refused(capsys, *command, file)
        assert file.read_bytes() == b"a cat"
        assert run(*command, own) == 0 and (run(*command, own) == 0) is again
    assert "image folder" in refused(capsys, "data", "check", images, "--out", f"{images}/x.png")
    photos = tmp_path / "photos"
    shutil.copytree(images, photos / "k0001")
    (photos / "my_settings.json").touch()
    given = ["--model", model, "--num-tokens", 1, "--out", photos]
    for command in (
        ["reconstruct", "--images", photos / "k0001"], ["reconstruct", "--images", images],
        ["evaluate", "--data", images], ["generate"],
    ):  # fmt: skip
        assert "holds k0001" in refused(capsys, *command, *given)
    assert sorted(p.name for p in photos.iterdir()) == ["k0001", "my_settings.json"]
    out = tmp_path / "model"
    assert run("convert", "--model", model, "--out", out) == 0
    assert "model.safetensors" in refused(capsys, "convert", "--model", model, "--out", out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "s3://closed/model"],
        ["tokenize", "--model", "demo-digits", "--images", "s3://closed/images", "--out", "t.npz"],
        ["reconstruct", "--model", "gs://closed/model", "--images", ".", "--out", "out"],
        ["generate", "--model", "demo-digits-ar", "--out", "s3://closed/out"],
        ["detokenize", "--model", "demo-digits", "--tokens", "gs://closed/t.npz", "--out", "out"],
    ],
)
def test_a_bucket_that_does_not_answer_is_named(arguments, monkeypatch, capsys, tmp_path):
    class NoCredentialsError(Exception):
        """Of no common base, as those of the stores are."""

    def store(path):
        raise NoCredentialsError("unable to locate credentials")

    for package in ("gcsfs", "s3fs"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "store", store)
    error = refused(capsys, *arguments)
    assert re.search(r"//closed cannot be reached \(unable to locate credentials\)", error)
    assert list(tmp_path.iterdir()) == []


def test_a_source_in_a_bucket_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr(paths, "store", lambda path: 1 / 0)
    for load in (FlexTok.from_pretrained, load_vae):
        with pytest.raises(ValueError, match="s3://closed cannot be reached"):
            load("s3://closed/model")


# How it ends.


def test_ctrl_c_ends_with_130_and_leaves_nothing_behind(
    model, images, tmp_path, monkeypatch, capsys
):
    def interrupt(*_):
        raise KeyboardInterrupt("decoding with 'cp437' codec failed")

    monkeypatch.setattr(reconstruction, "decode", interrupt)
    out = tmp_path / "out"
    assert run("reconstruct", "--model", model, "--images", images, "--out", out) == 130
    assert "cp437" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork")
def test_ctrl_c_in_a_terminal_ends_with_130(tmp_path):
    """A real process, with device work in flight: at a plain exit, most of these would crash."""
    env = {key: value for key, value in ENV.items() if not key.startswith(("XLA", "JAX_COMP"))}
    for attempt in range(3):
        command = ["-m", "flextok_jax.cli", "reconstruct", "--model", "demo-digits"]
        command += ["--images", str(digits_folder()), "--out", str(tmp_path / str(attempt))]
        pid, terminal = pty.fork()
        if pid == 0:
            termios.tcsetwinsize(0, (24, 80))
            os.execve(sys.executable, [sys.executable, *command], env)
        text, sent = b"", False
        try:
            while part := os.read(terminal, 4096):
                text += part
                if b"image/s" in text and not sent:  # The progress bar.
                    time.sleep(1.5 + 0.5 * attempt)
                    os.write(terminal, b"\x03")
                    sent = True
        except OSError:  # The process has closed its end.
            pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, text.decode()
        os.close(terminal)
        assert b"interrupted" in text and b"Traceback" not in text


def test_ctrl_c_inside_a_callback_is_not_lost(tmp_path):
    """Python ignores what a callback of the garbage collector raises; libraries install some."""
    program = """
import gc, pathlib, signal, sys, time
from flextok_jax import cli
from flextok_jax.io import storage

def work(argv):
    def callback(phase, info):
        gc.callbacks.clear()
        signal.raise_signal(signal.SIGINT)
    with storage.atomic(argv[0]) as file:
        file.write_text("half")
        gc.callbacks.append(callback)
        gc.collect()
        print("the callback is over", [p.name for p in file.parent.iterdir()], flush=True)
        time.sleep(60)

cli._main = work
cli.run()
"""
    args = [sys.executable, "-c", program, tmp_path / "file.txt"]
    done = subprocess.run(args, capture_output=True, text=True, env=ENV)
    assert done.returncode == 130, done.stderr
    assert "the callback is over" in done.stdout
    assert done.stderr == "interrupted: no file is half-written\n"
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_text_are_printed(tmp_path, capsys):
    for name in (os.fsdecode(b"caf\xe9.png"), "a.png"):
        (tmp_path / name).write_bytes(b"no image")
    assert run("data", "check", tmp_path) == 2
    assert r"caf\udce9.png" in capsys.readouterr().out


def test_a_fault_of_ours_keeps_its_traceback_and_a_missing_package_has_a_remedy(
    model, monkeypatch, capsys
):
    def fails(error):
        def load(_):
            raise error

        monkeypatch.setattr("flextok_jax.io.models.load", load)

    fails(RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        run("info", model)
    fails(ModuleNotFoundError("No module", name="sklearn.datasets"))
    assert ".[train]" in refused(capsys, "info", model)
    fails(ModuleNotFoundError("No module", name="grain.python"))
    assert ".[data]" in refused(capsys, "info", model)
    fails(ModuleNotFoundError("No module", name="gradio"))
    assert ".[demo]" in refused(capsys, "info", model)
    fails(RuntimeError("RESOURCE_EXHAUSTED: 51 GB"))
    assert "--batch-size" in refused(capsys, "info", model)


@pytest.mark.slow
def test_released_files_need_no_library_of_training(model, images, tmp_path):
    code = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("grain", "array_record", "clu", "ml_collections", "optax",
                                      "orbax", "tensorflow_datasets", "sklearn", "tensorboardX",
                                      "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from flextok_jax.cli import main
model, images, out = sys.argv[1:]
fast = ["--num-tokens", "2", "--steps", "1", "--limit", "2", "--guidance", "1"]
tokens = f"{out}/tokens.npz"
assert main(["info", model]) == 0
assert main(["convert", "--model", model, "--out", f"{out}/model"]) == 0
assert main(["reconstruct", "--model", model, "--images", images, "--out", f"{out}/a", *fast]) == 0
assert main(["tokenize", "--model", model, "--images", images, "--out", tokens]) == 0
fast = fast[:4] + fast[6:]
assert main(["detokenize", "--model", model, "--tokens", tokens, "--out", f"{out}/b", *fast]) == 0
"""
    command = [sys.executable, "-c", code, model, images, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)
    assert done.returncode == 0, done.stderr
