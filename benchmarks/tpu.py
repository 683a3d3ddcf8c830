"""The TPU compiler's estimates for every full-size configuration: the tables of docs/tpu.md and of
costs in docs/training.md.

    python -m benchmarks.tpu                     (about two hours on two cores)
    python -m benchmarks.tpu --only 'd18_d28 on v5e.*train'
    python -m benchmarks.tpu --pages             (the tables again from the numbers kept)

Compiles the training step of each configuration on its recommended topology, and the frozen VAE of
the tokenizers, by `python -m flextok_jax.compile`; no TPU is needed, and nothing runs on one. Keeps
the numbers in docs/tpu.json, with the compiler's version and the commit, and writes the tables anew
from it; `--only` (a regular expression over "CONFIG on TOPOLOGY: PROGRAM", where the program is
train or vae) compiles a part of them.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/tpu.json"
PAGE, COSTS = ROOT / "docs/tpu.md", ROOT / "docs/training.md"
BEGIN, END = "<!-- written by benchmarks/tpu.py -->", "<!-- end -->"

LARGE = ("tokenizer.py:d18_d28", "ar.py:c2i_d24", "ar.py:c2i_d30")
OTHERS = (
    *("tokenizer.py:d12_d12", "tokenizer.py:d18_d18"),
    *(f"ar.py:c2i_d{depth}" for depth in (10, 12, 16, 20)),
    *(f"ar.py:t2i_d{depth}" for depth in (12, 18, 26, 36)),
    *(f"vae.py:c{channels}" for channels in (4, 8, 16)),
)
# Chips that are rented together, with images per chip and microbatch such that a tenth of the
# memory stays free while the results of matrix products are kept for the backward pass.
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
WANTED = [(config, topology) for topology in TOPOLOGIES for config in LARGE]
WANTED += [(config, "v5e:4x4") for config in OTHERS]
# What more chips cost.
WANTED += [("tokenizer.py:d18_d28", f"v5e:{sides}") for sides in ("8x8", "16x16")]
WANTED += [("ar.py:c2i_d24", topology) for topology in ("v5e:8x8", "v5e:16x16", "2*v5e:8x8")]
# Microbatches of a step on 16 chips.
ACCUMULATE = {
    "tokenizer.py": {"v5e": 16, "v5p": 4, "v6e": 8},
    "ar.py": {"v5e": 4, "v5p": 1, "v6e": 2},
}


def flags(config: str, topology: str) -> list[str]:
    """What is recommended for training `config` on `topology`, as command-line flags."""
    file, _, variant = config.partition(":")
    slices, kind, sides = re.fullmatch(r"(?:(\d+)\*)?(\w+):([\dx]+)", topology).groups()
    data = int(slices or 1) * math.prod(map(int, sides.split("x"))) // 16
    mesh = [f"--config.mesh.data={data}", "--config.mesh.fsdp=16"]
    if file == "vae.py":
        return mesh
    accumulate = ACCUMULATE[file][kind] * (2 if variant == "t2i_d36" else 1)
    return [
        *mesh,
        "--config.compute.attention=pallas",
        "--config.compute.remat=dots",
        f"--config.optim.accumulate={max(1, accumulate // data)}",
    ]


def compile_one(config: str, topology: str, program: str, options: list[str]) -> dict:
    """The numbers of `flextok_jax.compile`, or {"error"}."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.json"
        command = [
            sys.executable, "-m", "flextok_jax.compile", f"--config={ROOT}/configs/{config}",
            f"--topology={topology}", f"--program={program}", f"--out={out}", *options,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"error": lines[-1][:300]}
        return json.loads(out.read_text())


