"""The report of the quickstart: the shipped models, and models of the digits just trained.

    python -m examples.quickstart quickstart

reads the workdirs quickstart/{vae,tokenizer,ar} and writes quickstart/report.html and
quickstart/digits.png.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import pathlib
import platform

import jax
import numpy as np

from examples.digits import arrays
from examples.digits.classifier import CLASSES, correct
from examples.digits.evaluation import COUNTS, Reconstructions, Samples, reconstruct, sample
from examples.emoji import evaluation as emoji
from flextok_jax import FlexTok, ImageGenerator, __version__, load_images
from flextok_jax.evaluation import report
from flextok_jax.evaluation.metrics import psnr
from flextok_jax.io import models, sources, storage
from flextok_jax.nn import vae
from flextok_jax.nn.images import to_float, to_uint8

PER_CLASS = 10
STAGES = {"vae": "Stage 0: VAE", "tokenizer": "Stage 1: tokenizer", "ar": "Stage 2: AR model"}
NAMES = [str(c) for c in range(CLASSES)]
COMMANDS = """./launch/quickstart.sh

# the same by hand
python -m flextok_jax.main --config=configs/vae.py:digits --workdir={runs}/vae \\
    --config.total_steps={vae}
python -m flextok_jax.main --config=configs/tokenizer.py:digits --workdir={runs}/tokenizer \\
    --config.total_steps={tokenizer}
python -m flextok_jax.main --config=configs/ar.py:digits --workdir={runs}/ar \\
    --config.tokenizer.source={runs}/tokenizer --config.total_steps={ar}
python -m examples.quickstart {runs}"""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A tokenizer and a generator of its tokens, and what they do on the digits."""

    name: str
    tok: FlexTok
    reconstructions: Reconstructions
    samples: Samples

    @property
    def parameters(self) -> int:
        """How many the tokenizer has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.tok.params))


def evaluate(name: str, tokenizer, generator) -> Model:
    """Loads and measures a pair of models."""
    tok = FlexTok.from_pretrained(tokenizer)
    gen = ImageGenerator.from_pretrained(generator, tokenizer=tok)
    return Model(name, tok, reconstruct(tok), sample(gen, PER_CLASS))


@dataclasses.dataclass(frozen=True)
class Training:
    """What a workdir records.

    Attributes:
        losses: (step, loss), means over the steps since the point before.
        seconds: in training steps, without compilation, saving and evaluation.
        config: the configuration.
    """

    losses: list[tuple[int, float]]
    seconds: float
    config: dict


def read_training(workdir) -> Training:
    """Reads DIR/metrics.jsonl and DIR/config.json.

    Raises:
        FileNotFoundError: they are not there.
    """
    workdir = pathlib.Path(workdir)
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses, seconds, before = [], 0.0, 0
    for record in map(json.loads, lines):
        if record.get("loss") is not None:
            losses.append((record["step"], record["loss"]))
        if record.get("step_time") is not None:
            seconds += record["step_time"] * (record["step"] - before)
            before = record["step"]
    return Training(losses, seconds, storage.read_json(workdir / "config.json")["config"])


def picture(model: Model) -> bytes:
    """PNG: reconstructions by number of tokens beside samples by class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1 + len(COUNTS), PER_CLASS))
    grids = {left: np.stack(_rows(model)), right: model.samples.images}
    for axes, grid in grids.items():
        grid = np.pad(grid, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
        rows, columns, height, width, _ = grid.shape
        axes.imshow(
            grid.swapaxes(1, 2).reshape(rows * height, columns * width, 3), interpolation="nearest"
        )
        axes.set_yticks(height * (np.arange(rows) + 0.5), NAMES)
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=12)
        axes.spines[:].set_visible(False)
    titles = ["image", *map(str, COUNTS)]
    left.set_xticks(18 * (np.arange(len(titles)) + 0.5), titles)
    left.xaxis.tick_top()
    left.set_title("Validation digits from k tokens", pad=20)
    right.set_title("Generated digits, ten of each class", pad=20)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"model": model.tok.origin})
    return stream.getvalue()


