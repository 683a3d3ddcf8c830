"""The Transformer of a flow over token vectors: velocities of all tokens from noised ones.

All tokens attend to each other; the time, with the class, modulates each block (adaLN-zero, Peebles
& Xie, arXiv 2212.09748), so a new network writes zeros.

B batch, K tokens, F channels of a token, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import layers, layout, order
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.block import Norm, modulate, normal, stack, zeros
from flextok_jax.nn.config import Compute

TIME_FREQUENCIES, MAX_TIMESTEP = 256, 1000.0


class Velocity(nn.Module):
    """See the module."""

    cfg: ARConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array | None) -> jax.Array:
        """The velocity of each token.

        Args:
            x: [B, K, F].
            t: float32 [B], or [1] for all; 1 is the source, 0 are tokens.
            labels: int32 [B]; negative: nothing is added to the time. None of models without
                condition. Of a text model every label from 0 on is the same one.

        Returns:
            float32 [B, K, F].
        """
        cfg, dtype, width = self.cfg, jnp.dtype(self.compute.dtype), self.cfg.width

        def dense(name):
            return layers.dense(width, jnp.float32, name, names=(None, "embed"))

        time = layers.time_frequencies(t, TIME_FREQUENCIES, MAX_TIMESTEP)
        embedding = dense("time_mlp_1")(nn.silu(dense("time_mlp_0")(time)))
        if cfg.conditional:
            shape = (max(1, cfg.num_classes), width)
            table = self.param("classes", layout.axes(normal, None, "embed"), shape)
            row = table[jnp.clip(labels, 0, len(table) - 1)]
            embedding = embedding + jnp.where(labels[:, None] < 0, 0, row)
        x = layers.dense(width, dtype, "token_proj", names=(None, "embed"))(x.astype(dtype))
        positions = self.param("pos", layout.axes(normal, None, "embed"), (cfg.num_tokens, width))
        carry = ((x + positions[None].astype(dtype),), None, jnp.int32(0))
        shared, sequences = (embedding.astype(dtype), None, None), (order.full(tokens=x.shape[1]),)
        (x,), *_ = stack(
            cfg.blocks, self.compute, carry, shared, sequences=sequences, modulated=True
        )
        adaln = layers.dense(2 * width, jnp.float32, "head_adaln", zeros, ("embed", "hidden"))
        shift, scale = jnp.split(adaln(nn.silu(embedding))[:, None, :], 2, axis=-1)
        x = modulate(Norm(cfg.norm, cfg.norm_eps, name="norm")(x.astype(jnp.float32)), shift, scale)
        return layers.dense(cfg.channels, jnp.float32, "head", zeros)(x)


def init(cfg: ARConfig, key: jax.Array) -> dict:
    """Random parameters, float32, in boxes with their axes."""
    x, labels = jnp.zeros((1, cfg.num_tokens, cfg.channels)), jnp.zeros(1, jnp.int32)
    return Velocity(cfg).init(key, x, jnp.zeros(1), labels)["params"]
