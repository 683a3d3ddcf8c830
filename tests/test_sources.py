"""One schema from every source, and every image of the real world: it works or it is named."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data_pipeline import pipeline

from flextok_jax import cli
from flextok_jax.data import shards, sources
from flextok_jax.data.decode import upright
from flextok_jax.data.transforms import NUM_DRAWS, Transform

SIZE = (24, 18)
SMOOTH = np.stack(np.meshgrid(np.arange(0, 240, 10), np.arange(0, 180, 10)), -1)
SMOOTH = Image.fromarray(np.concatenate([SMOOTH, 255 - SMOOTH[..., :1]], -1).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def bomb():
    """A small PNG file of 20 000 x 20 000 pixels."""

    def chunk(kind, data):
        size, check = (struct.pack(">I", n) for n in (len(data), zlib.crc32(kind + data)))
        return size + kind + data + check

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


DEEP = Image.fromarray(np.asarray(SMOOTH.convert("L")).astype(np.uint16) * 257)
ODD = {  # What is in the file, and how far its pixels may be from SMOOTH's (None: another picture).
    "grey.png": (encoded(SMOOTH.convert("L")), None),
    "palette.gif": (encoded(SMOOTH.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"), 12),
    "palette_clear.png": (encoded(SMOOTH.convert("P"), transparency=0), None),
    "alpha.png": (encoded(SMOOTH.convert("RGBA")), 0),
    "grey_alpha.png": (encoded(SMOOTH.convert("LA")), None),
    "cmyk.jpg": (encoded(SMOOTH.convert("CMYK"), "JPEG", quality=100, subsampling=0), 12),
    "deep.png": (encoded(DEEP), None),
    "deep.tif": (encoded(DEEP, "TIFF"), None),
    "bits.png": (encoded(SMOOTH.convert("1")), None),
    "turned.jpg": (
        encoded(SMOOTH.rotate(90, expand=True), "JPEG", quality=100, subsampling=0, exif=exif(6)),
        12,
    ),
    "animated.gif": (
        encoded(SMOOTH, "GIF", save_all=True, append_images=[SMOOTH.rotate(180)]),
        12,
    ),
    "animated.webp": (
        encoded(SMOOTH, "WEBP", lossless=True, save_all=True, append_images=[SMOOTH.rotate(180)]),
        0,
    ),
    "progressive.jpg": (encoded(SMOOTH, "JPEG", quality=100, subsampling=0, progressive=True), 12),
}
WHOLE = encoded(SMOOTH, "JPEG")
BROKEN = {
    "truncated.jpg": (WHOLE[: len(WHOLE) * 3 // 4], "runcated"),
    "truncated.png": (encoded(SMOOTH)[:-30], "runcated"),
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"this is no image", "cannot identify image file"),
    "bomb.png": (bomb(), "DecompressionBombError"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC images need"),
    "float.tif": (encoded(SMOOTH.convert("F"), "TIFF"), "no agreed range"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_becomes_upright_rgb(name):
    data, tolerance = ODD[name]
    image = upright(data)
    assert (image.mode, image.size) == ("RGB", SIZE)
    if name.startswith(("grey", "deep")):
        expected = np.asarray(SMOOTH.convert("L").convert("RGB"))
        np.testing.assert_array_equal(np.asarray(image), expected)
    elif tolerance is not None:
        far = np.abs(np.asarray(image).astype(int) - np.asarray(SMOOTH)).max()
        assert far <= tolerance


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_with_its_reason_and_does_not_stop_training(name, tmp_path):
    data, words = BROKEN[name]
    for i in range(4):
        SMOOTH.rotate(90 * i).save(tmp_path / f"{i}.png")
    (tmp_path / name).write_bytes(data)
    where = dict(source="folder", path=str(tmp_path), split="all", crop="random")
    p = pipeline(batch_size=5, max_unreadable=0.0, **where)
    assert [p[step]["image"].shape for step in range(2)] == [(5, 16, 16, 3)] * 2
    assert list(p.unreadable) == [name] and words in p.unreadable[name]
    assert "0x" not in p.unreadable[name]  # No address in memory.


# Scaled decoding.


def photo(width, height):
    """A JPEG of one of the embedded photographs."""
    from skimage import data

    image = Image.fromarray(data.astronaut()).resize((width, height), Image.Resampling.LANCZOS)
    return encoded(image, "JPEG", quality=92)


def test_training_decodes_large_photographs_smaller_and_sees_the_same_picture():
    whole, transform = upright(data := photo(1800, 1400)), Transform(64, "random", (0.08, 1.0))
    small = upright(data, transform.least)
    assert small.size == (450, 350)
    for draws in np.random.RandomState(0).random_sample((30, NUM_DRAWS)):
        a, b = (transform.fit(image, draws).astype(float) for image in (whole, small))
        assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) > 25  # dB
    for other in (transform.without_randomness(), Transform(32, "window")):
        assert upright(data, other.least).size == whole.size
    turned = encoded(Image.open(io.BytesIO(data)), "JPEG", exif=exif(6))
    assert upright(turned, 200).size == (350, 450)


# Folders with lists.


def folder_of(path, names):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        SMOOTH.rotate(i).save(path / name)


def everything(source):
    return [
        (source.key(i), source.read(i).label, source.read(i).caption) for i in range(len(source))
    ]


def test_a_list_gives_labels_and_captions(tmp_path):
    folder_of(tmp_path, ["x/a.png", "x/b.png", "c.png"])
    (tmp_path / "x" / "b.txt").write_text("beside\n", encoding="utf-8")
    (tmp_path / "metadata.csv").write_text(
        'file_name,label,text\nx/a.png,dog,"ein ""Hünd"", klein"\nc.png,cat,\n', encoding="utf-8"
    )
    source = sources.make_source(sources.parse(str(tmp_path)), "all")
    assert everything(source) == [
        ("c.png", 0, None), ("x/a.png", 1, 'ein "Hünd", klein'), ("x/b.png", -1, "beside"),
    ]  # fmt: skip
    assert source.classes == ["cat", "dog"]


def test_a_list_of_each_part_may_have_numbers_and_what_it_misses_is_unreadable(tmp_path):
    folder_of(tmp_path, ["train/a.png", "train/b.png", "test/c.png"])
    for part, names in (("train", "ab"), ("test", "cd")):
        rows = [{"file_name": f"{n}.png", "label": ord(n) - 90, "caption": n} for n in names]
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / part / "metadata.jsonl").write_text(lines)
    data = sources.parse(f"folder:{tmp_path}")
    assert everything(sources.make_source(data, "train")) == [
        ("train/a.png", 7, "a"), ("train/b.png", 8, "b"),
    ]  # fmt: skip
    where = dict(source="folder", path=str(tmp_path), eval_split="test", crop="center", train=False)
    p = pipeline(batch_size=2, **where)
    (batch,) = p.eval_batches(2)
    assert batch["mask"].tolist() == [True, False] and batch["label"][0] == 9
    assert "FileNotFoundError" in p.unreadable["test/d.png"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_caption_may_hold_any_character_of_a_line_end(suffix, tmp_path):
    folder_of(tmp_path, ["a.png", "b.png"])
    caption = "one\u2028two\x85three\x0bfour\x0cfive"
    rows = [{"file_name": name, "caption": caption} for name in ("a.png", "b.png")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if suffix == "csv":
        lines = ["file_name,caption", *(",".join(row.values()) for row in rows)]
    (tmp_path / f"metadata.{suffix}").write_text("\n".join(lines), encoding="utf-8")
    source = sources.make_source(sources.parse(str(tmp_path)), "all")
    assert everything(source) == [("a.png", -1, caption), ("b.png", -1, caption)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_whole_numbers_that_became_floats_are_numbers(suffix, tmp_path):
    folder_of(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    rows = [(f"{name}.png", label) for name, label in zip("abcd", ("0.0", "12.0", "", "-1.0"))]
    lines = [f'{{"file_name": "{name}", "label": {label or "null"}}}' for name, label in rows]
    if suffix == "csv":
        lines = ["file_name,label", *map(",".join, rows)]
    (tmp_path / f"metadata.{suffix}").write_text("\n".join(lines))
    source = sources.make_source(sources.parse(str(tmp_path)), "all")
    assert (source.classes, source.labels.tolist()) == ([], [0, 12, -1, -1])


@pytest.mark.parametrize("number, name", [("3", "dog"), ("3.0", "0.5")])
def test_a_list_of_numbers_and_names_is_refused(number, name, tmp_path):
    folder_of(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.csv").write_text(f"file_name,label\na.png,{number}\nb.png,{name}\n")
    with pytest.raises(ValueError, match=f"a.png is the number .*b.png the name '{name}'.*every"):
        sources.make_source(sources.parse(str(tmp_path)), "all")


@pytest.mark.parametrize("line", ['{"label": 1}', '{"file_name": "../x.png"}', "[]", "x"])
def test_a_list_that_names_no_image_of_the_folder_is_refused(line, tmp_path):
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="metadata.jsonl"):
        sources.make_source(sources.parse(str(tmp_path)), "all")


# Tar shards; see also test_webdataset.py.


def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def shard(first, count=4):
    """{name in the tar: bytes} of a few examples."""
    files = {}
    for i in range(first, first + count):
        files[f"{i:04}.jpg"] = encoded(SMOOTH.rotate(i), "JPEG")
        files[f"{i:04}.cls"] = f"{i % 3}\n".encode()
        files[f"{i:04}.txt"] = f"Bild {i} für alle".encode()
    return files


# Packing, and the same examples from every source.


def pack(source, out, *more):
    return cli.main(["data", "pack", str(source), "--out", str(out), *map(str, more)])


def test_packed_images_are_the_same_examples(tmp_path, capsys):
    tar(tmp_path / "tars" / "a.tar", shard(0, 9))
    assert pack(tmp_path / "tars", tmp_path / "p", "--split", "all", "--shard-size", 4) == 0
    assert "9 images in" in capsys.readouterr().out
    packed, original = (
        sources.make_source(sources.parse(str(tmp_path / name)), "all") for name in ("p", "tars")
    )
    assert sources.parse(str(tmp_path / "p")).source == "array_record"
    assert everything(packed) == everything(original) and len(packed) == 9
    assert [packed.read(i) for i in range(9)] == [original.read(i) for i in range(9)]


def test_packing_leaves_out_what_breaks_in_any_way_and_stops_at_too_many(tmp_path, capsys):
    folder_of(tmp_path / "in", [f"{i}.png" for i in range(3)])
    (tmp_path / "in" / "1.png").write_bytes(b"no image")
    (tmp_path / "in" / "0.npy").write_bytes(b"no array")
    np.save(tmp_path / "in" / "2.npy", np.ones((2, 6)))
    np.save(tmp_path / "in" / "null_text.npy", np.zeros((1, 6)))
    assert pack(tmp_path / "in", tmp_path / "out", "--split", "all") == 0
    error = capsys.readouterr().err
    assert "1 of 3 images could not be read" in error and "numbers: 0.png" in error
    source = sources.make_source(sources.parse(str(tmp_path / "out")), "all")
    assert source.embedding(0) is None and source.embedding(1).shape == (2, 6)
    assert source.null_text.shape == (1, 6) and source.labels.tolist() == [-1, -1]
    assert source.without_text == 1
    np.save(tmp_path / "in" / "null_text.npy", np.ones((1, 6)))
    assert pack(tmp_path / "in", tmp_path / "out", "--split", "all") == 2
    assert "null_text.npy is of another text encoder" in capsys.readouterr().err
    (tmp_path / "in" / "2.png").write_bytes(b"no image")
    write = tmp_path / "in", tmp_path / "many", "--split", "all", "--shard-size", 2
    assert pack(*write) == 2
    error = capsys.readouterr().err
    assert "Of 3 images, more than 10.0%" in error and "1.png (" in error and "2.png (" in error
    left = {path.name for path in (tmp_path / "many" / "all").iterdir()}
    assert not any(name.startswith("records-00001") for name in left), left
    with pytest.raises(ValueError, match="holds 1 of 2 shards"):
        shards.ShardSource(tmp_path / "many", "all")


def test_work_goes_on_with_the_images_that_it_began_with_or_not_at_all(tmp_path, capsys):
    folder_of(tmp_path / "in", [f"{i}.png" for i in range(4)])
    write = tmp_path / "in", tmp_path / "out", "--split", "all", "--shard-size", 2
    assert pack(*write) == 0
    (
        tmp_path / "out" / "all" / "records-00001-of-00002.array_record"
    ).unlink()  # As if interrupted.
    (tmp_path / "in" / "3.png").rename(tmp_path / "in" / "1b.png")  # As many, others.
    assert pack(*write) == 2
    assert "keys_sha256: " in capsys.readouterr().err
    (tmp_path / "in" / "1b.png").rename(tmp_path / "in" / "3.png")
    assert pack(*write) == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("tfds:imagenet2012:5.1.0@/d", ("tfds", "/d", "imagenet2012:5.1.0")),
        ("webdataset:/d", ("webdataset", "/d", "")),
        ("folder:/digits", ("folder", "/digits", "")),
        ("/a:b", ("folder", "/a:b", "")),
    ],
)
def test_a_text_names_any_source(text, expected):
    data = sources.parse(text)
    assert (data.source, data.path, data.name) == expected
    if not text.startswith("/"):
        assert str(data) == text


def test_every_source_has_the_schema(tmp_path, tiny_tfds):
    folder_of(tmp_path / "folder", ["a/1.png", "b/2.png"])
    tar(tmp_path / "tars" / "a.tar", shard(0, 2))
    pack(tmp_path / "folder", tmp_path / "packed", "--split", "all")
    kinds = set()
    texts = [f"tfds:tiny_digits@{tiny_tfds}"]
    for text in texts + [str(tmp_path / name) for name in ("folder", "tars", "packed")]:
        data = sources.parse(text)
        kinds.add(data.source)
        source = sources.make_source(data, "all")
        item = source.read(1)
        assert item.key == source.key(1), text
        assert isinstance(item.image, bytes | np.ndarray) and type(item.label) is int
        assert item.caption is None or isinstance(item.caption, str)
        assert source.embedding(1) is None and list(source.classes) is not None
        names = [source.key(i) for i in range(len(source))]
        assert len(set(names)) == len(source) > 1
    assert kinds == set(sources.SOURCES) - set(sources.ENCODED)
