"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

The only file that imports tensorflow_datasets. It reads the prepared files by their own
description, so neither the data set's generating code nor a download runs.
"""

import hashlib
import pathlib

from flextok_jax.data import source
from flextok_jax.data.source import VALIDATION, Example, Source
from flextok_jax.io import paths, storage
from flextok_jax.io.paths import as_path


class TfdsSource(Source):
    """One split of a prepared data set in the array_record format, such as imagenet2012.

    Args:
        name: "NAME", "NAME/CONFIG" or either followed by ":VERSION"; the newest version by default.
        split: any TFDS split, such as "train[:10%]"; "validation", "val" and "test" are synonyms.
        path: the data_dir it was prepared in, which contains NAME/[CONFIG/]VERSION.

    Raises:
        FileNotFoundError, ValueError: what is missing, with the remedy.
    """

    def __init__(self, name: str, split: str, path: str):
        super().__init__()
        import tensorflow_datasets as tfds

        if not name:
            raise ValueError("data.source='tfds' needs data.name, such as 'imagenet2012'")
        builder = tfds.builder_from_directory(_find(name, path))
        features = dict(builder.info.features.items())
        if not isinstance(features.get("image"), tfds.features.Image):
            raise ValueError(f"{name!r} has no feature 'image', only {', '.join(sorted(features))}")
        labels = features.get("label")
        self._labelled = isinstance(labels, tfds.features.ClassLabel)
        self.classes = list(labels.names) if self._labelled else []
        texts = (n for n in source.CAPTION if isinstance(features.get(n), tfds.features.Text))
        self._text = next(texts, None)
        if split in VALIDATION:
            split = source.resolve_split(split, list(builder.info.splits), name)
        if path.startswith("s3://"):
            builder = tfds.builder_from_directory(_copied(builder, split))
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            self._data = builder.as_data_source(split=split, decoders=decoders)
        except NotImplementedError as error:
            stored = builder.info.file_format.value
            raise ValueError(
                f"{name!r} is stored as {stored}, without random access. {_remedy(name, path)}"
            ) from error
        self._title = f"{name}/{split}"

    def __len__(self) -> int:
        return len(self._data)

    def key(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def read(self, index: int) -> Example:
        example, key = self._data[index], self.key(index)
        caption = example[self._text] if self._text else None
        caption = self.skipped.usable(source.parse_caption, caption, key)
        label = int(example["label"]) if self._labelled else -1
        return Example(example["image"], label, caption, key)


def _copied(builder, split: str) -> pathlib.Path:
    """A folder on this machine with what a split needs: ArrayRecord does not open s3://."""
    folder = as_path(builder.data_path)
    described = [file for file in folder.iterdir() if ".array_record" not in file.name]
    info = paths.read(folder / "dataset_info.json")
    key = hashlib.sha256(f"{folder}\n".encode() + info).hexdigest()
    shards = [folder / name for name in sorted(builder.info.splits[split].filenames)]
    return [storage.cached(file, key) for file in (*shards, *described)][-1].parent


def _remedy(name: str, path: str) -> str:
    return (
        "Prepare it once, where TensorFlow is installed:\n"
        f"    tfds build {name} --data_dir={path} --file_format=array_record\n"
        f"(imagenet2012 wants its two .tar files in {path}/downloads/manual first)"
    )


def _find(name: str, path: str):
    """The folder of the named (or else the newest) version."""
    import tensorflow_datasets as tfds

    stem, _, version = name.partition(":")
    root = source.place(path) / stem
    found = {file.parent.name: file.parent for file in root.glob("*/dataset_info.json")}
    versions = [n for n in found if tfds.core.Version.is_valid(n) and version in ("", n)]
    if not versions:
        raise FileNotFoundError(f"{name!r} is not prepared in {str(root)!r}. {_remedy(stem, path)}")
    return found[max(versions, key=tfds.core.Version)]
