"""The quickstart's report: the shipped model of the digits beside one trained here just now.

python -m flextok_jax.evaluation.quickstart_report --shipped demo-digits --trained quickstart/run \
    --out quickstart/report.html --picture quickstart/reconstructions.png
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import sys
import time

import flax
import jax
import numpy as np
import optax
import sklearn

from flextok_jax import __version__
from flextok_jax.evaluation import pictures, report
from flextok_jax.evaluation.digits_judge import COUNTS, evaluate_digits
from flextok_jax.interop import tensor_file
from flextok_jax.interop.checkpoint import WorkdirError
from flextok_jax.tokenizer import FlexTok

TITLES = ["original", "1 token", *(f"{k}" for k in COUNTS[1:])]
COMMANDS = """./launch/quickstart.sh

# or by hand: train, then compare
python -m flextok_jax.main --config=configs/tokenizer.py:digits \\
    --workdir={trained}{changes}
python -m flextok_jax.evaluation.quickstart_report \\
    {arguments}"""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A model and how it did on the held-out digits.

    Attributes:
        name: what the report calls it.
        tok: the model.
        result: of `evaluate_digits`.
        rows: for each class 0..9 its first held-out digit: [original, from 1 token, 2, ...], uint8.
        seconds: what the evaluation took, compilation included.
    """

    name: str
    tok: FlexTok
    result: dict
    rows: list[list[np.ndarray]]
    seconds: float

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.tok.params))


