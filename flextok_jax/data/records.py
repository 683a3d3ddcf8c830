"""One example as bytes: an image, or what models have made of its crops.

A record is a safetensors blob (no code, no pickle) with

    key         uint8 [n], UTF-8, the name of the example in its source
    label       int32 [], -1 unknown
    caption     uint8 [n], UTF-8, where there is one
    embedding   float16 [T, E], of the caption, where the data set has text
    length      int32 [], of the image's tokens, where they have lengths

and its content, either `image`, uint8 [n], the bytes of an image file, or some of

    tokens      uint16 or uint32 [crops, k]
    moments     float16 [crops, h, w, 2C], mean and log variance of the VAE's posterior
    repa        float16 [crops, P, E], patch features of DINOv2

where crop 0 is the plain one, without randomness.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

NULL_TEXT = "null_text.npy"  # The embedding of the empty caption, in the folder of a data set.


@dataclasses.dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        key: its name, unique in the data set.
        arrays: its content, see above.
        label: the class, -1 unknown.
        caption: None where there is none.
        embedding: float [T, E], of the caption, without padding; None where there is none.
        length: how many of the tokens stand for the image; None: all.
    """

    key: str
    arrays: Mapping[str, np.ndarray]
    label: int = -1
    caption: str | None = None
    embedding: np.ndarray | None = None
    length: int | None = None


def to_bytes(record: Record) -> bytes:
    """A record as it is stored."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in record.arrays.items()}
    arrays["key"] = _from_text(record.key)
    arrays["label"] = np.array(record.label, np.int32)
    if record.caption is not None:
        arrays["caption"] = _from_text(record.caption)
    if record.embedding is not None:
        arrays["embedding"] = np.ascontiguousarray(record.embedding, np.float16)
    if record.length is not None:
        arrays["length"] = np.array(record.length, np.int32)
    return save(arrays)


def from_bytes(data: bytes) -> Record:
    """The inverse of `to_bytes`."""
    from safetensors.numpy import load

    arrays = load(data)
    key, label = _to_text(arrays.pop("key")), int(arrays.pop("label"))
    caption, embedding = arrays.pop("caption", None), arrays.pop("embedding", None)
    caption, length = None if caption is None else _to_text(caption), arrays.pop("length", None)
    return Record(key, arrays, label, caption, embedding, None if length is None else int(length))


def stored_tokens(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Token ids in the smallest of uint16 and uint32 that holds every id.

    Raises:
        ValueError: an id is out of range.
    """
    for wrong in (ids.min(), ids.max()):
        if not 0 <= wrong < vocab_size:
            raise ValueError(f"token id {wrong}: must be in 0..{vocab_size - 1}")
    return ids.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def stored_floats(array: np.ndarray) -> np.ndarray:
    """float16, whose step of 2^-11 of a value is far below the VAE's own noise.

    Raises:
        ValueError: a value is not finite, or too large.
    """
    if not (most := np.abs(array).max()) <= np.finfo(np.float16).max:
        raise ValueError(f"values reach {most:g}, which float16 does not hold")
    return array.astype(np.float16)


def _from_text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def _to_text(array: np.ndarray) -> str:
    return array.tobytes().decode("utf-8", "surrogateescape")
