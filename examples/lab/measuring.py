"""The numbers of a trained variant of configs/lab.py."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

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
from flextok_jax.nn import masked
from flextok_jax.nn.flextok import codes_of, doublings
from flextok_jax.nn.images import to_float, to_uint8
from flextok_jax.token_sampling import PASSES, STEPS

PER_CLASS = 50  # Samples of a generator, of each class.


def measure(variant: str, workdir: pathlib.Path) -> dict:
    """The numbers of a trained variant."""
    if variant in lab.GENERATORS:
        return measure_generator(workdir)
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


def measure_generator(workdir: pathlib.Path) -> dict:
    """Samples of every class, and the loss on the validation digits."""
    gen = ImageGenerator.from_pretrained(str(workdir))
    tok = FlexTok.from_pretrained(gen.tokenizer_source)
    gen = dataclasses.replace(gen, tokenizer=tok)
    made, cfg, count = sample(gen, PER_CLASS), gen.config, CLASSES * PER_CLASS
    numbers = {
        "accuracy": float(made.correct.sum() / count),
        "tokens": cfg.num_tokens,
        "passes": passes(cfg),
    }
    if cfg.channels:  # Its loss is no likelihood.
        few = sample(gen, PER_CLASS, passes=2)
        numbers["accuracy of 2 steps"] = float(few.correct.sum() / count)
    else:
        records = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [x.get("eval/validation/loss") for x in map(json.loads, records)]
        numbers["loss"] = [loss for loss in losses if loss is not None][-1]
    images, labels = made.images.reshape(-1, *made.images.shape[2:]), list(range(CLASSES)) * 10
    cost = _cost(gen.params, len(labels), gen.generate_tokens, **wanted(gen, labels))
    return numbers | _of_images(images) | cost


def passes(cfg) -> int:
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
