"""Sharding by two tables: parameter path -> logical axes, logical axis -> mesh axis.

A parameter is stored sharded over `fsdp` and `tensor`; a batch over `data` and `fsdp`. The last
dimensions of a kernel are (in, out); stacked blocks have a leading depth axis that is never cut. A
frozen tokenizer ("tokenizer/encoder/...") lies as one that is trained.
"""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. None is replicated.
MESH_AXES = {
    "embed": "fsdp",
    "hidden": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    None: None,
}

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
    (r"ar/blocks/(attn|cross)/w[qkv]/kernel", ("embed", "heads")),
    (r"ar/blocks/(attn|cross)/proj/kernel", ("heads", "embed")),
    (r"ar/blocks/mlp/fc[13]/kernel", ("embed", "hidden")),
    (r"ar/blocks/mlp/fc2/kernel", ("hidden", "embed")),
    (r"ar/(blocks/norm_[123]|blocks/(attn|cross)/[qk]_norm|norm)/scale", ()),
    (r"ar/embed", ("vocab", "embed")),
    (r"ar/head/kernel", ("embed", "vocab")),
    (r"ar/(pos|classes)", (None, "embed")),
    (r"ar/sos", ()),
    (r"ar/text_fc1/kernel", ("embed", "hidden")),
    (r"ar/text_fc2/kernel", ("hidden", "embed")),
    (r"(vae|discriminator|lpips)/.*", ()),
    (r"null_text/.*", ()),  # the embedding of the empty caption
)


def path_string(path) -> str:
    """A key path of jax.tree_util as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str) -> tuple:
    """The logical axes of the parameter at `path` (its last dimensions).

    Raises:
        ValueError: no rule, or more than one, matches.
    """
    path = path.removeprefix("tokenizer/")
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
