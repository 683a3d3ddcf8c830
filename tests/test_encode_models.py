"""Latents and features made ahead: right, trained on, refused where they do not fit, killed."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from common import GOLDEN, ROOT, digits_folder
from PIL import Image
from test_encode import contents
from test_tokenizer_stage import config as tokenizer_config

from flextok_jax import cli
from flextok_jax.data import shards, sources
from flextok_jax.data.decode import upright
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.data.transforms import center_crop
from flextok_jax.io import storage
from flextok_jax.io.formats import networks
from flextok_jax.io.models import load_vae
from flextok_jax.nn import repa, vae
from flextok_jax.nn.config import Compute
from flextok_jax.training.loop import train
from flextok_jax.training.tokenizer_stage import TokenizerStage

VAE, DINO, SIZE = str(GOLDEN / "vae"), str(GOLDEN / "dinov2"), 16


def encode(images, out, *more):
    args = ["encode", "--data", images, "--out", out, "--split", "all", *more]
    return cli.main([str(a) for a in args])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven photographs in two classes, one with a caption."""
    from skimage import data

    folder = tmp_path_factory.mktemp("images")
    for i in range(7):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(data.coffee()[40 * i : 40 * i + 60, 50 * i : 50 * i + 70]).save(path)
    (folder / "class0" / "4.txt").write_text("part of a cup")
    return folder


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    """Moments and features, two crops of each image."""
    folder = tmp_path_factory.mktemp("encoded")
    options = ["--vae", VAE, "--dinov2", DINO, "--dinov2-size", 42, "--image-size", SIZE]
    options += ["--crops", 2, "--shard-size", 4, "--batch-size", 5]
    assert encode(images, folder, *options) == 0
    return folder


@pytest.mark.slow
def test_records_hold_what_the_models_make_of_the_crops(images, encoded):
    source = shards.ShardSource(encoded, "all")
    found = [source.record(i) for i in range(len(source))]
    keys = [f"class{i % 2}/{i}.png" for i in (0, 2, 4, 6, 1, 3, 5)]
    assert [r.key for r in found] == keys == [source.key(i) for i in range(7)]
    assert [r.label for r in found] == [0] * 4 + [1] * 3
    assert [r.caption for r in found] == [None, None, "part of a cup", *[None] * 4]
    plain = np.stack([center_crop(upright((images / k).read_bytes()), SIZE) for k in keys])
    cfg, params = load_vae(VAE)
    mean, logvar = vae.encode_moments(params, cfg, plain / np.float32(127.5) - 1)
    expected = np.concatenate([mean, logvar], -1)
    moments = np.stack([r.arrays["moments"] for r in found])
    assert moments.shape == (7, 2, 4, 4, 8) and moments.dtype == np.float16
    np.testing.assert_allclose(moments[:, 0], expected, rtol=1e-3, atol=2e-3)
    assert (moments[:, 0] != moments[:, 1]).any((1, 2, 3)).all()  # The other crop is another.
    cfg, params = networks.load_dinov2(DINO)
    expected = repa.targets(params, cfg, Compute(), plain, 42)
    features = np.stack([r.arrays["repa"] for r in found])
    np.testing.assert_allclose(features[:, 0], expected, rtol=2e-3, atol=4e-3)


