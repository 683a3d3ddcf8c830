"""The decoder: codes to latents, by a flow or in one pass. Its cost follows the codes.

Dropped registers are identical vectors, receive identical modulation, and attention sees no other
position, so they stay identical through every layer. They are computed as ONE register that stands
for all of them (`order.Sequence.folded`). The result is exact.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import haar, layers, layout, order
from flextok_jax.nn.block import Norm, Shared, modulate, normal, stack, zeros
from flextok_jax.nn.config import Compute
from flextok_jax.nn.convs import ConvDecoder
from flextok_jax.nn.tokenizer_config import TokenizerConfig


class Condition(NamedTuple):
    """What one pass of the decoder is conditioned on.

    Attributes:
        codes: float32 [B, K, F], the first K codes, K <= R. The other R - K registers are folded
            into one (none at K = R).
        keep: int32 [B], codes from this position on are replaced by the mask vector.
        null: bool [B], images whose registers are all replaced by the null vector.
    """

    codes: jax.Array
    keep: jax.Array
    null: jax.Array


def unconditional(batch: int, code_dim: int) -> Condition:
    """The null condition for a whole batch: one folded register, N + 1 positions."""
    return Condition(
        jnp.zeros((batch, 0, code_dim), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.ones((batch,), bool),
    )


class Decoder(nn.Module):
    """The Transformer over [patches | registers], for either target."""

    cfg: TokenizerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        conditions: tuple[Condition, ...],
        x_t=None,
        t=None,
        capture=None,
        grid=None,
        length=None,
        text=None,
    ):
        """What the target is, under several conditions.

        Args:
            conditions: the passes. One with K < R codes runs N + K + 1 positions, with K = R N + R.
            x_t: [B, h, w, C], noised latents, for the target "flow".
            t: float32 [B], or [1] when the batch shares one time (the modulation is then computed
                once). 1 is noise, 0 is data. For the target "flow".
            capture: also return the first pass's patch features after this block (for REPA).
            grid: patches (rows, columns), for the target "values"; the full grid by default.
            length: of a flow with `jumps`, float32 as t: the velocity is the average over the step
                from t to t - length. 0 by default: the velocity at t.
            text: float [B, T, E], for a model that reads one (`cfg.text`).

        Returns:
            A tuple of float32 [B, h, w, C], one per condition: velocities, or latents (of the
            target "values", and of a flow that predicts the image). With
            `capture`, the pair (that tuple, features [B, N, D]).
        """
        cfg, dtype, width = self.cfg, jnp.dtype(self.compute.dtype), self.cfg.decoder.width
        sites, batch = cfg.sites, conditions[0].codes.shape[0]
        embedding = there = None
        if cfg.is_flow:
            grid = tuple(side // sites.patch_size for side in x_t.shape[1:3])
            embedding = self._time_embedding(t, length)
            embed = layers.PatchEmbed(sites, width, dtype)
            nn.share_scope(self, embed)
            parts = embed(x_t)
        else:
            grid = sites.grid if grid is None else grid
            if not cfg.decoder.depth:
                codes = conditions[0].codes
                return (self._convs(codes.reshape(batch, *grid, codes.shape[-1])),)
            parts = self._queries(batch, grid) if cfg.tokens.registers else {}
            if cfg.text.dim:
                parts["text"], there = layers.read_text(self, cfg.text, text, parts["patches"])
        lengths = {name: part.shape[1] for name, part in parts.items()}
        registers, sequences = zip(*self._registers(conditions, lengths))
        passes = tuple(s.join(*parts.values(), r) for s, r in zip(sequences, registers))
        if sites.positions == "learned":
            norm = Norm(cfg.decoder.norm, cfg.decoder.norm_eps, name="pre_norm")
            passes = tuple(map(norm, passes))
        features = None if capture is None else jnp.zeros_like(parts["patches"])
        carry = (passes, features, jnp.int32(0))
        kept = None
        if cfg.tokens.dropped == "cut":
            kept = _kept(conditions[0].codes, conditions[0].keep)
        shared = Shared(
            None if embedding is None else embedding.astype(dtype),
            mask=sequences[0].seen(batch, text=there, registers=kept),
        )
        (passes, features, _) = stack(
            cfg.decoder, self.compute, carry, shared,
            sequences=sequences, modulated=cfg.is_flow, capture=capture,
        )  # fmt: skip
        written = "patches" if cfg.tokens.registers else "registers"
        patches = tuple(s.part(x, written) for s, x in zip(sequences, passes))
        if sites.levels:
            return tuple(self._scales(x, c.keep, grid) for x, c in zip(patches, conditions))
        made = self._head(patches, embedding, grid)
        return made if capture is None else (made, features)

    def _queries(self, batch: int, grid):
        """The segments that become patches, the same for all images: {name: [batch, n, D]}."""
        width, dtype = self.cfg.decoder.width, jnp.dtype(self.compute.dtype)
        query = self.param("query", layout.axes(normal, None), (width,)).astype(dtype)
        query = jnp.broadcast_to(query[None, None], (1, math.prod(grid), width))
        parts = layers.placed(self, self.cfg.sites, query, grid)
        return {name: jnp.broadcast_to(x, (batch, *x.shape[1:])) for name, x in parts.items()}

    def _time_embedding(self, t, length):
        flow, width = self.cfg.target.flow, self.cfg.decoder.width

        def dense(name, init=layers.xavier):
            return layers.dense(width, jnp.float32, name, init, names=(None, "embed"))

        def frequencies(x):
            return layers.time_frequencies(x, flow.time_frequencies, flow.max_timestep)

        hidden = dense("time_mlp_0")(frequencies(t))
        if flow.jumps:  # Zero at first: distillation begins at the velocity of the teacher.
            length = jnp.zeros_like(t) if length is None else length
            hidden = hidden + dense("length_mlp", zeros)(frequencies(length))
        return dense("time_mlp_1")(nn.silu(hidden))

    def _registers(self, conditions, lengths: dict[str, int]):
        """Register vectors [B, M, D] of each condition, and the sequence of its pass.

        `lengths` are those of the segments before the registers.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        total, width = cfg.num_tokens, cfg.decoder.width
        names, bias = (None, "embed"), cfg.linear_bias
        project = layers.dense(width, dtype, "register_proj", names=names, bias=bias)
        positions, dropped = None, cfg.tokens.dropped
        if cfg.sites.positions != "none":
            axes = layout.axes(normal, None, None)
            positions = self.param("register_pos", axes, (total, width)).astype(dtype)

        def vector(name):
            return self.param(name, layout.axes(normal, None), (width,)).astype(dtype)

        # A flow that keeps all tokens has a mask vector too: released files do.
        masked = cfg.is_flow or (cfg.tokens.keep != "fixed" and dropped == "mask")
        mask = vector("mask") if masked else None
        null = vector("null") if cfg.is_flow else None
        for codes, keep, is_null in conditions:
            if dropped == "zero":
                codes = jnp.where(_kept(codes, keep)[:, :, None], codes, 0)
                codes = jnp.pad(codes, ((0, 0), (0, total - codes.shape[1]), (0, 0)))
            batch, count, _ = codes.shape
            x = project(codes.astype(dtype))
            if positions is not None:
                x = x + jnp.broadcast_to(positions[None, :count], x.shape)
            if mask is not None:
                x = jnp.where(_kept(codes, keep)[:, :, None], x, mask[None, None, :])
            folded = total - count if dropped == "mask" and cfg.tokens.registers else 0
            if folded:
                x = jnp.concatenate([x, jnp.broadcast_to(mask, (batch, 1, width))], axis=1)
            if null is not None:
                x = jnp.where(is_null[:, None, None], null[None, None, :], x)
            if cfg.tokens.order == "scales":
                yield x, order.scales("registers", count, cfg.num_patches)
                continue
            sequence = order.Sequence(
                (*lengths, "registers"), (*lengths.values(), x.shape[1]), folded=max(folded, 1)
            )
            yield x, sequence

    def _head(self, patches, embedding, grid):
        """Patch features -> float32 [B, h, w, C], one for each pass."""
        cfg, output = self.cfg, self.cfg.target.output
        shift = scale = None
        written = cfg.target.codes or cfg.patch_dim * cfg.sites.repeat[1]
        head = layers.dense(written, jnp.float32, "head", zeros, bias=cfg.linear_bias)
        if embedding is not None:
            adaln = layers.dense(
                2 * cfg.decoder.width, jnp.float32, "head_adaln", zeros, ("embed", "hidden")
            )
            shift, scale = jnp.split(adaln(nn.silu(embedding))[:, None, :], 2, axis=-1)
        norm = Norm(cfg.decoder.norm, cfg.decoder.norm_eps, name="norm")

        def write(x):
            x = norm(x.astype(jnp.float32))
            x = x if shift is None else modulate(x, shift, scale)
            if output == "codes":
                return self._codes(head, x, grid)
            sides = [side * cfg.sites.patch_size for side in grid]
            x = head(x)[:, : math.prod(grid), : cfg.patch_dim]  # The first of repeated ones.
            x = layers.unpatchify(x, cfg.sites.patch_size, *sides)
            if output == "conv":
                x = layers.conv(x.shape[-1], "head_conv")(x)
            return nn.tanh(x) if output == "tanh" else x

        return tuple(write(x) for x in patches)

    def _scales(self, x, keep, grid):
        """Features [B, K, D] of scales -> float32 [B, h, w, C]; scales without tokens are 0."""
        cfg, side, patches = self.cfg, self.cfg.sites.patch_size, self.cfg.num_patches
        x = Norm(cfg.decoder.norm, cfg.decoder.norm_eps, name="norm")(x.astype(jnp.float32))
        x = jnp.pad(x, ((0, 0), (0, cfg.num_tokens - x.shape[1]), (0, 0)))
        found = []
        for i, size in enumerate(haar.sizes(side, cfg.sites.levels, cfg.vae.latent_channels)):
            head = layers.dense(size, jnp.float32, f"head_{i}", zeros, bias=cfg.linear_bias)
            made = head(x[:, i * patches : (i + 1) * patches])
            found.append(jnp.where((keep < (i + 1) * patches)[:, None, None], 0, made))
        x = haar.join(found, side, cfg.sites.levels)
        return layers.unpatchify(x, side, *(rows * side for rows in grid))

    def _codes(self, head, x, grid):
        """Patch features -> the mean of the codebook's vectors, through convolutions."""
        cfg = self.cfg
        hidden = layers.dense(2 * cfg.decoder.width, jnp.float32, "head_hidden")
        shape = (cfg.target.codes, cfg.convs.features)
        vectors = nn.initializers.normal(1.0)  # The mean of many smaller ones would be near 0.
        book = self.param("codebook", layout.axes(vectors, None, None), shape)
        probabilities = nn.softmax(head(nn.tanh(hidden(x))))
        return self._convs((probabilities @ book).reshape(len(x), *grid, shape[1]))

    def _convs(self, x):
        dtype, channels = jnp.dtype(self.compute.dtype), self.cfg.vae.latent_channels
        return ConvDecoder(self.cfg.convs, dtype, channels, name="convs")(x)


def _kept(codes, keep):
    """bool [B, K]: the first keep [B] of K positions."""
    return jnp.arange(codes.shape[1])[None, :] < keep[:, None]
