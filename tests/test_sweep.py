"""Sweeps of an evaluation: their metrics, their metadata, resuming, the report and the commands."""

import dataclasses
import errno
import hashlib
import json
import os

import numpy as np
import pytest
from common import TINY, changed, digits_folder, tiny_generator, tiny_tokenizer
from test_fidelity import weights  # noqa: F401, a fixture
from test_lpips import files  # noqa: F401, a fixture

from examples.digits import arrays, classifier
from flextok_jax import cli, conditions
from flextok_jax.evaluation import (
    environment,
    metrics,
    pictures,
    probe,
    statistics,
    sweep,
    sweep_report,
)
from flextok_jax.evaluation.networks import Networks
from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.evaluation.reconstruction import (
    Sampler,
    check_counts,
    decode,
    default_sampler,
    encode,
)
from flextok_jax.io import storage
from flextok_jax.nn.images import to_float, to_uint8

CFG = changed(TINY, sites__patch_size=4)  # 16 x 16 pixels
SETTINGS = sweep.grid([16, 1], [1.0], [1])
LIMIT = 12
SHARED = {
    "task": "reconstruction",
    "model": {"origin": "memory"},
    "data": {"title": "digits"},
    "reference": {"source": "data"},
    "batch_size": 5,
    "image_size": 16,
}


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer(CFG)


def sweep_of(tok, out, images=None, **fields):
    """A sweep of the first digits of the split test; the last batch is not full."""
    images = images or Pictures(digits_folder(), LIMIT, "test")
    networks = Networks(classifier.feature_network(tok.mesh))
    settings = SHARED | {"networks": networks.metadata}
    options = {"sampler": Sampler(), "seed": 3, "batch_size": 5} | fields
    return sweep.Sweep(out, settings, tok, images, networks, **options)


