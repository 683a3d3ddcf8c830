"""The TPU compiler's estimates for every full-size configuration: the table of docs/tpu.md.

    python -m benchmarks.tpu                     (about three hours on two cores)
    python -m benchmarks.tpu --only 'd18_d28 on v5e'

Compiles the training step of each configuration on its recommended topology, and the frozen VAE of
the tokenizers, by `flextok_jax.compile`; no TPU is needed, and nothing runs on one. Each result
replaces its row of the table. `--only` is a regular expression over "CONFIG on TOPOLOGY".
"""

import argparse
import concurrent.futures
import importlib
import math
import multiprocessing
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/tpu.md"
BEGIN, END = "<!-- written by benchmarks/tpu.py -->\n", "<!-- end -->"

LARGE = ("tokenizer.py:d18_d28", "ar.py:c2i_d24", "ar.py:c2i_d30")
OTHERS = (
    *("tokenizer.py:d12_d12", "tokenizer.py:d18_d18"),
    *(f"ar.py:c2i_d{depth}" for depth in (10, 12, 16, 20)),
    *(f"ar.py:t2i_d{depth}" for depth in (12, 18, 26, 36)),
    *(f"vae.py:c{channels}" for channels in (4, 8, 16)),
)
# Images per chip and microbatch are chosen such that a tenth of the memory stays free while the
# results of matrix products are kept for the backward pass.
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
WANTED = [(config, topology) for topology in TOPOLOGIES for config in LARGE]
WANTED += [(config, "v5e:4x4") for config in OTHERS]
# More chips.
WANTED += [("tokenizer.py:d18_d28", f"v5e:{sides}") for sides in ("8x8", "16x16")]
WANTED += [("ar.py:c2i_d24", topology) for topology in ("v5e:8x8", "v5e:16x16", "2*v5e:8x8")]
# Microbatches of a step on 16 chips.
ACCUMULATE = {
    "tokenizer.py": {"v5e": 16, "v5p": 4, "v6e": 16},
    "ar.py": {"v5e": 4, "v5p": 1, "v6e": 2},
}
HEAD = (
    "| configuration | topology | images per chip at a time | memory per chip | step | MFU "
    "| without Pallas | collectives alone | frozen VAE | chip-hours | compiled in | at commit |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def load(config: str, topology: str):
    """The configuration "FILE.py:VARIANT" with the settings recommended for `topology`."""
    file, variant = config.split(":")
    module = importlib.import_module(f"configs.{file.removesuffix('.py')}")
    config = module.get_config(variant)
    slices, kind, sides = re.fullmatch(r"(?:(\d+)\*)?(\w+):([\dx]+)", topology).groups()
    data = int(slices or 1) * math.prod(map(int, sides.split("x"))) // 16
    config.mesh.update(data=data, fsdp=16)
    if file != "vae.py":
        accumulate = ACCUMULATE[file][kind] * (2 if variant == "t2i_d36" else 1)
        config.optim.accumulate = max(1, accumulate // data)
        config.compute.update(attention="pallas", remat="dots")
    return config


def measure(config: str, topology: str) -> str:
    """One row of the table."""
    from flextok_jax import compile as estimates
    from flextok_jax.parallel.mesh import make_mesh

    jax.config.update("jax_platforms", "cpu")
    name, commit, settings = config.replace(".py:", " "), _commit(), load(config, topology)
    chip, devices = estimates.topology(topology)
    mesh = make_mesh(**settings.mesh, devices=devices)
    try:
        step = estimates.train_step(settings, chip, mesh)
    except estimates.DoesNotFit as error:
        return f"| {name} | {topology} | does not fit: {error} ||||||||||"
    parts, vae = settings.optim.accumulate, "-"
    if settings.stage == "tokenizer":
        vae = f"{parts * frozen_vae(settings, chip, mesh)['seconds']:.2f} s"
    memory, batch = step["memory"], settings.batch_size
    hours = step["seconds"] * settings.total_steps * step["chips"] / 3600
    return (
        f"| {name} | {topology} | {batch // step['chips'] // parts} "
        f"| {memory['total'] / 2**30:.1f} of {memory['chip'] / 2**30:.0f} GiB "
        f"({1 - memory['total'] / memory['chip']:.0%} free) | {step['seconds']:.2f} s "
        f"| **{step['mfu']:.1%}** | {step['mfu_without_kernels']:.1%} "
        f"| {step['collectives_seconds']:.2f} s | {vae} | {hours:,.0f} "
        f"| {step['compile_seconds']:.0f} s | {commit}, libtpu {step['versions']['libtpu']} |"
    )


def frozen_vae(config, chip, mesh) -> dict:
    """The estimate of making the moments of one microbatch."""
    from flextok_jax import compile as estimates
    from flextok_jax.nn import vae
    from flextok_jax.nn.images import to_float
    from flextok_jax.nn.vae_config import VAEConfig
    from flextok_jax.parallel.sharding import batch_sharding, param_shardings, placed

    cfg = VAEConfig(latent_channels=int(config.vae.source.rpartition("_c")[2]))
    params = jax.eval_shape(lambda: vae.init_vae(cfg, jax.random.key(0)))
    params = placed({"vae": params}, param_shardings(mesh, {"vae": params}))
    size = config.data.image_size
    images = jax.ShapeDtypeStruct(
        (config.batch_size // config.optim.accumulate, size, size, 3),
        jnp.uint8,
        sharding=batch_sharding(mesh),
    )

    @jax.jit
    def moments(params, images):
        return vae.encode_moments(params["vae"], cfg, to_float(images), jnp.bfloat16)

    state = {"parameters": params}
    return estimates.estimate(lambda: moments.lower(params, images), state, None, chip, mesh)


def _commit() -> str:
    """The commit of this checkout, with a + if files differ from it."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "--", "flextok_jax", "configs")
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def write(row: str, page: pathlib.Path = PAGE):
    """Puts a row into the table, in place of the one of the same configuration and topology."""
    before, rest = page.read_text().split(BEGIN)
    table, after = rest.split(END)
    rows = {tuple(line.split("|")[1:3]): line for line in table.splitlines()[2:]}
    rows[tuple(row.split("|")[1:3])] = row
    page.write_text(before + BEGIN + "\n".join([HEAD, *rows.values()]) + "\n" + END + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regex over CONFIG on TOPOLOGY")
    options = parser.parse_args()
    wanted = [pair for pair in WANTED if re.search(options.only, " on ".join(pair))]
    # A process for each, since compilers keep memory.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for row in pool.map(measure, *zip(*wanted)):
            print(row, flush=True)
            write(row)


if __name__ == "__main__":
    main()
