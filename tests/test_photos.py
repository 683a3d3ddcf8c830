"""The photographs: whole ones are held out, and test tiles are fixed."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from flextok_jax.data.photos import HELD_OUT, TRAIN, photos
from flextok_jax.data.pipeline import make_pipeline


def test_the_held_out_photographs_are_named_and_apart():
    assert HELD_OUT == ("chelsea", "china", "coffee")
    assert not set(HELD_OUT) & set(TRAIN) and len(set(TRAIN)) == 8
    # The two views of the motorcycle are one scene.
    assert {"motorcycle_left", "motorcycle_right"} <= set(TRAIN)
    train, test = photos("train", 64), photos("test", 64)
    assert train.names == TRAIN
    assert {name.split("[")[0] for name in test.names} == set(HELD_OUT)
    assert not set(train.labels) & set(test.labels)
    assert len(set(photos("all", 64).labels)) == 11


def test_they_are_real_rgb_photographs():
    for index, photo in enumerate(photos("train", 64).images):
        assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3, index
        assert min(photo.shape[:2]) >= 142 and photo.std() > 10, index
        assert np.ptp(photo.astype(int), axis=2).max() > 50, index  # Not grey.


def test_test_tiles_cover_the_held_out_photographs_in_order():
    tiles = photos("test", 64)
    per_photo = {name: sum(n.startswith(name) for n in tiles.names) for name in HELD_OUT}
    assert per_photo == {"chelsea": 1 * 2, "china": 2 * 3, "coffee": 2 * 3}
    assert tiles.name(1) == "photos/chelsea[0:64, 64:128]"
    whole = photos("test", 100)
    np.testing.assert_array_equal(tiles.images[1][:, :36], whole.images[0][:64, 64:100])


@pytest.mark.parametrize("size, split", [(101, "test"), (64, "valid")])
def test_what_is_not_there_is_refused(size, split):
    with pytest.raises(ValueError, match="chelsea.*150 x 100|'valid'.*train, test, all"):
        photos(split, size)


def test_batches_are_random_crops_to_train_and_tiles_to_test():
    cfg = ConfigDict(
        dict(
            source="photos", path="", name="", split="train", eval_split="test", image_size=64,
            crop="window", crop_scale=(0.06, 0.6), flip=True, quarter_turns=True,
            shift=0, rotate=0.0, zoom=0.0, color=0.0, max_unreadable=0.1,
        )
    )  # fmt: skip
    train = make_pipeline(cfg, seed=0, batch_size=16, train=True)
    batch = train[3]
    assert batch["image"].shape == (16, 64, 64, 3)
    np.testing.assert_array_equal(np.bincount(batch["label"]), [2] * 8)  # Two whole epochs.
    twins = [np.flatnonzero(batch["label"] == i) for i in range(8)]
    assert all((batch["image"][a] != batch["image"][b]).any() for a, b in twins)
    np.testing.assert_array_equal(train[3]["image"], batch["image"])
    tiles = photos("test", 64)
    test = next(make_pipeline(cfg, seed=0, batch_size=8, train=False).eval_batches(8))
    np.testing.assert_array_equal(test["image"], np.stack(tiles.images[:8]))
