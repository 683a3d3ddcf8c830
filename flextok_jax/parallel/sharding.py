"""The tables of `nn.layout` applied: trees of shardings, and batches put on a mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flextok_jax.nn.layout import BATCH_AXES, param_spec, path_string


def param_shardings(mesh: Mesh, params):
    """A tree of NamedSharding like `params` (arrays or shapes)."""

    def of(path, leaf):
        return NamedSharding(mesh, param_spec(path_string(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (batch) dimension cut over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread_batch(mesh: Mesh | None, batch):
    """A tree of arrays [B, ...] on the mesh, cut by `batch_sharding`.

    It is filled up with copies of the last element to a multiple of the devices. Without a mesh it
    stays as it is.
    """
    if mesh is None:
        return batch
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def place(array):
        size = array.shape[0]
        rows = np.minimum(np.arange(size + -size % shards), size - 1)
        return jax.device_put(array[rows], batch_sharding(mesh))

    return jax.tree.map(place, batch)
