"""The rules that all sources share: splits, labels, side information, what is passed over."""

import io
import json
import tarfile
import unicodedata

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_sources import SMOOTH, encoded, everything, exif, folder_of, pack, shard, tar

import flextok_jax
from configs import ar, tokenizer, vae
from flextok_jax.commands.images import read_labels
from flextok_jax.data import decode, sources, transforms
from flextok_jax.data.reader import Unreadable, read, read_ahead
from flextok_jax.data.shards import null_text
from flextok_jax.data.source import check_labels, read_embedding
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training.batches import Validation


def opened(path, split="all"):
    return sources.make_source(sources.parse(str(path)), split)


def skipped(source):
    """{name: reason}, of all that a source passed over."""
    return {name: reason for reason, names in source.skipped.items() for name in names}


@pytest.fixture(params=["folder", "webdataset", "array_record"])
def three_images(request, tmp_path):
    """A data set with train/ (two images) and val/ (one), of every kind."""
    folder_of(tmp_path / "in", ["train/a/0.png", "train/b/1.png", "val/b/2.png"])
    if request.param == "folder":
        return tmp_path / "in"
    if request.param == "webdataset":
        tar(tmp_path / "tar" / "train-0.tar", shard(0, 2))
        tar(tmp_path / "tar" / "val-0.tar", shard(2, 1))
        return tmp_path / "tar"
    for split in ("train", "val"):
        assert pack(tmp_path / "in", tmp_path / "packed", "--split", split) == 0
    return tmp_path / "packed"


def test_validation_val_and_test_mean_the_same_in_every_source(three_images):
    counts = {s: len(opened(three_images, s)) for s in ("train", "validation", "val", "test")}
    assert counts == {"train": 2, "validation": 1, "val": 1, "test": 1}
    assert len(opened(three_images)) == 3
    with pytest.raises(ValueError, match="'dev'.*train, val, all"):
        opened(three_images, "dev")


def test_every_shipped_config_evaluates_on_every_source(three_images, caplog):
    """What it reads for that is opened before the first step, with its own words for the split."""
    caplog.set_level("INFO", logger="flextok_jax")
    for module in (ar, tokenizer, vae):
        for variant in module.VARIANTS:
            c = module.get_config(variant)
            found = sources.parse(str(three_images))
            c.data.update(source=found.source, path=found.path, name="", crop="center")
            c.data.image_size = 8
            c.evaluation.batch_size = 1
            images = Validation(c.data, c.evaluation)
            assert images.count == 1, variant
            (batch,) = images.batches(make_mesh(data=1, devices=jax.devices()[:1]), ", 5 lengths")
            assert batch["image"].shape == (1, 8, 8, 3) and batch["mask"].all()
    assert "evaluating: 1 images, 5 lengths" in caplog.text


# Side information never costs the picture.


def text_png():
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 2**21, zip=True)
    return encoded(SMOOTH, pnginfo=info)


def odd_exif(value, kind):
    """A JPEG whose orientation has another type than a short number."""
    data = encoded(SMOOTH, "JPEG", exif=exif(6))
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    swapped = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    assert entry in data or swapped in data
    if entry in data:
        return data.replace(entry, b"\x12\x01" + bytes([kind, 0]) + b"\x02\0\0\0" + value)
    return data.replace(swapped, b"\x01\x12\0" + bytes([kind]) + b"\0\0\0\x02" + value)


@pytest.mark.parametrize(
    "data, size",
    [
        (text_png(), (24, 18)),
        (encoded(SMOOTH, icc_profile=b"x" * 99).replace(b"Profile\0\0", b"Profile\0x"), (24, 18)),
        (odd_exif(b"6\0\0\0", 2), (18, 24)),  # Text: it is clear what is meant.
        (odd_exif(b"x\0\0\0", 2), (24, 18)),
        (odd_exif(b"\xff\xff\xff\xff", 12), (24, 18)),
    ],
)
def test_metadata_of_a_file_never_costs_its_picture(data, size):
    assert decode.upright(data).size == size


