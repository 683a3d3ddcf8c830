"""Validation images on the mesh: exactly the first ones, whatever the batch size."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_training_state import get_config

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training.batches import Validation


@pytest.mark.parametrize("size, count, batches", [(16, 20, 2), (8, 16, 2), (160, 20, 1)])
def test_as_many_images_count_as_are_asked_for(size, count, batches):
    data, evaluation = get_config().data, ConfigDict(dict(num_images=count, batch_size=size))
    found = list(Validation(data, evaluation).batches(make_mesh()))
    assert len(found) == batches and all(len(batch["mask"]) == size for batch in found)
    counted = np.concatenate([np.array(b["image"])[np.array(b["mask"])] for b in found])
    pipeline = make_pipeline(data, seed=0, batch_size=count, train=False)
    np.testing.assert_array_equal(counted, next(pipeline.eval_batches(count))["image"])


def test_more_images_than_there_are_count_once():
    data, evaluation = get_config().data, ConfigDict(dict(num_images=1000, batch_size=160))
    assert Validation(data, evaluation).count == 297
    masks = [np.array(batch["mask"]) for batch in Validation(data, evaluation).batches(make_mesh())]
    assert np.concatenate(masks).sum() == 297
