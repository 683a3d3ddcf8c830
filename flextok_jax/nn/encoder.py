"""The encoder: latents to registers, of which a prefix does not depend on the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import bottleneck, layers, layout, order
from flextok_jax.nn.attention import layer_norm
from flextok_jax.nn.block import normal, stack, xavier, zeros
from flextok_jax.nn.config import Compute, TokenizerConfig


class Encoder(nn.Module):
    """Latents and learned registers through the Transformer."""

    cfg: TokenizerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, latents: jax.Array, num_registers: int | None = None) -> jax.Array:
        """The first registers of each image, before the bottleneck.

        Args:
            latents: [B, h, w, C], scaled.
            num_registers: K, how many to compute, one of `cfg.prefixes`; all R by default. The
                sequence has N + K positions, and the result is the prefix of the full one, because
                no register attends to one of a higher rank.

        Returns:
            float32 [B, K, channels that the bottleneck reads].
        """
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        width, most = cfg.encoder.width, cfg.num_tokens
        count = most if num_registers is None else num_registers
        embed = layers.PatchEmbed(cfg.sites.grid, cfg.sites.patch_size, width, dtype)
        nn.share_scope(self, embed)
        patches = embed(latents)
        registers = self.param("registers", layout.axes(normal, None, None), (most, width))
        registers = registers[None, :count].astype(dtype)
        registers = jnp.broadcast_to(registers, (patches.shape[0], count, width))
        make = order.causal_last if cfg.tokens.order == "causal" else order.full
        sequence = make(patches=patches.shape[1], registers=count)
        carry = ((sequence.join(patches, registers),), None, jnp.int32(0))
        (x,), *_ = stack(cfg.encoder, self.compute, carry, (None,) * 3, sequences=(sequence,))
        x = layer_norm(sequence.part(x, "registers")).astype(jnp.float32)
        # Codes of length 1 have no gradient at 0.
        init = xavier if cfg.bottleneck.kind == "vq" else zeros
        return layers.dense(bottleneck.features(cfg.bottleneck), jnp.float32, "head", init)(x)
