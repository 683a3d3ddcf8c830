"""`flextok generate`: classes to tokens to images."""

import dataclasses
import pathlib
import time

import numpy as np

from flextok_jax.commands import common
from flextok_jax.commands.reconstruct import metadata
from flextok_jax.commands.tokens import write_tokens
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.generation import generate as generate_batch
from flextok_jax.evaluation.reconstruction import check_counts, identity
from flextok_jax.evaluation.results import results_folder
from flextok_jax.generator import ImageGenerator

GRID_COLUMNS = 10


def generate(args) -> None:
    """Writes grid.png, tokens.npz, generation.json, and k0016/NUMBER_classLABEL.png for every k.

    The grid shows samples by class, or, for several numbers of tokens, each sample from fewer and
    from more of its tokens.
    """
    from tqdm import tqdm

    gen = load_generator(args)
    tok = gen.tokenizer
    labels = np.repeat(read_labels(args.labels, gen.config.num_classes), args.per_label)
    names = [f"{place:06d}_class{label}.png" for place, label in enumerate(labels)]
    counts = check_counts(tok, args.num_tokens or [gen.num_tokens], available=gen.num_tokens)
    sampling = common.sampling(args)
    how = common.token_sampling(args)
    ar = {"ar_model": gen.origin, "ar_fingerprint": gen.fingerprint}
    about = {**identity(tok), **ar, **sampling.about(tok), **how.about(gen)}
    settings = {**about, "labels": labels.tolist(), "num_tokens": counts, "dtype": args.dtype}
    batch_size = min(args.batch_size, len(labels))
    with results_folder(args.out, settings) as results:

        def path(name, k):
            return results.folder / f"k{k:04d}" / name

        todo = [i for i, name in enumerate(names) if name not in results.records]
        started = time.perf_counter()
        with tqdm(
            total=len(names), initial=len(names) - len(todo), unit="image", disable=None
        ) as bar:
            for first in range(0, len(todo), batch_size):
                part = todo[first : first + batch_size]
                seeds = pics.name_seeds([names[i] for i in part])  # As `flextok detokenize` does.
                tokens, drawn = generate_batch(
                    gen, labels[part], seeds, counts, how, sampling, batch_size
                )
                for k, images in drawn.items():
                    for i, image in zip(part, pics.to_uint8(images)):
                        what = {"label": labels[i], **metadata(about, k)}
                        pics.write_png(path(names[i], k), image, what)
                results.add({names[i]: {"tokens": t} for i, t in zip(part, tokens.tolist())})
                bar.update(len(part))
        seconds = time.perf_counter() - started
        tokens = np.array([results.records[name]["tokens"] for name in names])
        write_tokens(results.folder / "tokens.npz", tok, tokens, names)
        rows, titles = _sheet(labels, names, counts, path)
        sheet = pics.grid(rows, titles)
        pics.write_png(results.folder / "grid.png", sheet, metadata(about, counts))
        common.write_json(results.folder / "generation.json", settings | {"count": len(names)})
    print(f"{len(names)} samples from {', '.join(map(str, counts))} tokens in {args.out}")
    common.print_speed(len(todo), seconds)


def load_generator(args) -> ImageGenerator:
    """The AR model of --model with the tokenizer of --tokenizer, or the one its file names."""
    gen = ImageGenerator.from_pretrained(args.model, dtype=args.dtype, mesh=common.all_devices())
    source = args.tokenizer or gen.tokenizer_source
    if not source:
        raise ValueError(
            f"{gen.origin} does not say whose tokens it makes: pass --tokenizer SOURCE"
        )
    return dataclasses.replace(gen, tokenizer=common.load_model(args, source))


def read_labels(text: str, num_classes: int) -> np.ndarray:
    """ "all", "3", "0-9,42", or a file with one label per line -> int [n]."""
    if not num_classes:
        raise ValueError("the model knows no classes: only class-conditional models can be used")
    if text == "all":
        return np.arange(num_classes)
    file = pathlib.Path(text).expanduser()
    parts = file.read_text(encoding="utf-8").split() if file.is_file() else text.split(",")
    labels = []
    for part in parts:
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(
                f"--labels {text!r}: {part!r} is no label. Pass all, labels and ranges such as "
                "0-9,42, or a file with one label per line"
            )
        first, last = int(first), int(last or first)
        if max(first, last) >= num_classes:  # Before a range is written out: it may be endless.
            raise ValueError(
                f"--labels {text!r}: label {max(first, last)}; the model has the classes 0 to "
                f"{num_classes - 1}"
            )
        labels += range(first, last + 1)
    if not labels:
        raise ValueError(f"--labels {text!r}: no label; a range goes from less to more")
    return np.array(labels)


def _sheet(labels, names, counts, path):
    """Rows and titles of the grid."""
    if len(counts) > 1:  # One sample per row, coarse to fine.
        shown = sorted({int(label): i for i, label in reversed(list(enumerate(labels)))}.values())
        shown = (shown if len(shown) > 1 else list(range(len(names))))[: pics.GRID_ROWS]
        rows = [[pics.read_png(path(names[i], k)) for k in counts] for i in shown]
        return rows, [f"k = {k}" for k in counts]
    groups = [np.flatnonzero(labels == label)[:GRID_COLUMNS] for label in np.unique(labels)]
    width = max(map(len, groups))
    rows = [
        [pics.read_png(path(names[i], counts[0])) for i in group]
        for group in groups[: pics.GRID_ROWS]
    ]
    empty = np.full_like(rows[0][0], 255)
    rows = [row + [empty] * (width - len(row)) for row in rows]
    return rows, [f"{i + 1}" for i in range(width)]
