"""The laboratory's table of claims: every variant of configs/lab.py at one budget, three seeds.

    python -m examples.lab --out lab

trains one variant after the other, some hours on a core, measures each, and writes
lab/report.md: the numbers of every variant, and of each claim below its margin and whether it is
shown. The same command goes on after a stop: finished runs are not trained or measured again. The
claims were written before anything was trained; what comes out contrary stays in the table.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from scipy.stats import spearmanr

from configs import lab
from examples import canvas, paper
from examples.digits import arrays
from examples.digits.classifier import CLASSES, features, parameters
from examples.digits.evaluation import sample, wanted
from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.evaluation.metrics import psnr
from flextok_jax.evaluation.statistics import FeatureSet, fid
from flextok_jax.io import storage
from flextok_jax.nn import masked
from flextok_jax.nn.flextok import codes_of, doublings
from flextok_jax.nn.images import to_float, to_uint8
from flextok_jax.token_sampling import PASSES, STEPS

MEASURED = "measured.json"
REPORT = """Written by `python -m examples.lab`, which trains and measures every variant of
`configs/lab.py`. Mean and standard deviation over seeds. PSNR in dB; Frechet distances are between
features of the digits' classifier; steps are those of the training."""
Results = dict[str, dict]  # Of one seed: variant -> what `measure` found.


class Claim(NamedTuple):
    """What is claimed of a variant: that `margin` of the results of a seed is above 0."""

    variant: str
    sentence: str
    margin: Callable[[Results], float]


def _more(name: str, a: str, b: str, least: float = 0.0) -> Callable[[Results], float]:
    """Margin of "`name` of a is above that of b", or at most -`least` below it."""
    return lambda found: found[a][name] - found[b][name] - least


def _rises(variant: str) -> Callable[[Results], float]:
    """Margin of "each doubling of the tokens has a higher PSNR": the smallest gain in dB."""
    return lambda found: float(np.min(np.diff(list(found[variant]["psnr by tokens"].values()))))


def _lost(result: dict) -> float:
    """How much accuracy a flow loses by fewer steps."""
    return result["accuracy"] - result["accuracy of 2 steps"]


