"""Sweeps of an evaluation: their numbers, their stamps, and what happens when they are stopped."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from common import TINY, digits_folder, tiny_generator, tiny_tokenizer
from test_fidelity import weights  # noqa: F401, a fixture
from test_lpips import files  # noqa: F401, a fixture

from examples.digits import arrays, classifier
from flextok_jax import cli
from flextok_jax.evaluation import (
    chunks,
    metrics,
    pictures,
    probe,
    protocol,
    statistics,
    subjects,
    sweep,
    sweep_report,
)
from flextok_jax.evaluation.measure import Instruments, Reference
from flextok_jax.evaluation.pictures import Pictures, from_uint8, to_uint8
from flextok_jax.evaluation.reconstruction import Sampling, draw, encode
from flextok_jax.evaluation.subjects import Point, Reconstructions, Samples

CFG = dataclasses.replace(TINY, patch_size=4)  # 16 x 16 pixels
POINTS = sweep.grid([16, 1], [1.0], [1])
LIMIT = 22
DATA = {"from": "the pictures of data"}
DIGITS = "--data", digits_folder(), "--split", "test"


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer(CFG)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "SIZE", 8)


def sweep_of(tok, out, batch_size=5, process=(0, 1), **fields):
    """A sweep of held-out digits; with chunks of 8, so that the last ones are not full."""
    images = Pictures(f"{digits_folder()}/test", LIMIT)
    subject = Reconstructions(tok, images, 16, min(batch_size, len(images)))
    instruments = Instruments(classifier.feature_network(tok.mesh))
    stamp = {"networks": instruments.about(), "model": tok.fingerprint, "reference": DATA}
    return sweep.Sweep(
        out,
        stamp | fields.pop("stamp", {}),
        subject,
        Reference(images),
        instruments,
        Sampling(seed=3),
        process,
        **fields,
    )


@pytest.fixture(scope="module")
def plain(tok, tmp_path_factory):
    """The results of a sweep that nothing happened to, and its folder."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SIZE", 8)
        return sweep_of(tok, out).run(POINTS), out


def numbers(results, without=("seconds_per_image",)):
    return [{k: v for k, v in r["metrics"].items() if k not in without} for r in results]


# Numbers.


def test_a_sweep_measures_what_the_definitions_say(tok, plain):
    results, out = plain
    assert [r["stamp"]["point"]["num_tokens"] for r in results] == [1, 16]
    originals, labels = (array[:LIMIT] for array in arrays("test"))
    tokens = encode(tok, originals, 16, LIMIT)
    seeds = pictures.name_seeds(Pictures(f"{digits_folder()}/test", LIMIT).names)
    network = classifier.feature_network()
    real = statistics.Moments.empty(64).add(network(originals, LIMIT)["features"]).gaussian()
    for k, result in zip((1, 16), results):
        drawn = to_uint8(draw(tok, tokens, k, seeds, Sampling(1, 1.0, seed=3), LIMIT))
        found, (a, b) = result["metrics"], (from_uint8(drawn), from_uint8(originals))
        looked = network(drawn, LIMIT)
        made = statistics.Moments.empty(64).add(looked["features"]).gaussian()
        expected = {
            "psnr": metrics.psnr(a, b).mean(),
            "mae": metrics.mae(a, b).mean(),
            "ssim": metrics.ssim(a, b).mean(),
            "fid": statistics.fid(made, real),
            "accuracy": np.mean(looked["logits"].argmax(1) == labels),
            "inception_score": statistics.inception_score(looked["logits"])[0],
            "codebook_usage": len(np.unique(tokens[:, :k])) / CFG.vocab_size,
        }
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-3)
        assert sum(found["bands"]) == pytest.approx(np.mean((a - b) ** 2), rel=1e-3)
        assert found["count"] == LIMIT and found["seconds_per_image"] > 0
    with np.load(out / sweep.POINTS / f"{sweep.name(POINTS[1])}.npz") as shown:
        np.testing.assert_array_equal(shown["originals"], originals[: sweep.SHOWN])
        assert np.abs(shown["images"].astype(int) - drawn[: sweep.SHOWN]).max() <= 1
    saved, _ = statistics.read_gaussian(out / sweep.REFERENCE)
    np.testing.assert_allclose(saved.covariance, real.covariance, rtol=1e-4, atol=1e-6)
    assert not (out / sweep.WORK).exists()


