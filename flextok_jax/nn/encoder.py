"""The encoder: latents to registers, of which a prefix does not depend on the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import bottleneck, layers, layout, order
from flextok_jax.nn.block import Norm, Shared, normal, stack, xavier, zeros
from flextok_jax.nn.config import Compute, TokenizerConfig
from flextok_jax.nn.convs import ConvEncoder


class Encoder(nn.Module):
    """Latents and learned registers through the Transformer."""

    cfg: TokenizerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        num_registers: int | None = None,
        keep: jax.Array | None = None,
        text: jax.Array | None = None,
    ) -> jax.Array:
        """The first registers of each image, before the bottleneck.

        Args:
            latents: [B, h, w, C], scaled.
            num_registers: K, how many to compute; all R by default. Of causal registers the
                sequence has N + K positions, of scales K, and the result is the prefix of the full
                one, because no register attends to one of a higher rank.
            keep: int32 [B], how many of its tokens an image will keep, for `cfg.tokens.told`; K by
                default.
            text: float [B, T, E], for `cfg.text.encoder`; see `layers.read_text`.

        Returns:
            float32 [B, K, channels that the bottleneck reads].
        """
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        channels, most = bottleneck.features(cfg.bottleneck), cfg.num_tokens
        if not cfg.encoder.depth:
            grid = ConvEncoder(cfg.convs, dtype, channels, name="convs")(latents)
            return grid.reshape(len(grid), -1, channels)
        width, learned = cfg.encoder.width, cfg.sites.positions == "learned"
        count = most if num_registers is None else num_registers
        embed = layers.PatchEmbed(cfg.sites, width, dtype, cfg.linear_bias)
        nn.share_scope(self, embed)
        parts = embed(latents)
        there = None
        if cfg.text.encoder:
            parts["text"], there = layers.read_text(self, cfg.text, text, parts["patches"])
        tokens = "registers" if cfg.tokens.registers else "patches"
        if cfg.tokens.registers:
            run = count if cfg.tokens.order == "causal" else most
            parts[tokens] = self._registers(len(latents), run)
        if cfg.tokens.told:
            keep = jnp.full(len(latents), count) if keep is None else keep
            parts[tokens] = parts[tokens] + self._told(keep)
        if cfg.tokens.order == "scales":
            parts[tokens] = parts[tokens][:, :count]
            sequence = order.scales(tokens, count, cfg.num_patches)
        else:
            make = order.causal_last if cfg.tokens.order == "causal" else order.full
            sequence = make(**{name: part.shape[1] for name, part in parts.items()})
        x = sequence.join(*parts.values())
        if learned:
            x = Norm(cfg.encoder.norm, cfg.encoder.norm_eps, name="pre_norm")(x)
        carry = ((x,), None, jnp.int32(0))
        shared = Shared(mask=sequence.seen(len(latents), text=there))
        (x,), *_ = stack(cfg.encoder, self.compute, carry, shared, sequences=(sequence,))
        norm = Norm(cfg.encoder.norm, cfg.encoder.norm_eps, name="norm")
        x = norm(sequence.part(x, tokens)).astype(jnp.float32)
        if cfg.tokens.reshaped:
            x = x.reshape(len(x), width, most).swapaxes(1, 2)
        # Codes of length 1 have no gradient at 0.
        init = xavier if cfg.bottleneck.kind == "vq" else zeros
        head = layers.dense(channels, jnp.float32, "head", init, bias=cfg.linear_bias)
        return head(x[:, :count])

    def _registers(self, batch: int, count: int):
        """The first vectors of the registers, [batch, count, D]."""
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        shape = (cfg.num_tokens, cfg.encoder.width)

        def vectors(name):
            table = self.param(name, layout.axes(normal, None, None), shape)
            return table[None, :count].astype(dtype)

        registers = vectors("registers")
        if cfg.sites.positions == "learned":
            registers = registers + vectors("register_pos")
        return jnp.broadcast_to(registers, (batch, count, shape[1]))

    def _told(self, keep):
        """What says which tokens are kept, [B, R, D]."""
        width, dtype = self.cfg.encoder.width, jnp.dtype(self.compute.dtype)
        kept, dropped = (
            self.param(name, layout.axes(normal, None), (width,))[None, None].astype(dtype)
            for name in ("kept", "dropped")
        )
        is_kept = jnp.arange(self.cfg.num_tokens)[None] < keep[:, None]
        return jnp.where(is_kept[:, :, None], kept, dropped)
