"""The smallest number of tokens that meets a target, image by image: `FlexTok.choose_length`.

All images are measured at one number of tokens before the next one. Those that are decided leave,
and the rest is packed into full batches: there is one program for each number of tokens, and what
is chosen does not depend on the batches. An image has noise of its own, the same at every number of
tokens. There is no bisection: curves are not monotone (docs/lengths.md).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax import criteria
from flextok_jax.flow import path
from flextok_jax.nn import flextok, vae
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition, unconditional
from flextok_jax.nn.images import to_float
from flextok_jax.nn.tokenizer_config import TokenizerConfig
from flextok_jax.parallel.sharding import padded, spread_batch

RULES = ("first", "stable")
DRAWS = 16  # Of times and noises of the criterion "flow".
LEAST = 0.01  # Of the null condition's loss: what all tokens are taken to explain at least.


class Lengths(NamedTuple):
    """What `FlexTok.choose_length` returns, of B images.

    Attributes:
        num_tokens: int32 [B], the chosen numbers; the largest of `counts` where none meets.
        met: bool [B], whether a number meets the target.
        values: float32 [B, len(counts)], the criterion; NaN where it was not computed.
        counts: the numbers of tokens that there are to choose from.
        tokens: int32 [B, R] (of a continuous bottleneck float32 [B, R, F]), all of them.
    """

    num_tokens: np.ndarray
    met: np.ndarray
    values: np.ndarray
    counts: tuple[int, ...]
    tokens: np.ndarray


def smallest(
    values: Callable[[np.ndarray, int], np.ndarray],
    size: int,
    counts: Sequence[int],
    target: float | None = None,
    within: float | None = None,
    rule: str = "first",
    larger_is_better: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest of `counts` whose value meets a target, for each of `size` examples.

    Args:
        values: (rows int [n], k) -> [n], the criterion of some examples at k tokens.
        counts: ascending.
        target: a value meets that is at least as good. Or else
        within: a value meets that is at most so much worse than that of the largest count.
        rule: "first": the smallest count that meets, though a larger one may fail; "stable": the
            smallest for which it and all larger counts meet.

    Returns:
        (counts chosen int32 [size], met bool [size], values float32 [size, len(counts)]), as in
        `Lengths`.
    """
    sign, last = (1 if larger_is_better else -1), len(counts) - 1
    found = np.full((size, len(counts)), np.nan, np.float32)
    chosen = np.full(size, last)
    met, rows = np.zeros(size, bool), np.arange(size)
    if within is not None:
        found[:, last] = values(rows, counts[last])
        limits = sign * found[:, last] - np.float32(within)
    else:
        limits = np.full(size, sign * target, np.float32)
    order = range(len(counts)) if rule == "first" else reversed(range(len(counts)))
    for i in order:
        if not rows.size:
            break
        if within is None or i != last:
            found[rows, i] = values(rows, counts[i])
        meets = sign * found[rows, i] >= limits[rows]
        chosen[rows[meets]], met[rows[meets]] = i, True
        rows = rows[~meets] if rule == "first" else rows[meets]
    return np.asarray(counts, np.int32)[chosen], met, found


def choose(
    tok,
    images: np.ndarray | jax.Array,
    criterion="flow",
    target: float | None = None,
    within: float | None = None,
    counts: Sequence[int] | None = None,
    rule: str = "first",
    samples: int | None = None,
    how: dict | None = None,
    key: jax.Array | None = None,
    batch_size: int = 32,
    seeds: np.ndarray | None = None,
) -> Lengths:
    """See `FlexTok.choose_length`.

    Args:
        tok: a `FlexTok`.
        images: as `FlexTok.tokenize` takes them.
        how: fields of `flow.sampler.Sampler` in place of the model's own.
        seeds: uint32 [B], what an image's noise follows from beside `key`; by default its index.
    """
    criterion, how, cfg = criteria.find(criterion), how or {}, tok.config
    counts = check_counts(tok, counts)
    _check_target(target, within, rule)
    sampler = _sampler(tok, criterion, how)
    draws = (DRAWS if criterion.of == "velocity" else 1) if samples is None else samples
    if draws < 1 or (draws > 1 and not cfg.is_flow):
        wanted = "at least 1" if cfg.is_flow else "1, because this model decodes without noise"
        raise ValueError(f"samples={samples!r}: must be {wanted}")
    key = jax.random.key(0) if key is None else key
    images = np.asarray(images)
    size = min(batch_size, max(1, len(images)))
    rows, most = np.arange(len(images)), tok.num_tokens
    tokens = _by_batches(lambda i: tok.tokenize(images[i]), rows, size)
    originals = images
    if criterion.of != "images":
        with tok.on_mesh():
            originals = _by_batches(lambda i: _latents_of(tok, images[i]), rows, size)
    data = _Data(tok, originals, {most: tokens}, rows if seeds is None else seeds, key, size)
    if cfg.tokens.revised:
        for k in counts:
            data.tokens[k] = _by_batches(lambda i, k=k: tok.tokenize(images[i], k), rows, size)
    if criterion.of == "velocity":
        values = _explained(data, draws)
    else:
        values = _decoded(data, criterion, draws, sampler)

    def checked(rows, k):
        found = values(rows, k)
        if not np.isfinite(found).all():
            wrong = rows[np.flatnonzero(~np.isfinite(found))[0]]
            raise ValueError(
                f"criterion {criterion.name}: it is not finite for image {wrong} from {k} tokens"
            )
        return found

    better = criterion.larger_is_better
    found = smallest(checked, len(images), counts, target, within, rule, better)
    if cfg.tokens.revised:
        for row, k in enumerate(found[0]):
            tokens[row, :k] = data.tokens[int(k)][row]
    return Lengths(*found, counts, tokens)