def sections(both: list[Model], training: dict[str, Training], runs: pathlib.Path) -> list:
    """The content of the report; see `report.write_report`."""
    steps = {stage: run.config["total_steps"] for stage, run in training.items()}
    here = os.path.relpath(runs)
    commands = COMMANDS.format(runs=runs if here.startswith("..") else here, **steps)
    return [
        ("", _introduction(both, training)),
        ("Emoji", _emoji()),
        ("Reconstructions from the first k tokens", _reconstructions(both)),
        ("Generated digits, by class", _generated(both)),
        ("Quality by number of tokens", [_curves(both), _numbers(both)]),
        ("The VAE", _vae(runs / "vae")),
        ("Training", [report.row(*(_losses(stage, run) for stage, run in training.items()))]),
        ("How to make this page", [report.code(commands), report.fact_table(_facts(both))]),
    ]


def _introduction(both, training) -> list[str]:
    first, last, total = COUNTS[0], COUNTS[-1], _total()
    seconds = sum(run.seconds for run in training.values())
    texts = [
        "FlexTok writes an image as tokens, ordered from coarse to fine: the first k of them "
        "decode to an image, for every k. An AR model generates tokens for a class. First come "
        "emoji by models that come with the package, then handwritten digits: shipped models "
        f"beside models that were just trained on this machine, in {duration(seconds)}. All models "
        f"of digits were trained on 1 500 of them; the numbers are of {total} others (validation)."
    ]
    for model in both:
        counts, samples = model.reconstructions.correct, model.samples.correct.sum()
        texts.append(
            f"{model.name}: {counts[first]} of {total} digits are classified correctly from one "
            f"token, {counts[last]} from all {last}; {samples} of {PER_CLASS * CLASSES} generated "
            "digits are classified as the class that was asked for."
        )
    return [report.paragraph(text) for text in texts]


def _emoji() -> list[str]:
    tok = FlexTok.from_pretrained("demo-emoji")
    gen = ImageGenerator.from_pretrained("demo-emoji-ar", tokenizer=tok)
    files = sorted((sources.DEMO_FOLDER / sources.DEMOS["demo-emoji"] / "images").iterdir())
    images = load_images(files, tok.config.image_size[0])
    made = emoji.reconstruct(tok, images)
    rows = [[image, *(made[k][i] for k in made)] for i, image in enumerate(images)]
    names = [file.stem.replace("_", " ") for file in files]
    groups = list(emoji.GROUPS)
    samples = to_uint8(np.asarray(gen.generate(list(range(len(groups))) * PER_CLASS, key=0)))
    drawn = [list(samples[c :: len(groups)]) for c in range(len(groups))]
    titles = ["original", *(f"k = {k}" for k in made)]
    return [
        report.picture_table(
            "From the first k tokens", "emoji that no model was trained on", titles, rows, names
        ),
        report.picture_table(
            "Generated, by group", "ten samples each, key 0", [""] * PER_CLASS, drawn, groups
        ),
    ]


def _rows(model: Model) -> list[list[np.ndarray]]:
    """For each class its first validation digit: [original, from 1 token, 2, ...]."""
    originals, found = arrays("test")[0], model.reconstructions.images
    return [[originals[i], *(found[k][i] for k in COUNTS)] for i in _firsts()]


def _firsts() -> list[int]:
    """The first validation digit of each class."""
    return [int(np.flatnonzero(arrays("test")[1] == c)[0]) for c in range(CLASSES)]


def _total() -> int:
    return len(arrays("test")[1])


def _reconstructions(both) -> list[str]:
    titles = ["original", *(f"k = {k}" for k in COUNTS)]
    note = (
        "Each row is the first validation digit of its class. Both models start from the same "
        "noise (key 0)."
    )
    grids = (
        report.picture_table(m.name, f"{m.parameters:,} parameters", titles, _rows(m), NAMES)
        for m in both
    )
    return [report.row(*grids), report.paragraph(note, note=True)]


def _generated(both) -> list[str]:
    def grid(model):
        found = f"{model.samples.correct.sum()} of {PER_CLASS * CLASSES}"
        remark = f"{found} are classified as the class of their row"
        rows = list(model.samples.images)
        return report.picture_table(model.name, remark, [""] * PER_CLASS, rows, NAMES)

    samples = both[0].samples
    twins = report.picture_table(
        "New digits, or copies?",
        "above: the shipped model's first sample of each class; below: the closest training digit",
        NAMES,
        [list(samples.images[:, 0]), list(samples.nearest)],
    )
    note = (
        f"Median distance to the closest training digit: {samples.distance:.3f} for the shipped "
        f"model's samples, {samples.validation_distance:.3f} for validation digits (root mean "
        f"square over pixels in [-1, 1]). {samples.closer:.0%} of the samples are closer to a "
        "training digit than 95 % of the validation digits are: 5 % for new digits, 100 % for "
        "copies."
    )
    return [report.row(*map(grid, both)), twins, report.paragraph(note, note=True)]