@pytest.fixture(scope="module")
def plain(tok, tmp_path_factory):
    """The results of a sweep that nothing happened to, and its folder."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    out.mkdir()
    return sweep_of(tok, out).run(SETTINGS), out


def values(results):
    return [{k: v for k, v in r["metrics"].items() if k != "seconds_per_image"} for r in results]


def test_a_sweep_measures_what_the_definitions_say(tok, plain):
    results, out = plain
    assert [r["metadata"]["setting"]["num_tokens"] for r in results] == [1, 16]
    originals, labels = (array[:LIMIT] for array in arrays("test"))
    tokens = encode(tok, originals, 16, LIMIT)
    seeds = pictures.name_seeds(Pictures(digits_folder(), LIMIT, "test").names)
    network = classifier.feature_network()
    real = statistics.FeatureSet(*network(originals, LIMIT), labels)
    for k, result in zip((1, 16), results):
        images = to_uint8(decode(tok, tokens, k, seeds, Sampler(1, 1.0), 3, LIMIT))
        found, (a, b) = result["metrics"], (to_float(images), to_float(originals))
        made = statistics.FeatureSet(*network(images, LIMIT), labels)
        precision, recall = statistics.precision_recall(real, made)
        expected = {
            "psnr": float(metrics.psnr(a, b).mean()),
            "mae": float(metrics.mae(a, b).mean()),
            "ssim": float(metrics.ssim(a, b).mean()),
            "fid": statistics.fid(made.gaussian, real.gaussian),
            "precision": precision,
            "recall": recall,
            "accuracy": made.accuracy,
            "inception_score": statistics.inception_score(made.logits)[0],
            "codebook_usage": len(np.unique(tokens[:, :k])) / CFG.vocab_size,
        }
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-3)
        assert sum(found["bands"]) == pytest.approx(np.mean((a - b) ** 2), rel=1e-3)
        assert found["count"] == found["real_count"] == LIMIT and found["seconds_per_image"] > 0
    with np.load(out / sweep.POINTS / f"{SETTINGS[1].name}.npz") as shown:
        rows = [0, 1, 3, 4, 6, 7, 9, 11]
        np.testing.assert_array_equal(shown["originals"], originals[rows])
        assert np.abs(shown["images"].astype(int) - images[rows]).max() <= 1
        assert shown["titles"].tolist() == [f"class {label}" for label in labels[rows]]
    saved, _ = statistics.read_gaussian(out / sweep.REFERENCE)
    np.testing.assert_allclose(saved.covariance, real.gaussian.covariance, rtol=1e-4, atol=1e-6)


def test_a_full_disk_is_an_error_before_images_are_written(tok, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        assert length == LIMIT * 16 * 16 * 3
        raise OSError(errno.ENOSPC, storage.FULL)

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=storage.FULL):
        sweep_of(tok, tmp_path).run(SETTINGS)


def test_metrics_are_saved_with_the_full_setup(plain):
    metadata = plain[0][0]["metadata"]
    assert metadata["batch_size"] == 5 and metadata["networks"]["features"]["name"] == "digits"
    assert len(metadata["data"]["pixels_sha256"]) == 64 and metadata["data"]["title"] == "digits"
    assert metadata["versions"]["jax"] and metadata["devices"] and metadata["commit"]
    assert environment.product_precision() == "float32"  # Of the tests.


@pytest.mark.slow
def test_samples_are_measured_without_originals_and_at_every_token_guidance(tmp_path):
    gen = tiny_generator(CFG)
    labels = np.tile(np.arange(10), 2)
    samples = sweep.Samples(gen, conditions.of_labels(labels), labels, {"top_k": 5})
    run = sweep_of(gen.tokenizer, tmp_path, samples=samples, batch_size=20)
    run.run(sweep.grid([4], [1.0], [1], [4.0]))
    results = run.run(
        [*sweep.grid([4, 16], [1.0], [1], [4.0]), *sweep.grid([16], [1.0], [1], [1.0])]
    )
    assert len(results) == 3 and not {"psnr", "bands"} & set(results[0]["metrics"])
    assert all(r["metrics"]["fid"] > 0 and r["metrics"]["count"] == 20 for r in results)
    assert all(0 <= r["metrics"]["accuracy"] <= 1 for r in results)
    names = [sweep.Setting(**r["metadata"]["setting"]).name for r in results]
    codes = dict(zip(names, (r["metrics"]["codes"] for r in results)))
    longer, shorter = (codes[f"k{k:04d}_steps1_guidance1_tokens4"] for k in (16, 4))
    assert longer["distinct"][:4] == shorter["distinct"]  # The first four of the same tokens.
    assert longer != codes["k0016_steps1_guidance1_tokens1"]


def test_statistics_of_a_file_replace_those_of_the_data(tok, plain, tmp_path):
    results, out = plain
    gaussian, _ = statistics.read_gaussian(out / sweep.REFERENCE)
    moved = statistics.Gaussian(gaussian.mean + 1, gaussian.covariance)
    (result,) = sweep_of(tok, tmp_path, reference=moved).run(SETTINGS[:1])
    assert result["metrics"]["fid"] > results[0]["metrics"]["fid"] + 1


def test_exported_images_are_those_that_were_measured(tok, plain, tmp_path):
    file = tmp_path / "samples.npz"
    run = dataclasses.replace(sweep_of(tok, plain[1]), export=file)
    (result,) = run.run(SETTINGS[:1])
    images = np.load(file)["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (LIMIT, 16, 16, 3)
    psnr = metrics.psnr(to_float(images), to_float(arrays("test")[0][:LIMIT])).mean()
    assert float(psnr) == pytest.approx(result["metrics"]["psnr"], rel=1e-5)


def test_a_model_without_prefixes_ids_or_sampling_is_measured(tmp_path):
    fields = {"tokens__order": "full", "tokens__keep": "fixed", "target__kind": "values"}
    fields |= {"bottleneck__kind": "kl", "bottleneck__levels": (), "bottleneck__dim": 4}
    tok = tiny_tokenizer(changed(CFG, **fields))
    assert check_counts(tok, None) == [16] and default_sampler(tok) is None
    with pytest.raises(ValueError, match="num_tokens=4"):
        check_counts(tok, [4])
    with pytest.raises(ValueError, match="steps"):
        default_sampler(tok, steps=5)
    (result,) = sweep_of(tok, tmp_path, sampler=None).run([sweep.Setting(16)])
    assert result["metrics"]["psnr"] > 0 and "codes" not in result["metrics"]
    sweep_report.write(tmp_path / "report.html", *sweep.results(tmp_path))
    assert (tmp_path / sweep.POINTS / "k0016.json").exists()


def test_a_stopped_sweep_goes_on_and_measures_no_setting_twice(tok, plain, tmp_path, monkeypatch):
    measured, real = [], sweep.Sweep._measure

    def stop_at_the_second(self, setting, *args):
        measured.append(setting.num_tokens)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(self, setting, *args)

    monkeypatch.setattr(sweep.Sweep, "_measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sweep_of(tok, tmp_path).run(SETTINGS)
    (tmp_path / sweep.POINTS / f".{SETTINGS[1].name}.abcd.json").write_text("")  # Half written.
    assert len(sweep.results(tmp_path)[0]) == 1
    assert values(sweep_of(tok, tmp_path).run(SETTINGS)) == values(plain[0])
    assert measured == [1, 16, 16]


def test_pictures_are_read_once_unreadable_ones_named_and_changed_ones_refused(
    tok, tmp_path, monkeypatch
):
    folder, out, read, real = tmp_path / "images", tmp_path / "out", [], Pictures.batches
    monkeypatch.setattr(Pictures, "batches", lambda *args: read.append(args) or real(*args))
    out.mkdir()
    for i, image in enumerate(arrays("test")[0][:LIMIT]):
        pictures.write_png(folder / f"{i:02d}.png", image, {})
    (folder / "03.png").write_bytes(b"no image")
    for _ in range(2):
        result = sweep_of(tok, out, Pictures(str(folder))).run(SETTINGS)[0]
    assert len(read) == 1
    assert result["metrics"]["count"] == result["metrics"]["real_count"] == LIMIT - 1
    assert list(result["unreadable"]) == ["03.png"]
    pictures.write_png(folder / "03.png", arrays("test")[0][20], {})
    with pytest.raises(ValueError, match="pixels_sha256"):
        sweep_of(tok, out, Pictures(str(folder))).run([sweep.Setting(4, 1.0, 1)])


def test_few_images_and_other_networks_carry_a_warning():
    network = {"name": "inception", "description": "InceptionV3"}
    metadata = {"networks": {"features": network}, "reference": {"source": "data"}}

    def warnings(count, real_count):
        found = {"fid": 1.0, "count": count, "real_count": real_count}
        return environment.warnings(metadata, found)

    assert warnings(50_000, 50_000) == []
    assert "49999" in warnings(49_999, 60_000)[0] and "biased" in warnings(60_000, 49_999)[0]
    metadata["networks"]["features"] = {"name": "digits", "description": "a stand-in"}
    assert "a stand-in" in warnings(50_000, 50_000)[0]


def test_the_front_has_the_settings_that_no_other_beats_in_both():
    points = [(3.0, 24.0), (1.0, 20.0), (2.0, 19.0), (4.0, 24.0)]
    assert sweep_report.front(points, -1) == [(1.0, 20.0), (3.0, 24.0)]
    assert sweep_report.front(points, 1) == [(1.0, 20.0), (2.0, 19.0)]


def test_a_probe_finds_the_class_from_the_register_that_holds_it_on(monkeypatch):
    monkeypatch.setattr(probe, "STRENGTHS", (0.1, 1.0))
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    registers = rng.standard_normal((120, 4, 5)).astype(np.float32)
    registers[:, 2, :3] = 8 * np.eye(3)[labels]
    split = (registers[:90], labels[:90]), (registers[90:], labels[90:])
    found = dict(probe.probe(*split, [1, 2, 4]))
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["accuracy"][4] > 0.95 and max(found["accuracy"][k] for k in (1, 2)) < 0.6


# The commands.


@pytest.fixture(scope="module")
def model(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tok.save_pretrained(folder)
    return folder


def run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_the_command_writes_results_and_a_report_and_compares_them(
    model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(probe, "STRENGTHS", (1.0,))
    out = tmp_path / "out"
    command = ("evaluate", "--model", model, "--data", digits_folder(), "--out", out)
    settings = ("--limit", 120, "--num-tokens", "1,16", "--guidance", 1, "--batch-size", 60)
    code, told, _ = run(capsys, *command, *settings[:4], "--task", "probe")
    accuracy = json.loads((out / "probe.json").read_text())["metrics"]["accuracy"]
    assert code == 0 and f"{accuracy['16']:.1%}" in told
    code, told, noted = run(capsys, *command, *settings, "--split", "test", "--steps", "1,2")
    assert code == 0 and "PSNR" in told and "--inception" in noted and "--lpips-vgg" in noted
    page = (out / "report.html").read_text()
    assert "product_precision" in page and "class 2" in page
    more = ("--limit", 120, "--batch-size", 60, "--num-tokens", 1, "--guidance", 3, "--steps", 1)
    assert run(capsys, *command, *more, "--split", "test")[0] == 0
    code, _, noted = run(capsys, *command, *settings, "--split", "test", "--seed", 1)
    assert code == 2 and "sampling.seed: 0" in noted
    first, second = (out / sweep.POINTS / f"k0016_steps{s}_guidance1.json" for s in (1, 2))
    code, told, _ = run(capsys, "compare", first, second)
    assert code == 0 and "setting.steps: 1" in told and "psnr" in told and "fingerprint" not in told
    assert run(capsys, "compare", first, out / "probe.json")[0] == 0
    code, _, noted = run(capsys, "compare", first, out / "settings.json")
    assert code == 2 and "settings.json" in noted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inception", "missing.pth"], "missing.pth"),
        (["--lpips-vgg", "vgg.pth"], "--lpips-heads"),
        (["--export", "x.npz", "--num-tokens", "1,2"], "sweep of 2"),
        (["--reference", "missing.npz"], "missing.npz"),
        (["--num-tokens", "17"], "1 to 16"),
        (["--task", "probe", "--split", "all"], "--split all"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    command = ("evaluate", "--model", model, "--data", digits_folder(), "--out", out)
    code, _, noted = run(capsys, *command, *arguments)
    assert code == 2 and message in noted and not out.exists()


@pytest.mark.slow
def test_the_files_of_the_networks_give_their_metrics_and_their_hashes(
    model,
    weights,  # noqa: F811
    files,  # noqa: F811
    tmp_path,
    capsys,
):
    """Of random weights under the published names; `weights` of Inception, `files` of LPIPS."""
    out, (vgg, heads) = tmp_path / "out", files
    command = ("evaluate", "--model", model, "--data", digits_folder(), "--limit", 12)
    networks = ("--inception", weights, "--lpips-vgg", vgg, "--lpips-heads", heads, "--out", out)
    settings = ("--num-tokens", 16, "--steps", 1, "--guidance", 1, "--batch-size", 6)
    code, _, noted = run(capsys, *command, *networks, *settings)
    assert code == 0 and "--inception" not in noted
    (file,) = (out / sweep.POINTS).glob("*.json")
    result = storage.read_json(file)
    found, network = result["metrics"], result["metadata"]["networks"]
    assert found["fid"] > 0 and found["lpips"] > 0 and "accuracy" not in found
    assert network["features"]["name"] == "inception" and network["perceptual"]["vgg_sha256"]
    assert network["features"]["file_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert len(statistics.read_gaussian(out / sweep.REFERENCE)[0].mean) == 2048
