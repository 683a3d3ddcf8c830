"""The data of examples/: fixed pixels, fixed splits, folders written once."""

import hashlib
import pathlib

import numpy as np
import pytest
from PIL import Image

import examples
from examples import canvas, digits, paper, photos
from flextok_jax.data import decode
from flextok_jax.data.folder import FolderSource


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTOK_EXAMPLES", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_split_of_the_digits_is_fixed():
    hashes, counts = {}, {}
    for split in ("train", "test"):
        images, labels = digits.arrays(split)
        hashes[split] = hashlib.sha256(images.tobytes()).hexdigest()
        counts[split] = np.bincount(labels).tolist()
    assert hashes == {
        "train": "37d1ad956d5c0728bd81885f4f11940e60aedbede5b25fa5bb114e0e000f534e",
        "test": "67da8138ec1ceebb3bf8c194964515fcaf70d862c9b6dcfae4b557df961a09de",
    }
    assert counts["train"] == [151, 157, 142, 155, 143, 157, 151, 148, 151, 145]
    assert counts["test"] == [27, 25, 35, 28, 38, 25, 30, 31, 23, 35]


def test_the_digits_are_the_bilinear_resize_of_the_originals():
    from sklearn.datasets import load_digits

    small, images = load_digits().images, digits.arrays("train")[0]
    for index, row in enumerate(np.random.RandomState(0).permutation(1797)[:5]):
        large = Image.fromarray(small[row].astype(np.float32))
        large = np.asarray(large.resize((16, 16), Image.Resampling.BILINEAR))
        for channel in range(3):
            np.testing.assert_array_equal(images[index, ..., channel], np.rint(large / 16 * 255))


def test_the_folder_of_the_digits_holds_the_arrays(cache):
    folder = digits.folder()
    assert pathlib.Path(folder) == cache / "digits"
    for split, count in (("train", 1500), ("test", 297)):
        images, labels = digits.arrays(split)
        source = FolderSource(folder, split)
        assert len(source) == count and list(source.classes) == list("0123456789")
        for i in range(0, count, 50):
            example = source.read(i)
            index = int(pathlib.Path(example.key).stem)
            assert labels[index] == example.label
            np.testing.assert_array_equal(np.asarray(decode.upright(example.image)), images[index])


def test_a_folder_is_written_once_and_never_in_part(cache):
    image = np.zeros((2, 2, 3), np.uint8)

    def broken():
        yield "a/1.png", image
        raise RuntimeError

    with pytest.raises(RuntimeError):
        examples.image_folder("some", broken)
    assert not any(cache.iterdir())
    folder = examples.image_folder("some", lambda: [("a/1.png", image)])
    assert folder == examples.image_folder("some", broken)  # It is there: nothing is written.
    assert [path.name for path in cache.iterdir()] == ["some"]


def test_a_folder_that_appears_meanwhile_is_taken(cache):
    def slow():
        (cache / "some" / "a").mkdir(parents=True)
        yield "a/1.png", np.zeros((2, 2, 3), np.uint8)

    assert examples.image_folder("some", slow) == str(cache / "some")
    assert [path.name for path in cache.iterdir()] == ["some"]


def test_validation_photographs_are_apart_and_cut_into_tiles(cache):
    assert not set(photos.VALIDATION) & set(photos.TRAIN)
    train, test = (FolderSource(photos.folder(), split) for split in ("train", "test"))
    names = tuple(pathlib.Path(train.key(i)).stem for i in range(len(train)))
    assert names == photos.TRAIN
    tiles = photos.tiles()
    assert [f"test/{name}.png" for name in tiles] == [test.key(i) for i in range(len(test))]
    for i, tile in enumerate(tiles.values()):
        found = np.asarray(decode.upright(test.read(i).image))
        np.testing.assert_array_equal(found, tile)
    per_photo = {name: sum(n.startswith(name) for n in tiles) for name in photos.VALIDATION}
    assert per_photo == {"chelsea": 1 * 2, "china": 2 * 3, "coffee": 2 * 3}
    chelsea = photos.photographs()["chelsea"]
    np.testing.assert_array_equal(tiles["chelsea/000_064"], chelsea[:64, 64:128])


def test_the_photographs_are_rgb():
    for name, photo in photos.photographs().items():
        assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3, name
        assert min(photo.shape[:2]) >= 100 and photo.std() > 10, name
        assert np.ptp(photo.astype(int), axis=2).max() > 50, name  # Not grey.


def test_a_canvas_holds_digits_of_its_split_and_says_which(cache, monkeypatch):
    counts, quarters = np.zeros(5, int), 0
    known = {images.tobytes(): label for images, label in zip(*digits.arrays("test"))}
    for i in range(200):
        made = canvas.canvas("test", i)
        counts[made.count] += 1
        for place, digit in enumerate(made.digits):
            y, x = 16 * (place // 2), 16 * (place % 2)
            quarter = made.image[y : y + 16, x : x + 16]
            assert known[quarter.tobytes()] == digit if digit >= 0 else not quarter.any()
            quarters += quarter.any()
    # 50 each are expected, with a standard deviation of 6.1.
    assert counts[0] == 0 and counts[1:].min() > 50 - 4 * 6.1 and counts @ range(5) == quarters
    again, other = canvas.canvas("test", 7), canvas.canvas("test", 7, seed=1)
    np.testing.assert_array_equal(again.image, canvas.canvas("test", 7).image)
    assert (again.image != other.image).any()
    assert canvas.Canvas(made.image, np.array([-1, 8, -1, 1])).caption == (
        "an eight top right, a one bottom right"
    )
    monkeypatch.setattr(canvas, "SPLITS", {"train": 12, "test": 12})
    source = FolderSource(canvas.folder(), "test")
    assert len(source) == 12 and set(source.classes) <= set("1234")
    found = {pathlib.Path(source.read(i).key).stem: source.read(i) for i in range(12)}
    expected = canvas.canvas("test", 3)
    np.testing.assert_array_equal(decode.upright(found["0003"].image), expected.image)
    assert found["0003"].caption == expected.caption


def test_a_threshold_cleans_a_page_without_wear_and_no_worn_one():
    def best(pair):
        levels = np.unique(pair.worn)
        return max(paper.f_measure(pair.worn > level, pair.clean > 0) for level in levels)

    for i in range(10):
        new, worn = paper.pair("train", i, wear=0), paper.pair("train", i)
        assert best(new) > 0.99 and best(worn) < 0.96, i
        np.testing.assert_array_equal(new.clean, worn.clean)
        np.testing.assert_array_equal(worn.worn, paper.pair("train", i).worn)
    assert (paper.pair("train", 0, seed=1).worn != paper.pair("train", 0).worn).any()
    assert paper.pair("test", 0, size=64).worn.shape == (64, 64, 3)
    clean = np.array([True, False, False, True])
    assert paper.f_measure([False, False, True, True], clean) == 0.5
    with pytest.raises(ValueError, match="size=40"):
        paper.pair("train", 0, size=40)
