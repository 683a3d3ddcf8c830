"""What the quickstart's report is made of: models judged on the digits, and their training."""

import dataclasses
import json
import math
import os
import pathlib
import platform
import time

import flax
import jax
import numpy as np
import optax
import sklearn

from examples.digits import arrays
from examples.digits.judge import COUNTS, evaluate_digits
from examples.digits.samples import CLASSES, evaluate_samples, nearest_training
from flextok_jax import __version__
from flextok_jax.evaluation import pictures, report
from flextok_jax.generator import ImageGenerator
from flextok_jax.tokenizer import FlexTok

PER_CLASS = 10
TITLES = ["original", "1 token", *(f"{k}" for k in COUNTS[1:])]


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
class Sampled:
    """A generator and how its samples were read.

    Attributes:
        name: what the report calls it.
        gen: the generator, with its tokenizer.
        result: of `evaluate_samples`.
        rows: for each class 0..9 its samples, uint8.
        twins: of one sample of each class: [the sample, the training digit closest to it], uint8.
    """

    name: str
    gen: ImageGenerator
    result: dict
    rows: list[list[np.ndarray]]
    twins: list[list[np.ndarray]]


def sampled(name: str, source, tok: FlexTok) -> Sampled:
    """Loads an AR model, draws ten digits of each class and lets the judge read them."""
    gen = ImageGenerator.from_pretrained(source, tokenizer=tok)
    rows, firsts = [[] for _ in range(CLASSES)], []

    def keep(labels, images):
        for label, image in zip(labels.tolist(), images):
            if not rows[label]:
                firsts.append(image)
            rows[label].append(pictures.to_uint8(image))

    result = evaluate_samples(gen, PER_CLASS, visit=keep)
    index, _ = nearest_training(np.stack(firsts))
    train = arrays("train")[0]
    twins = [[row[0], train[i]] for row, i in zip(rows, index)]
    return Sampled(name, gen, result, rows, twins)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a workdir tells of its run.

    Attributes:
        losses: (step, loss), means over the steps since the point before.
        last: {metric: its last value}.
        seconds: in training steps, without compilation, saving and evaluation.
        config: the configuration, {} if it is not there.
    """

    losses: list[tuple[int, float]]
    last: dict
    seconds: float
    config: dict

    @property
    def steps(self) -> int:
        """The last step that is recorded."""
        return self.losses[-1][0] if self.losses else 0

    def about(self) -> str:
        """In words."""
        config = self.config
        how = f" of {config['batch_size']} images, seed {config['seed']}" if config else ""
        return f"{self.steps:,} steps{how}, {duration(self.seconds)} without compilation"


def read_training(workdir) -> Training:
    """Reads DIR/metrics.jsonl and DIR/config.json.

    Raises:
        FileNotFoundError: there is no DIR/metrics.jsonl.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pass the workdir of a training run")
    losses, last, seconds, before = [], {}, 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        last.update(record)
        if record.get("loss") is not None:
            losses.append((record["step"], record["loss"]))
        if record.get("step_time") is not None:
            seconds += record["step_time"] * (record["step"] - before)
            before = record["step"]
    about = workdir / "config.json"
    config = json.loads(about.read_text(encoding="utf-8"))["config"] if about.is_file() else {}
    return Training(losses, last, seconds, config)


def picture(model: Judged, generator: Sampled):
    """Reconstructions by number of tokens beside samples by class: a `PIL.Image.Image`."""
    from PIL import Image, ImageDraw, ImageFont

    sheets = {
        "Held-out digits, from their first k tokens": pictures.grid(
            model.rows, ["original", *(f"k = {k}" for k in COUNTS)], cell=64
        ),
        "New digits, ten of each class": pictures.grid(generator.rows, [""] * PER_CLASS, cell=64),
    }
    head, gap = 44, 28
    width = sum(sheet.width for sheet in sheets.values()) + gap
    whole = Image.new("RGB", (width, head + max(s.height for s in sheets.values())), "white")
    draw, x, font = ImageDraw.Draw(whole), 0, ImageFont.load_default(20)
    for title, sheet in sheets.items():
        whole.paste(sheet, (x, head))
        draw.text((x + 8, head - 8), title, fill="#1d1f24", font=font, anchor="ls")
        x += sheet.width + gap
    return whole


@dataclasses.dataclass(frozen=True)
class Content:
    """All that the report shows: of the shipped models and of those trained here just now."""

    shipped: Judged
    trained: Judged
    shipped_samples: Sampled
    trained_samples: Sampled
    training: dict[str, Training]  # Of "vae", "tokenizer" and "ar".
    commands: str


def sections(content: Content) -> list:
    """The content of the report; see `report.write_report`."""
    both = [content.shipped, content.trained]
    count, real = both[0].result["count"], both[0].result["real_recognition"]
    vocabulary = both[0].tok.config.vocab_size
    return [
        ("", [report.paragraph(text) for text in _introduction(content)]),
        (
            "Held-out digits, drawn from their first tokens",
            [
                report.row(*(_reconstructions(model) for model in both)),
                report.paragraph(
                    "Nothing is picked by eye: the rows are the first held-out digit of each class "
                    "0 to 9, and both models begin from the same noise (seed 0).",
                    note=True,
                ),
            ],
        ),
        ("New digits, drawn by class", _samples(content)),
        (
            f"Over all {count} held-out digits",
            [_quality(both, real, vocabulary), _table(both, vocabulary)],
        ),
        ("What was trained here", _training(content)),
        (
            "How it was made",
            [report.code(content.commands), report.fact_table(_facts(content))],
        ),
    ]


