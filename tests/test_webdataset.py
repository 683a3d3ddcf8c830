"""Tar shards: random access by an index, their splits, and what stands in the fields."""

import json
import os
import tarfile

import numpy as np
import pytest
from test_data_pipeline import pipeline
from test_sources import SMOOTH, encoded, everything, folder_of, shard, tar

from flextok_jax.data import sources, webdataset
from flextok_jax.data.webdataset import WebDatasetSource, read_index


def test_tar_shards_have_random_access_with_labels_and_captions(tmp_path):
    files = shard(0)
    files["deep/0009.PNG"] = encoded(SMOOTH)
    files["deep/0009.json"] = json.dumps({"label": 5, "caption": "aus JSON"}).encode()
    files["0010.json"] = b"{}"  # No image: no example.
    files["0011.jpg"] = b""
    tar(tmp_path / "a.tar", files)
    tar(tmp_path / "b.tar", shard(20))
    assert sources.parse(str(tmp_path)) == sources.Data("webdataset", str(tmp_path))
    source = sources.make_source(sources.parse(str(tmp_path)), "all")
    found = everything(source)
    assert found[1] == ("a.tar/0001", 1, "Bild 1 für alle")
    assert found[4:6] == [("a.tar/deep/0009", 5, "aus JSON"), ("a.tar/0011", -1, None)]
    assert found[6] == ("b.tar/0020", 2, "Bild 20 für alle") and len(found) == 10
    order = np.random.RandomState(0).permutation(4)
    assert all(source.read(i).image == files[f"{i:04}.jpg"] for i in order)
    p = pipeline(source="webdataset", path=str(tmp_path), split="all", crop="random", batch_size=10)
    assert p[0]["image"].shape == (10, 16, 16, 3) and list(p.unreadable) == ["a.tar/0011"]


def test_the_index_is_built_once_and_again_when_the_tar_has_changed(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", shard(0))
    scans, scan = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: scans.append(a) or scan(*a, **k))
    for _ in range(3):
        assert read_index(path)[0].tolist() == [b"0000", b"0001", b"0002", b"0003"]
    assert len(scans) == 1
    index = tmp_path / ".a.tar.index.npz"
    index.write_bytes(index.read_bytes()[:50])  # Damaged: it is only a cache.
    assert len(read_index(path)[0]) == 4 and len(scans) == 2
    tar(path, shard(8, 6))
    scans.clear()
    assert read_index(path)[0][0] == b"0008" and len(scans) == 1
    os.utime(path, ns=(0, 0))
    assert len(read_index(path)[0]) == 6 and len(scans) == 2


def test_a_read_only_folder_is_read_without_an_index_file(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", shard(0))

    def refuse(file):
        raise PermissionError(file)

    monkeypatch.setattr(webdataset.storage, "atomic", refuse)
    assert len(read_index(path).keys) == 4


@pytest.mark.parametrize("names", [("train/0.tar", "val/0.tar"), ("x-train-0.tar", "x-test-0.tar")])
def test_tar_splits_are_folders_or_words_of_the_names(names, tmp_path):
    tar(tmp_path / names[0], shard(0, 3))
    tar(tmp_path / names[1], shard(10, 2))
    counts = [len(WebDatasetSource(tmp_path, split)) for split in ("train", "test", "all")]
    assert counts == [3, 2, 5]


def test_what_is_no_tar_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="a.tar is not a whole tar file"):
        WebDatasetSource(tmp_path, "all")
    path = tar(tmp_path / "a.tar", shard(0))
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(ValueError, match="a.tar is not a whole tar file"):
        WebDatasetSource(tmp_path, "all")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FileNotFoundError, match="holds no .tar files"):
        WebDatasetSource(tmp_path, "all")


def test_labels_are_names_or_numbers_over_all_tar_files(tmp_path):
    picture = encoded(SMOOTH)
    about = json.dumps({"label": "cat"}).encode()
    tar(tmp_path / "train-0.tar", {"0.png": picture, "0.cls": b"dog\n", "0.json": about})
    tar(tmp_path / "test-0.tar", {"1.json": about} | {f"{i}.png": picture for i in (1, 2)})
    train, test = (WebDatasetSource(tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert (train.read(0).label, [test.read(i).label for i in range(2)]) == (1, [0, -1])
    tar(tmp_path / "train-1.tar", {"3.png": picture, "3.cls": b"3"})
    with pytest.raises(ValueError, match="train-1.tar/3 is the number 3, that of .* the name '"):
        WebDatasetSource(tmp_path, "train")
    for name in ("train-0.tar", "test-0.tar"):
        (tmp_path / name).unlink()
    tar(tmp_path / "a.tar", {"4.png": picture, "4.json": b'{"label": 2.0}'})
    source = WebDatasetSource(tmp_path, "all")
    assert source.classes == [] and [source.read(i).label for i in range(2)] == [2, 3]


@pytest.mark.parametrize("second", ["x/i.jpg", "x/i.PNG"])
def test_two_images_of_one_name_are_refused_and_other_endings_left_alone(second, tmp_path):
    picture = encoded(SMOOTH)
    path = tar(tmp_path / "a.tar", {"x/i.png": picture, "x/i.seg.png": b"", "i.png": picture})
    assert read_index(path).keys.tolist() == [b"x/i", b"i"]
    with tarfile.open(path, "a") as file:
        file.addfile(tarfile.TarInfo(second))
    with pytest.raises(ValueError, match=f"a.tar has more than one image of .*'x/i'.*{second}"):
        WebDatasetSource(tmp_path, "all")


def test_tar_files_beside_image_files_are_not_guessed(tmp_path):
    tar(tmp_path / "a.tar", shard(0))
    folder_of(tmp_path, ["train/class/1.png", ".hidden.png"])
    words = f"a.tar.*1.png.*webdataset:{tmp_path} or folder:{tmp_path}"
    with pytest.raises(ValueError, match=words):
        sources.parse(str(tmp_path))
    counts = [
        len(sources.make_source(sources.parse(f"{kind}:{tmp_path}"), "all"))
        for kind in ("webdataset", "folder")
    ]
    assert counts == [4, 1]
    (tmp_path / "train/class/1.png").unlink()
    assert sources.parse(str(tmp_path)).source == "webdataset"


@pytest.mark.parametrize("about", ['{"label": null}', "[1, 2]", "null", '{"label": [1, 2]}', "{"])
def test_what_gives_no_label_is_an_example_without_one(about, tmp_path):
    tar(tmp_path / "a.tar", {"0.png": encoded(SMOOTH), "0.json": about.encode()})
    assert everything(WebDatasetSource(tmp_path, "all")) == [("a.tar/0", -1, None)]
