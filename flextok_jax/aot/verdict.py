"""The TPU compiler's verdict on a program: memory, collectives, estimated time and MFU.

All of it is the compiler's estimate; nothing ran.
"""

import math
import time

import jax

from flextok_jax.aot import hlo, programs
from flextok_jax.aot.chips import Topology
from flextok_jax.parallel.mesh import compiler_options, make_mesh


class DoesNotFit(RuntimeError):
    """The program needs more memory than a chip has; the message says how much."""


def verdict(name: str, config, topology: Topology) -> tuple[dict, str]:
    """Compiles a program of a configuration for a topology.

    Args:
        name: one of `programs.PROGRAMS`.
        config: a ConfigDict; `config.mesh` lies over the topology's devices.
        topology: see `chips.topology`.

    Returns:
        The text of the compiled program, after a dictionary that JSON takes:
            program, topology, chips, mesh, versions;
            compile_seconds;
            memory: bytes per chip by kind, "total" and "chip" (what there is);
            model_flops: of one call on all chips, or None;
            collectives: {kind: {count, bytes}} per device and call, not part of the time;
            collectives_seconds: their bytes over the rate of the interconnect inside a slice, also
                of those between slices;
            kernels: Pallas calls per call;
            open_loops: loops that were counted once, since data decides how often they run;
            seconds: estimated time of a call, kernels by their roofline;
            seconds_without_kernels: the same without them;
            mfu, mfu_without_kernels: model_flops over peak and time, or None.

    Raises:
        DoesNotFit: there is not enough memory.
        ValueError: sizes that do not fit each other.
    """
    import libtpu

    mesh, chip = make_mesh(**config.mesh, devices=topology.devices), topology.chip
    program = programs.make(name, config, mesh)
    with jax.set_mesh(mesh):
        lowered = program.lower()
        begin = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options=compiler_options(mesh))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).split("RESOURCE_EXHAUSTED: ")[1].splitlines()[0]
            raise DoesNotFit(reason) from error
        seconds = time.perf_counter() - begin
    text = compiled.as_text()
    found = list(hlo.instructions(text))
    kernels = hlo.kernels(found)
    cycles = sum(instruction.cycles for instruction in found)
    of_kernels = sum(_kernel_cycles(kernel, chip) for kernel in kernels)
    exchanged = hlo.collectives(found)
    numbers = {
        "program": name,
        "topology": topology.name,
        "chips": topology.num_chips,
        "mesh": dict(mesh.shape),
        "versions": {"jax": jax.__version__, "libtpu": libtpu.__version__},
        "compile_seconds": seconds,
        "memory": _memory(program.state, compiled, chip),
        "model_flops": program.flops,
        "collectives": exchanged,
        "collectives_seconds": sum(row["bytes"] for row in exchanged.values()) / chip.interconnect,
        "kernels": sum(kernel.times for kernel in kernels),
        "open_loops": hlo.open_loops(found),
        "seconds": (cycles + of_kernels) / chip.clock,
        "seconds_without_kernels": cycles / chip.clock,
        "mfu": _mfu(program.flops, cycles + of_kernels, topology),
        "mfu_without_kernels": _mfu(program.flops, cycles, topology),
    }
    return numbers, text


def _mfu(flops, cycles, topology):
    if flops is None:
        return None
    return flops / (len(topology.devices) * topology.chip.flops_per_cycle * cycles)


def _kernel_cycles(kernel: hlo.Kernel, chip) -> float:
    """A roofline: head_dim fills that part of a matrix unit's side, and never counts as over half;
    or the memory's rate, if that is slower."""
    share = min(0.5, (kernel.head_dim or chip.mxu) / chip.mxu)
    compute = kernel.flops / (share * chip.flops_per_cycle)
    return kernel.times * max(compute, kernel.bytes / chip.bandwidth * chip.clock)


def _memory(state, compiled, chip) -> dict[str, int]:
    """Bytes per chip."""

    def local(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    kinds = {"parameters": local(state)}
    if hasattr(state, "opt_state"):
        kinds = {
            "parameters": local(state.params),
            "averages": local(state.ema),
            "optimizer": local(state.opt_state),
        }
    kinds["other arguments"] = max(0, arguments - sum(kinds.values()))
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    kinds["results"] = max(0, fresh)
    kinds["temporaries"] = analysis.temp_size_in_bytes
    kinds["program"] = analysis.generated_code_size_in_bytes
    return kinds | {"total": sum(kinds.values()), "chip": chip.memory}
