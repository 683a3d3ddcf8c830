"""`flextok tokenize` and `flextok detokenize`: images to a file of tokens, and back."""

import pathlib
import time

import numpy as np

from flextok_jax.commands import common
from flextok_jax.commands.reconstruct import metadata
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.reconstruction import check_counts, draw, encode, identity, side
from flextok_jax.evaluation.results import results_folder
from flextok_jax.io import storage

FIELDS = ("tokens", "names", "origin", "fingerprint", "levels", "num_tokens")


def tokenize(args) -> None:
    """Writes the first k tokens of every image, with the model's identity, as .npz.

    With --data: shards to train on, see `flextok encode`.
    """
    from tqdm import tqdm

    if args.data:
        from flextok_jax.commands.encode import encode as encode_data

        return encode_data(args)
    for option in common.DATA_OPTIONS:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} goes with --data, not with --images")

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
    tokens = np.concatenate(tokens)
    write_tokens(args.out, tok, tokens, names)
    common.report_unreadable(pictures)
    print(f"{k} tokens of each of {len(names)} images in {args.out}")
    common.print_speed(len(names), time.perf_counter() - started)


def detokenize(args) -> None:
    """Draws the images of a file of tokens: k0016/NAME.png for every k, in --out."""
    from tqdm import tqdm

    saved = read_tokens(args.tokens)
    tok = common.load_model(args)
    check_same_model(tok, saved, args.tokens)
    tokens, names = saved["tokens"], [str(name) for name in saved["names"]]
    counts = args.num_tokens or [tokens.shape[1]]
    counts = check_counts(tok, counts, available=tokens.shape[1])
    sampling = common.sampling(args)
    about = {**identity(tok), **sampling.about(tok)}
    png_names = pics.png_names(names)
    batch_size = min(args.batch_size, len(tokens))
    settings = {**about, "tokens": str(args.tokens), "num_tokens": counts, "dtype": args.dtype}
    with results_folder(args.out, settings) as results:
        todo = [i for i, name in enumerate(png_names) if name not in results.records]
        started = time.perf_counter()
        total, left = len(tokens) * len(counts), len(todo) * len(counts)
        with tqdm(total=total, initial=total - left, unit="image", disable=None) as bar:
            for first in range(0, len(todo), batch_size):
                part = todo[first : first + batch_size]
                batch_names = [png_names[i] for i in part]
                seeds = pics.name_seeds([names[i] for i in part])
                for k in counts:
                    images = draw(tok, tokens[part], k, seeds, sampling, batch_size)
                    for image, name in zip(pics.to_uint8(images), batch_names):
                        path = results.folder / f"k{k:04d}" / name
                        pics.write_png(path, image, metadata(about, k))
                    bar.update(len(part))
                results.add({name: {} for name in batch_names})
    print(f"{len(tokens)} images from {', '.join(map(str, counts))} tokens in {args.out}")
    common.print_speed(len(todo), time.perf_counter() - started)


def write_tokens(path, tok, tokens: np.ndarray, names: list[str]) -> None:
    """Writes the file of `read_tokens`, whole or not at all."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the name of a file, such as tokens.npz")
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.int32),
            names=np.array(names, dtype=np.str_),
            levels=np.array(tok.config.levels, np.int32),
            num_tokens=np.int32(tok.num_tokens),
            **{key: np.array(value) for key, value in identity(tok).items()},
        )


def read_tokens(path) -> dict[str, np.ndarray]:
    """A file of tokens.

    Returns:
        "tokens": int32 [n, k]; "names": str [n], of the images, relative to their folder;
        "origin", "fingerprint": str, "levels": int32 [F], "num_tokens": int32 (R), of the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tokens, or its names lead out of a folder.
    """
    if pathlib.Path(path).expanduser().is_dir():
        raise ValueError(f"{path} is a folder: pass a file that `flextok tokenize` wrote")
    try:
        with np.load(pathlib.Path(path).expanduser(), allow_pickle=False) as file:
            saved = {field: file[field] for field in FIELDS}
    except OSError:
        raise
    except Exception:  # What is no such file, or a damaged one, breaks in any way there is.
        saved = {"tokens": np.zeros(0), "names": np.zeros(0)}
    tokens, names = saved["tokens"], saved["names"]
    if not (
        tokens.ndim == 2
        and tokens.size
        and np.issubdtype(tokens.dtype, np.integer)
        and names.shape == tokens.shape[:1]
        and names.dtype.kind == "U"
    ):
        raise ValueError(
            f"{path} is no file of tokens: `flextok tokenize` writes one, an .npz file with "
            f"{', '.join(FIELDS)}"
        )
    for name in names:
        inside = pathlib.PurePosixPath(str(name))
        if not inside.parts or inside.is_absolute() or ".." in inside.parts or "\\" in str(name):
            raise ValueError(f"{path} names an image {str(name)!r}, outside of the output folder")
    return saved


def check_same_model(tok, saved: dict, path) -> None:
    """Refuses tokens that mean nothing to this model.

    Raises:
        ValueError: another model made them.
    """
    theirs = str(saved["fingerprint"])
    if theirs != tok.fingerprint:
        levels = " ".join(str(level) for level in saved["levels"].reshape(-1))
        ours = " ".join(str(level) for level in tok.config.levels)
        raise ValueError(
            f"{path} was made by another model, whose tokens mean nothing to this one:\n"
            f"  tokens: {saved['origin']}, levels {levels}, sha256 {theirs}\n"
            f"  --model: {tok.origin}, levels {ours}, sha256 {tok.fingerprint}\n"
            "Pass the model that made them, or tokenize the images again."
        )
