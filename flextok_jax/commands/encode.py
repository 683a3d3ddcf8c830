"""`flextok encode`: a data set as shards of what models make of it, to train on.

`flextok tokenize --data` is the same with a tokenizer alone.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from flextok_jax.commands import common, options
from flextok_jax.commands.encoders import Encoder, encoders
from flextok_jax.data import reader, shards, sources
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
    crops = functools.partial(_crops, augmented, args.crops, args.seed)
    # Some batches at a time, so that the last one, which is filled up, costs little.
    group_size = -(-8 * batch_size // args.crops)

    with tqdm(total=count, unit="image", disable=None) as bar:

        def make_shard(index: int) -> Iterator[Record | reader.Unreadable]:
            first = index * args.shard_size
            bar.update(first - bar.n)  # What is there already counts as done.
            places = range(first, min(first + args.shard_size, count))
            pictures = reader.read_ahead(source, places, crops, text=True, waiting=group_size)
            while group := list(itertools.islice(pictures, group_size)):
                yield from (item for item in group if isinstance(item, reader.Unreadable))
                found = [item for item in group if not isinstance(item, reader.Unreadable)]
                if found:
                    images = np.concatenate([images for images, _ in found])
                    arrays = _run(made, images, batch_size, args.crops)
                    for own, (_, info) in zip(arrays, found, strict=True):
                        yield Record(arrays=own, **info)
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
    common.passed_over(source)
    total = common.report_shards(manifest, folder)
    if total is not None:
        what = " and ".join(e.words for e in made)
        print(f"{what} of each of {total} images, {args.crops} crops of each, in {folder}")


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


def _crops(augmented: Transform, count: int, seed: int, picture: reader.Picture):
    """(uint8 [count, S, S, 3], key, label, caption and embedding) of one image.

    The first crop has no randomness; another is a function of (seed, place of the image, number of
    the crop).
    """
    crops = []
    for crop in range(count):
        draws = np.random.RandomState([seed, picture.index, crop]).random_sample((1, NUM_DRAWS))
        transform = augmented if crop else augmented.without_randomness()
        crops.append(transform.augment(transform.fit(picture.image, draws[0])[None], draws)[0])
    names = ("key", "label", "caption", "embedding")
    return np.stack(crops), {name: getattr(picture, name) for name in names}
