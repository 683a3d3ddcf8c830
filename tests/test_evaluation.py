"""Metrics, pictures in and out, folders of results, and reports."""

import math

import numpy as np
import pytest
from common import tiny_tokenizer
from PIL import Image

from flextok_jax.commands.common import out_results, results_folder
from flextok_jax.evaluation import metrics, pictures, reconstruction, report
from flextok_jax.nn import flextok
from flextok_jax.nn.images import to_float, to_uint8

# Metrics.


def test_psnr_and_mae_follow_their_closed_form():
    originals = np.zeros((2, 4, 4, 3), np.float32)
    images = originals + np.array([0.1, 1.0], np.float32).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(metrics.psnr(images, originals), 10 * np.log10([400, 4]), rtol=1e-6)
    np.testing.assert_allclose(metrics.mae(images, originals), [0.1, 1.0], rtol=1e-6)
    assert np.isfinite(metrics.psnr(originals, originals)).all()


def test_code_usage_counts_ids_and_takes_the_exponential_of_their_entropy():
    found = metrics.codes(np.array([[7, 0], [7, 1], [7, 2], [7, 2]]), 8, [1, 2])
    usage = found["codes"]
    assert usage["distinct"] == [1, 3] and found["codebook_usage"] == {1: 1 / 8, 2: 4 / 8}
    entropy = 2 * 0.25 * math.log(4) + 0.5 * math.log(2)
    assert usage["perplexity"] == pytest.approx([1, math.exp(entropy)])


def test_the_evaluator_averages_the_images_that_count_as_files_would_have_them():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (4, 16, 16, 3), np.uint8)
    images = rng.uniform(-1.5, 1.5, originals.shape).astype(np.float32)
    mask = np.array([True, True, False, True])
    images[2] = np.nan  # Does not count.
    found = dict(metrics.means([("/8", images, originals, mask)]))
    expected = metrics.psnr(to_float(to_uint8(images[mask])), to_float(originals[mask])).mean()
    assert set(found) == {"psnr/8", "mae/8", "ssim/8"}
    assert found["psnr/8"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="1 of 4 .*finite"):
        list(metrics.means([("/8", images, originals, np.ones(4, bool))]))


def test_counts_are_doublings_up_to_all_unless_they_are_given():
    tok = tiny_tokenizer()
    assert reconstruction.check_counts(tok, None) == [1, 2, 4, 8, 16]
    assert reconstruction.check_counts(tok, None, available=6) == [1, 2, 4, 6]
    assert reconstruction.check_counts(tok, [4, 1, 4]) == [1, 4]
    with pytest.raises(ValueError, match="num_tokens=17.*1 to 16"):
        reconstruction.check_counts(tok, [1, 17])
    assert flextok.doublings((9, 18, 27)) == (9, 18, 27) and flextok.doublings((16,)) == (16,)
    assert flextok.doublings(range(8, 65, 8)) == (8, 16, 32, 64)


# Pictures.


