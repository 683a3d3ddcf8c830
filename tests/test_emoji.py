"""The image folder of emoji, from a small package of the same layout."""

import csv
import json
import pathlib
import shutil
import tarfile

import matplotlib
import numpy as np
import pytest
from PIL import Image

from examples.emoji import make_data
from flextok_jax.data import decode
from flextok_jax.data.folder import FolderSource

FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
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


LIST = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F ; fully-qualified     # ☺️ E0.6 smiling face
263A ; unqualified         # ☺ E0.6 smiling face
# group: People & Body
261D FE0F ; fully-qualified     # ☝️ E0.6 index pointing up
261D 1F3FB ; fully-qualified     # ☝🏻 E1.0 index pointing up: light skin tone
1F468 200D 1F9B0 ; fully-qualified     # 👨‍🦰 E11.0 man: red hair
1F468 1F3FE 200D 1F9B0 ; fully-qualified     # 👨🏾‍🦰 E11.0 man: medium-dark skin tone, red hair
1F48F ; fully-qualified     # 💏 E0.6 kiss
1F48F 1F3FB ; fully-qualified     # 💏🏻 E13.1 kiss: light skin tone
1F9D1 1F3FB 200D 2764 FE0F 200D 1F48B 200D 1F9D1 1F3FD ; fully-qualified # 🧑 E13.1 \
kiss: person, person, light skin tone, medium skin tone
# group: Component
1F3FB ; component           # 🏻 E1.0 light skin tone
"""


def test_unicodes_list_has_groups_names_and_tones():
    found = {one["unified"]: one for one in make_data.listed(LIST)}
    tones = {code: list(one["skin_variations"]) for code, one in found.items()}
    assert tones == {
        "1F600": [], "263A-FE0F": [], "261D-FE0F": ["1F3FB"], "1F468-200D-1F9B0": ["1F3FE"],
        "1F48F": ["1F3FB", "1F3FB-1F3FD"],
    }  # fmt: skip
    assert found["1F600"]["category"] == "Smileys & Emotion"
    assert found["1F48F"]["category"] == "People & Body"
    assert found["1F468-200D-1F9B0"]["name"] == "man: red hair"


def test_a_font_is_a_package(tmp_path, monkeypatch):
    """The few emoji of LIST, by Debian's font; what is no font is refused."""
    monkeypatch.setattr(make_data, "UNICODE_LIST", tmp_path / "list.txt")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(FileNotFoundError, match="install unicode-data"):
        make_data.make([broken], tmp_path / "emoji")
    make_data.UNICODE_LIST.write_text(LIST, encoding="utf-8")
    with pytest.raises(ValueError, match="broken.ttf is no font"):
        make_data.make([broken], tmp_path / "emoji")
    for plain in pathlib.Path(matplotlib.get_data_path()).glob("fonts/ttf/DejaVuSans.ttf"):
        with pytest.raises(ValueError, match="DejaVuSans.ttf has no coloured|libfribidi"):
            make_data.make([plain], tmp_path / "emoji")
    if not FONT.exists():
        pytest.skip(f"{FONT} is not installed")
    assert make_data.make([FONT], tmp_path / "emoji") == 9
    with open(tmp_path / "emoji" / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    captions = [row["caption"] for row in rows]
    assert {"grinning face", "man: red hair, medium-dark skin tone"} < set(captions)
    assert captions[-1] == "kiss, light and medium skin tone"
    (smile,) = (tmp_path / "emoji").glob("*/1f600.png")
    pixels = np.asarray(Image.open(smile)).astype(int)
    assert pixels.shape == (64, 64, 3) and (pixels[0, 0] == 255).all()
    assert pixels[32, 5, 0] > 200 and pixels[32, 5, 2] < 120  # A yellow face.


def test_the_split_is_fixed():
    codes = [f"1F{i:03X}" for i in range(1000)]
    validation = [code for code in codes if make_data.split_of(code) == "validation"]
    assert 70 <= len(validation) <= 130 and validation[:3] == ["1F00D", "1F013", "1F01B"]
