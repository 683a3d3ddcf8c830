"""How few evaluations a decoder needs: digits, by solver, times and interval of guidance.

    python -m benchmarks.sampling
    python -m benchmarks.sampling --model runs/digits --most 16
    python -m benchmarks.sampling --student runs/fast

The 297 validation digits are decoded from their first 1, 4 and 16 tokens. The reference is 40
guided Euler steps. A row has the smallest number of steps, at most --most, that is as good for
every number of tokens: PSNR at most 0.1 dB lower, at most 3 digits fewer (one point) classified
correctly, and a Fréchet distance at most a tenth larger. PSNR favours blurred images and is best
after few steps; the Fréchet distance between features of the made and the original digits, by the
digits' classifier, sees blur. A guided evaluation runs the decoder twice, with the condition and
without: two passes.

With --student the rows are of few steps of --model and of its student, beside 20 guided Euler steps
of --model; the last number is how close images come to those, for the same noise: PSNR in dB.
"""

import argparse
import os

import jax
import numpy as np

from examples.digits import arrays
from examples.digits.classifier import feature_network
from examples.digits.evaluation import reconstruct
from flextok_jax import FlexTok
from flextok_jax.evaluation.metrics import psnr
from flextok_jax.evaluation.reconstruction import default_sampler
from flextok_jax.evaluation.statistics import FeatureSet, fid
from flextok_jax.nn.images import to_float

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


class Digits:
    """The validation digits, and what images of them are compared with."""

    def __init__(self):
        originals, self._labels = arrays("test")
        self._network = feature_network()
        self._real = self._gaussian(originals)

    def _gaussian(self, images):
        features = self._network(images, len(images))
        return FeatureSet(*features, self._labels).gaussian

    def measure(self, tok, target=None, **sampling) -> tuple[list[tuple], dict]:
        """For each of COUNTS (PSNR, digits classified correctly, Fréchet distance), and the images.

        With `target`, such images, also the PSNR to them.
        """
        found = reconstruct(tok, COUNTS, **sampling)
        numbers = []
        for k, images in found.images.items():
            row = found.psnr[k], found.correct[k], fid(self._gaussian(images), self._real)
            if target is not None:
                row += (float(np.mean(psnr(to_float(images), to_float(target[k])))),)
            numbers.append(row)
        return numbers, found.images


def as_good(found, reference) -> bool:
    """Whether a result is as good as the reference for every number of tokens."""
    pairs = zip(found, reference)
    return all(a[0] > b[0] - 0.1 and a[1] >= b[1] - 3 and a[2] < 1.1 * b[2] for a, b in pairs)


def show(tok, found, note: str = "", **sampling) -> None:
    """Prints a row."""
    sampler = default_sampler(tok, **sampling)
    low, high = sampler.guidance_interval
    guided = f"{low:g} to {high:g}" if sampler.guided else "no"
    cells = [sampler.solver + note, f"{sampler.time_shift:g}", guided, sampler.steps]
    for psnr_, count, distance, *close in found:
        numbers = f"{psnr_:.2f}", str(count), *(f"{x:.1f}" for x in (distance, *close))
        cells.append(", ".join(numbers))
    cells.insert(4, sampler.passes)
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(numbers: str) -> None:
    columns = ["solver", "time shift", "guidance from t to t", "steps", "passes"]
    columns += [f"k = {k}: {numbers}" for k in COUNTS]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def solvers(tok, digits: Digits, most: int) -> None:
    """The table of the smallest numbers of steps."""
    header("dB, correct, Fréchet")
    how = dict(steps=40, solver="euler", time_shift=1.0, guidance_interval=WHOLE)
    reference, _ = digits.measure(tok, **how)
    show(tok, reference, **how)
    for solver, shift, interval in SETTINGS:
        for steps in range(1, most + 1):
            how = dict(steps=steps, solver=solver, time_shift=shift, guidance_interval=interval)
            found, _ = digits.measure(tok, **how)
            if as_good(found, reference):
                break
        note = "" if as_good(found, reference) else ", not as good"
        show(tok, found, note, **how)


def distilled(tok, student, digits: Digits) -> None:
    """The table of few steps of a model and its student."""
    header("dB, correct, Fréchet, dB to the first row")
    how = dict(steps=20, solver="euler", time_shift=1.0)
    found, target = digits.measure(tok, **how)
    show(tok, found, **how)
    rows = [(tok, how | few) for few in (dict(steps=4), dict(steps=2), dict(steps=1))]
    shift = student.config.sampler.time_shift
    rows += [(tok, dict(steps=s, solver="euler", time_shift=shift)) for s in (4, 2)]
    rows += [(tok, dict(steps=s, solver="euler", guidance_scale=1.0)) for s in (2, 1)]
    for model, how in rows + [(student, dict(steps=s)) for s in (2, 1)]:
        found, _ = digits.measure(model, target, **how)
        show(model, found, ", student" if model is student else "", **how)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo-digits", help="a tokenizer of the digits")
    parser.add_argument("--most", type=int, default=10, help="steps that are tried (10)")
    parser.add_argument("--student", help="a distilled decoder of --model: compare few steps")
    args = parser.parse_args()
    print(f"{vars(args)}\n{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)")
    tok, digits = FlexTok.from_pretrained(args.model), Digits()
    if args.student:
        distilled(tok, FlexTok.from_pretrained(args.student), digits)
    else:
        solvers(tok, digits, args.most)


if __name__ == "__main__":
    main()
