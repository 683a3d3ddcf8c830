"""Folders of image files, with labels and captions beside them."""

import csv
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA = ("metadata.csv", "metadata.jsonl")
SPLITS = ("train", "test", "all")
HELD_OUT = ("test", "val", "validation")  # What a folder of held-out examples may be called.
TEST_PERCENT = 5  # Share of what has no parts of its own that is held out.


class FolderSource:
    """All images below a folder, sorted by path; the class is the first-level subfolder.

    Where `path/train` and `path/test` (or `val`, `validation`) both exist, they are the splits and
    the classes are their subfolders. Otherwise about 5 % are held out for "test", by a hash of each
    image's relative path (so adding images does not move the others), at least one and never all;
    where all images lie in one such folder, its subfolders are the classes. Hidden files are left
    out; linked folders are followed.

    Beside NAME.jpg may lie its caption, NAME.txt, and the caption's embedding, NAME.npy. Or
    metadata.csv or metadata.jsonl lists images: `file_name` (relative to where the list lies),
    `label` (all of them whole numbers, or all names of classes; -1 or nothing: unknown) and
    `caption` (or `text`); it goes before subfolders and .txt files. What it lists and is not there
    counts as an unreadable image.

    Attributes:
        files: the paths of this split's images.
        labels: per image, the index into `classes` (or the number that the list gives), or -1.
        classes: sorted names of the classes, over both splits; empty where the labels are numbers.
    """

    def __init__(self, path, split: str):
        root = pathlib.Path(path).expanduser()
        check_split(split, "an image folder has")
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise FileNotFoundError(
                f"The image folder {str(root)!r} {what}. Pass the folder that holds the images "
                "(in a config: --config.data.path=FOLDER)."
            )
        held_out = next((name for name in HELD_OUT if (root / name).is_dir()), None)
        listed = {}
        for folder in (root, root / "train", root / (held_out or "test")):
            listed |= _listed(folder, root)
        self._beside: set[str] = set()
        if held_out and (root / "train").is_dir():
            names = {"train": "train", "test": held_out}
            parts = {s: _images(root, name, self._beside, listed) for s, name in names.items()}
        else:
            found = _without_parts(_images(root, "", self._beside, listed))
            test = hold_out([file[0] for file in found])
            parts = {
                "train": [file for file, out in zip(found, test) if not out],
                "test": [file for file, out in zip(found, test) if out],
            }
        everything = sorted(parts["train"] + parts["test"])
        if not everything:
            raise FileNotFoundError(
                f"The folder {str(root)!r} holds no images. Images end in "
                f"{' '.join(IMAGE_SUFFIXES)}; subfolders are searched too."
            )
        chosen = everything if split == "all" else parts[split]
        if not chosen:
            raise ValueError(
                f"The folder {str(root)!r} has no images for split {split!r} ({len(everything)} in "
                "all). Give at least two images, or put images into both train/ and test/."
            )
        self._keys = [key for key, _ in chosen]
        self._captions = {key: caption for key, (_, caption) in listed.items() if caption}
        self.files = [str(root / key) for key in self._keys]
        self.classes, labels = _labels(root, everything, listed)
        self.labels = [labels[key] for key in self._keys]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        with open(self.files[index], "rb") as file:
            image = file.read()
        caption = self._captions.get(self._keys[index])
        if caption is None and self._has(index, ".txt"):
            beside = pathlib.Path(self.files[index]).with_suffix(".txt")
            caption = beside.read_text(encoding="utf-8").strip()
        return {"image": image, "label": self.labels[index], "caption": caption}

    def embedding(self, index: int) -> np.ndarray | None:
        """float [T, E] of the caption, None where there is none."""
        if not self._has(index, ".npy"):
            return None
        return np.load(pathlib.Path(self.files[index]).with_suffix(".npy"), allow_pickle=False)

    def name(self, index: int) -> str:
        return self._keys[index]

    def _has(self, index: int, suffix: str) -> bool:
        return os.path.splitext(self._keys[index])[0] + suffix in self._beside


