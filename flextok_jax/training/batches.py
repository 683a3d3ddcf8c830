"""Batches on the mesh: of training, and of validation images."""

import itertools
import logging
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.nn.flextok import lengths
from flextok_jax.parallel.sharding import batch_sharding

log = logging.getLogger(__name__)


def on_mesh(batches: Iterable[dict], mesh: Mesh) -> Iterator[dict]:
    """Batches of this process's images as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    for batch in batches:
        yield jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class Validation:
    """The first `evaluation.num_images` examples of a validation split, opened at once."""

    def __init__(self, data, evaluation, **texts):
        """Args: the parts `data` and `evaluation` of a config; `texts` as of `make_pipeline`."""
        self._size = evaluation.batch_size
        self._pipeline = make_pipeline(data, seed=0, batch_size=self._size, train=False, **texts)
        self.count = min(evaluation.num_images, self._pipeline.num_examples)

    def batches(self, mesh: Mesh, detail: str = "") -> Iterator[dict]:
        """Batches on the mesh, with a progress bar; "mask" is true for the images that count."""
        return on_mesh(self._masked(detail), mesh)

    def _masked(self, detail):
        import tqdm

        log.info("evaluating: %d images%s", self.count, detail)
        shown = tqdm.trange(
            -(-self.count // self._size), desc="evaluating", unit="batch", leave=False,
            disable=None if jax.process_index() == 0 else True,
        )  # fmt: skip
        for index, batch in zip(shown, self._pipeline.eval_batches(self._size)):
            mine = len(batch["mask"])
            rows = index * self._size + jax.process_index() * mine + np.arange(mine)
            yield batch | {"mask": batch["mask"] & (rows < self.count)}


def bins(num_tokens: int) -> dict[str, slice]:
    """The positions 1, 2, 3-4, 5-8, ..., of which metrics are separate: {"3-4": slice(2, 4)}."""
    edges = (0, *lengths(num_tokens))
    return {
        f"{low + 1}-{high}" if high > low + 1 else f"{high}": slice(low, high)
        for low, high in itertools.pairwise(edges)
    }
