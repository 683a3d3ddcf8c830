"""The device mesh: three integers, `data`, `fsdp` and `tensor`."""

import jax
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """A mesh with axes (data, fsdp, tensor).

    Args:
        data, fsdp, tensor: devices along each axis; at most one may be -1: what is left.
        devices: the devices to use, all of them by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or `data` is not a multiple
            of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
        known = len(devices)
    if min(sizes) < 1 or known != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: "
            "the three must multiply to that number (one of them may be -1)"
        )
    auto = (jax.sharding.AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(
                f"mesh data={sizes[0]} must be a multiple of the {slices} slices: only gradients "
                "should travel between them"
            )
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(grid, AXES, axis_types=auto)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


# Without them the compiler cuts matrix products into pieces as small as a device's part of the
# weights, to overlap them with their gathering: the pieces fill a fraction of the matrix units.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def platform(mesh: jax.sharding.Mesh | None) -> str:
    """Of its devices, without a mesh of the default one: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What `jax.stages.Lowered.compile` is to be told for these devices."""
    return TPU_OPTIONS if platform(mesh) == "tpu" else {}
