"""`flextok encode`: a data set as shards of what models make of it, to train on.

`flextok tokenize --data` is the same with a tokenizer alone.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.commands import common, options
from flextok_jax.data import shards, sources
from flextok_jax.data.reader import Picture, Unreadable, read_ahead
from flextok_jax.data.records import Record, stored_floats, stored_tokens
from flextok_jax.data.transforms import NUM_DRAWS, Transform
from flextok_jax.evaluation.reconstruction import check_counts, identity, side
from flextok_jax.io import models, storage
from flextok_jax.io.formats import networks
from flextok_jax.io.sources import pinned
from flextok_jax.nn import dinov2, repa, vae
from flextok_jax.nn.config import Compute
from flextok_jax.nn.images import to_float
from flextok_jax.parallel.mesh import mesh_context, platform
from flextok_jax.parallel.sharding import padded, place, spread_batch

IMAGE_SIZE = 256  # Where no model has another.
# Options that decide what is in the records, beside the models and the data.
DECISIVE = ("dtype", "crops", "crop_scale", "flip", "shift", "seed")


def encode(args: options.Encode) -> None:
    """Writes --out/SPLIT: shards and manifest.json; continues what was interrupted."""
    out = common.out_folder(args.out, args.data)
    data = sources.parse(args.data)
    source = sources.make_image_source(data, args.split)
    text = shards.null_text(data.path)
    keys = [source.key(i) for i in range(min(len(source), args.limit or len(source)))]
    size, encoders, known = make_encoders(args, keys)
    crop, scale = "center" if args.crop_scale == 1 else "random", (args.crop_scale, 1.0)
    transform = Transform(size, crop, crop_scale=scale, flip=args.flip, shift=args.shift)
    group = max(1, min(args.limit or len(source), args.batch_size // args.crops))  # Images a batch.
    batch_size = min(args.batch_size, group * args.crops)

    def records(indices: Iterable[int]) -> Iterator[Record | Unreadable]:
        crops = functools.partial(_crops, args, transform)
        found = read_ahead(source, indices, crops, text=True)
        while batch := list(itertools.islice(found, group)):
            images = [image for image in batch if not isinstance(image, Unreadable)]
            yield from (image for image in batch if isinstance(image, Unreadable))
            if images:
                yield from _records(encoders, images, batch_size, known)

    settings = {
        **{key: value for e in encoders for key, value in e.settings.items()},
        "arrays": {e.name: e.shape for e in encoders},
        "image_size": size,
        "text_dim": None if text is None else text.shape[1],
        **{name: getattr(args, name) for name in DECISIVE},
    }
    total = common.write_shards(args, out, data, source, settings, records)
    if total is not None:
        what = " and ".join(e.words for e in encoders)
        print(f"{what} of each of {total} images, {args.crops} crops of each, in {out}")


def _crops(args: options.Encode, transform: Transform, picture: Picture):
    """(uint8 [crops, S, S, 3], the other fields of its record) of one image.

    The first crop has no randomness; another depends on --seed, the image's index and its number.
    """
    crops = []
    for crop in range(args.crops):
        state = np.random.RandomState([args.seed, picture.index, crop])
        numbers, way = state.random_sample((1, NUM_DRAWS)), transform
        if crop == 0:
            way = transform.without_randomness()
        crops.append(way.augment(way.fit(picture.image, numbers[0])[None], numbers)[0])
    names = ("key", "label", "caption", "embedding")
    return np.stack(crops), {name: getattr(picture, name) for name in names}


def _records(
    encoders: "list[Encoder]", images: list, batch_size: int, known: common.KnownLengths | None
) -> Iterator[Record]:
    """The records of some images of `_crops`, encoded `batch_size` crops at a time."""
    crops = np.concatenate([part for part, _ in images])
    batches = [crops[i : i + batch_size] for i in range(0, len(crops), batch_size)]
    arrays = {}
    for e in encoders:
        found = np.concatenate([e.run(padded(b, batch_size))[: len(b)] for b in batches])
        arrays[e.name] = np.split(found, len(images))
    for i, (_, fields) in enumerate(images):
        if known:
            fields["length"] = int(known.of([fields["key"]])[0])
        yield Record(arrays={name: parts[i] for name, parts in arrays.items()}, **fields)


class Encoder(NamedTuple):
    """What becomes of an image."""

    name: str  # of the array in a record
    words: str  # for messages
    settings: dict  # of the manifest: the model's identity, and what else decides the result
    shape: tuple[int, ...]  # of one crop's array
    run: Callable[[np.ndarray], np.ndarray]  # uint8 [B, S, S, 3] -> [B, *shape], as it is stored


def make_encoders(args: options.Encode, keys: list[str]):
    """What becomes of the images with these keys.

    Returns:
        (the side S of the images, a list with an `Encoder` for each of --model, --vae and --dinov2,
        the lengths in --lengths or None).
    """
    made, size, known = [], args.image_size, None
    if args.lengths and not args.model:
        raise ValueError(f"--lengths {args.lengths}: lengths of tokens, name --model too")
    if args.model:
        tok = common.load_model(args)
        if size not in (None, side(tok)):
            raise ValueError(f"--image-size {size}: the tokenizer {args.model} has {side(tok)}")
        size = side(tok)
        if args.lengths:
            known = common.read_lengths(args.lengths, tok, keys)
        made.append(_tokens(args, tok, known))
    size = size or IMAGE_SIZE
    if args.vae:
        made.append(_moments(args, size))
    if args.dinov2:
        made.append(_features(args))
    if not made:
        raise ValueError("nothing to encode with: name --model (a tokenizer), --vae or --dinov2")
    return size, made, known


def _tokens(args, tok, known: common.KnownLengths | None) -> Encoder:
    (k,) = check_counts(tok, [args.num_tokens or tok.num_tokens])
    vocab_size = tok.config.vocab_size
    settings = {
        "tokenizer": {"source": pinned(args.model), **identity(tok)},
        "vocab_size": vocab_size,
        "num_tokens": k,
    } | ({"lengths": known.settings} if known else {})

    def run(images):
        return stored_tokens(np.asarray(tok.tokenize(images, k)), vocab_size)

    return Encoder("tokens", f"{k} tokens", settings, (k,), run)


def _moments(args, size: int) -> Encoder:
    cfg, params = models.load_vae(args.vae, 1.0)  # Moments come before the scaling.
    h, rest = divmod(size, cfg.downsample)
    if rest:
        raise ValueError(f"--image-size {size}: the VAE needs a multiple of {cfg.downsample}")
    settings = {"vae": {"source": pinned(args.vae), **models.vae_identity(cfg, params)}}

    def moments(params, images):
        found = vae.encode_moments(params, cfg, to_float(images), jnp.dtype(args.dtype))
        return jnp.concatenate(found, -1)

    shape, run = (h, h, 2 * cfg.latent_channels), _on_devices(moments, params, params)
    return Encoder("moments", f"{h}x{h} latents", settings, shape, run)


def _features(args) -> Encoder:
    cfg, params = networks.load_dinov2(args.dinov2)
    size = args.dinov2_size
    h, rest = divmod(size, cfg.patch_size)
    if rest:
        raise ValueError(f"--dinov2-size {size}: a multiple of {cfg.patch_size} needed")
    model = {"source": pinned(args.dinov2), "fingerprint": storage.fingerprint(params)}
    compute = Compute(args.dtype, args.attention)
    compute.check_platform(platform(None))

    def features(params, images):
        return repa.targets(params, cfg, compute, images, size)

    shape, run = (h**2, cfg.width), _on_devices(features, params, dinov2.shapes(cfg))
    return Encoder("repa", f"{h}x{h} features", {"dinov2": model | {"size": size}}, shape, run)


def _on_devices(function, params, like):
    """`function(params, images)` over all devices, as float16; `like`: the parameters in boxes."""
    mesh = common.all_devices()
    params = place(mesh, params, like)
    compiled = jax.jit(function)

    def run(images):
        with mesh_context(mesh):
            found = compiled(params, spread_batch(mesh, images))
        return stored_floats(np.asarray(found)[: len(images)])

    return run
