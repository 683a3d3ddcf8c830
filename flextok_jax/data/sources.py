"""Random-access image sources.

A source has `len(source)`, `source[i] -> dict(image=..., label=int)` and `source.name(i)`, the
words by which a warning names example i. `image` is either a uint8 array [H, W, 3] or the bytes of
an image file, which `decode_image` turns into RGB. Label -1 means "unknown".
"""

import dataclasses
import io
import os
import pathlib
import zlib

import numpy as np

SOURCES = ("digits", "photos", "folder", "tfds", "tokens")
SPLITS = ("train", "test", "all")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TEST_PERCENT = 5  # Share of a folder without train/ and test/ that is held out.
NUM_DIGITS, NUM_TRAIN_DIGITS = 1797, 1500


def make_source(cfg, split: str):
    """The source that `cfg.source` names, restricted to `split`.

    Args:
        cfg: the `data` part of a config: `source`, `path` (but for "digits" and "photos"), `name`
            ("tfds"), `image_size` ("photos").
        split: "train", "test" or "all"; for "tfds" any TFDS split, such as "train[:10%]".

    Raises:
        ValueError, FileNotFoundError: what is wrong with the config or the data, and the remedy.
    """
    if cfg.source == "digits":
        return digits(split)
    if cfg.source == "photos":
        from flextok_jax.data.photos import photos

        return photos(split, cfg.image_size)
    if cfg.source not in SOURCES:
        raise ValueError(f"data.source is {cfg.source!r}; allowed are {', '.join(SOURCES)}.")
    if not cfg.path:
        raise ValueError(
            f"data.source={cfg.source!r} needs a folder: pass --config.data.path=FOLDER."
        )
    if cfg.source == "folder":
        return FolderSource(cfg.path, split)
    if cfg.source == "tokens":
        from flextok_jax.data.tokens import TokenSource

        return TokenSource(cfg.path, split)
    from flextok_jax.data.tfds_source import TfdsSource

    return TfdsSource(cfg.name, split, cfg.path)


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A small data set held in memory.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int32 [N].
        title: what warnings call it.
    """

    images: np.ndarray
    labels: np.ndarray
    title: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def digits_images() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 handwritten digits of scikit-learn, 8x8 scaled bilinearly to 16x16.

    Values 0..16 are interpolated in float with half-pixel centres and clamped edges (at a factor of
    two the weights are exactly 3/4 and 1/4: the result of Pillow's bilinear resize in mode "F"),
    then stored as round(value / 16 * 255) in three equal channels.

    Returns:
        images uint8 [1797, 16, 16, 3] and labels int32 [1797].
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    target = np.arange(16)
    near = target // 2
    far = np.clip(near + np.where(target % 2, 1, -1), 0, 7)
    weights = 0.75 * np.eye(8)[near] + 0.25 * np.eye(8)[far]
    values = weights @ data.images @ weights.T  # Exact: sixteenths of integers.
    grey = np.rint(values / 16 * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), data.target.astype(np.int32)


def digits(split: str) -> ArraySource:
    """The digits, split: 1500 of a fixed permutation to train, the other 297 to test."""
    order = np.random.RandomState(0).permutation(NUM_DIGITS)
    parts = {"train": order[:NUM_TRAIN_DIGITS], "test": order[NUM_TRAIN_DIGITS:], "all": order}
    if split not in parts:
        raise ValueError(f"split is {split!r}; the digits have {', '.join(SPLITS)}.")
    images, labels = digits_images()
    return ArraySource(images[parts[split]], labels[parts[split]], f"digits/{split}")


class FolderSource:
    """All images below a folder, sorted by path; the class is the first-level subfolder.

    Where `path/train` and `path/test` (or `path/val`) both exist, they are the splits and the
    classes are their subfolders. Otherwise about 5 % are held out for "test", by a hash of each
    image's relative path (so adding images does not move the others), at least one and never all.
    Hidden files are left out; linked folders are followed.

    Attributes:
        files: the paths of this split's images.
        labels: per image, the index into `classes`, or -1 for an image outside any subfolder.
        classes: sorted names of the first-level subfolders that hold images, over both splits.
    """

    def __init__(self, path, split: str):
        root = pathlib.Path(path).expanduser()
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; an image folder has {', '.join(SPLITS)}.")
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise FileNotFoundError(
                f"The image folder {str(root)!r} {what}. Pass the folder that holds the images "
                "(in a config: --config.data.path=FOLDER)."
            )
        held_out = next((n for n in ("test", "val") if (root / n).is_dir()), None)
        if held_out and (root / "train").is_dir():
            parts = {"train": _image_files(root / "train"), "test": _image_files(root / held_out)}
        else:
            parts = _hold_out(_image_files(root))
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
        self.classes = sorted({name for _, name, _ in everything if name})
        self.files = [file for _, _, file in chosen]
        class_index = {name: i for i, name in enumerate(self.classes)}
        self.labels = [class_index.get(name, -1) for _, name, _ in chosen]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {"image": pathlib.Path(self.files[index]).read_bytes(), "label": self.labels[index]}

    def name(self, index: int) -> str:
        return self.files[index]


def _image_files(root: pathlib.Path) -> list[tuple[str, str, str]]:
    """Sorted (relative path, first-level subfolder or "", full path) of the images below root."""
    found, visited = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # A link to a folder above would be walked for ever, one to a sibling would count it twice.
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(n for n in subfolders if not n.startswith("."))
        for name in names:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                relative = pathlib.Path(folder, name).relative_to(root)
                subfolder = relative.parts[0] if len(relative.parts) > 1 else ""
                found.append((relative.as_posix(), subfolder, os.path.join(folder, name)))
    return sorted(found)


def _hold_out(files: list[tuple[str, str, str]]) -> dict[str, list]:
    """Splits by a hash of the relative path: the same on every machine and every day."""
    ranked = sorted((zlib.crc32(os.fsencode(file[0])) % 100, file) for file in files)
    count = sum(rank < TEST_PERCENT for rank, _ in ranked)
    count = min(max(count, 1), max(len(files) - 1, 0))
    files = [file for _, file in ranked]
    return {"test": sorted(files[:count]), "train": sorted(files[count:])}


def decode_image(data: bytes):
    """Decodes the bytes of an image file into an upright RGB `PIL.Image.Image`.

    The camera's rotation (EXIF) is applied, transparency is laid over white, 16-bit greyscale is
    scaled to 8 bits, and of an animation the first frame is taken.

    Raises:
        Exception: whatever Pillow raises for bytes that are no whole image; it has no single type.
    """
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(data))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
