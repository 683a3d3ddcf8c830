"""How few evaluations a decoder needs: digits, by solver, times and interval of guidance.

    python -m benchmarks.sampling
    python -m benchmarks.sampling --model runs/digits --most 16

The 297 validation digits are decoded from their first 1, 4 and 16 tokens. The reference is 40
guided Euler steps. A row has the smallest number of steps, at most --most, that is as good for
every number of tokens: PSNR at most 0.1 dB lower, at most 3 digits fewer (one point) classified
correctly, and a Fréchet distance at most a tenth larger. PSNR favours blurred images and is best
after few steps; the Fréchet distance between features of the made and the original digits, by the
digits' classifier, sees blur. A guided evaluation runs the decoder twice, with the condition and
without: two passes.
"""

import argparse
import os

import jax
import numpy as np

from examples.digits import arrays
from examples.digits.classifier import feature_network
from examples.digits.evaluation import reconstruct
from flextok_jax import FlexTok
from flextok_jax.evaluation.reconstruction import default_sampler
from flextok_jax.evaluation.statistics import FeatureSet, fid
from flextok_jax.flow.sampler import SOLVERS

COUNTS = (1, 4, 16)
WHOLE = (0.0, 1.0)
SETTINGS = (  # solver, time_shift, guidance_interval
    ("euler", 1.0, WHOLE),
    ("midpoint", 1.0, WHOLE),
    ("multistep", 1.0, WHOLE),
    ("euler", 0.5, WHOLE),
    ("multistep", 0.5, WHOLE),
    ("euler", 2.0, WHOLE),
    ("multistep", 2.0, WHOLE),
    ("euler", 1.0, (0.0, 0.75)),
    ("euler", 1.0, (0.25, 1.0)),
    ("euler", 1.0, (0.25, 0.75)),
    ("multistep", 1.0, (0.0, 0.75)),
    ("multistep", 1.0, (0.25, 1.0)),
)


def measure(tok, features, real, **sampling) -> list[tuple[float, int, float]]:
    """(PSNR, digits classified correctly, Fréchet distance) for each of COUNTS."""
    found = reconstruct(tok, COUNTS, **sampling)
    made = [features(found.images[k]) for k in COUNTS]
    return [(found.psnr[k], found.correct[k], fid(x, real)) for k, x in zip(COUNTS, made)]


def as_good(found, reference) -> bool:
    """Whether a result is as good as the reference for every number of tokens."""
    pairs = zip(found, reference)
    return all(a[0] > b[0] - 0.1 and a[1] >= b[1] - 3 and a[2] < 1.1 * b[2] for a, b in pairs)


def passes(sampler) -> int:
    """How often the decoder runs."""
    scales = sampler.schedule().scales[: sampler.steps]
    return int(SOLVERS[sampler.solver] * np.sum(1 + (scales != 1)))


def show(tok, found, **sampling) -> None:
    """Prints a row."""
    sampler = default_sampler(tok, **sampling)
    low, high = sampler.guidance_interval
    how = f"{sampler.solver} | {sampler.time_shift:g} | {low:g} to {high:g} | {sampler.steps}"
    how += f" | {passes(sampler)} | "
    print("| " + how + " | ".join(f"{p:.2f}, {c}, {d:.1f}" for p, c, d in found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo-digits", help="a tokenizer of the digits")
    parser.add_argument("--most", type=int, default=10, help="steps that are tried (10)")
    args = parser.parse_args()
    print(f"{vars(args)}\n{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)\n")
    columns = ["solver", "time shift", "guidance from t to t", "steps", "passes"]
    columns += [f"{k} tokens: dB, correct, Fréchet" for k in COUNTS]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    tok, network = FlexTok.from_pretrained(args.model), feature_network()

    def features(images):
        return FeatureSet(*network(images, len(images)), labels).gaussian

    originals, labels = arrays("test")
    real = features(originals)
    how = dict(steps=40, solver="euler", time_shift=1.0, guidance_interval=WHOLE)
    reference = measure(tok, features, real, **how)
    show(tok, reference, **how)
    for solver, shift, interval in SETTINGS:
        for steps in range(1, args.most + 1):
            how = dict(steps=steps, solver=solver, time_shift=shift, guidance_interval=interval)
            found = measure(tok, features, real, **how)
            if as_good(found, reference):
                show(tok, found, **how)
                break
        else:
            show(tok, found, **how)
            print(f"  (not as good within {args.most} steps)")


if __name__ == "__main__":
    main()
