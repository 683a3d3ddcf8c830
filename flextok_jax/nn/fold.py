"""Folding: the g tokens of a group as one position of a Transformer (arXiv 2504.17789).

Each token's vector is projected to D / g channels, those of a group lie side by side, and an MLP
with a residual mixes them; the way back is the same in the other direction. So a sequence of L
tokens costs the blocks L / g positions.

B batch, T tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn.block import MLP, Linear, Norm
from flextok_jax.nn.config import Blocks


class Fold(nn.Module):
    """Vectors of tokens to those of groups."""

    cfg: Blocks
    group: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T / g, D]."""
        project = Linear(self.cfg.width // self.group, ("embed", None), self.dtype, name="proj")
        return _mixed(self.cfg, self.dtype, project(x).reshape(len(x), -1, self.cfg.width))


class Unfold(nn.Module):
    """Vectors of groups to those of their tokens."""

    cfg: Blocks
    group: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T / g, D] -> [B, T, D]."""
        project = Linear(self.cfg.width, (None, "embed"), self.dtype, name="proj")
        x = _mixed(self.cfg, self.dtype, x)
        return project(x.reshape(len(x), -1, self.cfg.width // self.group))


def _mixed(cfg: Blocks, dtype, x: jax.Array) -> jax.Array:
    """x + MLP(norm(x)); to be called in a module."""
    return x + MLP(cfg, dtype, name="mlp")(Norm(cfg.norm, cfg.norm_eps, name="norm")(x))
