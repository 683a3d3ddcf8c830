"""Batches on the mesh: of training, and of held-out images."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.parallel.sharding import batch_sharding


def on_mesh(batches: Iterable[dict], mesh: Mesh) -> Iterator[dict]:
    """Batches of this process's images as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    for batch in batches:
        yield {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()
        }


def held_out(data, evaluation, mesh: Mesh) -> Iterator[dict]:
    """The batches with the first `evaluation.num_images` held-out images; "mask" counts no others.

    Args:
        data: the part `data` of a config.
        evaluation: the part `evaluation`: `num_images` and `batch_size`.
        mesh: where they are put.
    """
    size, count = evaluation.batch_size, evaluation.num_images
    pipeline = make_pipeline(data, seed=0, batch_size=size, train=False)

    def masked():
        for index, batch in zip(range(-(-count // size)), pipeline.eval_batches(size)):
            mine = len(batch["mask"])
            places = index * size + jax.process_index() * mine + np.arange(mine)
            yield batch | {"mask": batch["mask"] & (places < count)}

    return on_mesh(masked(), mesh)