def _introduction(content: Content):
    both = [content.shipped, content.trained]
    last = COUNTS[-1]
    bits = math.log2(both[0].tok.config.vocab_size)
    seconds = sum(training.seconds for training in content.training.values())
    yield (
        f"FlexTok turns an image into a row of {last} tokens, ordered from coarse to fine: the "
        "first token alone already draws a whole picture, and every further one corrects it. A "
        "second model, a small GPT, learns to write such rows for a class, and so draws new "
        f"images. Here are models that come with the package, beside models of the same kind "
        f"trained from scratch on this machine in {duration(seconds)}, on 1 500 handwritten "
        f"digits. None of them has seen the {both[0].result['count']} digits of this page."
    )
    for model, samples in zip(both, (content.shipped_samples, content.trained_samples)):
        yield (
            f"{_capital(model.name)}: {_percent(model.result['recognition'][1])} of the held-out "
            f"digits can be recognised from one token ({bits:.0f} bits), "
            f"{_percent(model.result['recognition'][last])} from all {last}; "
            f"{_percent(samples.result['recognition'])} of its new digits are read as the class "
            "that was asked for."
        )


def _reconstructions(model: Judged) -> str:
    about = f"{model.size:,} parameters"
    return report.picture_table(_capital(model.name), about, TITLES, model.rows)


def _samples(content: Content) -> list[str]:
    ours = content.shipped_samples
    grids = [
        report.picture_table(
            _capital(samples.name),
            f"{_percent(samples.result['recognition'])} are read as the class asked for",
            [str(i + 1) for i in range(PER_CLASS)],
            samples.rows,
        )
        for samples in (ours, content.trained_samples)
    ]
    near = ours.result["nearest"]
    twins = report.picture_table(
        "Not copies",
        "above: the first sample of each class; below: the training digit closest to it",
        [str(c) for c in range(CLASSES)],
        list(zip(*ours.twins)),
    )
    return [
        report.row(*grids),
        report.row(twins),
        report.paragraph(
            f"Of the shipped model's samples the median distance to the closest training digit is "
            f"{near['samples']:.3f} (root mean square over pixels, of a range of 2); of real "
            f"held-out digits it is {near['held_out']:.3f}. {_percent(near['closer'])} of the "
            "samples lie closer to a training digit than all but 5 % of the held-out digits do.",
            note=True,
        ),
    ]


def _quality(both: list[Judged], real: float, vocabulary: int) -> str:
    def curves(key):
        return {model.name: sorted(model.result[key].items()) for model in both}

    return report.row(
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
            level=(f"the originals: {_percent(real)}", real),
        ),
        report.chart(
            "Different ids in use",
            f"at each position, of {vocabulary:,}, over {both[0].result['count']} images",
            {
                model.name: list(enumerate(model.result["codes"]["distinct"], start=1))
                for model in both
            },
            "position",
            from_zero=True,
        ),
    )


def _table(both: list[Judged], vocabulary: int) -> str:
    titles = ["tokens", "bits"]
    titles += [f"PSNR (dB), {model.name}" for model in both]
    titles += [f"recognised, {model.name}" for model in both]
    rows = [
        [str(k), f"{k * math.log2(vocabulary):.0f}"]
        + [f"{model.result['psnr'][k]:.2f}" for model in both]
        + [_percent(model.result["recognition"][k]) for model in both]
        for k in COUNTS
    ]
    return report.number_table(titles, rows)


STAGES = {
    "vae": "Stage 0: the VAE (reconstruction and KL)",
    "tokenizer": "Stage 1: the tokenizer (rectified flow)",
    "ar": "Stage 2: the AR model (cross-entropy)",
}


def _training(content: Content) -> list[str]:
    charts = [
        report.chart(
            title,
            content.training[stage].about(),
            {"loss": content.training[stage].losses},
            "step",
            from_zero=True,
            colors=[report.COLORS[1]],
        )
        for stage, title in STAGES.items()
    ]
    return [report.row(*charts)]


def _facts(content: Content) -> dict[str, str]:
    both = [content.shipped, content.trained]
    sampler = both[0].result
    libraries = {"jax": jax, "flax": flax, "optax": optax, "numpy": np, "scikit-learn": sklearn}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in libraries.items())
    facts = {
        "Data": "the 1 797 handwritten digits of scikit-learn, 8 x 8 scaled to 16 x 16 pixels; "
        f"1 500 to train, {sampler['count']} held out",
        "Judge": "logistic regression (C = 0.1) on the pixels of the 1 500 training digits",
        "Drawing": f"{sampler['steps']} Euler steps, seed {sampler['seed']}; guidance "
        f"{sampler['guidance']:g}; clipped to the range of the originals",
        "Sampling tokens": f"temperature 1, guidance "
        f"{content.shipped_samples.result['token_guidance']:g}, no filter",
        "Evaluation": " and ".join(f"{model.seconds:.0f} s ({model.name})" for model in both)
        + ", compilation included",
        "Machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}; "
        f"computed on {jax.devices()[0].device_kind}",
        "Versions": f"flextok_jax {__version__}, Python {platform.python_version()}, " + versions,
    }
    for model, samples in zip(both, (content.shipped_samples, content.trained_samples)):
        for part in (model.tok, samples.gen):
            kind = "tokenizer" if part is model.tok else "AR model"
            facts[f"{_capital(model.name)}, {kind}"] = f"{part.origin}, sha256 {part.fingerprint}"
    return facts


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
