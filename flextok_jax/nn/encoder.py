"""The encoder: latents to registers, of which a prefix does not depend on the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import bottleneck, layers, layout, order
from flextok_jax.nn.block import Norm, Shared, normal, stack, stacked, xavier, zeros
from flextok_jax.nn.config import Compute
from flextok_jax.nn.convs import ConvEncoder
from flextok_jax.nn.tokenizer_config import TokenizerConfig


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
            keep: int32 [B], how many of its tokens an image will keep, for `cfg.tokens.told` and
                `rounds`; K by default.
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
        if cfg.tokens.rounds > 1:
            keep = jnp.full(len(latents), count) if keep is None else keep
            return self._features(self._rounds(parts, count, keep, there), count)
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
        return self._features(sequence.part(x, tokens), count)

    def _features(self, x, count: int):
        """What the bottleneck reads of the first `count` of [B, K, D]."""
        cfg, (batch, _, width) = self.cfg, x.shape
        x = Norm(cfg.encoder.norm, cfg.encoder.norm_eps, name="norm")(x).astype(jnp.float32)
        if cfg.tokens.reshaped:
            x = x.reshape(batch, width, cfg.num_tokens).swapaxes(1, 2)
        # Codes of length 1 have no gradient at 0.
        # Without biases, tokens of zeros and the decoder's head of zeros would have no gradient.
        init = xavier if cfg.bottleneck.kind == "vq" or not cfg.linear_bias else zeros
        channels = bottleneck.features(cfg.bottleneck)
        return layers.dense(channels, jnp.float32, "head", init, bias=cfg.linear_bias)(x[:, :count])

    def _rounds(self, parts, count: int, keep, there):
        """Registers [B, K, D] as they are after the round with which an image keeps `keep` of them.

        Those that it does not keep are as they were after their first round.
        """
        cfg, x = self.cfg, None
        registers, each = parts.pop("registers"), cfg.num_tokens // cfg.tokens.rounds
        lengths = {name: part.shape[1] for name, part in parts.items()}
        eps, run, found = cfg.encoder.norm_eps, None, None
        between = Norm(cfg.encoder.norm, eps, name="round_norm")
        for last in range(each, count + each, each):
            sequence, new = order.full(**lengths, registers=last), registers[:, last - each : last]
            x = jnp.concatenate([*parts.values(), new] if x is None else [x, new], axis=1)
            if found is not None:
                x = between(x)
            elif cfg.sites.positions == "learned":
                x = Norm(cfg.encoder.norm, eps, name="pre_norm")(x)
            carry = ((x,), None, jnp.int32(0))
            shared = Shared(mask=sequence.seen(len(x), text=there))
            run = stacked(cfg.encoder, self.compute, carry, shared) if run is None else run
            ((x,), *_), _ = run(carry, shared)
            made = sequence.part(x, "registers")
            if found is not None:
                first = jnp.concatenate([found, made[:, last - each :]], axis=1)
                made = jnp.where((keep >= last)[:, None, None], made, first)
            found = made
        return found

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
