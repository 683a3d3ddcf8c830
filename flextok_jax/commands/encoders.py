"""What `flextok encode` can make of an image: tokens, the VAE's moments, DINOv2 features."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.commands import common
from flextok_jax.data.records import stored_floats, stored_tokens
from flextok_jax.evaluation.reconstruction import check_counts, identity, side
from flextok_jax.interop import sources, tensor_file
from flextok_jax.nn import vae
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
    """The side S of the images, and an encoder for each model of --model and --vae.

    Raises:
        ValueError: no model is named, or --image-size is not the tokenizer's.
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
    if not made:
        raise ValueError("nothing to make: name a tokenizer (--model), a VAE (--vae), or both")
    return size, made


def _tokens(args, tok) -> Encoder:
    (k,) = check_counts(tok, [args.num_tokens or tok.num_tokens])
    about = {
        "tokenizer": {"source": _place(args.model), **identity(tok), "levels": tok.config.levels},
        "vocab_size": tok.config.vocab_size,
        "num_tokens": k,
    }

    def run(images):
        return stored_tokens(np.asarray(tok.tokenize(images, k)), tok.config.vocab_size)

    return Encoder("tokens", f"{k} tokens", about, (k,), run)


def _moments(args, size: int) -> Encoder:
    cfg, params = sources.load_vae(args.vae)
    h, rest = divmod(size, cfg.downsample)
    if rest:
        raise ValueError(f"--image-size {size}: the VAE needs a multiple of {cfg.downsample}")
    about = {"vae": {"source": _place(args.vae), **sources.vae_identity(cfg, params)}}
    mesh, dtype = common.all_devices(), jnp.dtype(args.dtype)
    params = jax.device_put(params, None if mesh is None else param_shardings(mesh, params))

    @jax.jit
    def moments(params, images):
        images = images.astype(jnp.float32) / 127.5 - 1.0
        return jnp.concatenate(vae.encode_moments(params, cfg, images, dtype), -1)

    def run(images):
        found = np.asarray(moments(params, spread_batch(mesh, images)))[: len(images)]
        return stored_floats(found, "the VAE's moments")

    shape = (h, h, 2 * cfg.latent_channels)
    return Encoder("moments", f"{h}x{h} latents", about, shape, run)


def _place(source: str) -> str:
    path = pathlib.Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
