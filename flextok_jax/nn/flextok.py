"""The whole FlexTok model as pure functions of (params, configs, arrays)."""

import jax
import jax.numpy as jnp

from flextok_jax.flow import sampler
from flextok_jax.nn import fsq, vae
from flextok_jax.nn.config import Compute, FlexTokConfig
from flextok_jax.nn.decoder import Condition, Decoder, unconditional
from flextok_jax.nn.encoder import Encoder


def init(cfg: FlexTokConfig, key: jax.Array) -> dict:
    """Random parameters {"vae", "encoder", "decoder"}, float32."""
    key_vae, key_enc, key_dec = jax.random.split(key, 3)
    rows, cols = (s * cfg.patch_size for s in cfg.grid)
    latents = jnp.zeros((1, rows, cols, cfg.vae.latent_channels))
    null = unconditional(1, len(cfg.levels))
    return {
        "vae": vae.init_vae(cfg.vae, key_vae),
        "encoder": Encoder(cfg).init(key_enc, latents)["params"],
        "decoder": Decoder(cfg).init(key_dec, latents, jnp.zeros((1,)), (null,))["params"],
    }


def lengths(num_tokens: int) -> tuple[int, ...]:
    """1, 2, 4, ... below R, and R: the numbers of tokens that programs are compiled for."""
    return (*(2**i for i in range((num_tokens - 1).bit_length())), num_tokens)


def bucket(k: int, num_tokens: int) -> int:
    """The smallest of `lengths` that is at least k."""
    return next(length for length in lengths(num_tokens) if length >= k)


def encode(params, cfg: FlexTokConfig, compute: Compute, latents, num_registers=None):
    """Scaled latents [B, h, w, C] -> registers before quantisation, float32 [B, K, F]."""
    return Encoder(cfg, compute).apply({"params": params["encoder"]}, latents, num_registers)


def velocities(params, cfg: FlexTokConfig, compute: Compute, x_t, t, conditions, capture=None):
    """The decoder's velocities, one per condition; see `Decoder.__call__`."""
    decoder = Decoder(cfg, compute)
    return decoder.apply({"params": params["decoder"]}, x_t, t, conditions, capture)


def decode(
    params,
    cfg: FlexTokConfig,
    compute: Compute,
    codes: jax.Array,
    keep: jax.Array,
    noise: jax.Array,
    scales: jax.Array,
    guided: bool,
    normalized: bool,
) -> jax.Array:
    """Codes to scaled latents by the flow.

    Args:
        codes: float32 [B, K, F], K <= R: positions beyond K are folded into one.
        keep: int32 [B], tokens kept of each image, at most K.
        noise: [B, h, w, C].
        scales, guided, normalized: see `sampler.euler`.

    Returns:
        float32 [B, h, w, C].
    """
    batch = codes.shape[0]
    conditions = (Condition(codes, keep, jnp.zeros((batch,), bool)),)
    if guided:
        conditions += (unconditional(batch, len(cfg.levels)),)

    def step(x, t):
        return velocities(params, cfg, compute, x, t, conditions)

    return sampler.euler(step, noise, scales, guided, normalized)


def quantize(registers: jax.Array, cfg: FlexTokConfig) -> tuple[jax.Array, jax.Array]:
    """Registers [..., F] -> (codes float32 [..., F] with straight-through gradient, ids int32)."""
    codes = fsq.quantize(registers, cfg.levels)
    return codes, fsq.codes_to_indices(codes, cfg.levels)
