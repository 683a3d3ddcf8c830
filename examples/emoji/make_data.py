"""An image folder of Noto Color Emoji, with their groups as labels and their names as captions.

    npm pack emoji-datasource-google
    python -m examples.emoji.make_data emoji-datasource-google-*.tgz data/emoji

The first argument is the npm package, as a file or unpacked; the second a new folder. It gets
{train,validation}/CODE.png, RGB on white, and metadata.csv. CODE are the emoji's code points.
About a tenth of the emoji are for validation, by a hash of the base emoji's code: an emoji in
another skin tone lies where its base lies.

The pictures are Google's Noto Color Emoji (Apache-2.0; the font is under the OFL 1.1), the names
and groups are from github.com/iamcal/emoji-data (MIT).
"""

import csv
import hashlib
import json
import pathlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator

from flextok_jax import load_images, to_pil

SIZE = 64  # pixels
VALIDATION = 10  # One of so many emoji.
PICTURES = f"img/google/{SIZE}"
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # fmt: skip
NO_GROUP = "Component"  # Five squares of skin colours.


def split_of(code: str) -> str:
    """ "train" or "validation"; `code`: the base emoji's code points, such as "1F44D"."""
    number = int(hashlib.sha256(code.encode()).hexdigest(), 16)
    return "train" if number % VALIDATION else "validation"


def rows(emoji: list[dict]) -> Iterator[dict[str, str]]:
    """{"image", "file_name", "label", "caption"} of each picture, a base before its skin tones.

    Args:
        emoji: the package's emoji.json.
    """
    for base in emoji:
        if base["category"] == NO_GROUP:
            continue
        split, name = split_of(base["unified"]), base["name"].lower()
        for tones, one in {"": base, **base.get("skin_variations", {})}.items():
            if not one["has_img_google"]:
                continue
            words = " and ".join(TONES[tone] for tone in tones.split("-") if tone)
            yield {
                "image": one["image"],
                "file_name": f"{split}/{one['image']}",
                "label": base["category"],
                "caption": f"{name}, {words} skin tone" if words else name,
            }


def make(package: pathlib.Path, out: pathlib.Path) -> int:
    """Writes the image folder `out`, as a whole or not at all. Returns the number of pictures.

    Args:
        package: the .tgz of the npm package, or a folder that holds emoji.json and img.

    Raises:
        FileExistsError: there is such a folder already.
        FileNotFoundError: the package lacks a file.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: remove it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        temporary = pathlib.Path(temporary)
        if package.is_file():
            with tarfile.open(package) as tar:
                wanted = [m for m in tar if m.name.endswith("/emoji.json") or PICTURES in m.name]
                tar.extractall(temporary, wanted, filter="data")
            package = temporary / "package"
        found = list(rows(json.loads((package / "emoji.json").read_text())))
        made = temporary / "made"
        for split in ("train", "validation"):
            (made / split).mkdir(parents=True)
        images = load_images([package / PICTURES / row["image"] for row in found], SIZE)
        with (made / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            names = ("file_name", "label", "caption")
            table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            for row, picture in zip(found, to_pil(images)):
                picture.save(made / row["file_name"])
                table.writerow(row)
        shutil.move(made, out)
    return len(found)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m examples.emoji.make_data PACKAGE FOLDER")
    try:
        print(make(*map(pathlib.Path, sys.argv[1:])), "pictures")
    except (OSError, ValueError, tarfile.TarError) as error:
        sys.exit(f"error: {error}")