def check_split(split: str, what: str) -> None:
    """Refuses a split that is none of SPLITS.

    Raises:
        ValueError: it begins the list of SPLITS with `what`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; {what} {', '.join(SPLITS)}.")


def hold_out(keys: Sequence[str]) -> list[bool]:
    """Which of the examples with these keys are held out: about 5 %, at least one and never all.

    By a hash of the key: the same on every machine and every day.
    """
    ranks = [zlib.crc32(os.fsencode(key)) % 100 for key in keys]
    count = sum(rank < TEST_PERCENT for rank in ranks)
    count = min(max(count, 1), max(len(keys) - 1, 0))
    first = sorted(range(len(keys)), key=lambda i: (ranks[i], keys[i]))[:count]
    return np.isin(np.arange(len(keys)), first).tolist()


def _images(
    root: pathlib.Path, part: str, beside: set[str], listed: Collection[str]
) -> list[tuple[str, str]]:
    """Sorted (path below root, first-level subfolder below root/part or "") of the images.

    Those of `listed` that lie in the part are among them, whether they are there or not.
    `beside` gains the paths of captions and embeddings: asking for each image whether it has one
    would be a request each on a mounted bucket.
    """
    top, found, visited = root / part, {}, set()
    for folder, subfolders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        # A link to a folder above would be walked for ever, one to a sibling would count it twice.
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(n for n in subfolders if not n.startswith("."))
        inside = pathlib.Path(folder).relative_to(top).parts
        for name in names:
            key = "/".join([part, *inside, name] if part else [*inside, name])
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                found[key] = inside[0] if inside else ""
            elif name.endswith((".txt", ".npy")):
                beside.add(key)
    for key in listed:
        if key.startswith(f"{part}/" if part else ""):
            found.setdefault(key, "")
    return sorted(found.items())


def _without_parts(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`_images` of a whole folder, with the subfolder below train/ where there is nothing else."""
    split = [key.split("/") for key, _ in found]
    if not {names[0] for names in split} <= {"train", *HELD_OUT}:
        return found
    return [("/".join(names), names[1] if len(names) > 2 else "") for names in split]


def _listed(folder: pathlib.Path, root: pathlib.Path) -> dict[str, tuple[str | None, str | None]]:
    """Path below root -> (label or None, caption or None), of the list in a folder, if any."""
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if file is None:
        return {}
    text, found = file.read_text(encoding="utf-8-sig"), {}
    for number, row in enumerate(_rows(file, text), 2 if file.suffix == ".csv" else 1):
        name = row.get("file_name")
        path = pathlib.PurePosixPath(str(name or ""))
        if not name or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{file}, line {number}: file_name is {name!r}; each line must name an image "
                "below the folder of the list"
            )
        label, caption = label_text(row.get("label")), row.get("caption") or row.get("text")
        found[(folder.relative_to(root) / path).as_posix()] = label, caption or None
    return found


def label_text(label) -> str | None:
    """A label as it stands in a list or a JSON file, as text; None for an unknown one.

    A whole number becomes its digits, also where pandas made it a float, as it does with a column
    that has gaps: "1.0" is "1".
    """
    text = "" if label is None else str(label).strip()
    number = re.fullmatch(r"(-?[0-9]+)(\.0*)?", text)
    text = str(int(number[1])) if number else text
    return None if text in ("", "-1") else text


def label_classes(labels: Mapping[str, str], where) -> list[str]:
    """The sorted names that these labels ({an image that has it: label}, see `label_text`) are.

    Returns:
        [] where all are numbers.

    Raises:
        ValueError: some are numbers and some are names.
    """
    numbers = {key: label for key, label in labels.items() if label.isdecimal()}
    if numbers and len(numbers) < len(labels):
        names = ((key, label) for key, label in labels.items() if key not in numbers)
        (a, number), (b, name) = next(iter(numbers.items())), next(names)
        raise ValueError(
            f"{where}: the label of {a} is the number {number}, that of {b} the name {name!r}. "
            "Give every image a whole number from 0 on (-1: unknown), or every image a name"
        )
    return [] if numbers else sorted(set(labels.values()))


def _rows(file: pathlib.Path, text: str) -> list[dict]:
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    try:
        # Not splitlines: it also breaks at characters that a caption may hold, such as U+2028.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not one JSON object per line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: every line must be a JSON object")
    return rows


def _labels(
    root: pathlib.Path, files: list[tuple[str, str]], listed: dict
) -> tuple[list[str], dict[str, int]]:
    """(classes, {path below root: label}): by the list if it has labels, else by subfolders."""
    names = {key: label for key, (label, _) in listed.items() if label is not None}
    if names:
        classes = label_classes(names, f"the list in {root}")
        if not classes:
            return [], {key: int(names.get(key, -1)) for key, _ in files}
    else:
        names = dict(files)
        classes = sorted({name for name in names.values() if name})
    index = {name: i for i, name in enumerate(classes)}
    return classes, {key: index.get(names.get(key), -1) for key, _ in files}
