"""From a step to its batch: the same for any process count, resumable, not stopped by an image."""

import itertools
import logging
import math
import sys
import types

import numpy as np
import pytest
from common import digits_folder
from PIL import Image

from examples.digits import arrays
from flextok_jax.data.pipeline import _stride, make_pipeline


def pipeline(train=True, seed=0, batch_size=8, index=0, count=1, **changes):
    values = dict(
        source="folder", path=digits_folder(), name="", split="train", eval_split="test",
        image_size=16, crop="none", crop_scale=(0.08, 1.0), flip=True, shift=2, rotate=10.0,
        zoom=0.1, color=0.0, quarter_turns=False, max_unreadable=0.5,
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


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_is_the_same_for_any_process_count(count):
    for step in (0, 200):  # The second one is in another epoch.
        parts = [pipeline(index=i, count=count)[step] for i in range(count)]
        assert_same(joined(parts), pipeline()[step])


def test_iterating_from_a_step_equals_asking_for_each_step():
    p = pipeline()
    for step, batch in zip(range(5, 15), p.iterate(5)):
        assert_same(batch, p[step])


def test_seed_and_step_change_the_batch_and_nothing_else_does():
    assert_same(pipeline()[7], pipeline()[7])
    for other in (pipeline()[8], pipeline(seed=1)[7]):
        assert (other["image"] != pipeline()[7]["image"]).any()


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    plain = dict(flip=False, shift=0, rotate=0.0, zoom=0.0, batch_size=40)
    p = pipeline(**plain)
    epochs = [joined([p[4 * e + i] for i in range(4)]) for e in range(2)]
    rows = [sorted(map(bytes, epoch["image"])) for epoch in epochs]
    assert rows[0] == rows[1] == sorted(map(bytes, arrays("train")[0][:160]))
    assert (epochs[0]["label"] != epochs[1]["label"]).any()


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    write_images(tmp_path, [(16, 16)] * 4)
    p = pipeline(source="folder", path=str(tmp_path), split="all", batch_size=9)
    assert p[0]["image"].shape == (9, 16, 16, 3)
    assert p.num_examples == 4


def test_images_of_any_size_are_cropped_and_evaluation_is_not_random(tmp_path):
    write_images(tmp_path, [(30, 20), (16, 16), (9, 50), (64, 64)])
    where = dict(source="folder", path=str(tmp_path), split="all", eval_split="all", crop="random")
    train, test = (pipeline(train=t, batch_size=4, **where) for t in (True, False))
    assert (train[0]["image"] != train[1]["image"]).any()
    (a,), (b,) = (list(p.eval_batches(4)) for p in (train, test))
    assert_same(a, b)
    order = [0, 2, 1, 3]  # class0 before class1.
    assert a["label"].tolist() == [i % 2 for i in order]


def test_a_corrupt_image_is_named_once_and_replaced_by_another(tmp_path, caplog):
    write_images(tmp_path, [(16, 16)] * 6, broken=(2,))
    where = dict(source="folder", path=str(tmp_path), split="all", flip=False, shift=0, rotate=0.0)
    p = pipeline(batch_size=6, zoom=0.0, **where)
    with caplog.at_level(logging.WARNING):
        batches = [p[0], p[1]]
    (name,) = p.unreadable
    assert name.endswith("class0/02.png") and "Error" in p.unreadable[name]
    assert sum("02.png" in record.getMessage() for record in caplog.records) == 1
    assert_same(pipeline(batch_size=6, zoom=0.0, **where)[0], batches[0])
    stand_in = np.asarray(Image.open(tmp_path / "class0" / "00.png"))
    for batch in batches:
        assert sum((image == stand_in).all() for image in batch["image"]) == 2


def test_an_unreadable_image_is_masked_in_evaluation(tmp_path):
    write_images(tmp_path, [(16, 16)] * 4, broken=(2,))
    p = pipeline(source="folder", path=str(tmp_path), eval_split="all", train=False)
    (batch,) = p.eval_batches(4)
    assert batch["mask"].tolist() == [True, False, True, True]  # class0/00, class0/02, class1/...


def test_a_folder_that_is_mostly_unreadable_stops_with_the_list(tmp_path):
    write_images(tmp_path, [(16, 16)] * 5, broken=(0, 2, 3))
    p = pipeline(source="folder", path=str(tmp_path), split="all")
    words = r"(?s)Of 5 images, more than 50.0%.*00.png.*02.png.*03.png \(OSErr"
    with pytest.raises(OSError, match=words):
        list(itertools.islice(p.iterate(0), 3))


def test_a_long_run_of_unreadable_images_stops_only_by_its_share(tmp_path, monkeypatch):
    write_images(tmp_path, [(16, 16)])
    image = (tmp_path / "class0" / "00.png").read_bytes()
    for i in range(1, 260):
        (tmp_path / "class0" / f"{i:03}.png").write_bytes(image if i >= 130 else b"broken")
    where = dict(source="folder", path=str(tmp_path), split="all", batch_size=260)
    p, reads = pipeline(max_unreadable=0.5, **where), []
    read = type(p.source).read
    monkeypatch.setattr(type(p.source), "read", lambda s, i: reads.append(i) or read(s, i))
    assert len(p[0]["image"]) == 260 and len(p.unreadable) == 129
    assert len(reads) < 3 * 260  # Nor is the whole run read for each of them.
    with pytest.raises(OSError, match="more than 40.0%"):
        pipeline(max_unreadable=0.4, **where)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12, 30, 97, 1000, 1281167])
