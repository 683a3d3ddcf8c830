"""The one way from a source to decoded pictures: threads, order, and what cannot be read."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from flextok_jax.data import decode, transforms
from flextok_jax.data.source import Source, log
from flextok_jax.io.paths import as_path
from flextok_jax.nn.images import to_uint8

MAX_UNREADABLE = 0.1  # What data.max_unreadable is in the configs.
MAX_LISTED = 1000  # Lines of an error.


class Picture(NamedTuple):
    """A decoded example.

    Attributes:
        image: upright RGB.
        index: its number in the source.
        embedding: float16 [T, E] of the caption, where it was asked for and a usable one is there.
        stored: bytes of a file, or uint8 [H, W, 3], as the source has it.
    """

    image: Image.Image
    index: int
    embedding: np.ndarray | None
    stored: bytes | np.ndarray
    label: int
    caption: str | None
    key: str


class Unreadable(NamedTuple):
    """An example that cannot be read, and why."""

    key: str
    reason: str


def read(source: Source, index: int, least=None, text=False) -> Picture | Unreadable:
    """One example, with the embedding of its caption if `text`; `least`: see `decode.upright`."""
    try:
        example = source.read(index)
        image = decode.upright(example.image, least)
    except Exception as error:  # Files break in any way there is.
        return Unreadable(source.key(index), decode.reason(error))
    embedding = None
    if text:
        embedding = source.skipped.usable(source.embedding, index, source.key(index))
    return Picture(image, index, embedding, *example)


def read_ahead(
    source: Source, indices: Iterable[int], function: Callable[[Picture], object], text=False
) -> Iterator:
    """`function(picture)` of each example in order, or its `Unreadable`; read ahead by threads.

    What `function` itself raises is no fault of a file, and is raised.
    """

    def one(index: int):
        found = read(source, index, text=text)
        return found if isinstance(found, Unreadable) else function(found)

    return ahead(one, indices)


def ahead(function: Callable, items: Iterable, waiting: int = 64) -> Iterator:
    """`function(item)` of each item in order, at most `waiting` of them made ahead by threads."""
    pool = concurrent.futures.ThreadPoolExecutor(threads())
    try:
        begun: collections.deque = collections.deque()
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > waiting:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def threads() -> int:
    """As many as cores that this process may use; a few more hide the reading of files."""
    # macOS has no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(max(cores or 1, 4), 32)


class UnreadableCount(dict):
    """{key: reason} of the unreadable examples among `total`; a single one is always allowed."""

    def __init__(self, total: int, share: float = MAX_UNREADABLE):
        super().__init__()
        self._total, self._share = total, share

    def add(self, found: Unreadable) -> None:
        """Counts one and warns of it. Raises as `check`."""
        if found.key not in self:
            self[found.key] = found.reason
            log.warning("unreadable image %d, skipped: %s (%s)", len(self), *found)
        self.check()

    def check(self) -> None:
        """Raises OSError, which lists them, where more than the share are unreadable."""
        if len(self) > max(1, self._share * self._total):
            raise self.error(f"more than {self._share:.1%} (data.max_unreadable)")

    def error(self, which: str) -> OSError:
        lines = [f"  {key} ({reason})" for key, reason in sorted(self.items())]
        return OSError(
            f"Of {self._total} images, {which} could not be read; remove or repair them. "
            f"`flextok data check` names all; these {len(lines)} were met:\n"
            + "\n".join(lines[:MAX_LISTED])
        )


def load_images(paths, size: int) -> np.ndarray:
    """Image files as training and evaluation see them, centre-cropped to a square.

    Upright, transparent ones on white, by the crop that evaluations of ImageNet models use.

    Args:
        paths: one path, or several.
        size: side of the result, in pixels.

    Returns:
        uint8 [N, size, size, 3].

    Raises:
        ValueError: a file is no image that can be read.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)

    def load(path) -> np.ndarray:
        try:
            return transforms.center_crop(decode.upright(as_path(path).read_bytes()), size)
        except Exception as error:  # Files break in any way there is.
            raise ValueError(f"{path} cannot be read: {decode.reason(error)}") from error

    return np.array(list(ahead(load, paths)), np.uint8).reshape(-1, size, size, 3)


def to_pil(images) -> list[Image.Image]:
    """Images of a model as `PIL.Image.Image`, which can be shown and saved.

    Args:
        images: float [N, H, W, 3] in [-1, 1], clipped; or uint8 [N, H, W, 3]; or one without N.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        if images.dtype.kind in "biu":
            raise ValueError(f"images are {images.dtype}: must be uint8, or float in [-1, 1]")
        if not np.isfinite(images).all():
            raise ValueError("the images hold values that are not finite")
        images = to_uint8(images.astype(np.float32))
    return [Image.fromarray(image) for image in (images if images.ndim == 4 else images[None])]