RISES = "Every doubling of the tokens adds to the PSNR (dB)"
NEEDS = "Tokens for one error follow the number of digits (rank correlation above 0.5)"
CLAIMS = (
    Claim(
        "one_pass",
        "One pass has a higher PSNR than a flow (dB)",
        _more("psnr", "one_pass", "flow"),
    ),
    Claim(
        "one_pass",
        "A flow is nearer to the distribution of images (Frechet distance)",
        _more("frechet", "one_pass", "flow"),
    ),
    Claim(
        "continuous",
        "Tokens of four numbers have a higher PSNR than ids (dB)",
        _more("psnr", "continuous", "flow"),
    ),
    Claim(
        "llamagen",
        "Tokens that see the whole image have a higher PSNR than a grid's (dB)",
        _more("psnr", "one_pass", "llamagen"),
    ),
    Claim(
        "imagefolder",
        "The book that follows features says more of the digit (probe accuracy)",
        lambda found: found["imagefolder"]["probe last"] - found["imagefolder"]["probe first"],
    ),
    Claim(
        "imagefolder",
        "Two books cost at most 0.5 dB beside one, for as many bits",
        _more("psnr", "imagefolder", "one_pass", -0.5),
    ),
    Claim("one_d_piece", RISES, _rises("one_d_piece")),
    Claim("elastictok", RISES, _rises("elastictok")),
    Claim("spectral", RISES, _rises("spectral")),
    Claim(
        "spectral",
        "A scale is at most 0.5 dB worse, at its own resolution, than all scales made smaller",
        lambda found: found["spectral"]["own resolution"] + 0.5,
    ),
    Claim("canvas", NEEDS, lambda found: found["canvas"]["correlation"] - 0.5),
    Claim("canvas_elastic", NEEDS, lambda found: found["canvas_elastic"]["correlation"] - 0.5),
    Claim("alit", NEEDS, lambda found: found["alit"]["correlation"] - 0.5),
    Claim(
        "alit",
        "Rounds follow the number of digits more closely than ordered tokens (rank correlation)",
        _more("correlation", "alit", "canvas"),
    ),
    Claim(
        "binformer",
        "Ink of worn pages is found better than by Sauvola's threshold (F-measure)",
        lambda found: found["binformer"]["f"] - found["binformer"]["sauvola"],
    ),
    Claim(
        "cleaner",
        "Sixteen ordered tokens find it better than that threshold (F-measure)",
        lambda found: found["cleaner"]["f"] - found["cleaner"]["sauvola"],
    ),
    Claim(
        "textok",
        "Captions add to the PSNR of four tokens (dB)",
        _more("psnr", "textok", "textless"),
    ),
    Claim(
        "textok",
        "Captions of other canvases take it away (dB)",
        lambda found: found["textless"]["psnr"] - found["textok"]["psnr of others"],
    ),
    Claim(
        "tatitok",
        "A decoder that reads captions alone gains less than with the encoder (dB)",
        _more("psnr", "textok", "tatitok"),
    ),
    Claim(
        "pairs",
        "Two tokens at once lose what they say of each other (nats per token)",
        _more("loss", "pairs", "single"),
    ),
    Claim(
        "pairs",
        "Half the steps cost at most 2 points of accuracy",
        _more("accuracy", "pairs", "single", -0.02),
    ),
    Claim(
        "folded",
        "Half the positions cost at most 2 points of accuracy beside pairs",
        _more("accuracy", "folded", "pairs", -0.02),
    ),
    Claim(
        "doubling",
        "5 steps cost at most 5 points of accuracy beside 16",
        _more("accuracy", "doubling", "single", -0.05),
    ),
    Claim(
        "masked",
        "8 passes cost at most 2 points of accuracy beside 16 steps",
        _more("accuracy", "masked", "single", -0.02),
    ),
    Claim(
        "coarse",
        "Ids drawn at once lose what they say of each other (nats per token)",
        _more("loss", "coarse", "single"),
    ),
    Claim(
        "coarse",
        "Coarse ids first bring samples nearer to the images (Frechet distance)",
        _more("frechet", "single", "coarse"),
    ),
    Claim(
        "token_flow",
        "A flow over numbers costs at most 2 points of accuracy beside ids one by one",
        _more("accuracy", "token_flow", "single", -0.02),
    ),
    Claim(
        "flowtok",
        "From a text a flow loses less accuracy by 2 steps in place of 20 than from noise",
        lambda found: _lost(found["token_flow"]) - _lost(found["flowtok"]),
    ),
)


def train(variant: str, seed: int, workdir: pathlib.Path, steps: int | None = None) -> bool:
    """Trains a variant, or goes on with it; whether it is finished."""
    from flextok_jax import main
    from flextok_jax.training.loop import train as run

    config = lab.get_config(variant)
    config.seed = seed
    if variant in lab.FLOWS:
        config.tokenizer.source = str(workdir.parent / f"{lab.FLOWS[variant]}-{seed}")
    if steps:
        config.update(total_steps=steps, eval_every=steps)
        config.checkpoint.every = min(config.checkpoint.every, steps)
    outcome = run(main.make_stage(config), config, workdir)
    jax.clear_caches()
    return not outcome.stopped


def measure(variant: str, workdir: pathlib.Path, per_class: int) -> dict:
    """The numbers of a trained variant."""
    if variant in lab.GENERATORS:
        return measure_generator(workdir, per_class)
    tok = FlexTok.from_pretrained(str(workdir))
    if variant in lab.IMAGE_TO_IMAGE:
        return measure_pages(tok)
    if variant in lab.TEXT:
        return measure_text(tok)
    return measure_canvas(tok) if variant in lab.CANVAS else measure_tokenizer(tok)


