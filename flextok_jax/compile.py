"""Memory, exchange between chips and speed of a training step, as the TPU compiler estimates them:

python -m flextok_jax.compile --config=configs/tokenizer.py:d18_d28 --topology=v5e:4x4 \
    [--config.mesh.fsdp=16] [--config.KEY=VALUE ...]

No TPU is needed, only its compiler (`pip install libtpu`, Linux). Kinds: v4, v5e, v5p, v6e;
"2*v5e:8x8" is two slices. The step of a tokenizer takes moments of the VAE, that of an AR model
tokens, both made before (64 000 ids, 256 tokens and 1000 classes, unless `model` says otherwise);
that of a VAE takes images. Exit code 1: it does not fit.

The compiler estimates the cycles of each fusion. The body of a loop is printed once and counts as
often as the loop runs (once where the program does not say how often). Pallas kernels have no
estimate and enter by their roofline; waiting for other chips is not in the time.
"""

import collections
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh

from flextok_jax import config_flag
from flextok_jax.nn.layout import unbox
from flextok_jax.parallel.mesh import compiler_options, make_mesh
from flextok_jax.parallel.sharding import batch_sharding, local_bytes, param_shardings, placed

_TOPOLOGY = flags.DEFINE_string("topology", None, "KIND:AxB, such as v5e:4x4")

GIB, GB = 2**30, 1e9
TEXT_LENGTH = 128  # positions of a text embedding


class Chip(NamedTuple):
    """One kind of TPU (cloud.google.com/tpu/docs, "system architecture" of each version).

    Bytes of HBM, bfloat16 FLOP/s, bytes/s of the HBM and to the other chips of the slice, side of a
    matrix unit, and FLOPs per cycle of all matrix units (that of v6e is inferred).
    """

    memory: int
    peak: float
    bandwidth: float
    interconnect: float
    mxu: int
    flops_per_cycle: int

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak / self.flops_per_cycle


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, 128, 262_144),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 128, 131_072),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 128, 262_144),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9, 256, 524_288),
}


