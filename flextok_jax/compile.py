"""What the TPU compiler says of a configuration, without a TPU:

python -m flextok_jax.compile --config=configs/tokenizer.py:d18_d28 --topology=v5e:4x4 \
    [--config.mesh.fsdp=16] [--program=train] [--out=FILE.json] [--text=FILE.txt]

Needs libtpu (`pip install libtpu`, Linux). Kinds: v4, v5e, v5p, v6e; "2*v5e:8x8" is two slices. The
programs are train (of a VAE on images, of the others on its moments or on tokens that were made
before), and of a tokenizer vae (those moments, of one microbatch), tokenize, detokenize; of an AR
model generate. Exit code 1: it does not fit.
"""

import json
import os
import pathlib
import sys
import tempfile

from absl import app, flags

from flextok_jax import config_flag

_TOPOLOGY = flags.DEFINE_string("topology", None, "KIND:AxB, such as v5e:4x4")
_PROGRAM = flags.DEFINE_string("program", "train", "train, vae, tokenize, detokenize or generate")
_OUT = flags.DEFINE_string("out", None, "write the numbers to this file as JSON")
_TEXT = flags.DEFINE_string("text", None, "write the compiled program to this file")

GIB, GB = 2**30, 1e9


def report(found: dict) -> str:
    """The verdict as text, for people."""
    memory, chips = found["memory"], found["chips"]
    kinds = {k: v for k, v in memory.items() if k not in ("total", "chip")}
    free = 1 - memory["total"] / memory["chip"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    versions = ", ".join(map(" ".join, found["versions"].items()))
    lines = [
        f"{found['program']} on {found['topology']} ({chips} chips; {mesh}), by the compiler's "
        "estimate; nothing ran",
        f"  {versions}; compiled in {found['compile_seconds']:.0f} s",
        "memory per chip (GiB)",
        *(f"  {kind:18}{size / GIB:8.2f}" for kind, size in kinds.items()),
        f"  {'total':18}{memory['total'] / GIB:8.2f} of {memory['chip'] / GIB:.0f}, "
        f"{free:.0%} free",
        "collectives per device and call (time is not in the estimate)",
    ]
    for kind, row in sorted(found["collectives"].items()):
        lines.append(f"  {kind:18}{row['bytes'] / GB:8.2f} GB in {row['count']} calls")
    lines.append(
        f"  {'alone':18}{found['collectives_seconds'] * 1e3:8.1f} ms at the interconnect's rate"
    )
    if "*" in found["topology"]:
        lines.append("  (between slices not counted at their own rate, which is lower)")
    if found["open_loops"]:
        lines.append(f"{found['open_loops']} loops of unknown length, each counted once:")
    lines.append(
        f"time {found['seconds'] * 1e3:.1f} ms, of it "
        f"{(found['seconds'] - found['seconds_without_kernels']) * 1e3:.1f} ms for "
        f"{found['kernels']} Pallas calls by their roofline"
    )
    if found["model_flops"]:
        lines.append(
            f"model FLOPs {found['model_flops']:.3e}; MFU {found['mfu']:.1%} "
            f"({found['mfu_without_kernels']:.1%} without the Pallas calls)"
        )
    return "\n".join(lines)


def main(argv):
    """Compiles, prints, and returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option begins with --")
    # The host only describes: arrays that are made on the way lie on the CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from flextok_jax.aot.chips import topology
    from flextok_jax.aot.verdict import DoesNotFit, verdict
    from flextok_jax.io.storage import atomic

    try:
        for path in filter(None, (_OUT.value, _TEXT.value)):
            _check_writable(path)  # Before the minutes that compiling takes.
        found, text = verdict(_PROGRAM.value, config_flag.CONFIG.value, topology(_TOPOLOGY.value))
        print(report(found))
        numbers = json.dumps(found, indent=2) + "\n"
        for path, content in ((_OUT.value, numbers), (_TEXT.value, text)):
            if path:
                with atomic(path) as file:
                    file.write_text(content)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except DoesNotFit as error:
        sys.exit(f"does not fit: {error}")
    return 0


def _check_writable(path):
    """Raises OSError where no file can be put at `path`."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=config_flag.parse)
