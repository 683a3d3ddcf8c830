"""A number for each leaf of a tree that changes with any of its bits, for noticing damage.

It is the same for every sharding, on every device and in numpy, and cheap: one pass over the
memory, where the arrays are. It does not protect against intent.
"""

import jax
import jax.numpy as jnp
import numpy as np


def checksum(x):
    """The sum of (2 i + 1) b_i modulo 2^32, where b_i are the bits of element i as an integer.

    Any change of a single element changes it, because odd factors are invertible modulo 2^32; of
    two different arrays chosen at random it is equal with probability 2^-32.

    Args:
        x: an array of elements of at most 4 bytes; numpy or jax (also traced).

    Returns:
        uint32 scalar.
    """
    xp = np if isinstance(x, (np.ndarray, np.generic)) else jnp
    # By axes and not by reshape(-1), which would gather what is sharded.
    index, stride = xp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        along = xp.arange(x.shape[axis], dtype=xp.uint32).reshape(shape)
        index = index + along * xp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(xp.uint32)
    return (bits * (2 * index + 1)).sum(dtype=xp.uint32)


def checksums(tree) -> dict[str, int]:
    """The checksum of each leaf by its path "a/b/c"; leaves of any sharding, or of numpy."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if any(isinstance(leaf, jax.Array) for leaf in leaves.values()):
        values = jax.device_get(_on_device(leaves))
    else:
        values = {name: checksum(leaf) for name, leaf in leaves.items()}
    return {name: int(value) for name, value in values.items()}


@jax.jit
def _on_device(leaves):
    return {name: checksum(leaf) for name, leaf in leaves.items()}


def differing(found: dict[str, int], expected: dict[str, int]) -> list[str]:
    """The paths of `found` whose checksum is not the expected one."""
    return [name for name, value in found.items() if expected.get(name) != value]
