"""`flextok tokenize --data`: a data set as shards of tokens, to train AR models on."""

import concurrent.futures
import functools
import os
import pathlib
import sys

import numpy as np

from flextok_jax.commands import common
from flextok_jax.data import sources, tokens
from flextok_jax.data.transforms import NUM_DRAWS, Transform
from flextok_jax.evaluation.pictures import DIGITS
from flextok_jax.evaluation.reconstruction import check_counts, encode, identity, side


def tokenize_data(args) -> None:
    """Writes --out/SPLIT: shards and manifest.json; continues what was interrupted."""
    from tqdm import tqdm

    for option, default in common.DATA_OPTIONS.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    common.check_apart(args.data, args.out)
    tok = common.load_model(args)
    (k,) = check_counts(tok, [args.num_tokens or tok.num_tokens])
    digits = args.data == DIGITS
    source = sources.digits(args.split) if digits else sources.FolderSource(args.data, args.split)
    count = min(len(source), args.limit or len(source))
    null_text = _null_text(args.data)
    folder = pathlib.Path(args.out).expanduser() / args.split
    augmented = Transform(
        side(tok),
        "none" if digits else "random",
        crop_scale=(args.crop_scale, 1.0),
        flip=args.flip,
        shift=args.shift,
    )
    batch_size = min(args.batch_size, count * args.crops)
    read = functools.partial(_read, source, augmented, args.crops, args.seed)

    with (
        tqdm(total=count, unit="image", disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):

        def make_shard(index: int) -> tuple[list, dict]:
            """The records of one shard, and why images are missing."""
            first = index * args.shard_size
            bar.update(first - bar.n)  # What is there already counts as done.
            places = range(first, min(first + args.shard_size, count))
            records, unreadable = [], {}
            # Some batches at a time, so that the last one, which is filled up, costs little.
            for group in _groups(pool, read, places, -(-8 * batch_size // args.crops)):
                found = []
                for place, future in group:
                    try:
                        found.append(future.result())
                    except Exception as error:  # Files break in any way there is.
                        reason = f"{type(error).__name__}: {error}".splitlines()[0]
                        unreadable[source.name(place)] = reason
                images = [image for crops, *_ in found for image in crops]
                parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
                ids = [encode(tok, np.stack(part), k, batch_size) for part in parts]
                ids = np.concatenate(ids).reshape(-1, args.crops, k) if ids else ()
                records += [tokens.Record(own, *about) for own, (_, *about) in zip(ids, found)]
                bar.update(len(group))
            return records, unreadable

        settings = _settings(args, tok, k, count, getattr(source, "classes", None), null_text)
        manifest = tokens.write_split(folder, settings, make_shard, null_text)
        bar.update(count - bar.n)
    _report(manifest, folder)


def _groups(pool, read, places, size: int):
    """Lists of (place, future of `read(place)`), each begun while the one before is used."""
    begun = None
    for start in range(0, len(places), size):
        part = [(place, pool.submit(read, place)) for place in places[start : start + size]]
        if begun:
            yield begun
        begun = part
    if begun:
        yield begun


def _settings(args, tok, k: int, count: int, classes, null_text) -> dict:
    """All that decides the tokens, and so may not change between runs into one folder."""
    path = pathlib.Path(args.model).expanduser()
    data = args.data if args.data == DIGITS else str(pathlib.Path(args.data).expanduser().resolve())
    return {
        "format": 1,
        "tokenizer": {
            "source": str(path.resolve()) if path.exists() else args.model,
            **identity(tok),
            "levels": list(tok.config.levels),
        },
        "vocab_size": tok.config.vocab_size,
        "num_tokens": k,
        "dtype": args.dtype,
        "data": data,
        "split": args.split,
        "image_size": side(tok),
        "num_images": count,
        "classes": classes,
        "text_dim": None if null_text is None else null_text.shape[1],
        "crops": args.crops,
        "crop_scale": args.crop_scale,
        "flip": args.flip,
        "shift": args.shift,
        "seed": args.seed,
        "shard_size": args.shard_size,
        "num_shards": -(-count // args.shard_size),
    }


def _read(source, augmented: Transform, count: int, seed: int, place: int):
    """([count] of uint8 [S, S, 3], label, caption or None, embedding or None) of one image.

    The first crop has no randomness; the draws of another are a function of (seed, place of the
    image, number of the crop).
    """
    item = source[place]
    image = item["image"]
    if isinstance(image, bytes):
        image = sources.decode_image(image)
    crops = []
    for crop in range(count):
        draws = np.random.RandomState([seed, place, crop]).random_sample((1, NUM_DRAWS))
        transform = augmented if crop else augmented.without_randomness()
        crops.append(transform.augment(transform.fit(image, draws[0])[None], draws)[0])
    beside = pathlib.Path(source.name(place))
    caption, embedding = beside.with_suffix(".txt"), beside.with_suffix(".npy")
    return (
        crops,
        item["label"],
        caption.read_text(encoding="utf-8").strip() if caption.is_file() else None,
        np.load(embedding, allow_pickle=False) if embedding.is_file() else None,
    )


def _null_text(data: str) -> np.ndarray | None:
    """The embedding of the empty caption, of a folder that has text embeddings."""
    path = pathlib.Path(data).expanduser() / tokens.NULL_TEXT
    return np.load(path, allow_pickle=False) if path.is_file() else None


def _report(manifest: dict, folder: pathlib.Path) -> None:
    count = sum(about["records"] for about in manifest["shards"].values())
    unreadable = manifest["unreadable"]
    if unreadable:
        lines = [f"\n  {name}: {reason}" for name, reason in list(unreadable.items())[:10]]
        print(
            f"warning: {len(unreadable)} of {manifest['num_images']} images could not be read and "
            f"were left out (all in {tokens.MANIFEST}):{''.join(lines)}",
            file=sys.stderr,
        )
    print(
        f"{manifest['num_tokens']} tokens of each of {count} images, {manifest['crops']} crops of "
        f"each, in {folder} ({len(manifest['shards'])} shards)"
    )
