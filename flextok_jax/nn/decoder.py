"""The decoder: noised latents, a time and codes -> velocity. Its cost follows the codes given.

Dropped registers are identical vectors, receive identical modulation, and attention sees no other
position, so they stay identical through every layer. n identical keys with score s and value v
contribute n e^s v = e^(s + log n) v to the softmax: they are computed as ONE register whose key
carries the attention bias log n (the folding identity). The result is exact.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import attention, kernels, layers, layout
from flextok_jax.nn.config import Compute, FlexTokConfig


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


def unconditional(batch: int, num_features: int) -> Condition:
    """The null condition for a whole batch: one folded register, N + 1 positions."""
    return Condition(
        jnp.zeros((batch, 0, num_features), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.ones((batch,), bool),
    )


def _segments(modulation: jax.Array, num_patches: int, num_registers: int) -> jax.Array:
    """[B', 2, D] (for patches, for registers) -> [B', N + M, D]."""
    if num_patches == num_registers:  # The same, with a gradient that is one sum per half.
        return jnp.repeat(modulation, num_patches, axis=1)
    is_patch = jnp.arange(num_patches + num_registers) < num_patches
    return jnp.where(is_patch[None, :, None], modulation[:, :1], modulation[:, 1:])


def _modulate(x, shift, scale):
    """x (1 + scale) + shift; shift and scale: [B or 1, S or 1, D]."""
    return x * (1 + scale) + shift


# What `kernels` does on a TPU, for any segments: shift, scale and gate are [B or 1, S or 1, D].


def _normalize(x, shift, scale):
    return x, _modulate(layers.layer_norm(x), shift, scale)


def _add_gated(x, y, gate):
    return x + gate * y


class DecoderBlock(nn.Module):
    """adaLN-zero block. All passes share its weights and the modulation of the time."""

    cfg: FlexTokConfig
    compute: Compute
    num_patches: int
    capture: int | None

    @nn.compact
    def __call__(self, carry, shared):
        """carry: (passes, features, index); shared: (time embedding [B' , D], key biases)."""
        (passes, features, index), (temb, biases) = carry, shared
        cfg, dtype, n = self.cfg, jnp.dtype(self.compute.dtype), self.num_patches
        width = cfg.dec_width
        attn = layers.Attention(width, cfg.head_dim, dtype, name="attn")
        mlp = layers.SwiGLU(width, cfg.mlp_ratio, dtype, name="mlp")
        adaln = nn.Dense(12 * width, dtype=dtype, kernel_init=layers.zeros, name="adaln")
        modulation = adaln(nn.silu(temb)).reshape(temb.shape[0], 2, 6, width)

        def one_pass(x, bias):
            scale = 8.0 / cfg.head_dim  # the muP form; 1/sqrt(64) at 64

            def core(q, k, v):
                return attention.attend(q, k, v, self.compute.attention, scale, bias=bias)

            how, (batch, length, _) = self.compute.attention, x.shape
            parts = (modulation[:, :, i] for i in range(6))
            halves = length == 2 * n and kernels.can_normalize(length, 2, width)
            if how == "pallas" and halves:
                parts = (jnp.broadcast_to(part, (batch, 2, width)) for part in parts)
                norm, add_gated = kernels.normalize, kernels.add_gated
            else:
                parts = (_segments(part, n, length - n) for part in parts)
                norm, add_gated = _normalize, _add_gated
            kernel = None
            if bias is None:
                kernel = attention.with_norms(how, length, width, cfg.head_dim, scale)
            gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = parts
            x, y = norm(x, shift_attn, scale_attn)
            x = add_gated(x, attn(y, core, kernel), gate_attn)
            x, y = norm(x, shift_mlp, scale_mlp)
            return add_gated(x, mlp(y), gate_mlp)

        passes = tuple(layout.batch_first(one_pass(x, b)) for x, b in zip(passes, biases))
        if self.capture is not None:
            features = jnp.where(index == self.capture, passes[0][:, :n], features)
        return (passes, features, index + 1), None


class Decoder(nn.Module):
    """The rectified-flow velocity network."""

    cfg: FlexTokConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x_t, t, conditions: tuple[Condition, ...], capture: int | None = None):
        """Velocities of the same noised latents under several conditions.

        Args:
            x_t: [B, h, w, C], noised latents.
            t: float32 [B], or [1] when the batch shares one time (the modulation is then computed
                once). 1 is noise, 0 is data.
            conditions: the passes. A pass with K < R codes runs N + K + 1 positions, with K = R
                N + R.
            capture: also return the first pass's patch features after this block (for REPA).

        Returns:
            A tuple of float32 [B, h, w, C], one velocity per condition; with `capture`, the pair
            (that tuple, features [B, N, D]).
        """
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        temb = self._time_embedding(t)
        embed = layers.PatchEmbed(cfg.grid, cfg.patch_size, cfg.dec_width, dtype)
        nn.share_scope(self, embed)
        patches = embed(x_t)
        n = patches.shape[1]
        registers, biases = zip(*self._registers(conditions, n))
        passes = tuple(jnp.concatenate([patches, r], axis=1) for r in registers)
        blocks = layers.stack(
            DecoderBlock, cfg, self.compute, cfg.dec_depth, "decoder/blocks",
            num_patches=n, capture=capture,
        )  # fmt: skip
        features = None if capture is None else jnp.zeros_like(patches)
        carry = (passes, features, jnp.zeros((), jnp.int32))
        (passes, features, _), _ = blocks(carry, (temb.astype(dtype), biases))
        velocities = self._head(tuple(x[:, :n] for x in passes), temb, x_t.shape[1:3])
        return velocities if capture is None else (velocities, features)

    def _time_embedding(self, t):
        cfg = self.cfg
        temb = layers.time_frequencies(t, cfg.time_frequencies, cfg.max_timestep)

        def dense(i):
            return nn.Dense(
                cfg.dec_width, dtype=jnp.float32, kernel_init=layers.xavier, name=f"time_mlp_{i}"
            )

        return dense(1)(nn.silu(dense(0)(temb)))

    def _registers(self, conditions, num_patches):
        """Register vectors [B, M, D] of each condition, and their bias on the attention's keys."""
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        total, width = cfg.num_tokens, cfg.dec_width
        project = nn.Dense(width, dtype=dtype, kernel_init=layers.xavier, name="register_proj")
        positions = self.param("register_pos", layers.normal, (total, width)).astype(dtype)
        mask = self.param("mask", layers.normal, (width,)).astype(dtype)
        null = self.param("null", layers.normal, (width,)).astype(dtype)
        for codes, keep, is_null in conditions:
            batch, count, _ = codes.shape
            x = project(codes.astype(dtype))
            x = x + jnp.broadcast_to(positions[None, :count], x.shape)
            dropped = jnp.arange(count)[None, :] >= keep[:, None]
            x = jnp.where(dropped[:, :, None], mask[None, None, :], x)
            bias = None
            if count < total:
                folded = jnp.broadcast_to(mask[None, None, :], (batch, 1, width))
                x = jnp.concatenate([x, folded], axis=1)
                bias = np.zeros((1, 1, 1, num_patches + count + 1), np.float32)
                bias[..., -1] = np.log(total - count)
            x = jnp.where(is_null[:, None, None], null[None, None, :], x)
            yield x, bias

    def _head(self, patches, temb, size):
        """Patch features -> float32 velocities [B, h, w, C]."""
        cfg = self.cfg
        adaln = nn.Dense(
            2 * cfg.dec_width, dtype=jnp.float32, kernel_init=layers.zeros, name="head_adaln"
        )
        head = nn.Dense(cfg.patch_dim, dtype=jnp.float32, kernel_init=layers.zeros, name="head")
        shift, scale = jnp.split(adaln(nn.silu(temb))[:, None, :], 2, axis=-1)

        def velocity(x):
            x = _modulate(layers.layer_norm(x.astype(jnp.float32)), shift, scale)
            return layers.unpatchify(head(x), cfg.patch_size, *size)

        return tuple(velocity(x) for x in patches)