def check_counts(tok, counts: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of tokens to choose from: 1, 2, 4, ... up to all by default.

    Raises:
        ValueError: they do not ascend or are outside 1..R, or the model's tokens are not ordered.
    """
    most = tok.num_tokens
    if tok.prefixes == (most,) and most > 1:
        raise ValueError(
            f"the tokens of {tok.origin} are not ordered: all {most} of them stand for an image, "
            "there is nothing to choose"
        )
    allowed = tok.prefixes
    counts = flextok.doublings(allowed) if counts is None else tuple(counts)
    right = all(isinstance(k, (int, np.integer)) and k in allowed for k in counts)
    if not counts or not right or any(a >= b for a, b in zip(counts, counts[1:])):
        values = f"1..{most}" if len(allowed) == most else allowed
        raise ValueError(f"counts={counts}: must be ascending numbers of tokens in {values}")
    return tuple(int(k) for k in counts)


def _check_target(target, within, rule) -> None:
    if (target is None) == (within is None):
        raise ValueError(
            f"target={target} and within={within}: give one of them, a value of the criterion, or "
            "how much worse than with all tokens it may be"
        )
    if target is not None and not np.isfinite(target):
        raise ValueError(f"target={target}: must be finite")
    if within is not None and not 0 <= within < np.inf:
        raise ValueError(f"within={within}: must be a number from 0 on")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: allowed are {', '.join(RULES)}")


def _sampler(tok, criterion, how: dict):
    """How images are decoded; None where nothing is sampled."""
    if not tok.config.is_flow and (how or criterion.of == "velocity"):
        wrong = ", ".join(how) or f"criterion {criterion.name!r}"
        raise ValueError(f"{wrong}: {tok.origin} decodes in one pass, without a flow")
    if criterion.of == "velocity" and how:
        raise ValueError(f"{', '.join(how)}: the criterion {criterion.name!r} samples nothing")
    return dataclasses.replace(tok.config.sampler, **how) if tok.config.is_flow else None


class _Data(NamedTuple):
    """Images or their latents, and their tokens, on the host; and how batches of them are run.

    `tokens` are all R of them, {R: tokens}; where those for fewer are other tokens, also those for
    each number.
    """

    tok: object
    originals: np.ndarray
    tokens: dict[int, np.ndarray]
    seeds: np.ndarray
    key: jax.Array
    size: int

    def run(self, function: Callable, rows: np.ndarray) -> np.ndarray:
        """`function` of full batches of row numbers [size], on the devices: float32 [n, ...]."""
        with self.tok.on_mesh():
            return _by_batches(function, rows, self.size)

    def spread(self, *arrays):
        """Arrays [size, ...] on the devices; they may fill it up."""
        return spread_batch(self.tok.mesh, arrays)

    def codes(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [n, K, ...], of which the first k count, k as int32 [n]); K is k rounded up."""
        most = self.tok.num_tokens
        tokens = self.tokens.get(k, self.tokens[most])[rows, : flextok.bucket(k, most)]
        return tokens, np.full(len(rows), k, np.int32)


def _by_batches(function: Callable, rows: np.ndarray, size: int) -> np.ndarray:
    """`function` of `size` rows at a time, the last batch filled up with its last row."""
    parts = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        filled = padded(part, size)
        parts.append(np.asarray(function(filled))[: len(part)])
    return np.concatenate(parts)


# By the decoded images or latents.


def _decoded(data: _Data, criterion, draws: int, sampler) -> Callable:
    """The mean criterion of `draws` decoded images, as a function of (rows, k)."""
    cfg, compute, params = data.tok.config, data.tok.compute, data.tok.params
    pixels, shape = criterion.of == "images", data.originals.shape[1:]
    if pixels:
        down = cfg.vae.downsample
        shape = (shape[0] // down, shape[1] // down, cfg.vae.latent_channels)

    def batch(rows, k):
        tokens, keep = data.codes(rows, k)
        originals = data.originals[rows]
        if originals.dtype == np.uint8:
            originals = to_float(originals)
        arrays = data.spread(tokens, keep, data.seeds[rows], originals)
        total = 0.0
        for draw in range(draws):
            decoded = _decode(
                params, *arrays[:3], data.key, np.int32(draw),
                cfg=cfg, compute=compute, shape=shape, sampler=sampler, pixels=pixels,
            )  # fmt: skip
            found = np.asarray(criterion.function(criterion.params, decoded, arrays[3]))
            if found.shape != decoded.shape[:1]:
                raise ValueError(
                    f"criterion {criterion.name}: it returned shape {found.shape} for "
                    f"{len(decoded)} images, must be ({len(decoded)},)"
                )
            total = total + found
        return total / draws

    return lambda rows, k: data.run(functools.partial(batch, k=k), rows)


def _noise(key, seeds, draw, shape):
    """float32 [B, *shape]: a function of the key, the image's seed and the draw alone."""

    def one(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, seed), draw), shape)

    return jax.vmap(one)(seeds)


