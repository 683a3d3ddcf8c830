"""The command of the laboratory; see `examples.lab`."""

import argparse
import pathlib

import jax

import examples.lab
from configs import lab
from examples.lab.measuring import measure
from examples.lab.report import report
from flextok_jax.io import storage
from flextok_jax.main import make_stage
from flextok_jax.training import loop

MEASURED = "measured.json"


def train(variant: str, seed: int, workdir: pathlib.Path, steps: int | None = None) -> bool:
    """Trains a variant, or goes on with it; whether it is finished."""
    config = lab.get_config(variant)
    config.seed = seed
    if variant in lab.FLOWS:
        config.tokenizer.source = str(workdir.parent / f"{lab.FLOWS[variant]}-{seed}")
    if steps:
        config.update(total_steps=steps, eval_every=steps)
        config.checkpoint.every = min(config.checkpoint.every, steps)
    outcome = loop.train(make_stage(config), config, workdir)
    jax.clear_caches()
    return not outcome.stopped


def main(argv=None) -> None:
    """Trains, measures and writes the report after each variant."""
    about = examples.lab.__doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m examples.lab", description=about)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of all runs")
    parser.add_argument("--variants", default=",".join(lab.VARIANTS), help="some, by commas (all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--steps", type=int, help="of each training (the variant's own)")
    args = parser.parse_args(argv)
    variants, found = args.variants.split(","), {}
    for name in ("seeds", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if unknown := set(variants) - set(lab.VARIANTS):
        parser.error(f"variants {sorted(unknown)}: allowed are {', '.join(lab.VARIANTS)}")
    for seed in range(args.seeds):
        for variant in variants:
            workdir = args.out / f"{variant}-{seed}"
            steps = args.steps or lab.get_config(variant).total_steps
            if not (workdir / MEASURED).exists():
                if not train(variant, seed, workdir, args.steps):
                    return
                numbers = measure(variant, workdir) | {"steps": steps}
                storage.write_json(workdir / MEASURED, numbers)
            numbers = storage.read_json(workdir / MEASURED)
            if numbers["steps"] != steps:  # One report of two budgets would compare what differs.
                parser.error(
                    f"{workdir} was measured after {numbers['steps']} steps, not {steps}: remove "
                    "it, or name another --out"
                )
            found.setdefault(seed, {})[variant] = numbers
            storage.write_text(args.out / "report.md", report(found))
    print(args.out / "report.md")


if __name__ == "__main__":
    main()
