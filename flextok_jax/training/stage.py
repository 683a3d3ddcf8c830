"""A stage: what is trained. The loop knows this interface and nothing else of a stage."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from clu import metrics

Params = dict[str, Any]  # Nested dictionaries of arrays.
Batch = dict[str, jax.Array]  # Leading dimension: images. Pixels are still uint8.
Evaluator = Callable[[Params, Params, jax.sharding.Mesh], Iterator[tuple[str, float]]]


class Stage(Protocol):
    """Pure functions over parameter trees; a stage holds its configuration and no arrays."""

    model: Any  # The network's configuration, a dataclass of nn/*_config.py.
    # What becomes of a caption in a batch (see data/pipeline.py); None: captions are not used.
    captions: Callable[[str | None], dict] | None = None
    # (T, E) of the embeddings of captions in a batch; None: they are not used.
    embedding: tuple[int, int] | None = None

    def init(self, key: jax.Array) -> Params:
        """The float32 parameters at the start, in boxes that say their axes (nn/layout.py)."""

    def init_from(self, source: str) -> Params:
        """The same tree, without boxes, from what `config.init_from` names."""

    def load_frozen(self) -> Params:
        """Networks that are used but not trained: an argument of every step, never saved."""

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, metrics.Metric]]:
        """The mean loss over the batch (float32 scalar), and what to log, as mergeable metrics.

        All randomness comes from `key` and from what `draw` put into the batch; `step` is the
        number of batches consumed before. A stage with `lengths` also takes `length`, one of them.
        """

    def draw(self, key: jax.Array, rank: jax.Array) -> Batch:
        """What is sampled for every image, [B, ...] each, before the batch is cut into groups.

        Args:
            rank: int32 [B], a permutation of 0 .. B - 1 (see training/groups.py).
        """
        return {}

    def lengths(self, count: int) -> tuple[int | None, ...]:
        """How long sequences are in each of `count` groups of images, cut by rank; None: equal."""
        return (None,) * count

    def trainable(self, path: str) -> bool:
        """False for a parameter ("a/b/c") that is never trained, decayed or averaged."""
        return True

    def measure(self, params: Params, frozen: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """What is measured of the averaged parameters and saved beside them."""
        return {}

    def evaluators(self) -> dict[str, Evaluator]:
        """Name -> function of (averaged parameters, frozen, mesh) that yields (metric, value).

        Opens what the evaluators read: it is called before the first step.
        """

    def export_config(self) -> dict[str, Any]:
        """The model in JSON terms: enough to rebuild it for inference."""