def judged(name: str, source) -> Judged:
    """Loads a model, reconstructs the held-out digits and keeps the first of each class."""
    start = time.perf_counter()
    tok = FlexTok.from_pretrained(source)
    first = {}

    def keep(batch, drawn):
        for i, label in enumerate(batch.labels.tolist()):
            row = [batch.images[i], *(pictures.to_uint8(images[i]) for images in drawn.values())]
            first.setdefault(label, row)

    result = evaluate_digits(tok, COUNTS, visit=keep)
    rows = [first[label] for label in sorted(first)]
    return Judged(name, tok, result, rows, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a workdir tells of its run.

    Attributes:
        losses: (step, loss), means over the steps since the point before.
        seconds: in training steps, without compilation, saving and evaluation.
        config: the configuration, {} if it is not there.
    """

    losses: list[tuple[int, float]]
    seconds: float
    config: dict

    @property
    def steps(self) -> int:
        """The last step that is recorded."""
        return self.losses[-1][0] if self.losses else 0


def read_training(workdir) -> Training:
    """Reads DIR/metrics.jsonl and DIR/config.json.

    Raises:
        FileNotFoundError: there is no DIR/metrics.jsonl.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pass the workdir of a training run")
    losses, seconds, before = [], 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("loss") is not None:
            losses.append((record["step"], record["loss"]))
        if record.get("step_time") is not None:
            seconds += record["step_time"] * (record["step"] - before)
            before = record["step"]
    about = workdir / "config.json"
    config = json.loads(about.read_text(encoding="utf-8"))["config"] if about.is_file() else {}
    return Training(losses, seconds, config)


def picture(models: list[Judged]):
    """The grids of the models side by side below their names: a `PIL.Image.Image`."""
    from PIL import Image, ImageDraw, ImageFont

    titles = ["original", *(f"k = {k}" for k in COUNTS)]
    sheets = [pictures.grid(model.rows, titles, cell=64) for model in models]
    head, gap = 44, 28
    width = sum(sheet.width for sheet in sheets) + gap * (len(sheets) - 1)
    whole = Image.new("RGB", (width, head + sheets[0].height), "white")
    draw, x = ImageDraw.Draw(whole), 0
    for model, sheet in zip(models, sheets):
        whole.paste(sheet, (x, head))
        name = model.name[0].upper() + model.name[1:]
        font = ImageFont.load_default(20)
        draw.text((x + 8, head - 8), name, fill="#1d1f24", font=font, anchor="ls")
        x += sheet.width + gap
    return whole


def sections(shipped: Judged, trained: Judged, training: Training, command: str) -> list:
    """The content of the report; see `report.write_report`."""
    both = [shipped, trained]
    count = shipped.result["count"]
    real = shipped.result["real_recognition"]
    all_tokens = COUNTS[-1]
    vocabulary = shipped.tok.config.vocab_size
    bits = math.log2(vocabulary)
    minutes = _duration(training.seconds)
    intro = (
        f"FlexTok turns an image into a row of {all_tokens} tokens, ordered from coarse to fine: "
        "the first token alone already draws a whole picture, and every further one corrects it. "
        f"Here two models draw {count} handwritten digits that neither has seen in training: one "
        f"that comes with the package, and one trained from scratch on this machine in {minutes}."
    )
    headline = " ".join(
        f"{_capital(model.name)}: {_percent(model, 1)} of the digits can be recognised from one "
        f"token ({bits:.0f} bits), {_percent(model, all_tokens)} from all {all_tokens}."
        for model in both
    )
    grids = report.row(
        *(
            report.picture_table(_capital(model.name), about, TITLES, model.rows)
            for model, about in zip(
                both,
                (
                    f"{shipped.size:,} parameters",
                    f"{trained.size:,} parameters, {training.steps:,} steps, {minutes}",
                ),
            )
        )
    )

    def curves(key):
        return {model.name: sorted(model.result[key].items()) for model in both}

    quality = report.row(
        report.chart(
            "Closeness to the original",
            "PSNR in dB, mean over the images; higher is closer",
            curves("psnr"),
            "tokens",
            log2=True,
        ),
        report.chart(
            "Digits recognised",
            "share read correctly by a classifier trained on real digits",
            curves("recognition"),
            "tokens",
            log2=True,
            percent=True,
            level=(f"the originals: {100 * real:.1f}\u00a0%", real),
        ),
        report.chart(
            "Training loss",
            f"of {trained.name}",
            {"loss": training.losses},
            "step",
            from_zero=True,
            colors=[report.COLORS[1]],
        ),
        report.chart(
            "Different ids in use",
            f"at each position, of {vocabulary:,}, over {count} images",
            {
                model.name: list(enumerate(model.result["codes"]["distinct"], start=1))
                for model in both
            },
            "position",
            from_zero=True,
        ),
    )
    titles = ["tokens", "bits"]
    titles += [f"PSNR (dB), {model.name}" for model in both]
    titles += [f"recognised, {model.name}" for model in both]
    rows = [
        [str(k), f"{k * bits:.0f}"]
        + [f"{model.result['psnr'][k]:.2f}" for model in both]
        + [_percent(model, k) for model in both]
        for k in COUNTS
    ]
    return [
        ("", [report.paragraph(intro), report.paragraph(headline)]),
        (
            "Held-out digits, drawn from their first tokens",
            [
                grids,
                report.paragraph(
                    "Nothing is picked by eye: the rows are the first held-out digit of each class "
                    "0 to 9, and both models begin from the same noise (seed 0).",
                    note=True,
                ),
            ],
        ),
        (f"Over all {count} held-out digits", [quality, report.number_table(titles, rows)]),
        ("How it was made", [report.code(command), report.fact_table(_facts(both, training))]),
    ]


def _facts(both: list[Judged], training: Training) -> dict[str, str]:
    shipped, trained = both
    sampler = shipped.result
    config = training.config
    libraries = {"jax": jax, "flax": flax, "optax": optax, "numpy": np, "scikit-learn": sklearn}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in libraries.items())
    device = jax.devices()[0]
    facts = {
        "Data": "the 1 797 handwritten digits of scikit-learn, 8 x 8 scaled to 16 x 16 pixels; "
        f"1 500 to train, {sampler['count']} held out",
        "Judge": "logistic regression (C = 0.1) on the pixels of the 1 500 training digits",
        "Drawing": f"{sampler['steps']} Euler steps, seed {sampler['seed']}; guidance "
        f"{sampler['guidance']:g} (shipped), {trained.result['guidance']:g} (trained here); "
        "clipped to the range of the originals",
        "Training": f"{training.steps:,} steps"
        + (f" of {config['batch_size']} images, seed {config['seed']}" if config else "")
        + f", {_duration(training.seconds)} without compilation",
        "Evaluation": " and ".join(f"{model.seconds:.0f} s ({model.name})" for model in both)
        + ", compilation included",
        "Machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}; "
        f"computed on {device.device_kind}",
        "Versions": f"flextok_jax {__version__}, Python {platform.python_version()}, "
        + versions,
    }
    for model in both:
        facts[_capital(model.name)] = f"{model.tok.origin}, sha256 {model.tok.fingerprint}"
    return facts


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _percent(model: Judged, k: int) -> str:
    return f"{100 * model.result['recognition'][k]:.1f}\u00a0%"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def main(argv: list[str] | None = None) -> int:
    """Evaluates both models and writes the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", required=True, help="a model of the digits")
    parser.add_argument("--trained", required=True, help="the workdir of a training run")
    parser.add_argument("--out", required=True, help="the HTML file")
    parser.add_argument("--picture", help="a PNG file for the grids alone")
    args = parser.parse_args(argv)
    try:
        training = read_training(args.trained)
        shipped = judged("the shipped model", args.shipped)
        trained = judged("the model trained here", args.trained)
        total = training.config.get("total_steps")
        shift = training.config.get("data", {}).get("shift", 0)
        command = COMMANDS.format(
            trained=_short(args.trained),
            changes=f" --config.total_steps={total} --config.data.shift={shift}" if total else "",
            arguments=" \\\n    ".join(
                f"--{name} {value if name == 'shipped' else _short(value)}"
                for name, value in vars(args).items()
                if value
            ),
        )
        if args.picture:
            with tensor_file.atomic(args.picture) as temporary:
                about = {k: shipped.result[k] for k in ("steps", "seed")}
                about |= {"num_tokens": ",".join(map(str, COUNTS))}
                for model in (shipped, trained):
                    about[model.name] = f"{model.tok.origin}, guidance {model.result['guidance']:g}"
                pictures.write_png(temporary, picture([shipped, trained]), about)
        report.write_report(
            args.out,
            "An image in one token, or two, or sixteen",
            sections(shipped, trained, training, command),
        )
    except (ValueError, OSError, WorkdirError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The report is {args.out}")
    return 0


def _short(path: str) -> str:
    """Relative to the current folder where it lies inside."""
    here, full = pathlib.Path.cwd(), pathlib.Path(path).absolute()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
