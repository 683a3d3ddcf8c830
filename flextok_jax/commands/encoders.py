"""What `flextok encode` can make of an image: tokens, the VAE's moments, DINOv2 features."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.commands import common
from flextok_jax.data.records import stored_floats, stored_tokens
from flextok_jax.evaluation.reconstruction import check_counts, identity, side
from flextok_jax.io import models, storage
from flextok_jax.io.formats import networks
from flextok_jax.nn import repa, vae
from flextok_jax.nn.config import Compute
from flextok_jax.nn.images import to_float
from flextok_jax.parallel.mesh import platform
from flextok_jax.parallel.sharding import param_shardings, spread_batch

IMAGE_SIZE = 256  # Where no model says another.


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One of them.

    Attributes:
        name: of the array in a record.
        words: what it is, to a person.
        about: what the manifest says of it: the model's identity, and what decides the result.
        shape: of one crop's array.
        run: uint8 [B, S, S, 3] -> [B, *shape], as it is stored.
    """

    name: str
    words: str
    about: dict
    shape: tuple[int, ...]
    run: Callable[[np.ndarray], np.ndarray]


def encoders(args) -> tuple[int, list[Encoder]]:
    """The side S of the images, and an encoder for each of --model, --vae and --dinov2.

    Raises:
        ValueError: no model is named, or sizes do not fit each other.
    """
    made, size = [], args.image_size
    if args.model:
        tok = common.load_model(args)
        if size not in (None, side(tok)):
            raise ValueError(f"--image-size {size}: the tokenizer {args.model} has {side(tok)}")
        size = side(tok)
        made.append(_tokens(args, tok))
    size = size or IMAGE_SIZE
    if args.vae:
        made.append(_moments(args, size))
    if args.dinov2:
        made.append(_features(args))
    if not made:
        raise ValueError("nothing to make: name a tokenizer (--model), --vae or --dinov2")
    return size, made


def _tokens(args, tok) -> Encoder:
    (k,) = check_counts(tok, [args.num_tokens or tok.num_tokens])
    about = {
        "tokenizer": {"source": _place(args.model), **identity(tok)},
        "vocab_size": tok.config.vocab_size,
        "num_tokens": k,
    }

    def run(images):
        return stored_tokens(np.asarray(tok.tokenize(images, k)), tok.config.vocab_size)

    return Encoder("tokens", f"{k} tokens", about, (k,), run)


def _moments(args, size: int) -> Encoder:
    cfg, params = models.load_vae(args.vae, args.scaling_factor)
    h, rest = divmod(size, cfg.downsample)
    if rest:
        raise ValueError(f"--image-size {size}: the VAE needs a multiple of {cfg.downsample}")
    about = {"vae": {"source": _place(args.vae), **models.vae_identity(cfg, params)}}
    dtype = jnp.dtype(args.dtype)

    def moments(params, images):
        images = to_float(images)
        return jnp.concatenate(vae.encode_moments(params, cfg, images, dtype), -1)

    shape, run = (h, h, 2 * cfg.latent_channels), _on_devices(moments, "vae", params)
    return Encoder("moments", f"{h}x{h} latents", about, shape, run)


def _features(args) -> Encoder:
    cfg, params = networks.load_dinov2(args.dinov2)
    side, rest = divmod(args.dinov2_size, cfg.patch_size)
    if rest:
        raise ValueError(f"--dinov2-size {args.dinov2_size}: a multiple of {cfg.patch_size} needed")
    fingerprint = storage.fingerprint(params)
    about = {"source": _place(args.dinov2), "fingerprint": fingerprint, "size": args.dinov2_size}
    compute = Compute(args.dtype, args.attention)
    compute.check_platform(platform(None))

    def features(params, images):
        return repa.targets(params, cfg, compute, images, args.dinov2_size)

    shape, run = (side**2, cfg.width), _on_devices(features, "dinov2", params)
    return Encoder("repa", f"{side}x{side} features", {"dinov2": about}, shape, run)


def _on_devices(function, name: str, params):
    """uint8 [B, S, S, 3] -> float16 [B, ...]: `function(params, images)` over all devices.

    `name` is the model's in the table of shardings.
    """
    mesh = common.all_devices()
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, {name: params})[name])
    compiled = jax.jit(function)

    def run(images):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            found = compiled(params, spread_batch(mesh, images))
        return stored_floats(np.asarray(found)[: len(images)])

    return run


def _place(source: str) -> str:
    path = pathlib.Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
