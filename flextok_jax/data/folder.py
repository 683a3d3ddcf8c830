"""Folders of image files, with labels and captions beside them."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from flextok_jax.data import source
from flextok_jax.data.source import IMAGE_SUFFIXES, TRAIN, VALIDATION, Example, composed
from flextok_jax.io import paths

METADATA = ("metadata.csv", "metadata.jsonl")
FIELDS = {"file_name", *source.LABEL, *source.CAPTION}

csv.field_size_limit(2**31 - 1)


class FolderSource(source.Source):
    """All images below a folder, sorted by path; the class is the first-level subfolder.

    Where the first level is splits (see `source.select`), or one of their names alone, the classes
    are one level below. Captions, embeddings and lists lie beside the images, see docs/data.md.
    What a list names and is not there counts as an unreadable image. Hidden files are left out;
    linked folders are followed.
    """

    def __init__(self, path, split: str):
        """Lists the images.

        Raises:
            FileNotFoundError, ValueError: no folder, no image, no such split, or an unclear list.
        """
        super().__init__()
        root = self._root = source.place(path)
        if not root.is_dir():
            raise FileNotFoundError(
                f"{str(root)!r} is no folder; pass the folder that holds the images (in a config: "
                "--config.data.path=FOLDER)"
            )
        self._beside: dict[str, str] = {}  # Captions and embeddings: asking for each image whether
        images = self._walk()  # it has one would be a request each on a mounted bucket.
        listed = self._listed(images)
        everything = sorted(images | listed.keys())
        if not everything:
            endings = " ".join(IMAGE_SUFFIXES)
            words = f"{str(root)!r} and its subfolders hold no images ({endings})"
            raise FileNotFoundError("\n  ".join([words, *self.skipped.lines()]))
        parts = [key.split("/")[0] for key in everything]
        used, named = source.select(everything, parts, split, str(root), self.skipped)
        self._keys = [key for key, use in zip(everything, used) if use]
        self._captions = {key: caption for key, (_, caption) in listed.items() if caption}
        splits = {TRAIN, *VALIDATION}
        texts = {key: label for key, (label, _) in listed.items() if label is not None}
        if texts:
            self.classes = source.label_classes(texts, f"the list in {root}")
        else:
            below = set(parts) <= splits or named  # Then the classes lie below the splits.
            for key, part in zip(everything, parts):
                inside = key.split("/")[bool(below) : -1]
                if inside and (part in splits or not named):
                    texts[key] = composed(inside[0])
            self.classes = source.sorted_classes(texts.values())
        self.labels = source.label_numbers(map(texts.get, self._keys), self.classes)

    def read(self, index: int) -> Example:
        key = self._keys[index]
        image = paths.read(self._root / key)
        return Example(image, int(self.labels[index]), self.caption(index), key)

    def caption(self, index: int) -> str | None:
        key = self._keys[index]
        caption = self._captions.get(key)
        if caption is None and (beside := self._besides(key, ".txt")):
            caption = self.skipped.usable(self._read_caption, beside, beside)
        return caption

    def _read_caption(self, beside: str) -> str | None:
        try:
            return source.parse_caption(paths.read(self._root / beside))
        except OSError as error:
            raise ValueError(f"the caption cannot be read: {error.strerror}") from None

    def embedding(self, index: int) -> np.ndarray | None:
        beside = self._besides(self._keys[index], ".npy")
        return beside and source.read_embedding(io.BytesIO(paths.read(self._root / beside)))

    def _besides(self, key: str, suffix: str) -> str | None:
        """The path of the caption or embedding of an image, if it has one."""
        return self._beside.get(composed(os.path.splitext(key)[0] + suffix))

    def _walk(self) -> set[str]:
        """The paths of all images below the root; what lies beside them is noted."""
        images = set()
        for key in paths.below(self._root) if paths.is_remote(self._root) else self._files():
            name, suffix = key.rpartition("/")[2], os.path.splitext(key)[1].lower()
            if "/." in f"/{key}":
                continue
            if suffix in IMAGE_SUFFIXES:
                images.add(key)
            elif suffix in (".txt", ".npy"):
                self._beside[composed(os.path.splitext(key)[0] + suffix)] = key
            elif name not in METADATA:
                self.skipped.add(f"no image by its ending {suffix or '(none)'}", key)
        return images

    def _files(self) -> Iterable[str]:
        """The names of all files below a local root, but of those in hidden folders."""
        visited = set()
        for folder, subfolders, names in os.walk(self._root, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:  # By a link, such as one to a folder above.
                subfolders.clear()
                self.skipped.add("a folder that is there already", folder)
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inside = pathlib.Path(folder).relative_to(self._root).parts
            yield from ("/".join([*inside, name]) for name in names)

    def _listed(self, images: set[str]) -> dict[str, tuple[str | None, str | None]]:
        """{path below the root: (label, caption)}, of the lists of the root and of its splits."""
        found, names = {}, {composed(key): key for key in images}
        for folder in ("", TRAIN, *VALIDATION):
            files = (self._root / folder / name for name in METADATA)
            file, *others = [file for file in files if file.is_file()] or [None]
            for other in others:
                self.skipped.add(f"{file.name} beside it is read", str(other))
            for number, row in _rows(file) if file else ():
                where, name = f"{file}, line {number}", row.get("file_name")
                for field in row.keys() - FIELDS:
                    self.skipped.add("a field that is not read", f"{file}: {field}")
                text = isinstance(name, str) and name
                path = pathlib.PurePosixPath(name.replace("\\", "/") if text else "/")
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(
                        f"{where}: file_name is {name!r}; name a file of this folder. The line has "
                        + ", ".join(row)
                    )
                exact, key = ((folder / p).as_posix() for p in (pathlib.PurePosixPath(name), path))
                key = exact if exact in images else names.get(composed(key), key)
                if key in found:
                    self.skipped.add("listed again (the first line counts)", where)
                    continue
                label, caption = (source.first_of(row, n) for n in (source.LABEL, source.CAPTION))
                found[key] = (
                    self.skipped.usable(source.parse_label, label, where),
                    self.skipped.usable(source.parse_caption, caption, where),
                )
        return found


def _rows(file) -> Iterable[tuple[int, dict]]:
    """(line, row) of a list; the names of fields in lower case."""
    try:
        text = io.TextIOWrapper(io.BytesIO(paths.read(file)), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); store it as UTF-8") from error
    if file.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        for row in rows:
            yield rows.line_num, {_field(key): value for key, value in row.items() if key}
        return
    # Not splitlines: it also breaks at characters that a caption may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line).items()
                yield number, {_field(key): value for key, value in row}
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is no JSON object: {line[:80]}") from error


def _field(name: str) -> str:
    return name.strip().lower()
