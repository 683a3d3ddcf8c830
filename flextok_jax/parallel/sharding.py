"""Sharding by two tables: parameter path -> logical axes, logical axis -> mesh axis.

A parameter is stored sharded over `fsdp` and `tensor`; a batch over `data` and `fsdp`. The last
dimensions of a kernel are (in, out); stacked blocks have a leading depth axis that is never cut.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. None is replicated.
MESH_AXES = {"embed": "fsdp", "hidden": "tensor", "heads": "tensor", None: None}

# (pattern over the whole path, logical axes of the LAST dimensions). Exactly one pattern matches
# each parameter; leading dimensions that are not named are replicated.
PARAMETER_RULES = (
    (r"(encoder|decoder)/blocks/attn/w[qkv]/kernel", ("embed", "heads")),
    (r"(encoder|decoder)/blocks/attn/proj/kernel", ("heads", "embed")),
    (r"(encoder|decoder)/blocks/mlp/fc[13]/kernel", ("embed", "hidden")),
    (r"(encoder|decoder)/blocks/mlp/fc2/kernel", ("hidden", "embed")),
    (r"decoder/blocks/adaln/kernel", ("embed", "hidden")),
    (r"decoder/blocks/adaln/bias", ("hidden",)),
    (r"decoder/head_adaln/kernel", ("embed", "hidden")),
    (r"decoder/head_adaln/bias", ("hidden",)),
    (r"decoder/time_mlp_[01]/kernel", (None, "embed")),
    (r"(encoder|decoder)/(patch_emb|register_proj)/kernel", (None, "embed")),
    (r"(encoder|decoder)/head/kernel", ("embed", None)),
    (r"(encoder|decoder)/(patch_emb|head|register_proj|time_mlp_[01])/bias", ()),
    (r"(encoder|decoder)/(sincos|registers|register_pos)", ()),
    (r"decoder/(mask|null)", ()),
    (r"vae/.*", ()),
)


def path_string(path) -> str:
    """A key path of jax.tree_util as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str) -> tuple:
    """The logical axes of the parameter at `path` (its last dimensions).

    Raises:
        ValueError: no rule, or more than one, matches.
    """
    hits = [axes for pattern, axes in PARAMETER_RULES if re.fullmatch(pattern, path)]
    if len(hits) != 1:
        raise ValueError(f"{len(hits)} sharding rules match the parameter {path!r}; need exactly 1")
    return hits[0]


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter; an axis that does not divide evenly stays whole."""
    axes = logical_axes(path)
    axes = (None,) * (len(shape) - len(axes)) + axes
    spec = []
    for size, axis in zip(shape, axes):
        mesh_axis = MESH_AXES[axis]
        fits = mesh_axis is not None and size % mesh.shape[mesh_axis] == 0
        spec.append(mesh_axis if fits else None)
    return PartitionSpec(*spec)


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
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
