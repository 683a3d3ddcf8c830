"""Batches of what models made of images before: tokens, latents, features."""

import dataclasses

import numpy as np

from flextok_jax.data.decode import reason
from flextok_jax.data.reader import Unreadable


@dataclasses.dataclass(frozen=True)
class Crops:
    """How records become a batch (as `pipeline.Images`): one crop of each image.

    A batch holds the arrays of `names`, [B, ...] each ("tokens" int32, all others float16),
    "label" int32 [B], and for a data set with text "text" float16 [B, T, E], "text_mask" bool
    [B, T].

    It is a random crop, or crop 0, the plain one. `names` are the arrays that are wanted, `text` is
    (T, E) or None.
    """

    names: tuple[str, ...]
    text: tuple[int, int] | None
    random: bool = True
    num_draws = 1

    @classmethod
    def of(cls, kind: str, source) -> "Crops":
        """The tokens of a `shards.ShardSource`, or all its other arrays ("encoded")."""
        arrays = source.manifest["arrays"]
        names = tuple(name for name in arrays if (name == "tokens") == (kind == "tokens"))
        if not names:
            raise ValueError(f"data.source is {kind!r}, but the data has {', '.join(arrays)} only")
        return cls(names, source.text)

    def without_randomness(self) -> "Crops":
        return dataclasses.replace(self, random=False)

    def read(self, source, index: int, draws: np.ndarray) -> dict | Unreadable:
        try:
            record = source.record(index)
        except Exception as error:  # A damaged file breaks in any way there is.
            return Unreadable(source.key(index), reason(error))
        out = {"label": np.int32(record.label)}
        for name in self.names:
            crops = record.arrays[name]
            crop = crops[int(draws[0] * len(crops)) if self.random else 0]
            out[name] = crop.astype(np.int32 if name == "tokens" else np.float16)
        return out if self.text is None else out | padded_text(record.embedding, self.text)

    def augment(self, batch: dict, draws: np.ndarray) -> dict:
        return batch


def padded_text(embedding: np.ndarray | None, shape: tuple[int, int]) -> dict:
    """ "text": float16 [T, E] and "text_mask": bool [T]; longer ones are cut; None: all padding."""
    text, count = np.zeros(shape, np.float16), 0
    if embedding is not None:
        count = min(len(embedding), shape[0])
        text[:count] = embedding[:count]
    return {"text": text, "text_mask": np.arange(shape[0]) < count}