def test_captions_and_lists_that_cannot_be_used_are_counted_by_name(tmp_path):
    others = ["-2.png", "0.5.png", "True.png", "inf.png"]
    folder_of(tmp_path, ["a.png", "b.png", "c.png", "d.png", "e.png", *others])
    (tmp_path / "a.txt").write_bytes("Tür".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    rows = [
        {"file_name": "c.png", "caption": ["no text"], "label": 1},
        {"file_name": "d.png", "label": 10**20},
        {"file_name": "e.png", "label": {}},
        {"file_name": "c.png", "label": 5},
        *({"file_name": f"{x}.png", "label": x} for x in (-2, 0.5, True, float("inf"))),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    captions = {key: caption for key, _, caption in everything(source)}
    assert {key for key, caption in captions.items() if caption} == {"b.png"}
    assert dict(zip(captions, source.labels.tolist())) == dict.fromkeys(captions, -1) | {"c.png": 1}
    assert {name.rpartition("/")[2] for name in skipped(source)} == {
        *("a.txt", "d.txt"),
        *(f"metadata.jsonl, line {i}" for i in range(1, 9)),
    }
    assert not any(isinstance(found, Unreadable) for found in read_ahead(source, range(9), len))


def test_side_files_of_a_tar_that_cannot_be_used_are_counted_by_name(tmp_path):
    picture = encoded(SMOOTH)
    files = {f"{i}.png": picture for i in range(3)}
    files |= {"0.json": b'{"label": 1', "1.json": b'{"text": 5}', "2.txt": b"\xfc"}
    source = opened(tar(tmp_path / "a.tar", files))
    assert [(label, caption) for _, label, caption in everything(source)] == [(-1, None)] * 3
    assert {name.rpartition("/")[2] for name in skipped(source)} == {"0.json", "1.json", "2.txt"}


def test_the_reader_keeps_the_order_and_tells_files_from_faults_of_the_caller(tmp_path):
    folder_of(tmp_path, [f"{i:02}.png" for i in range(90)])
    (tmp_path / "40.png").write_bytes(b"broken")
    source = opened(tmp_path)
    found = list(read_ahead(source, reversed(range(90)), lambda picture: picture.key))
    keys = [f"{i:02}.png" for i in reversed(range(90))]
    assert [getattr(item, "key", item) for item in found] == keys
    assert [item.key for item in found if isinstance(item, Unreadable)] == ["40.png"]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(source, range(90), lambda picture: 1 // 0))


# Names that are clear are found, all others counted.


def test_lists_may_have_other_columns_separators_and_unicode_forms(tmp_path):
    folder_of(tmp_path, ["x/a.png", unicodedata.normalize("NFD", "é.png"), "c.png"])
    (tmp_path / unicodedata.normalize("NFC", "é.txt")).write_text("beside")
    (tmp_path / "metadata.csv").write_text(
        "file_name, Class ,lable\nx\\a.png, dog,1\né.png, cat,2\n", encoding="utf-8"
    )
    (tmp_path / "metadata.jsonl").write_text("not read")
    source = opened(tmp_path)
    found = {unicodedata.normalize("NFC", k): (n, c) for k, n, c in everything(source)}
    assert found == {"c.png": (-1, None), "x/a.png": (1, None), "é.png": (0, "beside")}
    list_, unread = tmp_path / "metadata.csv", tmp_path / "metadata.jsonl"
    assert source.classes == ["cat", "dog"]
    assert set(skipped(source)) == {f"{list_}: lable", str(unread)}


def test_a_class_is_the_same_in_both_unicode_forms(tmp_path):
    folder_of(tmp_path, [unicodedata.normalize(form, "é/x.png") for form in ("NFC", "NFD")])
    assert opened(tmp_path).classes == ["é"] and opened(tmp_path).labels.tolist() == [0, 0]
    assert read_labels(unicodedata.normalize("NFD", "é"), 1, ["é"]).tolist() == [0]


def test_a_list_without_names_of_files_says_what_it_has(tmp_path):
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text("name,label\na.png,1\n")
    with pytest.raises(ValueError, match="line 2: file_name is None.*name, label"):
        opened(tmp_path)


def test_class_folders_of_numbers_are_in_numeric_order(tmp_path):
    folder_of(tmp_path, [f"{i}/x.png" for i in range(12)])
    source = opened(tmp_path)
    assert source.classes == [str(i) for i in range(12)]
    assert {source.key(i): int(n) for i, n in enumerate(source.labels)}["10/x.png"] == 10


def test_files_that_are_no_images_are_counted_by_their_ending(tmp_path):
    folder_of(tmp_path, ["train/a.jfif", "train/b.ppm", "test/c.png", "d/e/f.png"])
    (tmp_path / "train" / "e.psd").write_bytes(b"")
    assert len(opened(tmp_path)) == 3 and opened(tmp_path).classes == []
    assert set(skipped(opened(tmp_path))) == {"train/e.psd", "d/e/f.png"}  # Outside the splits.
    (line,) = [line for line in opened(tmp_path).skipped.lines() if "e.psd" in line]
    assert line.startswith("1: ")


@pytest.mark.parametrize("name", ["a.avif", "a.jfif", "a.ppm"])
def test_less_common_formats_are_images(name, tmp_path):
    folder_of(tmp_path, [name])
    assert read(opened(tmp_path), 0).image.size == SMOOTH.size


def test_dotted_names_and_links_inside_of_a_tar_are_examples(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        {
            **{name: encoded(SMOOTH) for name in ("22.05.png", "x.png", "deep\\y.png")},
            **{"22.05.cls": b"3", "x.seg.png": b"", "n.heif.bak": b""},
        },
    )
    with tarfile.open(path, "a") as file:
        for name, kind, to in (
            ("deep/soft.png", tarfile.SYMTYPE, "../x.png"),
            ("deep/hard.png", tarfile.LNKTYPE, "./deep/soft.png"),
            ("deep/hard.cls", tarfile.LNKTYPE, "22.05.cls"),
            ("out.png", tarfile.SYMTYPE, "/x.png"),
            ("loop.png", tarfile.SYMTYPE, "loop.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            file.addfile(member)
    source = opened(path)
    found = {key.partition("/")[2]: label for key, label, _ in everything(source)}
    assert found == {"22.05": 3, "x": -1, "deep/y": -1, "deep/soft": -1, "deep/hard": 3}
    names = {name.partition("/")[2] for name in skipped(source)}
    assert names == {"x.seg.png", "n.heif.bak", "out.png", "loop.png"}
    assert [read(source, i).image.size for i in range(5)] == [SMOOTH.size] * 5


def test_compressed_tar_files_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="(?s)unpack.*a.tar.gz"):
        opened(tmp_path)
    tar(tmp_path / "b.tar", shard(0, 2))
    assert set(skipped(opened(tmp_path))) == {"a.tar.gz"}


# Conditions.


def test_splits_have_the_same_classes(tmp_path, caplog):
    folder_of(tmp_path, ["train/a/0.png", "train/b/1.png", "train/2.png", "val/b/3.png"])
    train, val = (opened(tmp_path, split) for split in ("train", "val"))
    assert check_labels(train) == 1 and check_labels(val, train) == 0
    folder_of(tmp_path, ["val/c/4.png"])
    train, val = (opened(tmp_path, split) for split in ("train", "val"))
    assert not caplog.records and check_labels(val, train) == 0
    assert caplog.records[0].getMessage().endswith("1, c")
    folder_of(tmp_path / "other", ["a/0.png", "z/1.png"])
    with pytest.raises(ValueError, match="'b', 'c', 'z'"):
        check_labels(opened(tmp_path / "other"), train)


def test_packed_splits_of_other_classes_are_not_read_as_one(tmp_path):
    for split, name in (("train", "a"), ("test", "b")):
        folder_of(tmp_path / split, [f"{name}/0.png", "c/1.png"])
        assert pack(tmp_path / split, tmp_path / name, "--split", "all") == 0
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / name / "all").rename(tmp_path / "out" / split)
    assert len(opened(tmp_path / "out", "train")) == 2
    with pytest.raises(ValueError, match="test.*train"):
        opened(tmp_path / "out")


# Embeddings.


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 4), "V2"), "V2"),  # As NumPy stores bfloat16.
        (np.zeros((2, 4), np.int32), "int32"),
        (np.zeros(4, np.float32), "1 axes"),
        (np.full((2, 4), np.nan), "NaN"),
        (np.full((2, 4), 7e4, np.float32), "65504"),
        (np.zeros((0, 4), np.float16), "empty"),
    ],
)
def test_an_embedding_that_is_not_usable_is_named(array, words):
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    with pytest.raises(ValueError, match=words):
        read_embedding(file)