def commit() -> str:
    """The commit of this checkout, with a + if files differ from it."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "--", "flextok_jax", "configs")
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def row(key: str, found: dict) -> str:
    """One line of the table."""
    config, topology = key.split(" on ")
    name, step = config.replace(".py:", " "), found["train"]
    if "error" in step:
        return f"| {name} | {topology} | {step['error']} ||||||||||"
    memory, batch = step["memory"], found["batch"]
    images_per_chip = batch // step["chips"] // _microbatches(found)
    hours = step["seconds"] * found["steps"] * step["chips"] / 3600
    return (
        f"| {name} | {topology} | {images_per_chip} "
        f"| {memory['total'] / 2**30:.1f} of {memory['chip'] / 2**30:.0f} GiB "
        f"({1 - memory['total'] / memory['chip']:.0%} free) | {step['seconds']:.2f} s "
        f"| **{step['mfu']:.1%}** | {step['mfu_without_kernels']:.1%} "
        f"| {_seconds(step['collectives_seconds'])} | {_seconds(_vae(found))} | {hours:,.0f} "
        f"| {step['compile_seconds']:.0f} s | {step['commit']} |"
    )


HEAD = (
    "| configuration | topology | images per chip at a time | memory per chip | step | MFU "
    "| without Pallas | collectives alone | frozen VAE | chip-hours | compiled in | at commit |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def _microbatches(found: dict) -> int:
    options = dict(flag.split("=") for flag in found["flags"])
    return int(options.get("--config.optim.accumulate", 1))


def _vae(found: dict) -> float | None:
    """Seconds of the frozen VAE in a step; None: there is none, or it is not known."""
    seconds = found.get("vae", {}).get("seconds")
    return seconds and seconds * _microbatches(found)


def _seconds(value: float | None) -> str:
    return f"{value:.2f} s" if value else "-"


def cost(key: str, found: dict) -> str:
    """One line of the table of costs."""
    config, topology = key.split(" on ")
    step, vae = found["train"], _vae(found)
    hours = step["seconds"] * found["steps"] / 3600
    with_vae = f"{(hours + vae * found['steps'] / 3600) * step['chips']:,.0f}" if vae else "-"
    return (
        f"| {config.replace('.py:', ' ')} | {topology} | {found['steps']:,} x {found['batch']} "
        f"| {hours * step['chips']:,.0f} | {with_vae} | {hours / 24:.1f} days |"
    )


COST_HEAD = (
    "| configuration | topology | steps x images | chip-hours | with the frozen VAE in the step "
    "| on this slice, without the VAE |\n|---|---|---|---|---|---|"
)


def write_pages(results: dict):
    """Puts the tables between the marks of docs/tpu.md and docs/training.md."""
    keys = [f"{config} on {topology}" for config, topology in WANTED]
    keys = [key for key in keys if "train" in results.get(key, {})]
    costs = [COST_HEAD, *(cost(k, results[k]) for k in keys if "error" not in results[k]["train"])]
    _write(COSTS, costs)
    lines = [HEAD, *(row(key, results[key]) for key in keys)]
    compilers = {
        ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
        for key in keys
        for run in (results[key]["train"], results[key].get("vae", {}))
        if "versions" in run
    }
    lines += ["", f"Compiled by: {'; '.join(sorted(compilers))}."]
    _write(PAGE, lines)


def _write(page: pathlib.Path, lines: list[str]):
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="of CONFIG on TOPOLOGY: PROGRAM, a regex")
    parser.add_argument("--pages", action="store_true", help="compile nothing, write the tables")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for config, topology in WANTED:
        key, about = f"{config} on {topology}", load(config)
        for program in ("train", "vae") if about.stage == "tokenizer" else ("train",):
            if options.pages or not re.search(options.only, f"{key}: {program}"):
                continue
            given, now = flags(config, topology), commit()  # Before the minutes it takes.
            found = compile_one(config, topology, program, given) | {"commit": now}
            about_steps = {"flags": given, "batch": about.batch_size, "steps": about.total_steps}
            results[key] = results.get(key, {}) | about_steps | {program: found}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_pages(results)
            print(f"{key}: {program}" if program == "vae" else row(key, results[key]), flush=True)
    write_pages(results)


def load(config: str):
    """A configuration by "FILE.py:VARIANT"."""
    file, variant = config.split(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


if __name__ == "__main__":
    main()
