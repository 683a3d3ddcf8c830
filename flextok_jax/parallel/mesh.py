"""The device mesh: three integers, `data`, `fsdp` and `tensor`."""

import contextlib
import importlib.metadata
import logging

import jax
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "tensor")
# How products of float32 matrices are computed unless the highest precision is asked for.
PRECISION = {"gpu": "tensorfloat32", "tpu": "bfloat16"}
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")

log = logging.getLogger(__name__)


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


def mesh_context(mesh: jax.sharding.Mesh | None):
    """`jax.set_mesh`; without a mesh a context that changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


# Without them the compiler cuts matrix products into pieces as small as a device's part of the
# weights, to overlap them with their gathering: the pieces fill a fraction of the matrix units.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def platform(mesh: jax.sharding.Mesh | None) -> str:
    """The platform of the mesh's devices, or of the default device: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Options of `jax.stages.Lowered.compile` for these devices."""
    return TPU_OPTIONS if platform(mesh) == "tpu" else {}


def describe(mesh: jax.sharding.Mesh | None = None, dtype="float32") -> str:
    """One line about the devices: "8 x NVIDIA H100 (gpu), mesh data=8, bfloat16".

    The first line of training and of every long command. A warning is logged where a CPU is used
    although JAX's CUDA plugin is installed and nobody asked for the CPU.

    Args:
        mesh: of the run; None: the default device alone.
        dtype: the compute type of the networks.
    """
    where = platform(mesh)
    devices = list(mesh.devices.flat) if mesh else jax.local_devices()[:1]
    if where == "cpu" and not jax.config.jax_platforms and any(map(_installed, CUDA_PLUGINS)):
        log.warning("running on the CPU, although JAX's CUDA plugin is installed: no GPU was found")
    kind = devices[0].device_kind
    parts = [f"{len(devices)} x {kind}" + (f" ({where})" if kind != where else "")]
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1] if mesh else []
    parts += [f"mesh {' '.join(sizes)}"] if sizes else []
    dtype = str(jax.numpy.dtype(dtype))
    precision = jax.config.jax_default_matmul_precision or PRECISION.get(where)
    inexact = dtype == "float32" and precision not in (None, "float32", "highest")
    return ", ".join([*parts, dtype + (f" (matrix products in {precision})" if inexact else "")])


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