def _latents_of(tok, images):
    (images,) = spread_batch(tok.mesh, (images,))
    return _latents(tok.params["vae"], images, tok.config.vae, tok.compute)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def _latents(params, images, cfg, compute):
    """Images -> scaled latents, the mean of the VAE's posterior: float32 [B, h, w, C]."""
    if images.dtype == jnp.uint8:
        images = to_float(images)
    return vae.images_to_latents(params, cfg, images, jnp.dtype(compute.dtype))


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "shape", "sampler", "pixels"))
def _decode(
    params, tokens, keep, seeds, key, draw, cfg, compute: Compute, shape, sampler, pixels: bool
):
    """The first keep [B] of the tokens [B, K, ...] -> images in [-1, 1], or scaled latents."""
    codes, noise = flextok.codes_of(params, cfg, tokens), _noise(key, seeds, draw, shape)
    latents = flextok.decode(params, cfg, compute, codes, keep, noise, sampler)
    if not pixels:
        return latents
    dtype = jnp.dtype(compute.dtype)
    return vae.latents_to_images(params["vae"], cfg.vae, latents, dtype).clip(-1, 1)


# By the flow's own loss.


def _explained(data: _Data, draws: int) -> Callable:
    """What k tokens explain of the loss that all explain, as a function of (rows, k).

    (L_null - L_k) / (L_null - L_R): 0 for the null condition, 1 for all tokens, where L is the
    mean over `draws` of the squared error of the velocity. Where all tokens explain less than LEAST
    of L_null, the share is of that, so that it stays finite and in order.
    """
    tok, everything = data.tok, np.arange(len(data.seeds))

    def batch(rows, k):
        tokens, keep = (
            data.codes(rows, k) if k else (data.tokens[tok.num_tokens][rows, :0], 0 * rows)
        )
        arrays = data.spread(tokens, keep, data.seeds[rows], data.originals[rows])
        return flow_loss(tok.params, *arrays, data.key, tok.config, tok.compute, draws)

    def loss(rows, k):
        return data.run(functools.partial(batch, k=k), rows)

    null, full = loss(everything, 0), loss(everything, tok.num_tokens)
    gain = np.maximum(null - full, LEAST * null)

    def values(rows, k):
        found = full[rows] if k == tok.num_tokens else loss(rows, k)
        return (null[rows] - found) / gain[rows]

    return values


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "draws"))
def flow_loss(
    params, tokens, keep, seeds, x0, key, cfg: TokenizerConfig, compute: Compute, draws: int
):
    """The flow's loss of images at fixed times and noises, without guidance.

    Each draw has one time for all images, so that the modulation is computed once, and a noise for
    each image.

    Args:
        tokens: [B, K, ...], of which the first keep [B] count; K = 0: the null condition.
        seeds: uint32 [B], of the images' noises.
        x0: scaled latents [B, h, w, C].

    Returns:
        float32 [B].
    """
    if tokens.shape[1]:
        codes = flextok.codes_of(params, cfg, tokens)
        condition = Condition(codes, keep, jnp.zeros(len(keep), bool))
    else:
        condition = unconditional(len(x0), cfg.code_dim)

    def add(total, item):
        t, draw = item
        noise = _noise(key, seeds, draw, x0.shape[1:])
        x_t = path.interpolate(x0, noise, t[None])
        (v,) = flextok.velocities(params, cfg, compute, x_t, t[None], (condition,))
        error = v.astype(jnp.float32) - path.target(x0, noise)
        return total + jnp.mean(jnp.square(error), axis=(1, 2, 3)), None

    items = times(cfg, draws), jnp.arange(draws)
    total, _ = jax.lax.scan(add, jnp.zeros(len(x0)), items)
    return total / draws


def times(cfg: TokenizerConfig, draws: int) -> jax.Array:
    """float32 [draws]: the middle of each of `draws` equal parts of training's times.

    A `time_shift` of the training's configuration is no part of a model and not in it.
    """
    u = (jnp.arange(draws) + 0.5) / draws
    if cfg.target.flow.log_normal_time:
        return jax.nn.sigmoid(jax.scipy.special.ndtri(u))
    return path.mode_time(u, cfg.target.flow.mode_scale)
