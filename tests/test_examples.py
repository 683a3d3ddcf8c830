"""The digits and the photographs: fixed pixels, fixed splits, folders written once."""

import hashlib
import pathlib

import numpy as np
import pytest
from PIL import Image

import examples
from examples import digits, photos
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
