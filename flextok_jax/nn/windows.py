"""Patches that overlap: windows of windows (Yuan et al., tokens-to-token, arXiv 2101.11986).

A window of stride s reads 2 s - 1 positions per side, of which its neighbours read s - 1 too, and
its values become the channels of one position. The strides' product is the side of a patch. After
each window but the last, one Transformer block with one head runs over all positions.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import order
from flextok_jax.nn.block import Block
from flextok_jax.nn.config import Blocks, Compute


def unfold(x: jax.Array, stride: int) -> jax.Array:
    """[B, h, w, C] -> [B, h / s, w / s, (2 s - 1)^2 C], channels ordered (row, column, channel).

    s // 2 zeros lie around the image; the stride s divides its sides.
    """
    _, height, width, _ = x.shape
    around, size = (stride // 2,) * 2, 2 * stride - 1
    x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    rows, columns = height - stride + 1, width - stride + 1
    parts = [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(parts, axis=-1)


class Windows(nn.Module):
    """Images to overlapping patches."""

    strides: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, N, channels], N = h w / (product of the strides)^2."""
        for i, stride in enumerate(self.strides):
            x = self._mixed(x, f"block_{i}") if i else x
            x = unfold(x, stride)
        return x.reshape(len(x), -1, x.shape[-1])

    def _mixed(self, x, name: str):
        channels, length = x.shape[-1], math.prod(x.shape[1:3])
        cfg = Blocks(
            channels, 1, channels, channels, norm="affine", qk_norm="none", mlp="gelu", bias=True
        )
        compute = Compute(jnp.dtype(self.dtype).name)
        block = Block(cfg, compute, (order.full(positions=length),), name=name)
        carry = ((x.reshape(len(x), length, channels),), None, jnp.int32(0))
        ((mixed,), *_), _ = block(carry, (None,) * 3)
        return mixed.reshape(x.shape)
