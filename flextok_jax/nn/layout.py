"""Where arrays lie on a mesh: two tables, parameter path -> logical axes -> mesh axes.

A parameter is stored sharded over `fsdp` and `tensor`; a batch over `data` and `fsdp`. The last
dimensions of a kernel are (in, out); stacked blocks have a leading depth axis that is never cut. A
frozen tokenizer ("tokenizer/encoder/...") lies as one that is trained.

Networks use the second half while they are traced: it does nothing where no mesh is set.
"""

import functools
import re

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")

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
    (r"(repa/fc[13]|dinov2/blocks/(query|key|value|fc1))/kernel", ("embed", "hidden")),
    (r"(repa/fc2|dinov2/blocks/(proj|fc2))/kernel", ("hidden", "embed")),
    (r"dinov2/(patch_emb/kernel|pos)", (None, "embed")),
    (r"(repa|dinov2)/(.*/bias|.*/scale|blocks/scale[12]|cls)", ()),
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


def param_spec(path: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The partition of one parameter; an axis that does not divide evenly stays whole."""
    axes = logical_axes(path)
    axes = (None,) * (len(shape) - len(axes)) + axes
    spec = []
    for size, axis in zip(shape, axes):
        mesh_axis = MESH_AXES[axis]
        fits = mesh_axis is not None and size % mesh.shape[mesh_axis] == 0
        spec.append(mesh_axis if fits else None)
    return PartitionSpec(*spec)


def batch_first(x: jax.Array) -> jax.Array:
    """`x` [B, ...] with the batch spread over the devices; as it is where no mesh is set.

    Parameters lie along the same devices as the batch. Without this the compiler may spread an
    activation's channels instead, and then every device keeps the whole batch.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather(params, prefix: str, dtype):
    """The parameters of one block as it computes with them: in `dtype`, whole along `fsdp`.

    They travel between devices in `dtype`, and the sums of their gradients are scattered as they
    are made, so no device holds a whole gradient of more than one block. Without a mesh, and of
    vectors, only the type changes.

    Args:
        params: a block's tree, one layer of the stack.
        prefix: its path, such as "decoder/blocks".
        dtype: the compute type.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one(path, x):
        x = x.astype(dtype)
        if mesh.empty or x.ndim < 2:
            return x
        return _gather(param_spec(f"{prefix}/{path_string(path)}", x.shape, mesh), x)

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    # First the spec it has: what is cast is a device's part, before it travels.
    x = jax.lax.with_sharding_constraint(x, spec)
    return jax.lax.with_sharding_constraint(x, whole)


_gather.defvjp(
    lambda spec, x: (_gather(spec, x), None),
    lambda spec, _, grad: (jax.lax.with_sharding_constraint(grad, spec),),
)
