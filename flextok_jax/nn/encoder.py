"""The encoder: latents to registers, of which a prefix does not depend on the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import bottleneck, layers, layout, order
from flextok_jax.nn.block import Norm, normal, stack, xavier, zeros
from flextok_jax.nn.config import Compute, TokenizerConfig
from flextok_jax.nn.convs import ConvEncoder


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
        channels = bottleneck.features(cfg.bottleneck)
        if not cfg.encoder.depth:
            grid = ConvEncoder(cfg.convs, dtype, channels, name="convs")(latents)
            return grid.reshape(len(grid), -1, channels)
        width, most = cfg.encoder.width, cfg.num_tokens
        learned = cfg.sites.positions == "learned"
        count = most if num_registers is None else num_registers
        embed = layers.PatchEmbed(cfg.sites, width, dtype)
        nn.share_scope(self, embed)
        parts = embed(latents)

        def vectors(name):
            table = self.param(name, layout.axes(normal, None, None), (most, width))
            return table[None, :count].astype(dtype)

        registers = vectors("registers")
        if learned:
            registers = registers + vectors("register_pos")
        parts["registers"] = jnp.broadcast_to(registers, (len(latents), count, width))
        make = order.causal_last if cfg.tokens.order == "causal" else order.full
        sequence = make(**{name: part.shape[1] for name, part in parts.items()})
        x = sequence.join(*parts.values())
        if learned:
            x = Norm(cfg.encoder.norm, cfg.encoder.norm_eps, name="pre_norm")(x)
        carry = ((x,), None, jnp.int32(0))
        (x,), *_ = stack(cfg.encoder, self.compute, carry, (None,) * 3, sequences=(sequence,))
        norm = Norm(cfg.encoder.norm, cfg.encoder.norm_eps, name="norm")
        x = norm(sequence.part(x, "registers")).astype(jnp.float32)
        if cfg.tokens.reshaped:
            x = x.reshape(len(x), width, most).swapaxes(1, 2)
        # Codes of length 1 have no gradient at 0.
        init = xavier if cfg.bottleneck.kind == "vq" else zeros
        return layers.dense(channels, jnp.float32, "head", init)(x)