def test_the_size_of_batches_changes_no_number(tok, plain, tmp_path):
    other = numbers(sweep_of(tok, tmp_path / "out", batch_size=16).run(POINTS))
    for a, b in zip(numbers(plain[0]), other):
        for key in ("psnr", "ssim", "fid", "precision", "inception_score"):
            assert a[key] == pytest.approx(b[key], rel=5e-3), key
        assert a["codes"] == b["codes"]


def test_samples_are_measured_without_originals_and_at_every_guidance_of_tokens(
    tmp_path, monkeypatch
):
    gen, images = tiny_generator(CFG), Pictures(f"{digits_folder()}/test", LIMIT)
    hows = tuple(subjects.TokenSampling(guidance=scale) for scale in (1.0, 4.0))
    subject = Samples(gen, np.tile(np.arange(10), 2), 16, hows, 0, 20)
    instruments = Instruments(classifier.feature_network())
    stamp = {"networks": instruments.about(), "reference": DATA}
    run = sweep.Sweep(tmp_path / "out", stamp, subject, Reference(images), instruments, Sampling())
    with monkeypatch.context() as patch:  # Begun with other scales, which the folder may have.
        patch.setattr(sweep.Sweep, "_finish", lambda *_: 1 / 0)
        begun = dataclasses.replace(run, subject=dataclasses.replace(subject, hows=hows[:0:-1]))
        with pytest.raises(ZeroDivisionError):
            begun.run(sweep.grid([4], [1.0], [1], [4.0]))
    results = run.run(sweep.grid([4, 16], [1.0], [1], [1.0, 4.0]))
    assert len(results) == 4 and not {"psnr", "bands"} & set(results[0]["metrics"])
    assert all(r["metrics"]["fid"] > 0 and 0 <= r["metrics"]["accuracy"] <= 1 for r in results)
    found = {sweep.name(Point(**r["stamp"]["point"])): r["metrics"]["codes"] for r in results}
    longer, shorter = (found[f"k{k:04d}_steps1_guidance1_tokens4"] for k in (16, 4))
    assert longer["distinct"][:4] == shorter["distinct"]  # The first four of the same tokens.
    assert longer != found["k0016_steps1_guidance1_tokens1"]


def test_statistics_of_a_file_stand_in_for_those_of_the_data(tok, plain, tmp_path):
    results, out = plain
    gaussian, _ = statistics.read_gaussian(out / sweep.REFERENCE)
    run = sweep_of(tok, tmp_path / "out")
    same = dataclasses.replace(run, reference=Reference(run.reference.pictures, gaussian))
    assert same.run(POINTS)[0]["metrics"]["fid"] == pytest.approx(results[0]["metrics"]["fid"])
    moved = statistics.Gaussian(gaussian.mean + 1, gaussian.covariance)
    run = sweep_of(tok, tmp_path / "moved")
    run = dataclasses.replace(run, reference=Reference(run.reference.pictures, moved))
    assert run.run(POINTS)[0]["metrics"]["fid"] > results[0]["metrics"]["fid"] + 1


