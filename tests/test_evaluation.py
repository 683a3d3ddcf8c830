"""Metrics, pictures in and out, and the reports."""

import dataclasses
import functools
import html.parser
import math

import numpy as np
import pytest
from common import TINY, digits_folder, tiny_tokenizer
from PIL import Image

from flextok_jax.evaluation import metrics, pictures, reconstruction, report
from flextok_jax.evaluation.results import Paused, results_folder

DIGITS = dataclasses.replace(TINY, patch_size=4)  # 16 x 16 pixels


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer(DIGITS)


# Metrics.


def test_psnr_and_mae_follow_their_closed_form():
    originals = np.zeros((2, 4, 4, 3), np.float32)
    images = originals + np.array([0.1, 1.0], np.float32).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(metrics.psnr(images, originals), 10 * np.log10([400, 4]), rtol=1e-6)
    np.testing.assert_allclose(metrics.mae(images, originals), [0.1, 1.0], rtol=1e-6)
    assert np.isfinite(metrics.psnr(originals, originals)).all()


def test_code_usage_counts_ids_and_takes_the_exponential_of_their_entropy():
    usage = metrics.code_usage(np.array([[7, 0], [7, 1], [7, 2], [7, 2]]))
    assert usage["distinct"] == [1, 3]
    entropy = 2 * 0.25 * math.log(4) + 0.5 * math.log(2)
    assert usage["perplexity"] == pytest.approx([1, math.exp(entropy)])


# Numbers of tokens.


def test_counts_are_doublings_up_to_all_unless_they_are_given(tok):
    assert reconstruction.check_counts(tok, None) == [1, 2, 4, 8, 16]
    assert reconstruction.check_counts(tok, None, available=6) == [1, 2, 4, 6]
    assert reconstruction.check_counts(tok, [4, 1, 4]) == [1, 4]


# Pictures.


def test_pictures_are_upright_cropped_and_the_unreadable_ones_named(tmp_path):
    rng = np.random.RandomState(0)
    upright = Image.fromarray(rng.randint(0, 256, (40, 60, 3), np.uint8))
    rotated = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "Turn right to see it upright."
    upright.save(tmp_path / "a.png")
    rotated.save(tmp_path / "b.png", exif=exif)
    (tmp_path / "c.jpg").write_bytes(b"no image")
    (tmp_path / "sub").mkdir()
    upright.convert("L").save(tmp_path / "sub" / "d.png")
    (tmp_path / "sub" / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:400])
    found = pictures.Pictures(str(tmp_path))
    first, second = found.batches(size=16, batch_size=2)
    assert found.names == ["a.png", "b.png", "c.jpg", "sub/d.png", "sub/e.png"]
    assert first.names == ["a.png", "b.png"]
    assert second.names == ["sub/d.png"]
    np.testing.assert_array_equal(second.seeds, pictures.name_seeds(["sub/d.png"]))
    np.testing.assert_array_equal(first.images[0], first.images[1])
    assert first.images.shape == (2, 16, 16, 3) and first.images.dtype == np.uint8
    assert list(found.unreadable) == ["c.jpg", "sub/e.png"]
    assert "c.jpg: UnidentifiedImageError: cannot identify image file\n" in found.complaint()
    assert len(pictures.Pictures(str(tmp_path), limit=2)) == 2
    for name in ("a.png", "b.png", "sub/d.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="(?s)none of the 5 images.*c.jpg"):
        list(pictures.Pictures(str(tmp_path)).batches(16, 2))


def test_no_picture_overwrites_another():
    assert pictures.png_names(["a.JPG", "s/a.png", "b"]) == ["a.png", "s/a.png", "b.png"]
    clash = pictures.png_names(["a.jpg", "A.png", "a.jpg.png"])
    assert len({name.casefold() for name in clash}) == 3


def test_every_byte_survives_the_way_to_minus_one_to_one_and_back():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pictures.to_uint8(pictures.from_uint8(values)), values)
    np.testing.assert_array_equal(pictures.to_uint8(np.array([-3.0, 3.0])), [0, 255])


def test_a_grid_enlarges_small_pictures_by_a_whole_factor():
    rows = np.random.RandomState(0).randint(0, 256, (3, 2, 16, 16, 3), np.uint8)
    sheet = np.asarray(pictures.grid([list(row) for row in rows], ["original", "k = 1"]))
    enlarged = rows[2, 1].repeat(6, axis=0).repeat(6, axis=1)
    bottom, right = sheet.shape[0] - 8, sheet.shape[1] - 8
    np.testing.assert_array_equal(sheet[bottom - 96 : bottom, right - 96 : right], enlarged)
    large = pictures.grid([[np.zeros((200, 200, 3), np.uint8)]], ["original"])
    assert large.width == 200 + 16
    title = sheet[:30]
    assert (title < 128).any() and (title[:, :8] == 255).all()