def test_too_many_unreadable_images_stop_with_the_list_and_no_shard(images, tmp_path, capsys):
    for i in range(8):
        (tmp_path / "in").mkdir(exist_ok=True)
        data = next(images.glob("*/0.png")).read_bytes() if i > 1 else b"no image"
        (tmp_path / "in" / f"{i}.png").write_bytes(data)
    options = ["--vae", VAE, "--image-size", SIZE]
    assert encode(tmp_path / "in", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "0.png (" in error and "1.png (" in error and "2.png" not in error
    assert [path.name for path in (tmp_path / "out" / "all").iterdir()] == ["manifest.json"]


def test_the_check_command_tells_by_whom_and_verifies(encoded, capsys):
    assert cli.main(["data", "check", str(encoded)]) == 0
    out = capsys.readouterr().out
    sha = storage.fingerprint(load_vae(VAE)[1])
    assert all(words in out for words in ("7 records", VAE, sha, "dinov2", "4x4x8", "9x24"))


# Training.


def config(folder, images="", **changes):
    small = "digits,width=32,enc_depth=1,dec_depth=2,batch=8"
    changes = {
        "vae__source": VAE,
        "model__sites__patch_size": 2,
        "data__image_size": SIZE,
    } | changes
    c = tokenizer_config(small, **changes)
    c.data.update(source="encoded", path=str(folder), split="all", crop="random")
    c.data.eval_split, c.evaluation.data = "all", str(images)
    return c


@pytest.mark.slow
def test_a_stage_trains_on_them_with_repa_and_evaluates_on_images(images, encoded, tmp_path):
    c = config(encoded, images, repa__weight=0.5, repa__width=24)
    c.evaluation.update(num_images=7, batch_size=7, steps=2)
    train(TokenizerStage(c), c, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and np.isfinite(last["loss_repa"]) and np.isfinite(last["loss_flow"])
    assert 0 < last["eval/reconstruction/psnr/16"] < 40


def test_the_latents_are_those_of_the_images(images, encoded):
    c = config(encoded)
    stage = TokenizerStage(c)
    (batch,) = make_pipeline(c.data, seed=0, batch_size=7, train=False).eval_batches(7)
    source = sources.make_source(sources.parse(str(images)), "all")
    plain = [center_crop(upright(source.read(i).image), SIZE) for i in range(7)]
    noise = jax.random.normal(jax.random.key(0), (7, *stage.model.latent_shape))
    latents = jax.jit(lambda **batch: stage._latents(stage.load_frozen(), batch))
    ahead = latents(moments=batch["moments"], posterior=noise)
    online = latents(image=np.stack(plain), posterior=noise)
    np.testing.assert_allclose(ahead, online, rtol=2e-3, atol=3e-3)  # Of float16.


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data__image_size=32), "image_size: 16 there, 32 now"),
        (dict(repa__weight=1.0, repa__width=32), "repa.width: 24 there, 32 now"),
        (
            dict(vae__source="identity", model__sites__patch_size=4),
            "vae.latent_channels: 4 there, 3 now",
        ),
        (dict(data__paired=True), "paired=True.*no pairs"),
        (dict(evaluation__num_images=5), "holds no images to evaluate on.*evaluation.data"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(changes, words, encoded):
    with pytest.raises(ValueError, match=words):
        TokenizerStage(config(encoded, **changes))


def test_an_evaluation_needs_images(encoded):
    stage = TokenizerStage(config(encoded, encoded, evaluation__num_images=5))
    with pytest.raises(ValueError, match="flextok encode"):
        stage.evaluators()


def test_moments_of_another_vae_are_refused_by_its_sha256(encoded, tmp_path, capsys):
    from flextok_jax.io.formats import vae_files

    cfg, params = load_vae(VAE)
    changed = jax.tree.map(np.array, params)
    changed["encoder"]["conv_in"]["bias"][0] += 1
    vae_files.save_folder(tmp_path / "vae", cfg, changed)
    c = config(encoded)
    c.vae.source = str(tmp_path / "vae")
    sha = [storage.fingerprint(p) for p in (params, changed)]
    with pytest.raises(ValueError, match=f"fingerprint: '{sha[0]}' there, '{sha[1]}' now"):
        TokenizerStage(c)
    more = ["--vae", tmp_path / "vae", "--image-size", SIZE, "--split", "test"]
    # Nor are they written beside them.
    assert encode(digits_folder(), encoded, *more, "--limit", 2) == 2
    assert "fingerprint" in capsys.readouterr().err and not (encoded / "test").exists()


# Several processes, and kill -9.


def test_processes_share_the_shards_and_the_last_completes_the_manifest(images, tmp_path, capsys):
    options = ["--vae", VAE, "--image-size", SIZE, "--shard-size", 2]
    assert encode(images, tmp_path / "one", *options) == 0
    assert encode(images, tmp_path / "two", *options, "--process", "1/2") == 0
    assert "2 of 4 shards" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 of 4 shards"):
        shards.ShardSource(tmp_path / "two", "all")
    assert encode(images, tmp_path / "two", *options, "--process", "0/2") == 0
    assert contents(tmp_path / "one" / "all") == contents(tmp_path / "two" / "all")


# `flextok`, which kills itself when shard 3 is written but has not got its name.
KILLED = """
import os, signal, sys
from flextok_jax import cli
rename = os.replace
def replace(source, target):
    if os.path.basename(target) == "records-00003-of-00007.array_record":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_with_sigkill_continues_to_the_same_files(images, tmp_path):
    """Two devices; killed when three shards are finished and the next is a temporary file."""
    options = ["--vae", VAE, "--image-size", str(SIZE), "--shard-size", "1"]
    folder = tmp_path / "killed" / "all"
    arguments = ["encode", "--data", images, "--split", "all", *options, "--out", folder.parent]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}

    def run(*program):
        return subprocess.run([sys.executable, *program, *map(str, arguments)], env=env).returncode

    assert run("-c", KILLED) == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in folder.glob("records-*.array_record")}
    assert len(done) == 3 and list(folder.glob(".records-00003-of-00007.*.array_record"))
    assert run("-m", "flextok_jax.cli") == 0
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())  # They were not made again.
    assert encode(images, tmp_path / "whole", *options) == 0  # On one device.
    found, expected = (shards.ShardSource(tmp_path / name, "all") for name in ("killed", "whole"))
    for i in range(7):
        a, b = (source.record(i) for source in (found, expected))
        assert (a.key, a.label, a.caption) == (b.key, b.label, b.caption)
        np.testing.assert_allclose(a.arrays["moments"], b.arrays["moments"], rtol=2e-3, atol=2e-3)
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in (tmp_path / "whole" / "all").iterdir()}  # No leftovers.
