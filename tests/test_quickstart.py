"""The quickstart's report, made from tiny models."""

import dataclasses
import functools
import html.parser
import json

import numpy as np
import pytest
from common import GOLDEN, TINY, changed, tiny_generator
from PIL import Image

from examples import quickstart
from examples.digits import arrays
from examples.digits.evaluation import reconstruct, sample

QUICK = dict(steps=1, guidance_scale=1.0)

pytestmark = pytest.mark.slow  # The report decodes many images.


@pytest.fixture(scope="module")
def gen():
    return tiny_generator(changed(TINY, sites__patch_size=4, encoder__depth=1, decoder__depth=1))


@pytest.fixture(scope="module")
def runs(gen, tmp_path_factory):
    """The models, each with the records of a training run beside it."""
    folder = tmp_path_factory.mktemp("runs")
    gen.tokenizer.save_pretrained(folder / "tokenizer")
    gen.save_pretrained(folder / "ar")
    (folder / "vae").mkdir()
    for stage in quickstart.STAGES:
        records = [{"step": s, "loss": 1 / s, "step_time": 0.5} for s in (10, 20, 30)]
        records.append({"step": 30, "eval/psnr/1": 12.0})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / stage / "metrics.jsonl").write_text(text)
        config = {"total_steps": 30, "batch_size": 8, "seed": 5}
        (folder / stage / "config.json").write_text(json.dumps({"config": config}))
    return folder


@pytest.fixture(scope="module")
def model(runs):
    """The models, measured with one Euler step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "reconstruct", functools.partial(reconstruct, **QUICK))
        patch.setattr(quickstart, "sample", functools.partial(sample, **QUICK))
        return quickstart.evaluate("model", runs / "tokenizer", runs / "ar")


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


def test_the_report_is_whole_and_needs_nothing_else(runs, model, monkeypatch):
    load = quickstart.models.load_vae
    monkeypatch.setattr(quickstart.models, "load_vae", lambda _: load(GOLDEN / "vae"))
    evaluated = []

    def evaluate(name, *sources):
        evaluated.append(sources)
        return dataclasses.replace(model, name=name)

    monkeypatch.setattr(quickstart, "evaluate", evaluate)
    quickstart.main([str(runs)])
    assert evaluated == [("demo-digits", "demo-digits-ar"), (runs / "tokenizer", runs / "ar")]
    text = (runs / "report.html").read_text()
    page = Page(text)
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert all(src.startswith("data:image/") for src in pictures)
    # Emoji and their prefixes, and samples; of digits reconstructions and samples of two models,
    # samples beside training digits, a VAE.
    count = sum(src.startswith("data:image/png") for src in pictures)
    assert count == 9 * 7 + 9 * 10 + 2 * 10 * 6 + 2 * 10 * 10 + 2 * 10 + 2 * 10
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http:" not in page.words and "url(" not in text
    assert "--config.total_steps=30" in page.words
    assert "15 seconds" in page.words  # 30 steps of half a second.
    assert "45 seconds" in page.words  # Of three stages.
    with Image.open(runs / "digits.png") as image:
        assert image.width > 1000


def test_the_rows_of_the_report_are_the_first_digit_of_each_class(model):
    images, labels = arrays("test")
    rows = quickstart._rows(model)
    assert len(rows) == 10
    for digit, row in enumerate(rows):
        first = int(np.flatnonzero(labels == digit)[0])
        np.testing.assert_array_equal(row[0], images[first])
        np.testing.assert_array_equal(row[-1], model.reconstructions.images[16][first])
    assert model.samples.images.shape == (10, 10, 16, 16, 3)


def test_samples_are_grouped_by_their_class(gen):
    found = sample(gen, 3, **QUICK).images
    direct = gen.generate(labels=list(range(10)) * 10, key=0, **QUICK)
    expected = quickstart.to_uint8(np.asarray(direct))
    for c in range(10):
        np.testing.assert_array_equal(found[c], expected[[c, 10 + c, 20 + c]])


def test_a_report_without_a_training_run_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        quickstart.main([str(tmp_path)])