def _curves(both) -> str:
    found = {model.name: model.reconstructions for model in both}
    quality = {name: list(one.psnr.items()) for name, one in found.items()}
    share = {
        name: [(k, count / _total()) for k, count in one.correct.items()]
        for name, one in found.items()
    }
    remarks = (
        "dB, mean over images; higher is better",
        "share of reconstructions classified correctly",
    )
    originals = "originals", float(np.mean(correct(*arrays("test"))))
    return report.row(
        report.chart("PSNR", remarks[0], quality, "tokens", log2=True),
        report.chart(
            "Accuracy", remarks[1], share, "tokens", log2=True, percent=True, level=originals
        ),
    )


def _numbers(both) -> str:
    titles = ["k", "bits", "PSNR, shipped", "PSNR, here", "correct, shipped", "correct, here"]
    bits, rows = math.log2(both[0].tok.config.vocab_size), []
    for k in COUNTS:
        rows.append([str(k), f"{k * bits:.0f}"])
        rows[-1] += [f"{model.reconstructions.psnr[k]:.2f}" for model in both]
        rows[-1] += [str(model.reconstructions.correct[k]) for model in both]
    return report.number_table(titles, rows)


def _vae(workdir: pathlib.Path) -> list[str]:
    cfg, params = models.load_vae(str(workdir))
    originals = arrays("test")[0]
    mean, _ = vae.encode_moments(params, cfg, to_float(originals))
    found = to_uint8(np.asarray(vae.decode_latents(params, cfg, mean)))
    quality = float(np.mean(psnr(to_float(found), to_float(originals))))
    table = report.picture_table(
        "Above: original; below: reconstruction by the VAE trained here",
        f"16x16x3 pixels to {'x'.join(map(str, mean.shape[1:]))} latents and back: "
        f"{quality:.1f} dB PSNR over {len(originals)} validation digits",
        NAMES,
        [list(images[_firsts()]) for images in (originals, found)],
    )
    note = (
        "Larger tokenizers work on a VAE's latents (stage 0). The tokenizers of this page work on "
        "pixels: 16x16 are few enough."
    )
    return [table, report.paragraph(note, note=True)]


def _losses(stage: str, run: Training) -> str:
    remark = (
        f"{run.config['total_steps']:,} steps of {run.config['batch_size']} images, "
        f"{duration(run.seconds)} without compilation"
    )
    return report.chart(STAGES[stage], remark, {"loss": run.losses}, "step", from_zero=True)


def _facts(both) -> dict[str, str]:
    facts = {
        "Data": "the 1 797 digits of scikit-learn (UCI), 8x8 enlarged to 16x16 pixels",
        "Classifier": "a small convolutional network, trained on the 1 500 training digits",
        "Sampling": "the models' own settings (solver, steps, guidance), temperature 1, key 0",
        "Machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}; "
        f"computed on {jax.devices()[0].device_kind}",
        "Versions": f"flextok_jax {__version__}, jax {jax.__version__}, "
        f"Python {platform.python_version()}",
    }
    return facts | {
        model.name: f"{model.tok.origin}, sha256 {model.tok.fingerprint}" for model in both
    }


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def main(argv=None) -> None:
    """Measures the models and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, help="a folder with vae, tokenizer and ar")
    runs = parser.parse_args(argv).runs
    training = {stage: read_training(runs / stage) for stage in STAGES}
    both = [
        evaluate("Shipped models", "demo-digits", "demo-digits-ar"),
        evaluate("Trained here", runs / "tokenizer", runs / "ar"),
    ]
    with storage.atomic(runs / "digits.png") as temporary:
        temporary.write_bytes(picture(both[0]))
    title = "Images in ordered tokens: emoji and digits"
    report.write_report(runs / "report.html", title, sections(both, training, runs))
    print(f"The report is {runs / 'report.html'}")


if __name__ == "__main__":
    main()
