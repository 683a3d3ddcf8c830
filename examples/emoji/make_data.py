"""An image folder of Noto Color Emoji, with their groups as labels and their names as captions.

    npm pack emoji-datasource-google
    python -m examples.emoji.make_data emoji-datasource-google-*.tgz data/emoji

The first argument is the npm package, as a file or unpacked; the last a new folder. It gets
{train,validation}/CODE.png, RGB on white, and metadata.csv. CODE are the emoji's code points.
About a tenth of the emoji are for validation, by a hash of the base emoji's code: an emoji in
another skin tone lies where its base lies. Packages between the two, such as
emoji-datasource-twitter, are more pictures for training: of the same emoji, drawn by others.

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

from flextok_jax import load_images, to_pil

SIZE = 64  # pixels
VALIDATION = 10  # One of so many emoji.
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # fmt: skip
SPLITS = ("train", "validation")
NO_GROUP = "Component"  # Five squares of skin colours.


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
        packages: .tgz files of npm packages, or folders that hold emoji.json and img. All but the
            first add to the training side alone.

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
                package = unpack(package, temporary / str(number))
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
