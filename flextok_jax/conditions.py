"""Conditions: what samples are generated from. Labels or texts in one object.

A generator, the commands and the evaluation carry it and never ask what is inside.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """One condition per sample, B of them.

    Attributes:
        labels: int32 [B], classes; None for texts.
        text: float32 [B, T, E], embeddings of a text encoder; None for labels.
        text_mask: bool [B, T], False at padding.
        names: B words for a person: the names of classes, or the prompts.
    """

    labels: np.ndarray | None = None
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.labels is None) == (self.text is None):
            raise ValueError("conditions are labels or texts: give one of them")
        if self.names and len(self.names) != len(self):
            raise ValueError(f"{len(self.names)} names of {len(self)} conditions")

    def __len__(self) -> int:
        return len(self.labels if self.text is None else self.text)

    def take(self, rows) -> "Conditions":
        """The conditions of some samples, in that order.

        Args:
            rows: a slice, or ints [n].
        """
        rows = np.arange(len(self))[rows]

        def part(array):
            return None if array is None else array[rows]

        names = tuple(self.names[row] for row in rows) if self.names else ()
        return Conditions(part(self.labels), part(self.text), part(self.text_mask), names)


def of_labels(labels, class_names: Sequence[str] = ()) -> Conditions:
    """Classes.

    Args:
        labels: int [B].
        class_names: of class 0, 1, …; without them, a class is named "class 3".
    """
    labels = np.asarray(labels, np.int32)
    names = (class_names[i] if class_names else f"class {i}" for i in labels.tolist())
    return Conditions(labels, names=tuple(names))


def of_text(embeddings, mask, prompts: Sequence[str] = ()) -> Conditions:
    """Embeddings [B, T, E] of texts, and which of their positions [B, T] are no padding."""
    return Conditions(
        text=np.asarray(embeddings, np.float32),
        text_mask=np.asarray(mask, bool),
        names=tuple(prompts),
    )
