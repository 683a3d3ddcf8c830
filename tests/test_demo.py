"""The shipped model does what its description says."""

import json
import pathlib

import flextok_jax
from flextok_jax import FlexTok
from flextok_jax.evaluation.digits_judge import evaluate_digits

FOLDER = pathlib.Path(flextok_jax.__file__).parent / "demos" / "digits"


def test_shipped_digits_are_read_by_the_judge_and_get_closer_with_every_doubling():
    tok = FlexTok.from_pretrained("demo-digits")
    result = evaluate_digits(tok)
    recognition, psnr = result["recognition"], list(result["psnr"].values())
    assert result["count"] == 297 and result["real_recognition"] > 0.97
    assert recognition[16] >= 0.95 and recognition[1] >= 0.88
    assert psnr[-1] - psnr[0] >= 3
    assert all(b - a > -0.05 for a, b in zip(psnr, psnr[1:]))
    recorded = json.loads((FOLDER / "metrics.json").read_text())
    assert abs(recorded["psnr"]["16"] - psnr[-1]) < 0.1


def test_shipped_model_is_small_and_described():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 4e6
    description = (FOLDER / "MODEL.md").read_text()
    assert FlexTok.from_pretrained("demo-digits").fingerprint in description
