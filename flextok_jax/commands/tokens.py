"""`flextok tokenize` and `flextok detokenize`: images to a file of tokens, and back."""

import dataclasses
import pathlib
import time

import numpy as np
from tqdm import tqdm

from flextok_jax.commands import common, options
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path

FIELDS = ("tokens", "names", "origin", "fingerprint")


def tokenize(args: options.Tokenize) -> None:
    """Writes the first k tokens of every image, with the model's identity, as .npz.

    With --data: shards to train on, see `flextok encode`.
    """
    if args.data:
        from flextok_jax.commands.encode import encode

        shared = {f.name for f in dataclasses.fields(options.Encode)} & set(vars(args))
        return encode(options.Encode(**{name: getattr(args, name) for name in shared}))
    for field in dataclasses.fields(options.Crops):
        if getattr(args, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} goes with --data, not --images")
    out = common.out_file(args.out)
    pictures = pics.Pictures(args.images, args.limit)
    tok = common.load_model(args)
    (k,) = rec.check_counts(tok, [args.num_tokens or tok.num_tokens])
    size = min(args.batch_size, len(pictures))
    tokens, names, started = [], [], time.perf_counter()
    with tqdm(total=len(pictures), unit="image", disable=None) as bar:
        for batch in pictures.batches(rec.side(tok), size):
            tokens.append(rec.encode(tok, batch.images, k, size))
            names += batch.names
            bar.update(len(batch.names))
    write_tokens(out, tok, np.concatenate(tokens), names)
    common.left_out(pictures.unreadable, len(pictures))
    print(f"{k} tokens of each of {len(names)} images in {out}")
    common.print_speed(len(names), time.perf_counter() - started)


def detokenize(args: options.Detokenize) -> None:
    """Writes the images of a file of tokens: k0016/NAME.png for every k, in --out."""
    saved = read_tokens(args.tokens)
    out = common.out_results(args.out)
    tok = common.load_model(args)
    if str(saved["fingerprint"]) != tok.fingerprint:
        raise ValueError(
            f"{args.tokens} has tokens of another model:\n"
            f"  tokens: {saved['origin']}, sha256 {saved['fingerprint']}\n"
            f"  --model: {tok.origin}, sha256 {tok.fingerprint}\n"
            "Pass the model that made them, or tokenize the images again"
        )
    tokens, names = saved["tokens"], saved["names"].tolist()
    counts = args.num_tokens or [tokens.shape[1]]
    counts = rec.check_counts(tok, counts, available=tokens.shape[1])
    sampler = common.sampler(args, tok)
    info = rec.metadata(tok, sampler, args.seed)
    settings = {**info, "tokens": str(args.tokens), "num_tokens": counts}
    settings["tokens_sha256"] = storage.fingerprint({"tokens": tokens})
    started = time.perf_counter()
    with common.results_folder(out, settings):
        common.write_pictures(out, tok, tokens, names, counts, sampler, info, args)
    print(f"{len(names)} images from {', '.join(map(str, counts))} tokens in {args.out}")
    common.print_speed(len(names) * len(counts), time.perf_counter() - started)


def write_tokens(path, tok, tokens: np.ndarray, names: list[str]) -> None:
    """Writes the file of `read_tokens`, whole or not at all."""
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, tokens=tokens, names=np.array(names), **rec.identity(tok))


def read_tokens(path) -> dict[str, np.ndarray]:
    """A file of tokens.

    Returns:
        "tokens": int32 [n, k], or float32 [n, k, F] of a model without ids; "names": str [n], of
        the images, relative to their folder; "origin", "fingerprint": str, of the model.

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
        for name in names.tolist():
            inside = pathlib.PurePosixPath(name)
            if not inside.parts or inside.is_absolute() or {"..", "\\"} & {*inside.parts, *name}:
                raise ValueError(f"it names an image {name!r}, outside of the output folder")
    except OSError:
        raise
    except Exception as error:  # A damaged archive shows itself as several exceptions.
        raise ValueError(
            f"{path} is no file of `flextok tokenize`, with {', '.join(FIELDS)}: {error}"
        ) from error
    return saved
