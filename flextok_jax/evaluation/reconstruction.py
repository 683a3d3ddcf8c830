"""Images and conditions to tokens, and tokens to images, in batches of one size."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from flextok_jax.conditions import Conditions
from flextok_jax.flow.sampler import Sampler
from flextok_jax.generator import ImageGenerator
from flextok_jax.nn import flextok
from flextok_jax.parallel.sharding import padded
from flextok_jax.tokenizer import FlexTok


def default_sampler(tok: FlexTok, **changes) -> Sampler | None:
    """The model's own sampler, with those of `changes` that are not None.

    None for a model that decodes in one pass; ValueError for changes to it.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if tok.config.is_flow:
        return tok.config.sampler_with(**changes)
    if changes:
        raise ValueError(
            f"{', '.join(changes)}: {tok.origin} decodes in one pass, without sampling"
        )
    return None


def identity(model) -> dict:
    """Which model it is: its origin in words, and the sha256 over all its parameters."""
    return {"origin": model.origin, "fingerprint": model.fingerprint}


def metadata(tok: FlexTok, sampler: Sampler | None, seed: int) -> dict:
    """What images are made with, for files and settings: model, dtype, sampler, seed."""
    found = {"model": identity(tok), "dtype": tok.compute.dtype}
    if sampler is None:
        return found | {"solver": "one pass"}
    return found | {
        "steps": sampler.steps,
        "guidance": sampler.guidance_scale,
        "norm_guidance": sampler.normalized,
        "solver": sampler.solver,
        "time_shift": sampler.time_shift,
        "guidance_interval": list(sampler.guidance_interval),
        "seed": seed,
    }


def side(tok: FlexTok) -> int:
    """The side of the model's images in pixels. Raises ValueError where they are not square."""
    height, width = tok.config.image_size
    if height != width:
        raise ValueError(
            f"{tok.origin} has images of {height} x {width} pixels, and files are cropped to "
            "squares: call `tokenize` from Python with arrays of that size"
        )
    return height


def check_counts(tok: FlexTok, counts: Sequence[int] | None, available: int | None = None):
    """The numbers of tokens asked for, ascending; 1, 2, 4, ... up to all where None.

    Args:
        available: how many there are, R by default.

    Raises:
        ValueError: a number is not in 1..available, or the model's tokens have no prefixes.
    """
    most = tok.num_tokens if available is None else available
    allowed = [k for k in tok.prefixes if k <= most]
    if counts is None:
        return list(flextok.doublings(allowed))
    wrong = [k for k in counts if k not in allowed]
    if wrong:
        which = f"1 to {most}" if len(allowed) == most > 1 else allowed
        raise ValueError(f"num_tokens={','.join(map(str, wrong))}: allowed are {which}")
    return sorted(set(counts))


def encode(tok: FlexTok, images: np.ndarray, num_tokens: int, batch_size: int) -> np.ndarray:
    """uint8 [n, S, S, 3] → tokens [n, num_tokens, ...]; run as `batch_size` images, n or more."""
    return np.asarray(tok.tokenize(padded(images, batch_size), num_tokens))[: len(images)]


def tokens_for(tok: FlexTok, tokens, images: np.ndarray, num_tokens: int, batch_size: int):
    """Tokens to decode an image from `num_tokens` of.

    These are `tokens`, of which the first ones count, unless those for fewer are other tokens
    (`Tokens.revised`): then those that `encode` makes of the images for this number.
    """
    if not tok.config.tokens.revised or tokens.shape[1] == num_tokens:
        return tokens
    return encode(tok, images, num_tokens, batch_size)


def decode(
    tok: FlexTok,
    tokens: np.ndarray,
    num_tokens: int | np.ndarray,
    seeds: np.ndarray,
    sampler: Sampler | None,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Tokens [n, k, ...] → float32 [n, S, S, 3], clipped to [-1, 1]. Raises as `detokenize`.

    Args:
        sampler: None for a model that decodes in one pass.
        num_tokens: how many of the tokens are used, of all images or int [n] of each.
        seeds: uint32 [n], one per image, see `pictures.name_seeds`: an image's noise is a function
            of `seed` and of its own seed, so that the size of the batches changes nothing.
        batch_size: the number of images it is run as, n or more.
    """
    cfg, how = tok.config, {}
    if sampler is not None:
        latent = (*(s // cfg.vae.downsample for s in cfg.image_size), cfg.vae.latent_channels)
        how = dataclasses.asdict(sampler)
        how["noise"] = _noise(np.uint32(seed), padded(seeds, batch_size), latent)
    most, keep = int(np.max(num_tokens)), np.broadcast_to(num_tokens, (len(tokens),))
    tokens_of = padded(tokens[:, :most], batch_size)
    images = tok.detokenize(tokens_of, padded(keep, batch_size), **how)
    return np.clip(np.asarray(images)[: len(tokens)], -1, 1)


def sample_tokens(
    gen: ImageGenerator,
    conditions: Conditions,
    seeds: np.ndarray,
    num_tokens: int,
    how: dict,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Tokens of one batch of samples: int32 [n, num_tokens].

    Args:
        conditions: n of them.
        seeds: uint32 [n], one per sample: it depends on `seed` and its own, not on the batches.
        how: arguments of `ImageGenerator.generate_tokens`: guidance_scale, temperature, ...
        batch_size: the number of samples it is run as, n or more.
    """
    key = jax.random.key(seed)
    keys = jax.vmap(lambda one: jax.random.fold_in(key, one))(padded(seeds, batch_size))
    conditions = conditions.take(padded(np.arange(len(conditions)), batch_size))
    tokens = gen.generate_tokens(conditions=conditions, num_tokens=num_tokens, key=keys, **how)
    return np.asarray(tokens)[: len(seeds)]


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seed, seeds, shape):
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(seeds)