def measure_pages(tok: FlexTok, count: int = 200) -> dict:
    """Clean pages of `count` worn ones: the F-measure of ink, and that of Sauvola's threshold."""
    from skimage.filters import threshold_sauvola

    pairs = [paper.pair("test", i) for i in range(count)]
    worn, clean = (np.stack(images) for images in zip(*pairs))
    grey = worn[..., 0]
    found = np.stack([x > threshold_sauvola(x, 15) for x in grey])
    by_tokens = {}
    for k in doublings(tok.prefixes):
        made = to_uint8(tok.detokenize(tok.tokenize(worn, k)))
        by_tokens[str(k)] = paper.f_measure(made > 127, clean > 127)
    numbers = {
        "f": by_tokens[str(tok.num_tokens)],
        "f by tokens": by_tokens,
        "sauvola": paper.f_measure(found, clean[..., 0] > 127),
        "tokens": tok.num_tokens,
        "passes": 1,
    }
    tokens = tok.tokenize(worn)
    return numbers | _cost(tok.params, count, tok.detokenize, tokens)


def measure_tokenizer(tok: FlexTok) -> dict:
    """Reconstructions of the 297 validation digits from all tokens, and PSNR by their number."""
    images, _ = arrays("test")
    key = {"key": 0} if tok.config.is_flow else {}
    by_tokens = {}
    for k in doublings(tok.prefixes):  # Tokens are made for each number: an encoder may be told it.
        tokens = tok.tokenize(images, k)
        made = to_uint8(tok.detokenize(tokens, **key))
        by_tokens[str(k)] = float(np.mean(psnr(to_float(made), to_float(images))))
    numbers = {
        "psnr": by_tokens[str(tok.num_tokens)],
        "psnr by tokens": by_tokens,
        "tokens": tok.num_tokens,
        "passes": tok.config.sampler.steps if tok.config.is_flow else 1,
    }
    if tok.config.sites.levels:
        numbers["own resolution"] = own_resolution(tok, tokens, images)
    if tok.config.bottleneck.books > 1:
        numbers |= probes(tok)
    return (
        numbers | _of_images(made) | _cost(tok.params, len(images), tok.detokenize, tokens, **key)
    )


