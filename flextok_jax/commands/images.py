"""Images to tokens and back: `flextok reconstruct`, `tokenize`, `detokenize` and `generate`."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from flextok_jax import conditions
from flextok_jax.commands import common, options, text
from flextok_jax.data.source import composed
from flextok_jax.evaluation import metrics
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.generator import ImageGenerator
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path
from flextok_jax.parallel.sharding import padded
from flextok_jax.tokenizer import FlexTok

FIELDS = ("tokens", "names", "origin", "fingerprint")
LENGTHS = "lengths"  # A field that a file of tokens may have.
OWN = "own"  # The folder of images from their own lengths.
GRID_COLUMNS = 10


def reconstruct(args: options.Reconstruct) -> None:
    """Writes grid.png, k0016/NAME.png for every k and image, and metrics.json into --out."""
    pictures = pics.Pictures(args.images, args.limit)
    out = common.out_results(args.out, args.images)
    tok = common.load_model(args)
    counts = rec.check_counts(tok, args.num_tokens)
    sampler = common.sampler(args, tok)
    info = rec.metadata(tok, sampler, args.seed)
    settings = {**info, "images": str(args.images), "limit": args.limit, "num_tokens": counts}
    files = dict(zip(pictures.names, pics.png_names(pictures.names)))
    size, tokens, rows, names = min(args.batch_size, len(pictures)), [], [], []

    def stream(bar):
        """See `metrics.per_image`."""
        for batch in pictures.batches(rec.side(tok), size):
            tokens.append(rec.encode(tok, batch.images, counts[-1], size))
            columns = [batch.images]
            for k in counts:
                paths = [out / f"k{k:04d}" / files[name] for name in batch.names]
                given = rec.tokens_for(tok, tokens[-1], batch.images, k, size)
                how = (k, batch.seeds, sampler, args.seed, size)
                make = functools.partial(rec.decode, tok, given, *how)
                of = [{"image_sha256": hashlib.sha256(x).hexdigest()} for x in batch.images]
                text = [png_metadata(info, k) | one for one in of]
                columns.append(pics.saved_pictures(paths, text, make))
                both = (padded(x, size) for x in (columns[-1], batch.images))
                yield f"/{k}", *both, np.arange(size) < len(paths)
            shown = pics.GRID_ROWS - len(rows)
            rows.extend(list(zip(*columns))[:shown])
            names.extend(pictures.class_name(label) for label in batch.labels[:shown])
            bar.update(len(batch.names))

    with common.results_folder(out, settings):
        with tqdm(total=len(pictures), unit="image", disable=None) as bar:
            means: dict = {}
            for name, value in metrics.means(stream(bar)):
                metric, k = name.split("/")
                means.setdefault(metric, {})[int(k)] = value
        tokens = np.concatenate(tokens)
        sheet = pics.grid(rows, ["original", *(f"k = {k}" for k in counts)], names)
        pics.write_png(out / "grid.png", sheet, png_metadata(info, counts))
        result = {
            **info,
            "images": pictures.title,
            "count": len(tokens),
            "unreadable": pictures.unreadable,
            "num_tokens": counts,
            **means,
            **metrics.codes(tokens, tok.config.vocab_size, counts),
        }
        storage.write_json(out / "metrics.json", result)
    common.left_out(pictures.skipped, pictures.unreadable, len(pictures))
    print(f"{len(tokens)} images from their first k tokens, in {args.out}")
    for k in counts:
        print(f"{k:5} tokens:" + "".join(f"  {n.upper()} {x[k]:.4g}" for n, x in means.items()))


def tokenize(args: options.Tokenize) -> None:
    """Writes the first k tokens of every image as .npz; with --data: see `flextok encode`."""
    if args.data:
        from flextok_jax.commands.encode import encode

        shared = {f.name for f in dataclasses.fields(options.Encode)} & set(vars(args))
        return encode(options.Encode(**{name: getattr(args, name) for name in shared}))
    for field in dataclasses.fields(options.Crops):
        if getattr(args, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} goes with --data, not --images")
    out = common.out_file(args.out, ours=_holds_tokens)
    pictures = pics.Pictures(args.images, args.limit)
    tok = common.load_model(args)
    (k,) = rec.check_counts(tok, [args.num_tokens or tok.num_tokens])
    known = common.read_lengths(args.lengths, tok, pictures.names) if args.lengths else None
    size = min(args.batch_size, len(pictures))
    tokens, names = [], []
    with tqdm(total=len(pictures), unit="image", disable=None) as bar:
        for batch in pictures.batches(rec.side(tok), size):
            tokens.append(rec.encode(tok, batch.images, k, size))
            names += batch.names
            bar.update(len(batch.names))
    lengths = None if known is None else known.of(names).clip(max=k)
    write_tokens(out, tok, np.concatenate(tokens), names, lengths)
    common.left_out(pictures.skipped, pictures.unreadable, len(pictures))
    mean = "" if lengths is None else f" with lengths of {lengths.mean():.4g} on average"
    print(f"{k} tokens of each of {len(names)} images{mean} in {out}")


def detokenize(args: options.Detokenize) -> None:
    """Writes the images of a file of tokens: k0016/NAME.png for every k, in --out."""
    saved = read_tokens(args.tokens)
    out = common.out_results(args.out)
    tok = common.load_model(args)
    if not tok.decodes(str(saved["fingerprint"])):
        raise ValueError(
            f"{args.tokens} has tokens of {saved['origin']}, sha256 {saved['fingerprint']}, not of "
            f"--model {tok.origin}, sha256 {tok.fingerprint}: pass the model that made them"
        )
    tokens, names = saved["tokens"], saved["names"].tolist()
    if own := LENGTHS in saved and not args.num_tokens:
        counts, words = [saved[LENGTHS]], "their own numbers of"
    else:
        counts = args.num_tokens or [tokens.shape[1]]
        counts = rec.check_counts(tok, counts, available=tokens.shape[1])
        words = ", ".join(map(str, counts))
    sampler = common.sampler(args, tok)
    info = rec.metadata(tok, sampler, args.seed)
    settings = {**info, "tokens": str(args.tokens), "num_tokens": OWN if own else counts}
    settings["tokens_sha256"] = storage.fingerprint({"tokens": tokens})
    if own:
        settings["lengths_sha256"] = storage.fingerprint({LENGTHS: saved[LENGTHS]})
    with common.results_folder(out, settings):
        write_pictures(out, tok, tokens, names, counts, sampler, info, args)
    print(f"{len(names)} images from {words} tokens in {args.out}")


def generate(args: options.Generate) -> None:
    """Writes grid.png, tokens.npz, generation.json, and k0016/NUMBER_classLABEL.png for every k."""
    out = common.out_results(args.out)
    texts = text.encoded(args)
    gen = load_generator(args)
    tok = gen.tokenizer
    gen, wanted = asked(args, gen, texts)
    names = wanted.names
    counts = rec.check_counts(tok, args.num_tokens or [gen.num_tokens], available=gen.num_tokens)
    sampler = common.sampler(args, tok, gen.decoding)
    scale = gen.config.guidance_scale if args.token_guidance is None else args.token_guidance
    how = token_filters(args) | ({"passes": args.passes} if args.passes else {})
    info = rec.metadata(tok, sampler, args.seed) | how | {"token_guidance": scale}
    info |= {"ar_model": gen.origin, "ar_fingerprint": gen.fingerprint}
    settings = {**info, **wanted.about, "num_tokens": counts}
    seeds, size = pics.name_seeds(names), min(args.batch_size, len(names))
    with common.results_folder(out, settings):
        tokens, how = [], how | {"guidance_scale": scale}
        for first in tqdm(range(0, len(names), size), "tokens", unit="batch", disable=None):
            rows = slice(first, first + size)
            options = (counts[-1], how, args.seed, size)
            tokens.append(
                rec.sample_tokens(gen, wanted.conditions.take(rows), seeds[rows], *options)
            )
        tokens = np.concatenate(tokens)
        write_pictures(out, tok, tokens, names, counts, sampler, info, args, wanted.texts)
        write_tokens(out / "tokens.npz", tok, tokens, names)
        words = wanted.conditions.names
        sheet = _sheet(wanted.groups, words, counts, lambda i, k: out / f"k{k:04d}" / names[i])
        pics.write_png(out / "grid.png", sheet, png_metadata(info, counts))
        storage.write_json(out / "generation.json", settings | {"count": len(names)})
    print(f"{len(names)} samples from {', '.join(map(str, counts))} tokens in {args.out}")


class Asked(NamedTuple):
    """What samples are asked for by the options, in order.

    Attributes:
        conditions: one for each sample.
        groups: int [n], equal for samples of one label or prompt.
        names: of their files, such as "000003_class7.png".
        about: for settings.
        texts: what each PNG says.
    """

    conditions: conditions.Conditions
    groups: np.ndarray
    names: list[str]
    about: dict
    texts: list[dict]


def asked(args, gen: ImageGenerator, texts: text.Texts | None) -> tuple[ImageGenerator, Asked]:
    """--labels, --text or --prompts, each --per-label times; the generator with the null prompt.

    Args:
        texts: of `text.encoded`.
    """
    count, about = args.per_label, {}
    if texts is None and not gen.config.num_classes and args.labels is None:
        groups, wanted = np.zeros(count, int), conditions.of_nothing(count)
        slugs, what = ["sample"] * count, [{}] * count
    elif texts is None:
        labels = read_labels(args.labels or "all", gen.config.num_classes, gen.class_names)
        groups = np.repeat(labels, count)
        wanted = conditions.of_labels(groups, gen.class_names)
        slugs, about = [f"class{label}" for label in groups], {"labels": groups.tolist()}
        what = [
            {"label": label, "class": name} for label, name in zip(groups.tolist(), wanted.names)
        ]
    else:
        groups = np.repeat(np.arange(len(texts.conditions)), count)
        wanted, about = texts.conditions.take(groups), texts.about
        gen = dataclasses.replace(gen, null_text=texts.null)
        if (found := texts.null[0].shape[2]) != gen.config.text_dim:
            raise ValueError(
                f"--text-encoder: it makes {found} channels, {gen.origin} reads "
                f"{gen.config.text_dim}"
            )
        slugs = [text.slug(prompt) for prompt in wanted.names]
        what = [{"prompt": name} for name in wanted.names]
    names = [f"{number:06d}_{slug}.png" for number, slug in enumerate(slugs)]
    return gen, Asked(wanted, groups, names, about, what)


def png_metadata(info: dict, num_tokens) -> dict:
    """The text of a PNG file: `info` of `reconstruction.metadata`, and the number of tokens."""
    model = info["model"]
    what = {"model": model["origin"], "fingerprint": model["fingerprint"], "num_tokens": num_tokens}
    return info | what


def write_pictures(
    out, tok: FlexTok, tokens: np.ndarray, names: Sequence[str], counts, sampler, info: dict, args,
    texts: Sequence[dict] | None = None,
) -> None:  # fmt: skip
    """Writes OUT/k0016/NAME.png of all tokens [n, K] and every k, unless they are there.

    `counts` may also hold int [n], the length of each image: OUT/own/NAME.png.
    """
    files, size = pics.png_names(names), min(args.batch_size, len(names))
    texts = texts or [{}] * len(names)
    with tqdm(total=len(names) * len(counts), unit="image", disable=None) as bar:
        for first in range(0, len(names), size):
            rows = slice(first, first + size)
            options = (pics.name_seeds(names[rows]), sampler, args.seed, size)
            for k in counts:
                folder = out / (f"k{k:04d}" if np.ndim(k) == 0 else OWN)
                paths = [folder / name for name in files[rows]]
                each = np.broadcast_to(k, len(names))[rows]
                text = [png_metadata(info, int(n)) | more for n, more in zip(each, texts[rows])]
                make = functools.partial(rec.decode, tok, tokens[rows], each, *options)
                pics.saved_pictures(paths, text, make)
                bar.update(len(paths))


def write_tokens(path, tok, tokens: np.ndarray, names: list[str], lengths=None) -> None:
    """Writes the file of `read_tokens`, whole or not at all."""
    more = {} if lengths is None else {LENGTHS: lengths}
    common.write_arrays(path, tokens=tokens, names=np.array(names), **rec.identity(tok), **more)


def read_tokens(path) -> dict[str, np.ndarray]:
    """A file of tokens.

    Returns:
        "tokens": int32 [n, k], or float32 [n, k, F] of a model without ids; "names": str [n], of
        the images, relative to their folder; "origin", "fingerprint": str, of the model; perhaps
        "lengths": int32 [n], how many of its tokens an image is made of.

    Raises:
        FileNotFoundError, ValueError: there is none, or its names lead out of a folder.
    """
    path = as_path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            more = {LENGTHS} & set(arrays)
            saved = {field: arrays[field] for field in (*FIELDS, *more)}
        tokens, names = saved["tokens"], saved["names"]
        kind = {2: np.integer, 3: np.floating}.get(tokens.ndim, np.void)  # Ids, or codes.
        if not (tokens.size and np.issubdtype(tokens.dtype, kind)):
            raise ValueError(f"its tokens are {tokens.dtype} of shape {tokens.shape}")
        if names.shape != tokens.shape[:1] or names.dtype.kind != "U":
            raise ValueError(f"its names are {names.dtype} of shape {names.shape}")
        lengths = saved.get(LENGTHS, np.ones(len(names), int))
        if lengths.shape != names.shape or lengths.dtype.kind not in "iu":
            raise ValueError(f"its lengths are {lengths.dtype} of shape {lengths.shape}")
        if not 1 <= lengths.min() <= lengths.max() <= tokens.shape[1]:
            raise ValueError(f"its lengths are not all in 1..{tokens.shape[1]}")
        for name in names.tolist():
            inside = pathlib.PurePosixPath(name)
            if not inside.parts or inside.is_absolute() or {"..", "\\"} & {*inside.parts, *name}:
                raise ValueError(f"it names an image {name!r}, outside of the output folder")
    except OSError:
        raise
    except Exception as error:  # A damaged archive shows itself as several exceptions.
        raise ValueError(f"{path} is no file of `flextok tokenize`: {error}") from error
    return saved


def _holds_tokens(path) -> bool:
    with contextlib.suppress(ValueError):
        return bool(read_tokens(path))
    return False


def token_filters(args: options.TokenSampling) -> dict:
    """Arguments of `ImageGenerator.generate_tokens` beside the scale of guidance."""
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}


def load_generator(args: options.Generate | options.Search | options.Evaluate) -> ImageGenerator:
    """The AR model of --model with the tokenizer of --tokenizer, or the one its file names."""
    gen = ImageGenerator.from_pretrained(args.model, dtype=args.dtype, mesh=common.all_devices())
    source = args.tokenizer or gen.tokenizer_source
    if not source:
        raise ValueError(f"{gen.origin} names no tokenizer: pass --tokenizer SOURCE")
    return dataclasses.replace(gen, tokenizer=common.load_model(args, source))


def read_labels(text: str, num_classes: int, class_names: Sequence[str] = ()) -> np.ndarray:
    """Classes of --labels, such as "3,0-9,cat", "all", or a file with one per line: int [n].

    A class whose name is a number is found by its name.
    """
    if not num_classes:
        raise ValueError("the model has no classes: --labels is for class-conditional models")
    if text == "all":
        return np.arange(num_classes)
    file = as_path(text)
    parts = file.read_text(encoding="utf-8").splitlines() if file.is_file() else text.split(",")
    labels = []
    for part in filter(None, map(str.strip, parts)):
        first, _, last = part.partition("-")
        if composed(part) in class_names:
            first = last = str(class_names.index(composed(part)))
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < num_classes):
            names = f" or one of {', '.join(class_names[:20])}" if class_names else ""
            raise ValueError(
                f"--labels: {part!r} is no class. Allowed: all, numbers and ranges from 0 to "
                f"{num_classes - 1}{names}"
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
