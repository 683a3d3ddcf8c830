"""`flextok data check`: what it tells of images, and what it notices in shards."""

import numpy as np
import pytest
from PIL import Image
from test_sources import BROKEN, ODD, SMOOTH, folder_of, pack

from flextok_jax import cli


def check(source, tmp_path, *more):
    return cli.main(["data", "check", str(source), "--out", str(tmp_path / "sheet.png"), *more])


@pytest.fixture
def folder(tmp_path):
    """Sixteen plain images in two classes, odd ones, and broken ones."""
    path = tmp_path / "images"
    folder_of(path, [f"{'ab'[i % 2]}/{i}.png" for i in range(30)])
    for name, (data, _) in ODD.items():
        (path / "a" / name).write_bytes(data)
    for name in ("text.jpg", "bomb.png"):
        (path / name).write_bytes(BROKEN[name][0])
    (path / "a" / "0.txt").write_text("a smooth picture")
    return path


def test_it_tells_counts_kinds_labels_captions_and_names_what_cannot_be_read(
    folder, tmp_path, capsys
):
    assert check(folder, tmp_path) == 0
    out = capsys.readouterr().out
    for words in (
        "split all: 45 images",
        "opened    45 images, of which 2 unreadable",
        "36 PNG, 3 JPEG, 2 GIF",
        "1 CMYK",
        "24 to 24 wide, 18 to 18 high",
        "2 of 2 classes, 15 to 28 of these images each (a, b)",
        "1 of these images, such as 'a smooth picture'",
        "unreadable: text.jpg: UnidentifiedImageError: cannot identify image file",
        "unreadable: bomb.png: DecompressionBombError",
    ):
        assert words in out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    picture = np.asarray(SMOOTH.resize((24 * 6, 18 * 6), Image.Resampling.NEAREST))
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:, :, 0], (108, 144))
    rows, columns = np.nonzero((windows[:, :, ::54, 7::72] == picture[::54, 7::72, 0]).all((2, 3)))
    assert any((windows[y, x] == picture[..., 0]).all() for y, x in zip(rows, columns))


def test_it_fails_where_training_would(folder, tmp_path, capsys):
    for name, (data, _) in BROKEN.items():
        (folder / name).write_bytes(data)
    assert check(folder, tmp_path) == 2
    assert "10.0% (data.max_unreadable)" in capsys.readouterr().err


def test_a_sample_is_spread_over_the_whole(tmp_path, capsys):
    folder_of(tmp_path / "in", [f"{i}.png" for i in range(12)])
    Image.new("RGB", (4000, 1)).save(tmp_path / "in" / "0.png")
    assert check(tmp_path / "in", tmp_path, "--sample", "5") == 0
    out = capsys.readouterr().out
    assert "opened    5 images" in out and "7 were not opened: --all opens every one" in out


@pytest.mark.parametrize("damage", ["a byte", "the end", "all"])
def test_damaged_shards_are_found_and_made_again(damage, tmp_path, capsys):
    folder_of(tmp_path / "in", [f"{i}.png" for i in range(7)])
    write = tmp_path / "in", tmp_path / "out", "--split", "all", "--shard-size", 3
    assert pack(*write) == 0 and check(tmp_path / "out", tmp_path) == 0
    assert "7 records in 3 shards, each as its manifest says" in capsys.readouterr().out
    shard = tmp_path / "out" / "all" / "records-00001-of-00003.array_record"
    whole = shard.read_bytes()
    changed = bytearray(whole)
    changed[99] ^= 1
    if damage == "all":
        shard.unlink()
    else:
        shard.write_bytes(changed if damage == "a byte" else whole[:-5])
    assert check(tmp_path / "out", tmp_path) == 2
    out, err = capsys.readouterr()
    assert "1 of them damaged" in out and "records-00001-of-00003.array_record: it" in err
    shard.unlink(missing_ok=True)  # As the message says.
    assert pack(*write) == 0 and shard.read_bytes() == whole
    assert check(tmp_path / "out", tmp_path) == 0
