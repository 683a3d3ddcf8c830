"""The image folder of emoji, from a small package of the same layout."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from examples.emoji import make_data
from flextok_jax.data import decode
from flextok_jax.data.folder import FolderSource

TONES = ("1F3FB", "1F3FF", "1F3FB-1F3FF")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """40 emoji in two groups, each in four colours; one without a picture, and one swatch."""
    folder = tmp_path_factory.mktemp("npm") / "package"
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    emoji = []

    def one(code, **more):
        name = f"{code.lower()}.png"
        pixels = np.zeros((64, 64, 4), np.uint8)  # Transparent, but for a red square.
        pixels[16:48, 16:48] = 255, 0, 0, 255
        Image.fromarray(pixels).save(pictures / name)
        return {"image": name, "has_img_google": True} | more

    for i in range(40):
        code = f"1F{i:03X}"
        tones = {tone: one(f"{code}-{tone}") for tone in TONES}
        group = ("People & Body", "Flags")[i % 2]
        about = {"unified": code, "name": f"EMOJI, {i}", "category": group}
        emoji.append(one(code, **about, skin_variations=tones))
    about = {"unified": "2A", "name": "STAR", "category": "Flags"}
    emoji.append(one("2a", **about, has_img_google=False))
    emoji.append(one("1F3FB", unified="1F3FB", name="SWATCH", category=make_data.NO_GROUP))
    (folder / "emoji.json").write_text(json.dumps(emoji))
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_tones_lie_beside_their_base_with_group_and_name(package, packed, tmp_path):
    given = package
    if packed:
        given = tmp_path / "emoji.tgz"
        with tarfile.open(given, "w:gz") as tar:
            tar.add(package, "package")
    assert make_data.make([given], tmp_path / "emoji") == 160
    bases = {}
    for split in ("train", "validation"):
        source = FolderSource(tmp_path / "emoji", split)
        assert list(source.classes) == ["Flags", "People & Body"]
        examples = [source.read(i) for i in range(len(source))]
        bases[split] = {example.key.split("/")[1][:5] for example in examples}
        assert len(examples) == 4 * len(bases[split])
        for example in examples:
            code = example.key.split("/")[1].removesuffix(".png")
            number = int(code[2:5], 16)
            assert source.classes[example.label] == ("People & Body", "Flags")[number % 2]
            words = {"1f3fb": "light", "1f3ff": "dark", "1f3fb-1f3ff": "light and dark"}
            tone = words.get(code[6:])
            assert example.caption == f"emoji, {number}" + f", {tone} skin tone" * bool(tone)
        pixels = np.asarray(decode.upright(examples[0].image))
        assert pixels[0, 0].tolist() == [255] * 3 and pixels[32, 32].tolist() == [255, 0, 0]
    assert not bases["train"] & bases["validation"]
    assert len(bases["train"]) + len(bases["validation"]) == 40
    with pytest.raises(FileExistsError, match="is there already"):
        make_data.make([given], tmp_path / "emoji")


def test_another_package_adds_to_the_training_side(package, tmp_path):
    other = shutil.copytree(package, tmp_path / "other")
    (other / "img" / "google").rename(other / "img" / "twitter")
    emoji = (other / "emoji.json").read_text().replace("has_img_google", "has_img_twitter")
    (other / "emoji.json").write_text(emoji)
    made = tmp_path / "emoji"
    number = make_data.make([package, other], made)
    train, validation = (sorted(p.name for p in (made / s).iterdir()) for s in make_data.SPLITS)
    assert len(train) + len(validation) == number and len(train) == 2 * (160 - len(validation))
    assert [name for name in validation if "twitter" in name] == []
    own = [name for name in train if "twitter" not in name]
    assert sorted([*own, *(f"{name[:-4]}_twitter.png" for name in own)]) == train
    source = FolderSource(made, "train")
    about = {e.key: (e.label, e.caption) for e in map(source.read, range(len(source)))}
    assert all(about[f"train/{n}"] == about[f"train/{n[:-4]}_twitter.png"] for n in own)
    shutil.rmtree(other / "img")
    with pytest.raises(ValueError, match="0 folders img"):
        make_data.make([package, other], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_damaged_package_is_refused_and_leaves_nothing(package, tmp_path):
    whole, damaged, out = tmp_path / "emoji.tgz", tmp_path / "damaged.tgz", tmp_path / "emoji"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(package, "package")
    data = whole.read_bytes()
    cut = [data[:i] + data[i + 99 :] for i in range(99, len(data) - 99, len(data) // 9)]
    for content in (b"", b"no archive", data[: len(data) // 2], *cut):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="damaged.tgz .*fetch it again"):
            make_data.make([damaged], out)
    assert sorted(tmp_path.iterdir()) == [damaged, whole]


def test_the_split_is_fixed():
    codes = [f"1F{i:03X}" for i in range(1000)]
    validation = [code for code in codes if make_data.split_of(code) == "validation"]
    assert 70 <= len(validation) <= 130 and validation[:3] == ["1F00D", "1F013", "1F01B"]