def own_resolution(tok: FlexTok, tokens, images) -> float:
    """The PSNR (dB) of a scale without the finer ones beyond that of all scales made smaller.

    The least over scales. Both against the means of blocks of pixels, in their resolution; all
    scales are made smaller by bicubic interpolation.
    """
    whole, gains = tok.detokenize(tokens), []
    for i, k in enumerate(tok.prefixes[:-1]):
        block = 2 ** (tok.config.sites.levels - i)

        def means(x, block=block):
            n, height, width, channels = x.shape
            x = x.reshape(n, height // block, block, width // block, block, channels)
            return np.asarray(x.mean(axis=(2, 4)))

        original, found = means(to_float(images)), means(np.asarray(tok.detokenize(tokens, k)))
        smaller = np.asarray(jax.image.resize(whole, found.shape, "bicubic"))
        gains.append(np.mean(psnr(found, original)) - np.mean(psnr(smaller, original)))
    return float(min(gains))


def probes(tok: FlexTok) -> dict:
    """How well a linear map finds the digit in the mean code of the first and of the last book.

    The accuracy on the 297 validation digits of a ridge regression on the 1 500 others.
    """
    books, found = tok.config.bottleneck.books, {}
    codes = {
        split: np.asarray(codes_of(tok.params, tok.config, tok.tokenize(arrays(split)[0])))
        for split in ("train", "test")
    }
    for name, book in (("probe first", 0), ("probe last", books - 1)):
        means = {split: x[:, book::books].mean(axis=1) for split, x in codes.items()}
        x, y = (np.append(m, np.ones((len(m), 1)), axis=1) for m in means.values())
        wanted = np.eye(CLASSES)[arrays("train")[1]]
        weights = np.linalg.solve(x.T @ x + 1e-3 * np.eye(x.shape[1]), x.T @ wanted)
        found[name] = float(np.mean((y @ weights).argmax(axis=1) == arrays("test")[1]))
    return found


def measure_canvas(tok: FlexTok, count: int = 400) -> dict:
    """How far the tokens that an image needs follow the number of its digits; see `needed`."""
    made = [canvas.canvas("test", i) for i in range(count)]
    images = np.stack([one.image for one in made])
    counts = [k for k in range(2, tok.num_tokens + 1, 2) if k in tok.prefixes]
    found = tok.choose_length(images, "mae", target=0.0, counts=counts)
    tokens, digits = needed(found.values, counts), np.array([one.count for one in made])
    numbers = {
        "correlation": float(spearmanr(tokens, digits).statistic),
        "tokens by digits": {str(n): float(tokens[digits == n].mean()) for n in range(1, 5)},
        "tokens": tok.num_tokens,
        "passes": 1,
    }
    return numbers | _cost(tok.params, count, tok.detokenize, tok.tokenize(images))


def measure_text(tok: FlexTok, count: int = 400) -> dict:
    """PSNR of canvases with their captions, and with those of other canvases."""
    made = [canvas.canvas("test", i) for i in range(count)]
    images = np.stack([one.image for one in made])
    numbers, cfg = {"tokens": tok.num_tokens, "passes": 1}, tok.config.text
    texts = np.stack([one.embedding for one in made])
    for name, shift in (("psnr of others", 1), ("psnr", 0)):
        text = np.roll(texts, shift, axis=0) if cfg.dim else None
        tokens = tok.tokenize(images, text=text if cfg.encoder else None)
        found = to_float(to_uint8(tok.detokenize(tokens, text=text)))
        numbers[name] = float(np.mean(psnr(found, to_float(images))))
    return numbers | _cost(tok.params, count, tok.detokenize, tokens, text=text)


def needed(errors: np.ndarray, counts) -> np.ndarray:
    """The fewest tokens of each image for one error of all: int [n].

    That is the median of the errors with the middle one of the counts, so that a model's own
    quality is no part of it. Where no number meets it, the largest.

    Args:
        errors: float [n, numbers], of each image and each number of tokens.
        counts: the numbers, ascending.
    """
    meets = errors <= np.median(errors[:, (len(counts) - 1) // 2])
    first = np.where(meets.any(axis=1), meets.argmax(axis=1), len(counts) - 1)
    return np.asarray(counts)[first]


def measure_generator(workdir: pathlib.Path, per_class: int) -> dict:
    """Samples of every class, and the loss on the validation digits."""
    gen = ImageGenerator.from_pretrained(str(workdir))
    tok = FlexTok.from_pretrained(gen.tokenizer_source)
    gen = dataclasses.replace(gen, tokenizer=tok)
    made, cfg, count = sample(gen, per_class), gen.config, CLASSES * per_class
    numbers = {
        "accuracy": float(made.correct.sum() / count),
        "tokens": cfg.num_tokens,
        "passes": _passes(cfg),
    }
    if cfg.channels:  # Its loss is no likelihood.
        few = sample(gen, per_class, passes=2)
        numbers["accuracy of 2 steps"] = float(few.correct.sum() / count)
    else:
        records = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [x.get("eval/validation/loss") for x in map(json.loads, records)]
        numbers["loss"] = [loss for loss in losses if loss is not None][-1]
    images, labels = made.images.reshape(-1, *made.images.shape[2:]), list(range(CLASSES)) * 10
    cost = _cost(gen.params, len(labels), gen.generate_tokens, **wanted(gen, labels))
    return numbers | _of_images(images) | cost


def _passes(cfg) -> int:
    """How often a generator's Transformers run for all tokens."""
    if cfg.masked:
        return len(masked.left(cfg.num_tokens, PASSES))
    return STEPS if cfg.channels else sum(n for *_, n in cfg.runs) + bool(cfg.coarse)


def _of_images(images: np.ndarray) -> dict:
    """The Frechet distance of the classifier's features to those of the validation digits."""

    def gaussian(x):
        found, logits = map(np.asarray, features(parameters(), to_float(x)))
        return FeatureSet(found, logits, np.full(len(x), -1)).gaussian

    return {"frechet": float(fid(gaussian(images), gaussian(arrays("test")[0])))}


def _cost(params, count: int, function: Callable, *args, **kwargs) -> dict:
    """Parameters, and processor seconds for each of `count` images, after a call that compiles."""
    jax.block_until_ready(function(*args, **kwargs))
    start = time.process_time()
    jax.block_until_ready(function(*args, **kwargs))
    seconds = (time.process_time() - start) / count
    return {"parameters": sum(x.size for x in jax.tree.leaves(params)), "seconds": seconds}


def verdict(margins: list[float]) -> str:
    """ "shown" where the mean is more than two standard errors above 0, "contrary" below it.

    Else "not shown", and "one seed" of a single one.
    """
    if len(margins) < 2:
        return "one seed"
    mean, error = np.mean(margins), np.std(margins, ddof=1) / len(margins) ** 0.5
    return "shown" if mean > 2 * error else "contrary" if mean < -2 * error else "not shown"


def report(found: dict[int, Results]) -> str:
    """Markdown of the results of each seed."""
    lines = ["# The laboratory", "", REPORT, ""]
    for title, variants, names in (
        ("Tokenizers", lab.TOKENIZERS, ("psnr", "frechet")),
        ("Image to image", lab.IMAGE_TO_IMAGE, ("f", "sauvola")),
        ("Canvases", lab.CANVAS, ("correlation",)),
        ("Canvases with captions", lab.TEXT, ("psnr", "psnr of others")),
        ("Generators", lab.GENERATORS, ("accuracy", "loss", "frechet")),
    ):
        same = ("steps", "tokens", "passes", "parameters")
        columns = ("variant", "seeds", *names, *same, "CPU s per image")
        table = []
        for variant in variants:
            runs = [results[variant] for results in found.values() if variant in results]
            if runs:
                fixed = [f"{runs[0][name]:,}" for name in same]
                values = [
                    _spread([run[name] for run in runs]) if name in runs[0] else ""
                    for name in names
                ]
                seconds = _spread([run["seconds"] for run in runs])
                table.append(_row([variant, len(runs), *values, *fixed, seconds]))
        if table:
            header = [f"## {title}", "", _row(columns), _row(["---"] * len(columns))]
            lines += [*header, *table, ""]
    lines += ["## Claims", "", "A margin above 0 is as claimed.", ""]
    lines += [_row(("variant", "claim", "seeds", "margin", "")), _row(["---"] * 5)]
    for claim in CLAIMS:
        margins = []
        for results in found.values():
            try:
                margins.append(claim.margin(results))
            except KeyError:  # A variant that it compares with has not run with this seed.
                continue
        said = [_spread(margins), verdict(margins)] if margins else ["", "not run"]
        lines.append(_row([claim.variant, claim.sentence, len(margins), *said]))
    return "\n".join(lines) + "\n"


def _row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(values: list[float]) -> str:
    """ "1.23 ± 0.04" """
    deviation = f" ± {np.std(values, ddof=1):.3g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{deviation}"


def main(argv=None) -> None:
    """Trains, measures and writes the report after each variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of all runs")
    parser.add_argument("--variants", default=",".join(lab.VARIANTS), help="some, by commas (all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--steps", type=int, help="of each training (the variant's own)")
    parser.add_argument("--per-class", type=int, default=50, help="samples of each class (50)")
    args = parser.parse_args(argv)
    variants, found = args.variants.split(","), {}
    for name in ("seeds", "steps", "per_class"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if unknown := set(variants) - set(lab.VARIANTS):
        parser.error(f"variants {sorted(unknown)}: allowed are {', '.join(lab.VARIANTS)}")
    for seed in range(args.seeds):
        for variant in variants:
            workdir = args.out / f"{variant}-{seed}"
            if not (workdir / MEASURED).exists():
                if not train(variant, seed, workdir, args.steps):
                    return
                steps = args.steps or lab.get_config(variant).total_steps
                numbers = measure(variant, workdir, args.per_class) | {"steps": steps}
                storage.write_json(workdir / MEASURED, numbers)
            found.setdefault(seed, {})[variant] = storage.read_json(workdir / MEASURED)
            storage.write_text(args.out / "report.md", report(found))
    print(args.out / "report.md")


if __name__ == "__main__":
    main()
