"""From a step to its batch: the same for any process count, resumable, not stopped by an image."""

import collections
import itertools
import logging
import sys
import types

import numpy as np
import pytest
from common import digits_folder
from PIL import Image

from examples.digits import arrays
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.data.source import check_labels


def pipeline(train=True, seed=0, batch_size=8, index=0, count=1, **changes):
    values = dict(
        source="folder", path=digits_folder(), name="", split="train", eval_split="test",
        image_size=16, crop="none", crop_scale=(0.08, 1.0), flip=True, shift=2, rotate=10.0,
        zoom=0.1, color=0.0, quarter_turns=False, max_unreadable=0.5, paired=False,
    )  # fmt: skip
    cfg = types.SimpleNamespace(**{**values, **changes})
    return make_pipeline(
        cfg, seed=seed, batch_size=batch_size, train=train, process_index=index, process_count=count
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def write_images(folder, sizes, broken=()):
    """Images 0.png, 1.png, ... with label folders; those in `broken` are cut short."""
    for i, (width, height) in enumerate(sizes):
        path = folder / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
    return dict(source="folder", path=str(folder), split="all", eval_split="all")


def test_the_halves_of_a_pair_are_cropped_and_turned_alike(tmp_path):
    how = dict(path=str(tmp_path), split="all", eval_split="all", paired=True, crop="random")
    how |= dict(quarter_turns=True, color=0.1)
    (tmp_path / "a").mkdir()
    for i in range(8):
        half = np.random.RandomState(i).randint(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(np.concatenate([half, half], axis=1)).save(tmp_path / "a" / f"{i}.png")
    batch = pipeline(**how)[3]
    assert batch["image"].shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(batch["image"], batch["target"])
    Image.fromarray(np.concatenate([half, 255 - half], axis=1)).save(tmp_path / "a" / "7.png")
    (batch,) = pipeline(train=False, **how | {"crop": "center", "image_size": 20}).eval_batches(8)
    np.testing.assert_array_equal(batch["image"][7], half[:, 2:22])
    np.testing.assert_array_equal(batch["target"][7], 255 - half[:, 2:22])
    Image.fromarray(half[:, :23]).save(tmp_path / "a" / "7.png")
    with pytest.raises(ValueError, match="23 pixels wide"):
        list(pipeline(train=False, **how).eval_batches(8))


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_is_the_same_for_any_process_count(count):
    for step in (0, 200):  # The second one is in another epoch.
        parts = [pipeline(index=i, count=count)[step] for i in range(count)]
        assert_same(joined(parts), pipeline()[step])


def test_a_batch_is_a_function_of_seed_and_step_alone():
    p = pipeline()
    for step, batch in zip(range(5, 12), p.iterate(5)):
        assert_same(batch, p[step])
    assert_same(pipeline()[7], p[7])
    for other in (p[8], pipeline(seed=1)[7]):
        assert (other["image"] != p[7]["image"]).any()


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    plain = dict(flip=False, shift=0, rotate=0.0, zoom=0.0, batch_size=40)
    p = pipeline(**plain)
    epochs = [joined([p[4 * e + i] for i in range(4)]) for e in range(2)]
    rows = [sorted(map(bytes, epoch["image"])) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(map(bytes, arrays("train")[0][:160]))
    assert (epochs[0]["label"] != epochs[1]["label"]).any()


def test_images_of_any_size_are_cropped_and_evaluation_is_not_random(tmp_path):
    where = write_images(tmp_path, [(30, 20), (16, 16), (9, 50), (64, 64)])
    train, test = (pipeline(train=t, batch_size=9, crop="random", **where) for t in (True, False))
    assert train[0]["image"].shape == (9, 16, 16, 3)  # More than there are.
    assert (train[0]["image"] != train[1]["image"]).any()
    (a,), (b,) = (list(p.eval_batches(4)) for p in (train, test))
    assert_same(a, b)
    assert a["label"].tolist() == [0, 0, 1, 1] and train.num_examples == 4


def test_an_unreadable_image_is_named_once_replaced_and_masked(tmp_path, caplog):
    where = write_images(tmp_path, [(16, 16)] * 6, broken=(2,))
    plain = dict(batch_size=6, flip=False, shift=0, rotate=0.0, zoom=0.0)
    p = pipeline(**plain, **where)
    with caplog.at_level(logging.WARNING):
        batches = [p[0], p[1]]
    assert list(p.unreadable) == ["class0/02.png"] and "Error" in p.unreadable["class0/02.png"]
    assert sum("02.png" in record.getMessage() for record in caplog.records) == 1
    assert_same(pipeline(**plain, **where)[0], batches[0])
    for batch in batches:
        counts = collections.Counter(map(bytes, batch["image"]))
        assert sorted(counts.values()) == [1, 1, 1, 1, 2]
    (batch,) = p.eval_batches(6)
    assert batch["mask"].tolist() == [True, False, True, True, True, True]


def test_more_unreadable_images_than_their_share_stop_with_the_list(tmp_path):
    where = write_images(tmp_path, [(16, 16)] * 60, broken=range(0, 60, 2))
    p = pipeline(batch_size=60, **where)
    assert len(p[0]["image"]) == 60 and len(p.unreadable) == 30
    with pytest.raises(OSError, match=r"(?s)Of 60 images, more than 40.0%.*\.png \("):
        list(itertools.islice(pipeline(max_unreadable=0.4, **where).iterate(0), 8))


def test_a_source_of_one_unreadable_image_stops(tmp_path):
    where = write_images(tmp_path, [(16, 16)], broken=(0,))
    with pytest.raises(OSError, match="(?s)Of 1 images.*00.png"):
        pipeline(**where)[0]


def test_an_image_of_another_size_without_a_crop_names_image_and_remedy(tmp_path):
    where = write_images(tmp_path, [(16, 16), (20, 10)])
    with pytest.raises(ValueError, match="01.png.*20 x 10.*'center'"):
        pipeline(**where)[0]


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_sees_every_example_once_and_masks_the_padding(count):
    parts = [pipeline(train=False, index=i, count=count) for i in range(count)]
    batches = [joined(local) for local in zip(*(p.eval_batches(128) for p in parts), strict=True)]
    assert [int(batch["mask"].sum()) for batch in batches] == [128, 128, 41]
    everything = joined(batches)
    assert everything["mask"].dtype == bool and everything["mask"][:297].all()
    images, labels = arrays("test")
    np.testing.assert_array_equal(everything["image"][:297], images)
    np.testing.assert_array_equal(everything["label"][:297], labels)


def test_a_batch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size is 9.* 2 "):
        pipeline(batch_size=9, count=2)
    with pytest.raises(ValueError, match="batch_size is 3"):
        pipeline(train=False, count=2).eval_batches(3)


# TensorFlow Datasets.


def test_a_real_tfds_data_set_is_read_without_tensorflow(tiny_tfds):
    where = dict(source="tfds", path=str(tiny_tfds), name="tiny_digits", train=False)
    p = pipeline(eval_split="train", **where)
    (batch,) = p.eval_batches(30)
    images, labels = arrays("train")
    written = sorted(zip(map(bytes, images[:30]), labels[:30]))
    read = sorted(zip(map(bytes, batch["image"]), batch["label"]))
    assert read == written and batch["mask"].all() and not p.unreadable
    assert pipeline(eval_split="train[:50%]", **where).num_examples == 15
    assert pipeline(eval_split="val", **where).num_examples == 10
    assert p.source.key(3) == "tiny_digits/train[3]"
    unlabelled = pipeline(eval_split="test", **where)
    assert check_labels(p.source) == 0 and check_labels(unlabelled.source, p.source) == 10
    assert set(unlabelled[0]["label"]) == {-1}
    assert_same(next(iter(p.iterate(4))), p[4])
    assert "tensorflow" not in sys.modules


def test_tfds_says_what_is_missing_and_how_to_prepare_it(tiny_tfds, tmp_path):
    version = tmp_path / "tiny_digits" / "1.0.0"
    version.mkdir(parents=True)
    for file in (tiny_tfds / "tiny_digits" / "1.0.0").glob("*.json"):
        (version / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for path, changes, words in (
        (tiny_tfds, dict(name="imagenet2012"), "tfds build .*array_record"),
        (tiny_tfds, dict(name="tiny_digits:2.0.0"), "tfds build .*array_record"),
        (tiny_tfds, dict(split="nope"), "nope.*'train'"),
        (tiny_tfds, dict(name=""), "data.name"),
        (tmp_path, {}, "tfrecord.*--file_format=array_record"),
    ):
        cfg = {"source": "tfds", "path": str(path), "name": "tiny_digits"} | changes
        with pytest.raises((FileNotFoundError, ValueError), match=f"(?s){words}"):
            pipeline(**cfg)
