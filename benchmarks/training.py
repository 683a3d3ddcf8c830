"""Time of a tokenizer's training step: images grouped by the tokens they keep, and at full length.

    python -m benchmarks.training
    python -m benchmarks.training --config d12_d12,batch=8,enc_depth=2,dec_depth=2 --keep uniform

Each configuration of configs/tokenizer.py takes steps of both kinds in turn, on the same state, on
one device; latents of a VAE are made ahead (zeros here: what they hold does not change the time).
Medians of the seconds of a step with the least and the largest, and of the ratio within a round; on
a CPU also of the seconds of CPU, which other load on the machine changes little.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import tokenizer
from flextok_jax.nn.vae_config import VAEConfig
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training.groups import plan
from flextok_jax.training.state import build
from flextok_jax.training.tokenizer_stage import TokenizerStage


def load(text: str, keep: str | None, dtype: str | None):
    """The configuration of "VARIANT,size=NUMBER,...", without what a benchmark has no use for."""
    config = tokenizer.get_config(text)
    config.evaluation.num_images, config.data.eval_split = 0, config.data.split
    config.mesh.data = 1
    if keep:
        config.model.tokens.keep = keep
    if dtype:
        config.compute.dtype = dtype
    return config


def programs(config) -> tuple[dict, dict]:
    """({"plain", "grouped": its program}, a batch)."""
    identity = config.vae.source == "identity"
    cfg = None if identity else VAEConfig(latent_channels=16)
    mesh, made = make_mesh(1, 1, 1, jax.devices()[:1]), {}
    for name in ("plain", "grouped"):
        stage = TokenizerStage(config, vae_config=cfg, grouped=name == "grouped")
        made[name] = build(stage, config, mesh)
    runs = plan(stage, config.batch_size, config.optim.accumulate, 1)
    groups = ", ".join(f"{r.calls} x {r.images} of {r.length}" for r in runs)
    print(f"grouped: {groups} tokens", flush=True)
    if identity:
        side = config.data.image_size
        return made, {"image": jnp.zeros((config.batch_size, side, side, 3), jnp.uint8)}
    rows, columns, channels = stage.model.latent_shape
    return made, {"moments": jnp.zeros((config.batch_size, rows, columns, 2 * channels))}


def measure(config, rounds: int):
    """Prints the times of a configuration."""
    made, batch = programs(config)
    state, times = made["plain"].init(), {name: [] for name in made}
    repeats, compiled = {}, {}
    for name, program in made.items():
        begin = time.perf_counter()
        made[name] = program.step.lower(state, {}, batch).compile()
        compiled[name] = time.perf_counter() - begin
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(made[name](state, {}, batch))
        repeats[name] = max(1, round(1 / (time.perf_counter() - begin)))
    for _ in range(rounds):
        for name, step in made.items():
            begin = np.array([time.perf_counter(), time.process_time()])
            for _ in range(repeats[name]):
                state, metrics = step(state, {}, batch)
            jax.block_until_ready(state)
            end = np.array([time.perf_counter(), time.process_time()])
            times[name].append((end - begin) / repeats[name])
    assert np.isfinite(metrics["loss"].compute())
    print("compiled in", " and ".join(f"{each:.1f} s" for each in compiled.values()))
    plain, grouped = (np.array(times[name]).T for name in ("plain", "grouped"))
    for unit, a, b in zip(("s", "s of CPU"), plain, grouped):
        if unit == "s" or jax.default_backend() == "cpu":
            print(f"plain {_spread(a)}, grouped {_spread(b)} {unit} a step; ratio {_spread(b / a)}")


def _spread(values) -> str:
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", help="digits and d12_d12,batch=8 by default")
    parser.add_argument("--keep", help="the distribution of kept tokens instead of the config's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    print(f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores), {args.rounds} rounds")
    for text in args.config or ("digits", "d12_d12,batch=8"):
        config = load(text, args.keep, dtype)
        print(f"\n{text}, keep {config.model.tokens.keep}, {config.compute.dtype}", flush=True)
        measure(config, args.rounds)


if __name__ == "__main__":
    main()