def topology(name: str) -> tuple[Chip, list]:
    """The kind and the devices (to compile for) of "KIND:AxB", or of N slices "N*KIND:AxB".

    Raises:
        ValueError: an unknown kind or arrangement, or libtpu is missing.
    """
    from jax.experimental import topologies

    slices, _, shape = name.rpartition("*")
    kind = shape.partition(":")[0]
    if kind not in CHIPS or ":" not in shape or (slices and not slices.isdigit()):
        raise ValueError(
            f"topology {name!r}: KIND:AxB or N*KIND:AxB, such as v5p:2x2x4 or 2*v6e:4x4, of the "
            f"kinds {', '.join(CHIPS)}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no TPU to ask.
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # Compiling locks no TPU.
    options = {"num_slices": int(slices)} if slices else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # JAX sees the two cores of a v4 as one device.
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except Exception as error:  # The plugin raises errors of any type.
        raise ValueError(
            f"topology {name!r}: {str(error).splitlines()[0]} (the compiler: pip install libtpu)"
        ) from error
    return CHIPS[kind], list(found.devices)


def count_flops(function: Callable, *args) -> int:
    """FLOPs of all matrix products and convolutions of `function(*args)`; args may be shapes.

    A convolution over spread out pixels (the gradient of one with strides) counts without the zeros
    between them; the most expensive branch of a condition counts.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        left, right = [x.aval.shape for x in (*equation.invars, *equation.invars)[:2]] or [(), ()]
        out = equation.outvars[0].aval.shape if equation.outvars else ()
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            _, (_, channels, *sides), _ = params["dimension_numbers"]
            inputs = math.prod(right[axis] for axis in (channels, *sides))
            total += 2 * math.prod(out) * inputs // math.prod(params["lhs_dilation"])
        elif name == "cond":
            total += max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            raise ValueError("a loop whose rounds depend on data has no number of FLOPs")
        else:
            inside = [getattr(x, "jaxpr", x) for x in params.values()]
            inside = sum(_of_jaxpr(x) for x in inside if isinstance(x, jax.extend.core.Jaxpr))
            total += params.get("length", 1) * inside
    return total


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_CALLED = re.compile(r"(?:body|to_apply|calls|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))"
)


def instructions(text: str) -> Iterator[tuple[str, int]]:
    """(line, how often it runs) of every instruction, inside loops and branches too."""
    computations, lines, entry = {}, [], None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)

    def rounds(line):
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
        bounds = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
        return max(map(int, bounds), default=1)

    def visit(name, times):
        for line in computations[name]:
            called = _CALLED.search(line)
            if " while(" in line:
                yield from visit(re.search(r"body=%?([\w.\-]+)", line)[1], times * rounds(line))
            elif " conditional(" in line:
                for several, one in _BRANCHES.findall(line):
                    for branch in (several or one).split(","):
                        yield from visit(branch.strip().lstrip("%"), times)
            elif re.search(r" (call|async-start)\(", line) and called:
                if called[1] in computations:
                    yield from visit(called[1], times)
            elif " fusion(" in line:  # A collective may be part of one.
                inside = computations.get(called[1], ())
                yield from ((inner, times) for inner in inside if _COLLECTIVE.search(inner))
            yield line, times

    return visit(entry, 1)


def shapes(line: str) -> list[tuple[str, tuple[int, ...]]]:
    """The results of an instruction: [("bf16", (8, 512)), ...]."""
    result = re.split(r" [a-z][\w\-]*\(", line.partition(" = ")[2], maxsplit=1)[0]
    return [
        (kind, tuple(int(n) for n in sizes.split(",") if n))
        for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
        if kind in _BYTES
    ]


def cycles(lines: list[tuple[str, int]]) -> int:
    """The compiler's estimate for all instructions that have one."""
    found = ((re.search(r'"estimated_cycles":"(\d+)"', line), times) for line, times in lines)
    return sum(int(match[1]) * times for match, times in found if match)


def collectives(lines: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of one call, bytes of the largest array of each on one device."""
    channels = {}
    for line, times in lines:
        if _COLLECTIVE.search(line):
            # One that overlaps with computation is printed once for every piece of it.
            channel = re.search(r"channel_id=(\d+)", line)
            channels[channel[1] if channel else len(channels)] = (line, times)
    out = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for line, times in channels.values():
        row = out[_COLLECTIVE.search(line)[1]]
        largest = max((_BYTES[k] * math.prod(shape) for k, shape in shapes(line)), default=0)
        row["count"] += times
        row["bytes"] += times * largest
    return dict(out)


def kernel_cycles(lines: list[tuple[str, int]], chip: Chip) -> tuple[int, float]:
    """How many Pallas calls there are, and their cycles by the roofline.

    Products fill a matrix unit by the head dimension (the number in the kernel's name), at most by
    half; or the memory's bandwidth is the limit.
    """
    count, total = 0, 0.0
    for line, times in lines:
        cost = re.search(r'"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', line)
        if 'custom_call_target="tpu_custom_call"' not in line or not cost:
            continue
        head_dim = re.search(r"attention\w*?_(\d+)", line.split(" = ")[0])
        share = min(0.5, (int(head_dim[1]) if head_dim else chip.mxu) / chip.mxu)
        compute = int(cost[1]) / (share * chip.flops_per_cycle)
        count += times
        total += times * max(compute, int(cost[2]) / chip.bandwidth * chip.clock)
    return count, total


class DoesNotFit(RuntimeError):
    """The program needs more memory than a chip has; the message says how much."""


def estimate(program, state, flops: int | None, chip: Chip, mesh: Mesh) -> dict:
    """Compiles a program.

    Args:
        program: () -> jax.stages.Lowered.
        state: {name: tree of shapes with shardings}: arguments that stay between calls.
        flops: model FLOPs of a call on all chips, None where they are not counted.

    Returns:
        {"memory": bytes per chip by kind, "total" and "chip" (what there is); "collectives": {kind:
        {count, bytes}} per device and call; "collectives_seconds": those bytes at the rate of the
        interconnect, not part of "seconds"; "kernels": number of Pallas calls; ...}

    Raises:
        DoesNotFit: there is not enough memory.
    """
    import libtpu

    with jax.set_mesh(mesh):
        lowered, begin = program(), time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options=compiler_options(mesh))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).split("RESOURCE_EXHAUSTED: ")[1].splitlines()[0]
            raise DoesNotFit(reason) from error
        compile_seconds = time.perf_counter() - begin
    lines = list(instructions(compiled.as_text()))
    fused, (kernels, by_roofline) = cycles(lines), kernel_cycles(lines, chip)
    exchanged = collectives(lines)
    seconds, without = (fused + by_roofline) / chip.clock, fused / chip.clock
    return {
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "versions": {"jax": jax.__version__, "libtpu": libtpu.__version__},
        "compile_seconds": compile_seconds,
        "memory": _memory(state, compiled.memory_analysis()) | {"chip": chip.memory},
        "collectives": exchanged,
        "collectives_seconds": sum(row["bytes"] for row in exchanged.values()) / chip.interconnect,
        "kernels": kernels,
        "seconds": seconds,
        "seconds_without_kernels": without,
        "mfu": flops and flops / (mesh.size * chip.peak * seconds),
        "mfu_without_kernels": flops and flops / (mesh.size * chip.peak * without),
        "model_flops": flops,
    }


def _memory(state: dict, analysis) -> dict[str, int]:
    """Bytes per chip."""
    kinds = {name: sum(map(local_bytes, jax.tree.leaves(tree))) for name, tree in state.items()}
    kinds["other arguments"] = max(0, analysis.argument_size_in_bytes - sum(kinds.values()))
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    kinds["results"] = max(0, results)
    kinds["temporaries"] = analysis.temp_size_in_bytes
    kinds["program"] = analysis.generated_code_size_in_bytes
    return kinds | {"total": sum(kinds.values())}


def train_step(config, chip: Chip, mesh: Mesh) -> dict:
    """`estimate` of the training step of a configuration file."""
    from flextok_jax.training.checks import check_config
    from flextok_jax.training.state import build

    check_config(config, mesh)
    stage, frozen, batch = _stage(config)
    flops = config.batch_size * model_flops(config, mesh.shape["data"] * mesh.shape["fsdp"])
    program = build(stage, config, mesh)
    frozen = placed(frozen, param_shardings(mesh, frozen))
    batch = placed(batch, {name: batch_sharding(mesh) for name in batch})
    shapes = program.shapes
    state = {"parameters": shapes.params, "averages": shapes.ema, "optimizer": shapes.opt_state}
    return estimate(lambda: program.step.lower(shapes, frozen, batch), state, flops, chip, mesh)


def model_flops(config, shards: int = 1) -> float:
    """FLOPs of the loss and its gradient for one example, frozen networks too, nothing twice.

    The mean over a batch cut over `shards` devices, where examples differ (training/groups.py).
    """
    from flextok_jax.training import groups

    plain = config.copy_and_resolve_references()
    if config.stage != "vae":
        plain.compute.update(attention="xla", remat="none")
    if config.stage == "ar":
        plain.loss.chunk = 2**30  # All logits at once: none is made twice.
    stage, frozen, batch = _stage(plain)
    one = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    key, step = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    args = (unbox(jax.eval_shape(stage.init, key)), frozen, one, key, step)
    total, size = 0, config.batch_size
    for run in groups.plan(stage, size, config.optim.accumulate, shards):
        length = {} if run.length is None else {"length": run.length}
        gradient = jax.grad(lambda *args: stage.loss(*args, **length)[0])
        total += run.calls * run.images / size * count_flops(gradient, *args)
    return total


def _stage(config) -> tuple:
    """(stage, shapes of its frozen networks, of its batch); of models only a teacher is read."""
    from flextok_jax.nn import lpips
    from flextok_jax.nn.vae_config import VAEConfig
    from flextok_jax.training.ar_stage import PAPER, ARStage
    from flextok_jax.training.distill_stage import DistillStage
    from flextok_jax.training.tokenizer_stage import TokenizerStage
    from flextok_jax.training.vae_stage import VAEStage

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)

    if config.stage == "vae":
        stage, size = VAEStage(config), config.data.image_size
        frozen = {"lpips": lpips.shapes()} if config.loss.lpips_weight else {}
        return stage, frozen, {"image": array(jnp.uint8, size, size, 3)}
    if config.stage == "distill":
        stage = DistillStage(config)
        return stage, jax.eval_shape(stage.load_frozen), _moments(stage.model, array)
    if config.stage == "tokenizer":
        # The released VAEs by their names; another source is read.
        channels = re.fullmatch(r"EPFL-VILAB/flextok_vae_c(\d+)", config.vae.source)
        vae_config = channels and VAEConfig(latent_channels=int(channels[1]))
        stage = TokenizerStage(config, vae_config=vae_config)
        return stage, {}, _moments(stage.model, array)
    config = config.copy_and_resolve_references()
    config.tokenizer.source = ""
    stage = ARStage(config, PAPER)
    batch = {"tokens": array(jnp.int32, stage.model.num_tokens)}
    if not stage.model.text_dim:
        return stage, {}, batch | {"label": array(jnp.int32)}
    if stage.captions:
        text = {name: array(x.dtype, *x.shape) for name, x in stage.captions(None).items()}
        return stage, {}, batch | text
    text = {
        "text": array(jnp.bfloat16, TEXT_LENGTH, stage.model.text_dim),
        "text_mask": array(jnp.bool_, TEXT_LENGTH),
    }
    null = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in text.items()}
    return stage, {"null_text": null}, batch | text


def _moments(cfg, array) -> dict:
    side = [size // cfg.vae.downsample for size in cfg.image_size]
    return {"moments": array(jnp.bfloat16, *side, 2 * cfg.vae.latent_channels)}


def report(name: str, found: dict) -> str:
    """The estimate as text; `name`: of the topology."""
    memory = found["memory"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    versions = ", ".join(map(" ".join, found["versions"].items()))
    kernels = found["seconds"] - found["seconds_without_kernels"]
    return "\n".join(
        [
            f"training step on {name} ({found['chips']} chips; {mesh}), estimated by the compiler",
            f"  {versions}; compiled in {found['compile_seconds']:.0f} s",
            "memory per chip (GiB)",
            *(f"  {kind:18}{size / GIB:8.2f}" for kind, size in memory.items() if kind != "chip"),
            f"  of {memory['chip'] / GIB:.0f}, {1 - memory['total'] / memory['chip']:.0%} free",
            "collectives per device and step (not in the time below)",
            *(
                f"  {kind:18}{row['bytes'] / GB:8.2f} GB in {row['count']} calls"
                for kind, row in sorted(found["collectives"].items())
            ),
            f"  {'alone':18}{found['collectives_seconds'] * 1e3:8.1f} ms, more between slices",
            f"time {found['seconds'] * 1e3:.1f} ms, of it {kernels * 1e3:.1f} ms for "
            f"{found['kernels']} Pallas calls by their roofline",
            f"model FLOPs {found['model_flops']:.3e}; MFU {found['mfu']:.1%} "
            f"({found['mfu_without_kernels']:.1%} without the Pallas calls)",
        ]
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option begins with --")
    jax.config.update("jax_platforms", "cpu")  # Arrays that are made on the way are on the CPU.
    config = config_flag.CONFIG.value
    try:
        chip, devices = topology(_TOPOLOGY.value)
        found = train_step(config, chip, make_mesh(**config.mesh, devices=devices))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except DoesNotFit as error:
        sys.exit(f"does not fit: {error}")
    print(report(_TOPOLOGY.value, found))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=config_flag.parse)
