"""An image folder of Noto Color Emoji, with their groups as labels and their names as captions.

    npm pack emoji-datasource-google
    python -m examples.emoji.make_data emoji-datasource-google-*.tgz data/emoji

The first argument is the npm package, as a file or unpacked; the last a new folder. It gets
{train,validation}/CODE.png, RGB on white, and metadata.csv. CODE are the emoji's code points.
About a tenth of the emoji are for validation, by a hash of the base emoji's code: an emoji in
another skin tone lies where its base lies. Packages between the two, such as
emoji-datasource-twitter, are more pictures for training: of the same emoji, drawn by others.

A font with coloured pictures, NotoColorEmoji.ttf, may stand in the place of any package; groups and
names are then those of Unicode's list. In Debian:

    apt-get install fonts-noto-color-emoji unicode-data
    python -m examples.emoji.make_data /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf data/emoji

The pictures of emoji-datasource-google are Google's Noto Color Emoji (Apache-2.0; the font is under
the OFL 1.1), those of emoji-datasource-twitter are Twemoji (CC BY 4.0); the names and groups are
from github.com/iamcal/emoji-data (MIT).
"""

import csv
import gzip
import hashlib
import json
import pathlib
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont
from PIL import features as pillow

from flextok_jax import load_images, to_pil

SIZE = 64  # pixels
VALIDATION = 10  # One of so many emoji.
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # fmt: skip
SPLITS = ("train", "validation")
NO_GROUP = "Component"  # Five squares of skin colours.
UNICODE_LIST = pathlib.Path("/usr/share/unicode/emoji/emoji-test.txt")
STRIKE = 109  # The size in which the font's pictures are.


def split_of(code: str) -> str:
    """ "train" or "validation"; `code`: the base emoji's code points, such as "1F44D"."""
    number = int(hashlib.sha256(code.encode()).hexdigest(), 16)
    return "train" if number % VALIDATION else "validation"


def rows(emoji: list[dict], drawn_by: str) -> Iterator[dict[str, str]]:
    """{"image", "split", "label", "caption"} of each picture, a base before its skin tones.

    Args:
        emoji: the package's emoji.json.
        drawn_by: a folder of the package's img, such as "google".
    """
    for base in emoji:
        if base["category"] == NO_GROUP:
            continue
        split, name = split_of(base["unified"]), base["name"].lower()
        for tones, one in {"": base, **base.get("skin_variations", {})}.items():
            if not one[f"has_img_{drawn_by}"]:
                continue
            words = " and ".join(TONES[tone] for tone in tones.split("-") if tone)
            yield {
                "image": one["image"],
                "split": split,
                "label": base["category"],
                "caption": f"{name}, {words} skin tone" if words else name,
            }