def test_pictures_are_upright_cropped_and_the_unreadable_ones_named(tmp_path):
    rng = np.random.RandomState(0)
    upright = Image.fromarray(rng.randint(0, 256, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "Turn right to see it upright."
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    (tmp_path / "c.jpg").write_bytes(b"no image")
    (tmp_path / "sub").mkdir()
    upright.convert("L").save(tmp_path / "sub" / "d.png")
    found = pictures.Pictures(str(tmp_path))
    first, second = found.batches(size=16, batch_size=2)
    assert first.names == ["a.png", "b.png"] and second.names == ["sub/d.png"]
    np.testing.assert_array_equal(second.seeds, pictures.name_seeds(["sub/d.png"]))
    np.testing.assert_array_equal(first.images[0], first.images[1])
    assert first.images.shape == (2, 16, 16, 3) and first.images.dtype == np.uint8
    assert found.class_name(second.labels[0]) == "sub" and found.class_name(-1) == ""
    assert list(found.unreadable) == ["c.jpg"]
    for name in ("a.png", "b.png", "sub/d.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="c.jpg"):
        list(pictures.Pictures(str(tmp_path)).batches(16, 2))


def test_no_picture_overwrites_another():
    assert pictures.png_names(["a.JPG", "s/a.png", "b"]) == ["a.png", "s/a.png", "b.png"]
    clash = pictures.png_names(["a.jpg", "A.png", "a.jpg.png"])
    assert len({name.casefold() for name in clash}) == 3


def test_pictures_that_exist_are_kept_and_not_replaced(tmp_path):
    paths, made = [tmp_path / "a.png", tmp_path / "k" / "b.png"], []
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3))

    def make():
        made.append(1)
        return images

    for _ in range(2):
        found = pictures.saved_pictures(paths, [{"name": "ä"}, {}], make)
        np.testing.assert_array_equal(found, to_uint8(images))
    assert len(made) == 1
    Image.new("RGB", (4, 4)).save(paths[0])
    before = paths[0].read_bytes()
    paths[1].unlink()
    pictures.saved_pictures(paths, [{}, {}], make)
    assert paths[0].read_bytes() == before and paths[1].exists()


def test_a_grid_enlarges_small_pictures_and_names_its_rows():
    rows = np.random.RandomState(0).randint(0, 256, (3, 2, 16, 16, 3), np.uint8)
    sheet = np.asarray(pictures.grid([*rows[:2], rows[2][1:]], ["original", "k = 1"]))
    enlarged = rows[1, 1].repeat(6, axis=0).repeat(6, axis=1)
    bottom, right = sheet.shape[0] - 8 - 104, sheet.shape[1] - 8
    np.testing.assert_array_equal(sheet[bottom - 96 : bottom, right - 96 : right], enlarged)
    assert (sheet[-104:, right - 96 :] == 255).all()  # The row that is shorter.
    named = np.asarray(pictures.grid(rows, names=["cat", "dog", "a very long name indeed"]))
    left = named.shape[1] - 2 * 104
    assert all((named[8 + i * 104 :, :left][:96] < 128).any() for i in range(3))


# Folders of results.


def test_a_folder_that_is_not_recorded_as_ours_is_refused(tmp_path):
    photos, link = tmp_path / "photos", tmp_path / "link"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"a photograph")
    link.symlink_to(photos)
    for target in (photos, photos / "out", photos / "a.png", link):
        with pytest.raises(ValueError, match=target.name):
            out_results(target, str(photos))
    with pytest.raises(ValueError, match="a.png"):
        out_results(photos)


def test_a_folder_of_results_is_continued_with_equal_settings_only(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError), results_folder(out, {"seed": 0}):
        raise ZeroDivisionError
    assert not out.exists()
    with pytest.raises(KeyboardInterrupt), results_folder(out, {"seed": 0, "k": (1, 2)}):
        (out / "first").write_text("finished")
        raise KeyboardInterrupt
    with results_folder(out_results(out), {"seed": 0, "k": [1, 2]}):
        pass
    with pytest.raises(ValueError, match="seed: 0 .* 1 "), results_folder(out, {"seed": 1}):
        pass
    with results_folder(out, {"of": "a probe"}, "probe_settings.json"):
        pass
    assert (out / "first").exists()


# Reports.


def test_a_report_is_one_file_that_needs_nothing_else(tmp_path):
    points = [(1, 0.0), (2, math.nan), (4, 0.5), (16, 1.0)]
    options = {"log2": True, "percent": True, "level": ("chance", 0.1)}
    picture = np.zeros((2, 2, 3), np.uint8)
    pieces = [
        report.chart("a <b>", "unit", {"first": points, "second": []}, "tokens", **options),
        report.chart("empty", "", {"a": []}, "step"),
        report.picture_table("pictures", "", ["original"], [[picture]], ["cat"]),
        report.number_table(["k"], [["1"]]),
    ]
    report.write_report(tmp_path / "r.html", "T & t", [("", pieces[:2]), ("More", pieces[2:])])
    page = (tmp_path / "r.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 1
    assert page.count('src="data:image/png;base64,') == 1 and page.count("src=") == 2
    assert "a &lt;b&gt;" in page and "<th>cat</th>" in page and "http" not in page
