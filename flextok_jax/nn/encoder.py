"""The encoder: latents -> registers, with the first k registers independent of the later ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import attention, kernels, layers, layout
from flextok_jax.nn.config import Compute, FlexTokConfig


def causal_last_mask(num_patches: int, length: int) -> np.ndarray:
    """bool [length, length]: who may attend to whom, see `causal_last`."""
    mask = np.tri(length, dtype=bool)
    mask[:, :num_patches] = True
    return mask


def causal_last(num_patches: int, implementation: str, scale: float) -> layers.AttentionCore:
    """Patches attend to patches; register i attends to all patches and to registers <= i."""
    n = num_patches

    def core(q, k, v):
        count = q.shape[1] - n
        mask = causal_last_mask(n, n + count)[n:]
        patches = attention.attend(q[:, :n], k[:, :n], v[:, :n], implementation, scale)
        registers = attention.attend(q[:, n:], k, v, implementation, scale, mask)
        return jnp.concatenate([patches, registers], axis=1)

    return core


def _normalize(x):  # as `kernels.normalize`
    return x, layers.layer_norm(x)


class EncoderBlock(nn.Module):
    """Pre-norm residual block over [patches | registers]."""

    cfg: FlexTokConfig
    compute: Compute
    num_patches: int

    @nn.compact
    def __call__(self, x: jax.Array, _):
        """x: [B, N + K, D] -> (the same shape, None)."""
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        scale = 8.0 / cfg.head_dim  # the muP form; 1/sqrt(64) at 64
        how, length = self.compute.attention, x.shape[1]
        core = causal_last(self.num_patches, how, scale)
        mask = causal_last_mask(self.num_patches, length)
        kernel = attention.with_norms(how, length, cfg.enc_width, cfg.head_dim, scale, mask)
        norm = _normalize
        if how == "pallas" and kernels.can_normalize(length, 1, cfg.enc_width):
            norm = kernels.normalize
        attn = layers.Attention(cfg.enc_width, cfg.head_dim, dtype, name="attn")
        x, y = norm(x)
        x = x + attn(y, core, kernel)
        x, y = norm(x)
        x = x + layers.SwiGLU(cfg.enc_width, cfg.mlp_ratio, dtype, name="mlp")(y)
        return layout.batch_first(x), None


class Encoder(nn.Module):
    """Latents and learned registers through the Transformer."""

    cfg: FlexTokConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, latents: jax.Array, num_registers: int | None = None) -> jax.Array:
        """The first registers of each image, before quantisation.

        Args:
            latents: [B, h, w, C], scaled.
            num_registers: K, how many to compute; all R by default. The sequence has N + K
                positions, and the result is the prefix of the full one: no register attends to
                a later one.

        Returns:
            float32 [B, K, F].
        """
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        count = cfg.num_tokens if num_registers is None else num_registers
        embed = layers.PatchEmbed(cfg.grid, cfg.patch_size, cfg.enc_width, dtype)
        nn.share_scope(self, embed)
        x = embed(latents)
        num_patches = x.shape[1]
        registers = self.param("registers", layers.normal, (cfg.num_tokens, cfg.enc_width))
        registers = jnp.broadcast_to(
            registers[None, :count].astype(dtype), (x.shape[0], count, cfg.enc_width)
        )
        x = jnp.concatenate([x, registers], axis=1)
        blocks = layers.stack(
            EncoderBlock,
            cfg,
            self.compute,
            cfg.enc_depth,
            "encoder/blocks",
            num_patches=num_patches,
        )
        x, _ = blocks(x, None)
        x = layers.layer_norm(x[:, num_patches:])
        head = nn.Dense(len(cfg.levels), dtype=jnp.float32, kernel_init=layers.zeros, name="head")
        return head(x.astype(jnp.float32))
