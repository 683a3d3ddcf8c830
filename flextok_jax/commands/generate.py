"""`flextok generate`: classes to tokens to images."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from flextok_jax import conditions
from flextok_jax.commands import common, options
from flextok_jax.commands.tokens import write_tokens
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.generation import sample_tokens
from flextok_jax.evaluation.reconstruction import check_counts, metadata
from flextok_jax.generator import ImageGenerator
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path

GRID_COLUMNS = 10


def generate(args: options.Generate) -> None:
    """Writes grid.png, tokens.npz, generation.json, and k0016/NUMBER_classLABEL.png for every k.

    The grid shows samples by class, or, for several numbers of tokens, each sample from fewer and
    from more of its tokens.
    """
    out = common.out_results(args.out)
    gen = load_generator(args)
    tok = gen.tokenizer
    labels = read_labels(args.labels, gen.config.num_classes, gen.class_names)
    labels = np.repeat(labels, args.per_label)
    wanted = conditions.of_labels(labels, gen.class_names)
    names = [f"{number:06d}_class{label}.png" for number, label in enumerate(labels)]
    counts = check_counts(tok, args.num_tokens or [gen.num_tokens], available=gen.num_tokens)
    sampler = common.sampler(args, tok)
    scale = gen.config.guidance_scale if args.token_guidance is None else args.token_guidance
    how = token_filters(args)
    info = metadata(tok, sampler, args.seed) | how | {"token_guidance": scale}
    info |= {"ar_model": gen.origin, "ar_fingerprint": gen.fingerprint}
    settings = {**info, "labels": labels.tolist(), "num_tokens": counts}
    seeds, size, started = pics.name_seeds(names), min(args.batch_size, len(names)), time.time()
    with common.results_folder(out, settings):
        tokens, how = [], how | {"guidance_scale": scale}
        for first in tqdm(range(0, len(names), size), unit="batch of tokens", disable=None):
            rows = slice(first, first + size)
            options = (counts[-1], how, args.seed, size)
            tokens.append(sample_tokens(gen, wanted.take(rows), seeds[rows], *options))
        tokens = np.concatenate(tokens)
        texts = [{"label": label, "class": name} for label, name in zip(labels, wanted.names)]
        common.write_pictures(out, tok, tokens, names, counts, sampler, info, args, texts)
        write_tokens(out / "tokens.npz", tok, tokens, names)
        sheet = _sheet(labels, wanted.names, counts, lambda i, k: out / f"k{k:04d}" / names[i])
        pics.write_png(out / "grid.png", sheet, common.png_metadata(info, counts))
        storage.write_json(out / "generation.json", settings | {"count": len(names)})
    print(f"{len(names)} samples from {', '.join(map(str, counts))} tokens in {args.out}")
    common.print_speed(len(names), time.time() - started)


def token_filters(args: options.TokenSampling) -> dict:
    """Arguments of `ImageGenerator.generate_tokens` beside the scale of guidance."""
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}


def load_generator(args: options.Generate | options.Evaluate) -> ImageGenerator:
    """The AR model of --model with the tokenizer of --tokenizer, or the one its file names."""
    gen = ImageGenerator.from_pretrained(args.model, dtype=args.dtype, mesh=common.all_devices())
    source = args.tokenizer or gen.tokenizer_source
    if not source:
        raise ValueError(f"{gen.origin} names no tokenizer: pass --tokenizer SOURCE")
    return dataclasses.replace(gen, tokenizer=common.load_model(args, source))


def read_labels(text: str, num_classes: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """Classes of --labels: int [n].

    Args:
        text: "all", numbers, ranges and names of classes by commas such as "3,0-9,cat", or a file
            with one of these per line.
        class_names: of class 0, 1, …, where they are known. A name is taken for itself before it
            is taken for a number.
    """
    if not num_classes:
        raise ValueError("the model has no classes: only class-conditional models can be used")
    if text == "all":
        return np.arange(num_classes)
    file = as_path(text)
    parts = file.read_text(encoding="utf-8").splitlines() if file.is_file() else text.split(",")
    labels = []
    for part in filter(None, map(str.strip, parts)):
        first, _, last = part.partition("-")
        if part in class_names:
            first = last = str(class_names.index(part))
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < num_classes):
            names = f" or one of {', '.join(class_names[:20])}" if class_names else ""
            raise ValueError(
                f"--labels {text!r}: {part!r} is no class of the model. Allowed are all, numbers "
                f"and ranges from 0 to {num_classes - 1} such as 0-2{names}"
            )
        labels += range(int(first), int(last) + 1)
    if not labels:
        raise ValueError(f"--labels {text!r} names no class")
    return np.array(labels)


def _sheet(labels: np.ndarray, class_names, counts: list[int], path):
    """The grid of samples; `path(i, k)` is the file of sample i of k tokens."""
    first = np.sort(np.unique(labels, return_index=True)[1])[: pics.GRID_ROWS]
    if len(counts) > 1:  # One sample per row, coarse to fine: the first of each class.
        shown = first if len(first) > 1 else range(min(len(labels), pics.GRID_ROWS))
        rows = [[pics.read_png(path(i, k)) for k in counts] for i in shown]
        return pics.grid(rows, [f"k = {k}" for k in counts], [class_names[i] for i in shown])
    groups = [np.flatnonzero(labels == labels[i])[:GRID_COLUMNS] for i in first]
    rows = [[pics.read_png(path(i, counts[0])) for i in group] for group in groups]
    return pics.grid(rows, names=[class_names[i] for i in first])
