"""Trees of shardings from the axes that parameters carry, and batches put on a mesh."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flextok_jax.nn import layout
from flextok_jax.nn.layout import BATCH_AXES


def param_shardings(mesh: Mesh, params):
    """A tree of NamedSharding, one for each parameter.

    Args:
        params: boxes with axes (see `nn.layout`), of arrays or shapes; what is in no box is
            replicated.
    """
    return jax.tree.map(
        lambda x: NamedSharding(mesh, layout.spec(x, mesh)), params, is_leaf=layout.is_box
    )


def place(mesh: Mesh | None, params, like):
    """Parameters on the devices.

    Args:
        mesh: None: the default device.
        params: a tree of arrays.
        like: the same tree with boxes, which say the axes.
    """
    if mesh is None:
        return jax.device_put(params)
    return jax.device_put(params, param_shardings(mesh, like))


def placed(tree, shardings):
    """The shapes of `tree` (`jax.ShapeDtypeStruct`) with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def local_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part of an array with a sharding."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """`size` rows, filled up with copies of the last one: one program serves every batch."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), mode="edge")


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