def test_stand_ins_are_looked_for_far_away_and_everywhere(count):
    stride = _stride(count)
    assert math.gcd(stride, count) == 1  # Its multiples are all examples.
    assert count < 97 or 0.6 * count < stride < 0.65 * count


def test_a_source_of_one_unreadable_image_stops(tmp_path):
    write_images(tmp_path, [(16, 16)], broken=(0,))
    with pytest.raises(OSError, match="(?s)Of 1 images, not a single one.*00.png"):
        pipeline(source="folder", path=str(tmp_path), split="all")[0]


def test_an_image_of_another_size_without_a_crop_names_image_and_remedy(tmp_path):
    write_images(tmp_path, [(16, 16), (20, 10)])
    p = pipeline(source="folder", path=str(tmp_path), split="all")
    with pytest.raises(ValueError, match="01.png: the image is 20 x 10 pixels.*'center'"):
        p[0]


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
    assert not everything["image"][297:].any() and (everything["label"][297:] == -1).all()


def test_a_batch_size_that_does_not_divide_and_a_bad_seed_are_refused():
    with pytest.raises(ValueError, match="batch_size is 9; allowed: positive multiples of 2"):
        pipeline(batch_size=9, count=2)
    with pytest.raises(ValueError, match="batch_size is 3"):
        pipeline(train=False, count=2).eval_batches(3)
    with pytest.raises(ValueError, match="seed is -1"):
        pipeline(seed=-1)


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
    assert p.source.key(3) == "tiny_digits/train[3]"
    assert_same(next(iter(p.iterate(4))), p[4])
    assert "tensorflow" not in sys.modules


def test_tfds_says_what_is_missing_and_how_to_prepare_it(tiny_tfds):
    def read(**changes):
        where = {"source": "tfds", "path": str(tiny_tfds), "name": "tiny_digits"}
        return pipeline(**{**where, **changes})

    for name in ("imagenet2012", "tiny_digits:2.0.0"):
        with pytest.raises(FileNotFoundError, match="(?s)not prepared.*tfds build .*array_record"):
            read(name=name)
    with pytest.raises(ValueError, match="nope.*'train'"):
        read(split="nope")
    with pytest.raises(ValueError, match="needs data.name"):
        read(name="")


def test_tfds_in_a_format_without_random_access_is_refused_with_the_remedy(tiny_tfds, tmp_path):
    version = tmp_path / "tiny_digits" / "1.0.0"
    version.mkdir(parents=True)
    for file in (tiny_tfds / "tiny_digits" / "1.0.0").glob("*.json"):
        (version / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="(?s)stored as tfrecord.*--file_format=array_record"):
        pipeline(source="tfds", path=str(tmp_path), name="tiny_digits")
