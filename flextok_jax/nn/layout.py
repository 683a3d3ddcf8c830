"""Where arrays lie on a mesh. A parameter's axes are said beside its initialiser.

    self.param("kernel", layout.axes(xavier, "embed", "hidden"), (width, hidden))

`init` functions return each such parameter in a box, `Axes`, with the names of its dimensions; an
array without a box is replicated. `MESH_AXES` maps the names to the axes of a mesh. Parameters are
stored sharded over `fsdp` and `tensor`, a batch over `data` and `fsdp`.

The last two functions are for networks while they are traced: they do nothing where no mesh is set.
"""

import functools
from collections.abc import Callable

import flax
import jax
from flax.core import meta
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")

# Name of a dimension -> mesh axis. None is replicated.
MESH_AXES = {
    "embed": "fsdp",
    "hidden": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    None: None,
}


class Axes(flax.struct.PyTreeNode, meta.AxisMetadata):
    """An array and the names of its dimensions, one of MESH_AXES for each.

    Attributes:
        value: the array, or its shape.
        names: as many as `value` has dimensions.
    """

    value: jax.Array
    names: tuple = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self.replace(names=(*self.names[:index], None, *self.names[index:]))

    def remove_axis(self, index, params):
        return self.replace(names=(*self.names[:index], *self.names[index + 1 :]))


def axes(initializer: Callable, *names: str | None) -> Callable:
    """The initialiser of a parameter whose dimensions have these names."""
    return lambda *args, **kwargs: Axes(initializer(*args, **kwargs), names)


def is_box(x) -> bool:
    """Whether `x` is an array with its axes: the leaves of a tree of parameters."""
    return isinstance(x, Axes)


def unbox(tree):
    """The arrays (or shapes) alone."""
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def box(params, like):
    """`params` (arrays) in the boxes of a tree `like` it."""
    return jax.tree.map(
        lambda b, x: b.replace(value=x) if is_box(b) else x, like, params, is_leaf=is_box
    )


def whole(tree):
    """A tree without boxes in boxes that keep every array whole on each device."""
    return jax.tree.map(lambda x: Axes(x, (None,) * x.ndim), tree)


def path_string(path) -> str:
    """A key path of jax.tree_util as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(x, mesh) -> PartitionSpec:
    """The partition of one parameter, a box or an array.

    A dimension that the mesh axis does not divide stays whole.
    """
    if not is_box(x):
        return PartitionSpec()
    return named_spec(x.names, x.value.shape, mesh)


def named_spec(names: tuple, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The partition of an array of this shape whose dimensions have these names."""
    if len(names) != len(shape):
        raise ValueError(f"axes {names} of a parameter of shape {shape}: one name per dimension")
    mesh_axes = (MESH_AXES[name] for name in names)
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(shape, mesh_axes)
        )
    )


def batch_first(x: jax.Array) -> jax.Array:
    """`x` [B, ...] with the batch spread over the devices; as it is where no mesh is set.

    Parameters lie along the same devices as the batch. Without this the compiler may spread an
    activation's channels instead, and then every device keeps the whole batch.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather(params, like, dtype):
    """The parameters of one block as it computes with them: in `dtype`, whole along `fsdp`.

    They travel between devices in `dtype`, and the sums of their gradients are scattered as they
    are made, so no device holds a whole gradient of more than one block. Without a mesh, and of
    vectors, only the type changes.

    Args:
        params: a tree of arrays, of one layer of a stack.
        like: the same tree with boxes, which say the axes.
        dtype: the compute type.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one(box, x):
        x = x.astype(dtype)
        if mesh.empty or x.ndim < 2 or not is_box(box):
            return x
        return _gather(named_spec(box.names, x.shape, mesh), x)

    return jax.tree.map(one, like, params, is_leaf=is_box)


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