def test_exported_images_are_those_that_were_measured(tok, tmp_path):
    file = tmp_path / "samples.npz"
    (result,) = sweep_of(tok, tmp_path / "out", export=file).run(POINTS[:1])
    images = np.load(file)["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (LIMIT, 16, 16, 3)
    originals = arrays("test")[0][:LIMIT]
    psnr = metrics.psnr(from_uint8(images), from_uint8(originals)).mean()
    assert psnr == pytest.approx(result["metrics"]["psnr"], rel=1e-9)


def test_an_interrupted_sweep_may_be_exported_when_it_goes_on(tok, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep_of(tok, tmp_path / "out").run(POINTS[:1])  # Its chunks keep the first images.
    file = tmp_path / "samples.npz"
    sweep_of(tok, tmp_path / "out", export=file).run(POINTS[:1])
    assert np.load(file)["arr_0"].shape == (LIMIT, 16, 16, 3)


def test_unreadable_pictures_are_named_in_the_result_and_left_out(tok, tmp_path):
    folder = tmp_path / "images"
    for i, image in enumerate(arrays("test")[0][:20]):
        pictures.write_png(folder / f"{i:02d}.png", image, {})
    for i in range(8, 16):  # A whole chunk.
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    images, run = Pictures(str(folder)), sweep_of(tok, tmp_path / "out")
    subject = Reconstructions(tok, images, 16, 5)
    run = dataclasses.replace(run, subject=subject, reference=Reference(images))
    (result,) = run.run(POINTS[:1])
    assert result["metrics"]["count"] == result["metrics"]["real_count"] == 12
    assert sorted(result["unreadable"]) == [f"{i:02d}.png" for i in range(8, 16)]
    assert "cannot identify" in result["unreadable"]["08.png"]
    for i in range(20):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    run = dataclasses.replace(run, out=tmp_path / "none")
    with pytest.raises(ValueError, match="not one of 20 images could be read:\n  00.png: "):
        run.run(POINTS[:1])


# Stops, processes, stamps.


def test_a_stopped_sweep_goes_on_without_doing_anything_twice(tok, plain, tmp_path, monkeypatch):
    drawn, real = [], sweep.draw_point

    def stop_later(subject, prepared, point, *args):
        if len(prepared["names"]) > 1:  # Not the one that only compiles.
            drawn.append((point.num_tokens, prepared["names"][0]))
            if len(drawn) == 5:
                raise KeyboardInterrupt
        return real(subject, prepared, point, *args)

    monkeypatch.setattr(sweep, "draw_point", stop_later)
    with pytest.raises(KeyboardInterrupt):
        sweep_of(tok, tmp_path / "out").run(POINTS)
    assert len(list((tmp_path / "out" / sweep.POINTS).glob("*.json"))) == 1
    again = sweep_of(tok, tmp_path / "out").run(POINTS)
    assert numbers(again) == numbers(plain[0])
    assert len(drawn) == 7 and len(set(drawn)) == 6  # Three chunks at two points; one began twice.


def test_what_an_interrupted_sweep_prepared_serves_no_other_sweep(
    tok, plain, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run = sweep_of(tok, out)
    fewer = dataclasses.replace(run, subject=dataclasses.replace(run.subject, num_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fewer.run(POINTS[:1])  # Prepares four tokens of each, and measures one of them.
    assert numbers(run.run(POINTS)) == numbers(plain[0])
    assert not (out / sweep.WORK).exists()


def folder_of_digits(path, count):
    for i, image in enumerate(arrays("test")[0][:count]):
        pictures.write_png(path / f"{i:02d}.png", image, {})
    return path


def over_folder(tok, folder, out):
    images = Pictures(str(folder))
    run = sweep_of(tok, out)
    subject = dataclasses.replace(run.subject, pictures=images)
    return dataclasses.replace(run, subject=subject, reference=Reference(images))


def test_pictures_that_changed_are_not_mixed_with_those_that_were_measured(
    tok, tmp_path, monkeypatch
):
    folder, out = folder_of_digits(tmp_path / "images", 12), tmp_path / "out"
    over_folder(tok, folder, out).run(POINTS[:1])
    other = arrays("test")[0][20]
    pictures.write_png(folder / "03.png", other, {})
    with pytest.raises(ValueError, match="measured with other pictures"):
        over_folder(tok, folder, out).run(POINTS)
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "_measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            over_folder(tok, folder, tmp_path / "stopped").run(POINTS)
    pictures.write_png(folder / "03.png", 255 - other, {})
    with pytest.raises(ValueError, match="changed since their tokens were made"):
        over_folder(tok, folder, tmp_path / "stopped").run(POINTS)


def test_what_could_not_be_read_is_tried_again_by_the_next_run(tok, tmp_path, monkeypatch):
    folder, out = folder_of_digits(tmp_path / "images", 12), tmp_path / "out"
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "draw_point", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            over_folder(tok, folder, out).run(POINTS[:1])
    (folder / "03.png").write_bytes(whole)
    (result,) = over_folder(tok, folder, out).run(POINTS[:1])
    assert result["metrics"]["count"] == 12 and not result["unreadable"]


def test_what_a_kill_left_half_written_is_no_result(tok, plain, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain[1], out)
    (out / sweep.POINTS / f".{sweep.name(POINTS[0])}.abcd.json").write_text("")
    assert len(sweep.everything(out)[0]) == 2
    assert numbers(sweep_of(tok, out).run(POINTS)) == numbers(plain[0])


def test_the_stamp_has_the_machines_of_all_processes(tok, tmp_path, monkeypatch):
    out = tmp_path / "out"
    there = protocol.circumstances()
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "circumstances", lambda: there | {"machine": "gpu: 8 x other"})
        sweep_of(tok, out, process=(1, 2)).run(POINTS[:1])
    (result,) = sweep_of(tok, out).run(POINTS[:1])
    assert result["stamp"]["machine"] == f"{there['machine']} and gpu: 8 x other"
    assert result["stamp"]["versions"] == there["versions"]


def test_processes_that_share_a_folder_find_what_one_finds(tok, plain, tmp_path):
    out = tmp_path / "out"
    assert sweep_of(tok, out, process=(0, 2)).run(POINTS) == []
    assert sweep_of(tok, out, process=(1, 2)).run(POINTS) == []
    assert numbers(sweep_of(tok, out, process=(0, 2)).run(POINTS)) == numbers(plain[0])


def test_a_folder_of_other_settings_is_refused_with_the_differences(tok, plain):
    with pytest.raises(ValueError, match="other settings") as error:
        sweep_of(tok, plain[1], stamp={"model": "another"}).run(POINTS)
    assert f"model: {tok.fingerprint} | another" in str(error.value)


def test_stamps_tell_apart_what_was_made_differently():
    a = {"point": {"steps": 20}, "networks": {"features": None}, "count": 3}
    b = {"point": {"steps": 50}, "networks": {"features": {"name": "x"}}}
    assert list(protocol.differences(a, b)) == [
        "point.steps: 20 | 50",
        "networks.features: None | {'name': 'x'}",
        "count: 3 | (missing)",
    ]
    assert not list(protocol.differences(a, json.loads(json.dumps(a))))


def test_few_images_and_stand_in_networks_carry_a_warning():
    network = {"name": "inception", "words": "InceptionV3"}
    about = {"networks": {"features": network}, "reference": DATA}

    def warnings(count, real_count):
        return protocol.warnings(about, {"fid": 1.0, "count": count, "real_count": real_count})

    assert warnings(50_000, 50_000) == []
    assert "49999" in warnings(49_999, 60_000)[0] and "biased" in warnings(60_000, 49_999)[0]
    about["networks"]["features"] = {"name": "digits", "words": "a stand-in"}
    assert "a stand-in" in warnings(50_000, 50_000)[0]


def test_the_front_has_the_settings_that_no_other_beats_in_both():
    seconds_and_psnr = {1: (1.0, 20.0), 2: (2.0, 19.0), 4: (3.0, 24.0), 8: (4.0, 24.0)}
    results = [
        {
            "stamp": {
                "point": dataclasses.asdict(Point(k, 1.0, 5)),
                "machine": "m",
                "batch_size": 1,
            },
            "metrics": {"seconds_per_image": seconds, "psnr": psnr},
        }
        for k, (seconds, psnr) in seconds_and_psnr.items()
    ]
    page = "".join(sweep_report._costs(results))
    named = [f"front, tokens {k}, guidance scale 1, Euler steps 5, " for k in seconds_and_psnr]
    assert [name in page for name in named] == [True, False, True, False]
    assert page.count("settings, tokens") == 4
    assert page.count("<polyline") == 2  # The cost by tokens, and the front: dots have no line.


# Probing.


def test_a_probe_finds_the_class_from_the_register_that_holds_it_on():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    registers = rng.standard_normal((120, 4, 5)).astype(np.float32)
    registers[:, 2, 0] = 4 * labels
    split = (registers[:90], labels[:90]), (registers[90:], labels[90:])
    found = probe.probe(*split, [1, 2, 4])
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["accuracy"][4] > 0.95 and max(found["accuracy"][k] for k in (1, 2)) < 0.6


# The commands.


@pytest.fixture(scope="module")
def model(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tok.save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_evaluate_writes_stamped_results_and_a_report(model, tok, tmp_path, capsys):
    out = tmp_path / "out"
    command = ("evaluate", "--model", model, *DIGITS, "--limit", 20, "--out", out)
    settings = ("--num-tokens", "1,16", "--steps", "1,2", "--guidance", "1")
    code, told, noted = run(capsys, *command, *settings)
    assert code == 0 and "LPIPS is left out" in noted
    result = json.loads((out / sweep.POINTS / "k0016_steps2_guidance1.json").read_text())
    stamp = result["stamp"]
    assert stamp["model"]["fingerprint"] == tok.fingerprint
    assert stamp["versions"]["jax"] == jax.__version__
    assert stamp["point"] == dataclasses.asdict(Point(16, 1.0, 2))
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 8 * 3 and "Quality by Euler steps" in page
    code, told, noted = run(capsys, *command, *settings, "--seed", 1)
    assert code == 2 and "sampling.seed: 0 | 1" in noted
    first, second = (out / sweep.POINTS / f"k0016_steps{s}_guidance1.json" for s in (1, 2))
    code, told, _ = run(capsys, "compare", first, second)
    assert code == 0 and "point.steps: 1 | 2" in told and "psnr" in told
    assert "model" not in told.split("differently")[1]
    code, _, noted = run(capsys, "compare", first, out / sweep.SETTINGS)
    assert code == 2 and "no result of flextok evaluate" in noted


def test_a_probe_of_the_command_line_appears_in_the_report(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "STRENGTHS", (1.0,))
    command = ("evaluate", "--model", model, *DIGITS, "--out", tmp_path / "out")
    settings = ("--limit", 120, "--num-tokens", "1,16")
    code, told, _ = run(capsys, *command, *settings, "--task", "probe")
    found = json.loads((tmp_path / "out" / "probe.json").read_text())["metrics"]
    assert code == 0 and found["count"] == found["train_count"] == 120
    assert f"{found['accuracy']['16']:.1%}" in told
    assert run(capsys, *command, *settings, "--steps", 1, "--guidance", 1)[0] == 0
    assert "Linear probe" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr(probe, "registers", lambda *_: 1 / 0)  # Refused before any work.
    code, _, noted = run(capsys, *command, *settings, "--task", "probe", "--split", "all")
    assert code == 2 and "learns from the split train" in noted
    code, _, noted = run(capsys, *command, "--limit", 60, "--num-tokens", 1, "--task", "probe")
    assert code == 2 and "data.test.images: 120 | 60" in noted
    file = tmp_path / "out" / "probe.json"
    code, told, _ = run(capsys, "compare", file, file)
    assert code == 0 and "accuracy 16" in told
    (point,) = (tmp_path / "out" / sweep.POINTS).glob("*k0016*.json")
    assert run(capsys, "compare", point, file)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inception", "missing.pth"], "missing.pth does not exist"),
        (["--lpips-vgg", "vgg.pth"], "both files"),
        (["--export", "x.npz", "--num-tokens", "1,2"], "a sweep of 2"),
        (["--reference", "missing.npz"], "missing.npz"),
        (["--num-tokens", "17"], "allowed are 1 to 16"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    command = ("evaluate", "--model", model, *DIGITS, "--out", out)
    code, _, noted = run(capsys, *command, *arguments)
    assert code == 2 and message in noted and not out.exists()


def test_a_summary_of_one_image_has_what_one_image_gives(tok, tmp_path):
    run = sweep_of(tok, tmp_path / "out")
    images = Pictures(f"{digits_folder()}/test", 1)
    run = dataclasses.replace(
        run, subject=Reconstructions(tok, images, 16, 1), reference=Reference(images)
    )
    (result,) = run.run(POINTS[:1])
    assert "fid" not in result["metrics"] and result["metrics"]["psnr"] > 0
    assert "inception_score" not in result["metrics"]  # It needs an image for each split.


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
    command = ("evaluate", "--model", model, *DIGITS, "--limit", 12, "--out", out)
    networks = ("--inception", weights, "--lpips-vgg", vgg, "--lpips-heads", heads)
    settings = ("--num-tokens", 16, "--steps", 1, "--guidance", 1, "--batch-size", 6)
    code, told, noted = run(capsys, *command, *networks, *settings)
    assert code == 0 and "left out" not in noted
    (file,) = (out / sweep.POINTS).glob("*.json")
    result = json.loads(file.read_text())
    found, about = result["metrics"], result["stamp"]["networks"]
    assert found["fid"] > 0 and found["lpips"] > 0 and "accuracy" not in found
    assert about["features"]["name"] == "inception"
    assert about["features"]["file_sha256"] == files.sha256(weights) and about["perceptual"]
    assert about["features"]["file_sha256"] in noted
    assert len(statistics.read_gaussian(out / sweep.REFERENCE)[0].mean) == 2048
