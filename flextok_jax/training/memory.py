"""The memory of a training step, known before it is compiled, and what to do where it lacks."""

import contextlib
import logging
import math
import os

import jax
import jax.extend.core as core
from jax.sharding import Mesh

from flextok_jax.parallel.mesh import platform
from flextok_jax.parallel.sharding import local_bytes

GB = 1e9
CLEARLY = 1.3  # Above the largest error of the estimate.
REMEDIES = (
    "Set a smaller batch_size or a larger optim.accumulate (the same batch in parts), "
    "compute.remat=full (which computes more and keeps less), a smaller data.image_size or a "
    "larger model.sites.patch_size, smaller widths and depths, or mesh.fsdp on several devices"
)

log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """A run needs more memory than there is; the message says how much, and what to set."""


def check(shapes, mesh: Mesh, jaxpr: core.ClosedJaxpr | None = None) -> None:
    """Compares what a step needs of each device with what there is.

    The state is known exactly. What passes between operations is as the program is written: 2 %
    above what XLA allocates on a CPU for configs/tokenizer.py:folder_gpu, 25 % for folder. So more
    than there is gives a warning; a CPU's system would end the process, so that CLEARLY more stops
    the run.

    Args:
        shapes: of the training state, with shardings.
        mesh: of the run.
        jaxpr: of the step; None: the state alone is checked.

    Raises:
        OutOfMemory: it needs more.
    """
    kept = sum(map(local_bytes, jax.tree.leaves(shapes)))
    passing = peak(jaxpr.jaxpr) // mesh.size if jaxpr else 0
    need, there = kept + passing, available()
    said = f"{need / GB:.2f} GB of each device, {kept / GB:.2f} for the model and its optimizer"
    if there and need > there:
        lack = f"a training step needs about {said}, and there are {there / GB:.2f}. {REMEDIES}"
        if kept > there or need > CLEARLY * there and platform(mesh) == "cpu":
            raise OutOfMemory(lack)
        log.warning("%s", lack)
    elif jaxpr:
        has = f"; there are {there / GB:.1f} GB" if there else ""
        log.info("memory: a step needs about %s%s", said, has)


def peak(jaxpr: core.Jaxpr) -> int:
    """The most bytes that lie between the operations of a program at once, without its arguments.

    As it is written: a compiler joins operations, and then some of these arrays never exist.
    """
    last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    alive, most, given = 0, 0, {*jaxpr.invars, *jaxpr.constvars}
    for i, eqn in enumerate(jaxpr.eqns):
        programs = [x for value in eqn.params.values() for x in _programs(value)]
        inside = max(map(peak, programs), default=0)
        made = sum(map(_size, eqn.outvars))
        # The results of a loop lie beside what one round needs; those of a call are part of it.
        both = made + inside if eqn.primitive.name == "scan" else max(made, inside)
        most = max(most, alive + both)
        alive += made
        done = {v for v in (*_variables(eqn.invars), *eqn.outvars) if last.get(v, i) == i} - given
        alive -= sum(map(_size, done))
    return most


def available() -> int | None:
    """Bytes that a device of this process has; None: it does not say.

    Devices of one CPU share the machine's memory.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit")


@contextlib.contextmanager
def explained():
    """Turns XLA's error of a lack of memory into OutOfMemory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason, there = str(error).partition("RESOURCE_EXHAUSTED: ")[2].split("\n")[0], available()
        has = f" Each device has {there / GB:.2f} GB." if there else ""
        raise OutOfMemory(f"out of memory: {reason}{has} {REMEDIES}") from error


def _variables(values) -> list:
    return [x for x in values if isinstance(x, core.Var)]


def _programs(value) -> list[core.Jaxpr]:
    """The jaxprs in one parameter of an operation."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    found = (getattr(x, "jaxpr", x) for x in values)
    return [x for x in found if isinstance(x, core.Jaxpr)]


def _size(var) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)
