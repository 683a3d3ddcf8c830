"""The shipped model does what its description says."""

import json
import pathlib

import flextok_jax
from examples.digits.judge import evaluate_digits
from examples.digits.samples import evaluate_samples
from flextok_jax import FlexTok, ImageGenerator

DEMOS = pathlib.Path(flextok_jax.__file__).parent / "demos"


def test_shipped_digits_are_read_by_the_judge_and_get_closer_with_every_doubling():
    tok = FlexTok.from_pretrained("demo-digits")
    result = evaluate_digits(tok)
    recognition, psnr = result["recognition"], list(result["psnr"].values())
    assert result["count"] == 297 and result["real_recognition"] > 0.97
    assert recognition[16] >= 0.92 and recognition[1] >= 0.86  # One digit is 0.3 %.
    assert psnr[-1] - psnr[0] >= 3 and psnr[0] >= 18.5
    assert all(b - a > -0.05 for a, b in zip(psnr, psnr[1:]))
    recorded = json.loads((DEMOS / "digits" / "metrics.json").read_text())
    assert recorded["recognition"]["16"] >= 0.95 and recorded["recognition"]["1"] >= 0.9
    assert abs(recorded["psnr"]["16"] - psnr[-1]) < 0.1


def test_shipped_samples_are_read_as_the_class_asked_for_and_are_no_copies():
    tok = FlexTok.from_pretrained("demo-digits")
    gen = ImageGenerator.from_pretrained("demo-digits-ar", tokenizer=tok)
    result = evaluate_samples(gen, per_class=30, batch_size=100)
    assert result["recognition"] >= 0.90
    assert result["nearest"]["samples"] > 0.9 * result["nearest"]["held_out"]
    assert result["nearest"]["closer"] < 0.1
    recorded = json.loads((DEMOS / "digits_ar" / "metrics.json").read_text())
    assert abs(recorded["recognition"] - result["recognition"]) < 0.06


def test_shipped_models_are_small_and_described():
    assert sum(f.stat().st_size for f in (DEMOS / "digits").iterdir()) < 4e6
    assert sum(f.stat().st_size for f in DEMOS.rglob("*") if f.is_file()) < 8e6
    for folder, model in (
        ("digits", FlexTok.from_pretrained("demo-digits")),
        ("digits_ar", ImageGenerator.from_pretrained("demo-digits-ar")),
    ):
        assert model.fingerprint in (DEMOS / folder / "MODEL.md").read_text()