def test_results_replace_those_of_before_and_a_failure_changes_nothing(tmp_path):
    out = tmp_path / "new" / "results"
    with pytest.raises(KeyboardInterrupt):
        with results_folder(out, {}) as results:
            (results.folder / "half").write_text("half")
            raise KeyboardInterrupt
    assert not out.exists()
    for text in ("first", "second"):
        with results_folder(out, {}) as results:
            (results.folder / "k0001").mkdir()
            (results.folder / "k0001" / text).write_text(text)
            results.add({text: {}})
        (out / "mine.txt").write_text("mine")
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) == [
        "k0001", "k0001/second", "mine.txt",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is a file"):
        with results_folder(out / "mine.txt", {}):
            pass


def test_an_interrupted_run_goes_on_and_another_does_not_take_its_results(tmp_path, capsys):
    out, settings = tmp_path / "out", {"seed": 0}
    with pytest.raises(Paused, match="1 are finished"):
        with results_folder(out, settings) as results:
            (results.folder / "a").write_text("a")
            results.add({"a": {"psnr": [1.5]}})
            raise KeyboardInterrupt
    (journal,) = out.glob(".partial-*/journal.jsonl")
    journal.write_text(journal.read_text() + '{"b": {"ps')  # Killed in the middle of a line.
    with results_folder(out, {"seed": 1}) as results:
        assert results.records == {} and "unfinished results" in capsys.readouterr().err
    with results_folder(out, settings) as results:
        assert results.records == {"a": {"psnr": [1.5]}}
        results.add({"b": {"psnr": [2.5]}})
    assert [p.name for p in out.iterdir()] == ["a"]


def test_an_interrupted_evaluation_equals_an_uninterrupted_one(tok, tmp_path):
    images, quick = pictures.Pictures(f"{digits_folder()}/test", 5), reconstruction.Sampling(1, 1.0)
    evaluate = functools.partial(reconstruction.evaluate, tok, images, [1, 4], quick, 2)
    whole = evaluate()

    def stop_at_the_second(batch, drawn):
        if batch.names[0] == images.names[2]:
            raise KeyboardInterrupt

    with pytest.raises(Paused):
        with results_folder(tmp_path, {}) as results:
            evaluate(stop_at_the_second, results)
    with results_folder(tmp_path, {}) as results:
        assert list(results.records) == images.names[:2]
        again = evaluate(results=results)
    assert again == whole


def test_what_is_left_may_be_unreadable_when_a_run_goes_on(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    found = pictures.Pictures(str(tmp_path))
    assert not list(found.batches(8, 2, skip={"a.png": {}})) and list(found.unreadable) == ["b.png"]


def test_a_fault_in_the_middle_keeps_what_is_finished_and_says_so(tmp_path, capsys):
    with pytest.raises(OSError, match="No space left"):
        with results_folder(tmp_path, {}) as results:
            results.add({"a": {}})
            raise OSError(28, "No space left on device")
    assert "1 are finished and kept" in capsys.readouterr().err
    with results_folder(tmp_path, {}) as results:
        assert list(results.records) == ["a"]


# Reports.


class Page(html.parser.HTMLParser):
    """Collects the text and the tags of a page, and fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_chart_draws_each_finite_point_at_its_place():
    points = [(1, 0.0), (2, math.nan), (4, 0.5), (16, 1.0)]
    svg = report.chart("c", "", {"a <b>": points}, "tokens", log2=True, percent=True)
    page = Page(svg)
    dots = [attrs for tag, attrs in page.tags if tag == "circle"]
    x = [float(dot["cx"]) for dot in dots]
    y = [float(dot["cy"]) for dot in dots]
    assert len(dots) == 3
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(0.5, abs=0.01)  # One doubling of two.
    assert (y[0] - y[1]) / (y[0] - y[2]) == pytest.approx(0.5, abs=0.01) and y[0] > y[2]
    assert "a <b>, 4: 50.0\xa0%" in page.text
    assert "Nothing was recorded." in report.chart("c", "", {"a": []}, "step")


@pytest.mark.parametrize("low, high", [(0.2, 1.53), (10.78, 14.1), (0, 0), (5, 5), (1, 16)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    for whole in (False, True):
        ticks = report._ticks(low, high, whole=whole)
        assert 2 <= len(ticks) <= 9 and ticks[0] <= low and high <= ticks[-1]
        assert not whole or all(float(tick).is_integer() for tick in ticks)
