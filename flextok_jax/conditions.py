"""Conditions: what samples are generated from. Labels, texts or nothing, in one object.

A generator, the commands and the evaluation carry it and never ask what is inside.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from flextok_jax.nn import generation
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """One condition per sample, B of them.

    Attributes:
        labels: int32 [B], classes; None for texts.
        text: float32 [B, T, E], embeddings of a text encoder; None for labels.
        text_mask: bool [B, T], False at padding.
        names: B words for a person: the names of classes, or the prompts. Without labels and text
            they alone say how many samples there are, of a model without conditions.
    """

    labels: np.ndarray | None = None
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.labels is not None and self.text is not None:
            raise ValueError("conditions are labels or texts: give one of them")
        if self.names and len(self.names) != len(self):
            raise ValueError(f"{len(self.names)} names of {len(self)} conditions")

    def __len__(self) -> int:
        given = (x for x in (self.labels, self.text, self.names) if x is not None)
        return len(next(given))

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


def of_nothing(count: int) -> Conditions:
    """`count` samples of a model without conditions."""
    return Conditions(names=("",) * count)


def of_text(embeddings, mask, prompts: Sequence[str] = ()) -> Conditions:
    """Embeddings [B, T, E] of texts, and which of their positions [B, T] are no padding."""
    return Conditions(
        text=np.asarray(embeddings, np.float32),
        text_mask=np.asarray(mask, bool),
        names=tuple(prompts),
    )


def check_labels(cfg: ARConfig, labels) -> np.ndarray:
    """int32 [B]: labels of a class-conditional model. Raises ValueError for what is none."""
    labels = np.asarray(labels)
    if not cfg.num_classes:
        raise ValueError("not a class-conditional model: labels must be None")
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}: must be integers [B], B >= 1"
        )
    wrong = labels[(labels < 0) | (labels >= cfg.num_classes)]
    if wrong.size:
        raise ValueError(f"label {wrong[0]}: must be in 0..{cfg.num_classes - 1}")
    return labels.astype(np.int32)


def check_text(cfg: ARConfig, text, mask, name: str, mask_name: str) -> ARCondition:
    """The condition that embeddings are. Raises ValueError, with these names, for what is none."""
    text = np.asarray(text, np.float32)
    if text.ndim != 3 or not text.size or text.shape[2] != cfg.text_dim:
        raise ValueError(f"{name} have shape {text.shape}: must be [B, T, {cfg.text_dim}]")
    if not np.isfinite(text).all():
        raise ValueError(f"{name} hold values that are not finite")
    mask = np.ones(text.shape[:2], bool) if mask is None else np.asarray(mask)
    if mask.shape != text.shape[:2] or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{mask_name} is {mask.dtype} of shape {mask.shape}: must be bool or 0/1 of shape "
            f"{text.shape[:2]}"
        )
    if not mask.any(axis=1).all():
        raise ValueError(f"{mask_name}: row {mask.any(axis=1).argmin()} is padding only")
    return ARCondition(text=text, text_mask=mask.astype(bool))


def condition_of(cfg: ARConfig, labels, text, mask, batch: int | None) -> tuple[ARCondition, int]:
    """The checked condition of `batch` (None: its own number of) sequences, and how many."""
    if cfg.text_dim:
        if labels is not None or text is None:
            raise ValueError(
                "a text model: give text (with a text encoder) or text_embeddings, no labels"
            )
        condition = check_text(cfg, text, mask, "text_embeddings", "text_mask")
        found = len(condition.text)
        if found == 1 and batch is not None:
            return generation.repeat(condition, batch), batch
    else:
        if text is not None or mask is not None:
            raise ValueError("not a text model: text_embeddings and text_mask mean nothing")
        if labels is None:
            found = 1 if batch is None else batch
            condition = ARCondition()
            if cfg.num_classes:
                condition = ARCondition(np.full(found, -1, np.int32))
        else:
            condition = ARCondition(check_labels(cfg, labels))
            found = len(condition.labels)
    if batch not in (None, found):
        raise ValueError(f"{found} conditions and {batch} token sequences: must be as many")
    return condition, found


def null_condition_of(cfg: ARConfig, batch: int, text, mask) -> ARCondition:
    """The null condition of `batch` sequences; of a text model, its embeddings are given."""
    if not cfg.text_dim or cfg.channels:
        if text is not None or mask is not None:
            kind = "a flow" if cfg.channels else "not a text model"
            raise ValueError(f"{kind}: null_embeddings and null_mask mean nothing, give none")
        return ARCondition(np.full(batch, -1, np.int32))
    if text is None:
        raise ValueError(
            "guidance of a text model needs null_embeddings and null_mask, of the empty "
            "prompt; guidance_scale=1 does without"
        )
    null = check_text(cfg, text, mask, "null_embeddings", "null_mask")
    if len(null.text) not in (1, batch):
        raise ValueError(f"null_embeddings of {len(null.text)} prompts: must be 1")
    return generation.repeat(null, batch) if len(null.text) == 1 else null
