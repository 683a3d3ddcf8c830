"""`flextok tokenize` and `flextok detokenize`: images to a file of tokens, and back."""

import dataclasses
import functools
import pathlib
import time
import zipfile

import numpy as np
from tqdm import tqdm

from flextok_jax.commands import common, options
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.reconstruction import (
    check_counts,
    decode,
    encode,
    identity,
    metadata,
    side,
)
from flextok_jax.evaluation.results import check_folder, results_folder
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path

FIELDS = ("tokens", "names", "origin", "fingerprint")


def tokenize(args: options.Tokenize) -> None:
    """Writes the first k tokens of every image, with the model's identity, as .npz.

    With --data: shards to train on, see `flextok encode`.
    """
    if args.data:
        from flextok_jax.commands.encode import encode as encode_data

        shared = {f.name for f in dataclasses.fields(options.Encode)} & set(vars(args))
        return encode_data(options.Encode(**{name: getattr(args, name) for name in shared}))
    for field in dataclasses.fields(options.Crops):
        if getattr(args, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} goes with --data, not --images")
    out = common.out_file(args.out)
    pictures = pics.Pictures(args.images, args.limit)
    tok = common.load_model(args)
    (k,) = check_counts(tok, [args.num_tokens or tok.num_tokens])
    size, batch_size = side(tok), min(args.batch_size, len(pictures))
    tokens, names, started = [], [], time.perf_counter()
    with tqdm(total=len(pictures), unit="image", disable=None) as bar:
        for batch in pictures.batches(size, batch_size):
            tokens.append(encode(tok, batch.images, k, batch_size))
            names += batch.names
            bar.update(len(batch.names))
    write_tokens(out, tok, np.concatenate(tokens), names)
    common.report_unreadable(pictures)
    print(f"{k} tokens of each of {len(names)} images in {out}")
    common.print_speed(len(names), time.perf_counter() - started)


def detokenize(args: options.Detokenize) -> None:
    """Writes the images of a file of tokens: k0016/NAME.png for every k, in --out."""
    saved = read_tokens(args.tokens)
    check_folder(args.out, [args.tokens])
    tok = common.load_model(args)
    check_same_model(tok, saved, args.tokens)
    tokens, names = saved["tokens"], [str(name) for name in saved["names"]]
    counts = args.num_tokens or [tokens.shape[1]]
    counts = check_counts(tok, counts, available=tokens.shape[1])
    sampler = common.sampler(args, tok)
    info = metadata(tok, sampler, args.seed)
    settings = {**info, "tokens": str(args.tokens), "num_tokens": counts}
    settings["tokens_sha256"] = storage.fingerprint({"tokens": tokens})
    png_names, batch_size = pics.png_names(names), min(args.batch_size, len(tokens))
    started = time.perf_counter()
    with (
        results_folder(args.out, settings, [args.tokens]) as out,
        tqdm(total=len(tokens) * len(counts), unit="image", disable=None) as bar,
    ):
        for first in range(0, len(tokens), batch_size):
            rows = slice(first, first + batch_size)
            how = (pics.name_seeds(names[rows]), sampler, args.seed, batch_size)
            for k in counts:
                paths = [out / f"k{k:04d}" / name for name in png_names[rows]]
                make = functools.partial(decode, tok, tokens[rows], k, *how)
                pics.saved_pictures(paths, [common.png_metadata(info, k)] * len(paths), make)
                bar.update(len(paths))
    print(f"{len(tokens)} images from {', '.join(map(str, counts))} tokens in {args.out}")
    common.print_speed(len(tokens) * len(counts), time.perf_counter() - started)


def write_tokens(path, tok, tokens: np.ndarray, names: list[str]) -> None:
    """Writes the file of `read_tokens`, whole or not at all."""
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens,
            names=np.array(names, dtype=np.str_),
            **{key: np.array(value) for key, value in identity(tok).items()},
        )


def read_tokens(path) -> dict[str, np.ndarray]:
    """A file of tokens.

    Returns:
        "tokens": int32 [n, k]; "names": str [n], of the images, relative to their folder;
        "origin", "fingerprint": str, of the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tokens, or its names lead out of a folder.
    """
    path = as_path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            saved = {field: arrays[field] for field in FIELDS}
        tokens, names = saved["tokens"], saved["names"]
        kind = {2: np.integer, 3: np.floating}.get(tokens.ndim, np.void)  # Ids, or codes.
        if not (tokens.size and np.issubdtype(tokens.dtype, kind)):
            raise ValueError(f"its tokens are {tokens.dtype} of shape {tokens.shape}")
        if names.shape != tokens.shape[:1] or names.dtype.kind != "U":
            raise ValueError(f"its names are {names.dtype} of shape {names.shape}")
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no file of tokens ({error}): `flextok tokenize` writes one, an .npz file "
            f"with {', '.join(FIELDS)}"
        ) from error
    for name in map(str, names):
        inside = pathlib.PurePosixPath(name)
        if not inside.parts or inside.is_absolute() or ".." in inside.parts or "\\" in name:
            raise ValueError(f"{path} names an image {name!r}, outside of the output folder")
    return saved


def check_same_model(tok, saved: dict, path) -> None:
    """Refuses tokens that mean nothing to this model.

    Raises:
        ValueError: another model made them.
    """
    if str(saved["fingerprint"]) != tok.fingerprint:
        raise ValueError(
            f"{path} has the tokens of another model, which mean nothing to this one:\n"
            f"  tokens: {saved['origin']}, sha256 {saved['fingerprint']}\n"
            f"  --model: {tok.origin}, sha256 {tok.fingerprint}\n"
            "Pass the model that made them, or tokenize the images again."
        )