def unpack(package: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpacks what is wanted of a .tgz into `folder`. Returns the package's own folder."""
    names = re.compile(rf"package/(emoji\.json|img/\w+/{SIZE}/.*)")
    try:
        with gzip.open(package) as stream:  # To its checksum, which tarfile may miss.
            while stream.read(1 << 20):
                pass
        with tarfile.open(package, "r:gz") as tar:
            tar.extractall(folder, [m for m in tar if names.fullmatch(m.name)], filter="data")
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{package} is no whole .tgz ({error}): fetch it again") from error
    return folder / "package"


def listed(text: str) -> Iterator[dict]:
    """What emoji.json says of each emoji but for its picture, of Unicode's emoji-test.txt."""
    line = re.compile(r"([\dA-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)")
    group, bases = "", {}
    for row in text.splitlines():
        if row.startswith("# group: "):
            group = row.removeprefix("# group: ")
        elif found := line.fullmatch(row):
            code, (name, _, rest) = found[1].replace(" ", "-"), found[2].partition(": ")
            parts = rest.split(", ") if rest else []
            words = [p.removesuffix(" skin tone") for p in parts if p.endswith(" skin tone")]
            others = [p for p in parts if not p.endswith(" skin tone")]
            whole = ": ".join([name, ", ".join(others)] if others else [name])
            if not words:
                bases[whole] = {"unified": code, "name": whole, "category": group}
                bases[whole]["skin_variations"] = {}
                continue
            codes = "-".join(key for word in words for key, tone in TONES.items() if tone == word)
            # "kiss: person, person" in two tones is of the base "kiss".
            base = bases.get(whole) or bases[name]
            base["skin_variations"].setdefault(codes, {"unified": code})
    yield from bases.values()


def drawn(pen: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """Text in the font's own colours, in the middle of a transparent square."""
    left, top, right, bottom = pen.getbbox(text)
    side = max(right - left, bottom - top, 1)
    picture = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    place = (side - right + left) // 2 - left, (side - bottom + top) // 2 - top
    ImageDraw.Draw(picture).text(place, text, font=pen, embedded_color=True)
    return picture


def draw(font: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes the pictures of a font into `folder`, laid out as an npm package. Returns it.

    Raises:
        FileNotFoundError: UNICODE_LIST is not there.
        ValueError: it is no font with coloured pictures, or Pillow cannot join code points.
    """
    if not UNICODE_LIST.exists():
        raise FileNotFoundError(f"{UNICODE_LIST} has a font's groups: install unicode-data")
    try:
        pen = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"{font} is no font with pictures of {STRIKE} pixels ({error})") from error
    if not pillow.check("raqm"):  # Without it Pillow draws the parts of an emoji beside each other.
        raise ValueError("Pillow cannot draw emoji of several code points: install libfribidi0")
    smile = "\N{GRINNING FACE}"
    saturation = drawn(pen, smile).convert("RGB").convert("HSV").getextrema()[1]
    if saturation[1] == 0:
        raise ValueError(f"{font} has no coloured pictures: another font is needed")
    pictures = folder / "img" / font.stem / str(SIZE)
    pictures.mkdir(parents=True)
    emoji = list(listed(UNICODE_LIST.read_text(encoding="utf-8")))
    for one in (one for base in emoji for one in (base, *base["skin_variations"].values())):
        text = "".join(chr(int(code, 16)) for code in one["unified"].split("-"))
        # An emoji that the font does not know is empty, or drawn as its parts.
        known = 0 < pen.getlength(text) <= pen.getlength(smile)
        one |= {"image": f"{one['unified'].lower()}.png", f"has_img_{font.stem}": known}
        if known:
            drawn(pen, text).save(pictures / one["image"])
    (folder / "emoji.json").write_text(json.dumps(emoji))
    return folder


def add(package: pathlib.Path, made: pathlib.Path, validation: bool) -> list[dict[str, str]]:
    """Writes a package's pictures into `made`. Returns their rows of metadata.csv.

    Args:
        package: a folder that holds emoji.json and img/DRAWN_BY/64.
        made: where the folders train and validation are.
        validation: whether the pictures of the validation emoji are written too. If not, the
            others' names end in the name of who drew them.
    """
    folders = list(package.glob(f"img/*/{SIZE}"))
    if len(folders) != 1:
        raise ValueError(f"{package} has {len(folders)} folders img/*/{SIZE}, not one")
    pictures = folders[0]
    drawn_by = pictures.parent.name
    found = list(rows(json.loads((package / "emoji.json").read_text()), drawn_by))
    found = [row for row in found if validation or row["split"] == "train"]
    images = load_images([pictures / row["image"] for row in found], SIZE)
    for row, picture in zip(found, to_pil(images)):
        name = row["image"] if validation else f"{row['image'][:-4]}_{drawn_by}.png"
        row["file_name"] = f"{row['split']}/{name}"
        picture.save(made / row["file_name"])
    return found


def make(packages: Sequence[pathlib.Path], out: pathlib.Path) -> int:
    """Writes the image folder `out`, as a whole or not at all. Returns the number of pictures.

    Args:
        packages: .tgz files of npm packages, folders that hold emoji.json and img, or fonts (.ttf)
            with coloured pictures. All but the first add to the training side alone.

    Raises:
        FileExistsError: there is such a folder already.
        FileNotFoundError: a package lacks a file.
        ValueError: a package is damaged, has no pictures of the size, or several kinds of them.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: remove it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        temporary = pathlib.Path(temporary)
        made, found = temporary / "made", []
        for split in SPLITS:
            (made / split).mkdir(parents=True)
        for number, package in enumerate(packages):
            if not package.exists():
                raise FileNotFoundError(f"{package} is neither a file nor a folder")
            if package.is_file():
                read = draw if package.suffix == ".ttf" else unpack
                package = read(package, temporary / str(number))
            found += add(package, made, validation=number == 0)
        with (made / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            names = ("file_name", "label", "caption")
            table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(found)
        shutil.move(made, out)
    return len(found)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m examples.emoji.make_data PACKAGE [MORE_PACKAGES] FOLDER")
    try:
        *packages, out = map(pathlib.Path, sys.argv[1:])
        print(make(packages, out), "pictures")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