def test_an_embedding_that_is_not_usable_does_not_cost_the_picture(tmp_path):
    folder_of(tmp_path, ["a.png", "b.png"])
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    np.save(tmp_path / "b.npy", np.full((2, 4), np.nan))
    source = opened(tmp_path)
    found = list(read_ahead(source, range(2), lambda picture: picture.embedding, text=True))
    assert found[0].shape == (2, 4) and found[1] is None and set(skipped(source)) == {"b.png"}
    np.save(tmp_path / "null_text.npy", np.full((1, 4), np.nan))
    with pytest.raises(ValueError, match="null_text.npy: .*NaN"):
        null_text(tmp_path)


def test_a_usable_embedding_is_float16_and_an_object_array_is_none(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    assert read_embedding(tmp_path / "a.npy").dtype == np.float16
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="no .npy file of numbers"):
        read_embedding(tmp_path / "b.npy")


# Public helpers, and memory.


def test_files_become_arrays_and_arrays_pictures(tmp_path):
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    SMOOTH.save(tmp_path / "smooth.png")
    images = flextok_jax.load_images([tmp_path / "clear.png", tmp_path / "smooth.png"], 8)
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
    assert (images[0] == 255).all()
    np.testing.assert_array_equal(images[1], transforms.center_crop(SMOOTH, 8))
    floats = images / np.float32(127.5) - 1
    for given in (images, floats, 1.04 * floats[:1]):
        assert np.asarray(flextok_jax.to_pil(given)[0]).min() == 255
    np.testing.assert_array_equal(flextok_jax.to_pil(floats)[1], images[1])
    with pytest.raises(ValueError, match="not finite"):
        flextok_jax.to_pil(np.nan * floats)
    with pytest.raises(ValueError, match="int64"):
        flextok_jax.to_pil(images.astype(np.int64))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png"):
        flextok_jax.load_images(tmp_path / "text.png", 8)


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (3000, 2)])
def test_the_memory_of_a_crop_depends_on_the_target_alone(size, monkeypatch):
    made, resize = [], Image.Image.resize

    def counted(image, size, *arguments, **options):
        made.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    image, draws = (
        Image.new("RGB", size, "red"),
        np.random.RandomState(0).random_sample(transforms.NUM_DRAWS),
    )
    for crop in ("center", "random"):
        cut = transforms.Transform(64, crop).fit(image, draws)
        assert cut.shape == (64, 64, 3) and (cut == (255, 0, 0)).all()
    assert max(made) <= 16 * 64**2
