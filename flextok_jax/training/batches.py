"""Batches on the mesh: of training, and of validation images."""

import logging
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.parallel.sharding import batch_sharding

log = logging.getLogger(__name__)


def on_mesh(batches: Iterable[dict], mesh: Mesh) -> Iterator[dict]:
    """Batches of this process's images as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    for batch in batches:
        yield {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()
        }


class Validation:
    """The first `evaluation.num_images` examples of a validation split.

    Attributes:
        pipeline: of the split.
        count: how many images there are in fact.
    """

    def __init__(self, data, evaluation):
        """Opens them, so that what is missing shows itself before training.

        Args:
            data: the part `data` of a config.
            evaluation: the part `evaluation`: `num_images` and `batch_size`.
        """
        self._size = evaluation.batch_size
        self.pipeline = make_pipeline(data, seed=0, batch_size=self._size, train=False)
        self.count = min(evaluation.num_images, self.pipeline.num_examples)

    def batches(self, mesh: Mesh, detail: str = "") -> Iterator[dict]:
        """Batches on the mesh, with a progress bar; "mask" is true for the images that count."""
        return on_mesh(self._masked(detail), mesh)

    def _masked(self, detail):
        import tqdm

        log.info("evaluating: %d images%s", self.count, detail)
        indices = range(-(-self.count // self._size))
        shown = tqdm.tqdm(
            indices, "evaluating", unit="batch", leave=False,
            disable=None if jax.process_index() == 0 else True,
        )  # fmt: skip
        for index, batch in zip(shown, self.pipeline.eval_batches(self._size)):
            mine = len(batch["mask"])
            rows = index * self._size + jax.process_index() * mine + np.arange(mine)
            yield batch | {"mask": batch["mask"] & (rows < self.count)}
