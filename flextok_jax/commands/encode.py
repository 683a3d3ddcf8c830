"""`flextok encode`: a data set as shards of what models make of it, to train on.

`flextok tokenize --data` is the same with a tokenizer alone.
"""

import concurrent.futures
import functools
from collections.abc import Iterator

import numpy as np

from flextok_jax.commands import common, options
from flextok_jax.commands.encoders import Encoder, encoders
from flextok_jax.data import reader, shards, sources
from flextok_jax.data.decode import reason
from flextok_jax.data.reader import cores
from flextok_jax.data.records import Record
from flextok_jax.data.transforms import NUM_DRAWS, Transform
from flextok_jax.evaluation.reconstruction import padded

# Options that decide what is in the records, beside the models and the data.
DECISIVE = ("crops", "crop_scale", "flip", "shift", "seed", "shard_size")


def encode(args: options.Encode) -> None:
    """Writes --out/SPLIT: shards and manifest.json; continues what was interrupted."""
    from tqdm import tqdm

    out = common.out_folder(args.out, args.data)
    size, made = encoders(args)
    data = sources.parse(args.data)
    source = sources.make_image_source(data, args.split)
    count = min(len(source), args.limit or len(source))
    folder = out / args.split
    null_text = shards.null_text(data.path)
    augmented = Transform(
        size,
        "center" if args.crop_scale == 1 else "random",
        crop_scale=(args.crop_scale, 1.0),
        flip=args.flip,
        shift=args.shift,
    )
    batch_size = min(args.batch_size, count * args.crops)
    read = functools.partial(_read, source, augmented, args.crops, args.seed)

    with (
        tqdm(total=count, unit="image", disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor(min(16, cores())) as pool,
    ):

        def make_shard(index: int) -> Iterator[Record | reader.Unreadable]:
            first = index * args.shard_size
            bar.update(first - bar.n)  # What is there already counts as done.
            places = range(first, min(first + args.shard_size, count))
            # Some batches at a time, so that the last one, which is filled up, costs little.
            for group in _groups(pool, read, places, -(-8 * batch_size // args.crops)):
                found = []
                for crops, about in (future.result() for future in group):
                    if crops is None:
                        yield about
                    else:
                        found.append((crops, about))
                if found:
                    images = np.concatenate([crops for crops, _ in found])
                    arrays = _run(made, images, batch_size, args.crops)
                    for own, (_, about) in zip(arrays, found, strict=True):
                        yield Record(arrays=own, **about)
                bar.update(len(group))

        settings = {
            **{key: value for e in made for key, value in e.about.items()},
            "arrays": {e.name: e.shape for e in made},
            "dtype": args.dtype,
            "data": str(data),
            "split": args.split,
            "image_size": size,
            **shards.source_settings(source, count),
            "text_dim": None if null_text is None else null_text.shape[1],
            **{name: getattr(args, name) for name in DECISIVE},
            "num_shards": -(-count // args.shard_size),
        }
        manifest = shards.write_split(folder, settings, make_shard, null_text, args.process)
        bar.update(count - bar.n)
    total = common.report_shards(manifest, folder)
    if total is not None:
        what = " and ".join(e.words for e in made)
        print(f"{what} of each of {total} images, {args.crops} crops of each, in {folder}")


def _groups(pool, read, places, size: int):
    """Lists of futures of `read(place)`, each begun while the one before is used."""
    begun = None
    for start in range(0, len(places), size):
        part = [pool.submit(read, place) for place in places[start : start + size]]
        if begun:
            yield begun
        begun = part
    if begun:
        yield begun


def _run(
    made: list[Encoder], images: np.ndarray, batch_size: int, crops: int
) -> Iterator[dict[str, np.ndarray]]:
    """uint8 [n * crops, S, S, 3] -> of each of the n images {name: [crops, ...]}.

    A batch is run when all images before it are used, so that little is held at a time.
    """
    waiting: dict[str, list] = {e.name: [] for e in made}  # Crops of an image that is not whole.
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for e in made:
            waiting[e.name] += list(e.run(padded(part, batch_size))[: len(part)])
        for _ in range((start + len(part)) // crops - start // crops):
            yield {name: np.stack(found[:crops]) for name, found in waiting.items()}
            for found in waiting.values():
                del found[:crops]


def _read(source, augmented: Transform, count: int, seed: int, place: int):
    """(uint8 [count, S, S, 3], key, label, caption and embedding) of one image.

    Or, of one that cannot be read, (None, `Unreadable`). The first crop has no randomness; the
    draws of another are a function of (seed, place of the image, number of the crop).
    """
    found = reader.read(source, place)
    if isinstance(found, reader.Unreadable):
        return None, found
    try:
        embedding = source.embedding(place)
    except Exception as error:  # Files break in any way there is.
        return None, reader.Unreadable(found.key, reason(error))
    crops = []  # What fails from here on is no fault of the file, and stops.
    for crop in range(count):
        draws = np.random.RandomState([seed, place, crop]).random_sample((1, NUM_DRAWS))
        transform = augmented if crop else augmented.without_randomness()
        crops.append(transform.augment(transform.fit(found.image, draws[0])[None], draws)[0])
    info = {"key": found.key, "label": found.label, "caption": found.caption}
    return np.stack(crops), info | {"embedding": embedding}
