"""The quickstart's report, made from tiny models, and the judgement of generated digits."""

import dataclasses
import functools
import html.parser
import json

import numpy as np
import pytest
from common import TINY, tiny_generator
from PIL import Image

from examples import quickstart, quickstart_parts
from examples.digits import arrays
from examples.digits.judge import evaluate_digits
from examples.digits.samples import evaluate_samples, nearest, nearest_training
from flextok_jax.evaluation.generation import TokenSampling
from flextok_jax.evaluation.pictures import from_uint8
from flextok_jax.evaluation.reconstruction import Sampler

QUICK = Sampler(steps=1, guidance_scale=1.0)


@pytest.fixture(scope="module")
def gen():
    return tiny_generator(dataclasses.replace(TINY, patch_size=4))  # 16 x 16 pixels


@pytest.fixture(scope="module")
def runs(gen, tmp_path_factory):
    """The models, each with the records of a training run beside it."""
    folder = tmp_path_factory.mktemp("runs")
    gen.tokenizer.save_pretrained(folder / "tokenizer")
    gen.save_pretrained(folder / "ar")
    (folder / "vae").mkdir()
    for stage in ("vae", "tokenizer", "ar"):
        records = [{"step": s, "loss": 1 / s, "step_time": 0.5} for s in (10, 20, 30)]
        records.append({"step": 30, "eval/psnr/1": 12.0})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / stage / "metrics.jsonl").write_text(text)
        config = {"total_steps": 30, "batch_size": 8, "seed": 5}
        (folder / stage / "config.json").write_text(json.dumps({"config": config}))
    return folder


@pytest.fixture
def quick(monkeypatch):
    """One Euler step and few digits in place of all."""
    judged = functools.partial(evaluate_digits, steps=1)
    monkeypatch.setattr(quickstart_parts, "evaluate_digits", judged)
    samples = functools.partial(evaluate_samples, sampler=QUICK)
    monkeypatch.setattr(quickstart_parts, "evaluate_samples", samples)


class Page(html.parser.HTMLParser):
    """The tags of a page and its words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data + " "


def test_the_report_is_whole_and_needs_nothing_else(runs, quick, tmp_path):
    out, picture = tmp_path / "report.html", tmp_path / "picture.png"
    arguments = ["--shipped", str(runs / "tokenizer"), "--shipped-ar", str(runs / "ar")]
    arguments += ["--runs", str(runs), "--out", str(out), "--picture", str(picture)]
    assert quickstart.main(arguments) == 0
    text = out.read_text()
    page = Page(text)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    pictures = [src for src in sources if src.startswith("data:image/png;")]
    assert len(pictures) == 2 * 10 * 6 + 2 * 10 * 10 + 2 * 10
    assert all(src.startswith("data:image/png;base64,") for src in pictures)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in text and "url(" not in text
    assert "--config.total_steps=30" in page.words and "seed 5" in page.words
    assert "15 seconds" in page.words  # 30 steps of half a second.
    assert "45 seconds" in page.words  # Of three stages.
    assert sum(src.startswith("data:image/svg+xml;base64,") for src in sources) == 6
    with Image.open(picture) as image:
        assert image.text["num_tokens"] == "1,2,4,8,16" and image.width > 16 * 64


def test_the_rows_of_the_report_are_the_first_digit_of_each_class(runs, quick):
    rows = quickstart_parts.judged("model", runs / "tokenizer").rows
    images, labels = arrays("test")
    assert len(rows) == 10
    for digit, row in enumerate(rows):
        first = int(np.flatnonzero(labels == digit)[0])
        np.testing.assert_array_equal(row[0], images[first])


def test_a_report_without_a_training_run_says_what_is_missing(tmp_path, capsys):
    arguments = ["--shipped", "demo-digits", "--shipped-ar", "demo-digits-ar"]
    arguments += ["--runs", str(tmp_path), "--out", "unused.html"]
    assert quickstart.main(arguments) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err


def test_samples_depend_on_their_place_and_not_on_the_batch(gen):
    seen = {}
    for size in (20, 7):
        seen[size] = []
        result = evaluate_samples(
            gen, 2, 4, TokenSampling(guidance=1.0), QUICK, size,
            visit=lambda labels, images: seen[size].append((labels, images)),
        )  # fmt: skip
    labels, images = (np.concatenate(part) for part in zip(*seen[7]))
    assert labels.tolist() == [*range(10), *range(10)]
    np.testing.assert_allclose(images, np.concatenate([i for _, i in seen[20]]), atol=1e-5)
    assert result["count"] == 20 and result["num_tokens"] == 4
    assert result["recognition"] == pytest.approx(np.mean(result["recognition_by_class"]))
    json.dumps(result)


def test_copies_of_training_digits_are_told_from_new_ones():
    train, test = (from_uint8(arrays(split)[0]) for split in ("train", "test"))
    index, distance = nearest_training(train[:50])
    assert index.tolist() == list(range(50)) and distance.max() == 0
    index, distance = nearest_training(test[:5])
    all_distances = np.sqrt(((test[:5, None] - train[None]) ** 2).mean(axis=(2, 3, 4)))
    np.testing.assert_array_equal(index, all_distances.argmin(1))
    np.testing.assert_allclose(distance, all_distances.min(1), rtol=1e-5)
    assert nearest(train[:50])["closer"] == 1 and nearest(test)["closer"] == pytest.approx(
        15 / 297, abs=3 / 297
    )
