"""The bottleneck: features to codes, by one call whatever the kind.

    fsq   finite scalar quantisation (Mentzer et al., arXiv 2309.15505), see nn/fsq.py
    vq    the nearest vector of a learned codebook (van den Oord et al., arXiv 1711.00937): nn/vq.py
    kl    a sample of a diagonal Gaussian, regularised towards N(0, 1) (arXiv 1312.6114)
    none  the features themselves

Always float32. B images, K tokens, F channels of a code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flextok_jax.nn import fsq, vae, vq
from flextok_jax.nn.tokenizer_config import Bottleneck


class Quantized(NamedTuple):
    """What a bottleneck makes of features.

    Attributes:
        codes: float32 [B, K, F], with a gradient to the features.
        ids: int32 [B, K]; None where codes are continuous.
        loss: float32 [B], to be weighted and added: of "vq" a mean over tokens and channels, of
            "kl" nats per image, else 0.
    """

    codes: jax.Array
    ids: jax.Array | None
    loss: jax.Array


def init(cfg: Bottleneck, key: jax.Array) -> dict:
    """The parameters: {"codebook": [books * size, F]} of "vq", else {}."""
    return {"codebook": vq.init(cfg, key)} if cfg.kind == "vq" else {}


def features(cfg: Bottleneck) -> int:
    """How many channels the encoder writes for each token."""
    return 2 * cfg.dim if cfg.kind == "kl" else cfg.code_dim


def quantize(params, cfg: Bottleneck, z: jax.Array, noise: jax.Array | None = None) -> Quantized:
    """Features to codes.

    Args:
        params: of `init`.
        z: [B, K, `features`].
        noise: standard normal [B, K, F], for a sample of "kl"; None: the mean. Others ignore it.
    """
    z, nothing = z.astype(jnp.float32), jnp.zeros(z.shape[0], jnp.float32)
    if cfg.kind == "fsq":
        codes = fsq.quantize(z, cfg.levels, cfg.eps)
        return Quantized(codes, fsq.codes_to_indices(codes, cfg.levels), nothing)
    if cfg.kind == "vq":
        return Quantized(*vq.quantize(params["codebook"], cfg, z))
    if cfg.kind == "kl":
        mean, logvar = vae.split_moments(z)
        codes = mean if noise is None else vae.sample_posterior(mean, logvar, noise)
        return Quantized(codes, None, vae.kl(mean, logvar))
    return Quantized(z, None, nothing)


def codes_of(params, cfg: Bottleneck, tokens: jax.Array) -> jax.Array:
    """What the decoder reads: ids int32 [B, K], or float codes [B, K, F] -> float32 [B, K, F]."""
    if cfg.kind == "fsq":
        return fsq.indices_to_codes(tokens, cfg.levels)
    if cfg.kind == "vq":
        return vq.codes_of(params["codebook"], cfg, tokens)
    return tokens.astype(jnp.float32)
