"""Which source a config (data.source, .path, .name, .split) or the text of a command names."""

import dataclasses
import os

from flextok_jax.data import source
from flextok_jax.data.folder import FolderSource
from flextok_jax.data.shards import ShardSource, manifests, open_manifest
from flextok_jax.data.source import IMAGE_SUFFIXES, Source
from flextok_jax.data.tfds_source import TfdsSource
from flextok_jax.data.webdataset import WebDatasetSource
from flextok_jax.io.paths import as_path, below, is_remote, resolved

ENCODED = ("tokens", "encoded")  # Not images any more; see `pipeline.Crops`.
SOURCES = ("folder", "tfds", "webdataset", "array_record", *ENCODED)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a text names: a kind of SOURCES, a folder, and the name of a TFDS data set."""

    source: str
    path: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.name}{'@' if self.name else ''}{self.path}"


def parse(text: str) -> Data:
    """The data that a command's argument names.

    Args:
        text: KIND:PATH with a kind of SOURCES, "tfds:NAME@DIR" (NAME may be NAME/CONFIG:VERSION),
            or PATH alone, whose kind is detected: shards with a manifest, tar files, or else image
            files.

    Raises:
        ValueError: "tfds:" without a name or a folder, a manifest of another format, or tar files
            beside image files.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in SOURCES:
        path = resolved(source.place(text))
        return Data(_kind(path), str(path))
    if kind != "tfds":
        return Data(kind, str(resolved(source.place(rest))))
    name, _, place = rest.partition("@")
    if not (name and place):
        raise ValueError(f"{text!r}: a TFDS data set is named tfds:NAME@DIR, DIR its data_dir")
    path = as_path(place)
    return Data(kind, str(resolved(path)), name)


def _kind(path) -> str:
    for file in manifests(path):
        arrays = open_manifest(file)["arrays"]
        if "image" in arrays:
            return "array_record"
        return "encoded" if "moments" in arrays else "tokens"
    patterns = "*.tar", "*/*.tar", "*.tgz", *(f"*.tar.{x}" for x in ("gz", "xz", "bz2", "zst"))
    tar = next((file for pattern in patterns for file in path.glob(pattern)), None)
    if tar is None:
        return "webdataset" if path.suffix == ".tar" else "folder"
    if is_remote(path):
        files = below(path)
    else:
        files = (file.relative_to(path).as_posix() for file in path.rglob("*"))
    for inside in files:
        suffix = os.path.splitext(inside)[1].lower()
        if suffix in IMAGE_SUFFIXES and "/." not in f"/{inside}":
            raise ValueError(
                f"{path} holds both tar files ({tar.relative_to(path)}) and image files "
                f"({inside}): say webdataset:{path} or folder:{path}"
            )
    return "webdataset"


def make_source(cfg, split: str) -> Source:
    """The source that `cfg.source` names, restricted to `split`.

    Args:
        cfg: the `data` part of a config, or `Data`.
        split: "train", "validation" ("val", "test") or "all", see `source.resolve_split`; for
            "tfds" any TFDS split, such as "train[:10%]".

    Raises:
        ValueError, FileNotFoundError: what is wrong with the config or the data, and the remedy.
    """
    if cfg.source not in SOURCES:
        raise ValueError(f"data.source is {cfg.source!r}; allowed are {', '.join(SOURCES)}")
    if not cfg.path:
        raise ValueError(f"data.source={cfg.source!r} needs --config.data.path=FOLDER")
    if cfg.source == "tfds":
        return TfdsSource(cfg.name, split, cfg.path)
    kinds = {"folder": FolderSource, "webdataset": WebDatasetSource}
    return kinds.get(cfg.source, ShardSource)(cfg.path, split)


def make_image_source(data: Data, split: str) -> Source:
    """`make_source`, of data that hold images. Raises also as `check_images`."""
    check_images(data)
    return make_source(data, split)


def check_images(data: Data) -> None:
    """Raises ValueError for what `flextok encode` made of images."""
    if data.source in ENCODED:
        raise ValueError(
            f"{data.path} holds what `flextok encode` made of images: name the images themselves "
            "(`flextok data check` tells which)"
        )
