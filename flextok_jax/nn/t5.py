"""T5's encoder (v1.1, Flan): an embedding for each token (docs/reference.md, Text encoders).

Raffel et al., arXiv 1910.10683; v1.1 has a gated GELU. Positions enter by a bias of the attention's
logits alone, which depends on the distance and the head and is the same in every block.

B texts, T tokens, D width, H heads.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import layout, order
from flextok_jax.nn.block import Norm, Shared, stack
from flextok_jax.nn.config import Blocks, Compute

_normal = nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """An encoder; the defaults are Flan-T5-XL's.

    Attributes:
        vocab_size: rows of the embedding, at least the tokenizer's number of ids.
        width: D.
        depth: number of blocks.
        num_heads: H.
        head_dim: channels of a head; H head_dim may differ from D.
        mlp_hidden: hidden width of the MLPs.
        num_buckets: of distances, half of them for each direction.
        max_distance: from which on all distances are one.
        norm_eps: epsilon of every RMSNorm.
    """

    vocab_size: int = 32128
    width: int = 2048
    depth: int = 24
    num_heads: int = 32
    head_dim: int = 64
    mlp_hidden: int = 5120
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6

    @property
    def blocks(self) -> Blocks:
        """The Transformer's blocks."""
        return Blocks(
            width=self.width,
            depth=self.depth,
            head_dim=self.head_dim,
            mlp_hidden=self.mlp_hidden,
            norm="rms",
            norm_eps=self.norm_eps,
            qk_norm="none",
            mlp="geglu",
            heads=self.num_heads,
            scale=1.0,
        )


class T5(nn.Module):
    """Token ids int32 [B, T] and a mask bool [B, T], False at padding -> float32 [B, T, D].

    The residual stream, norms and the softmax are float32: the stream grows beyond what float16
    holds, and bfloat16 would lose its small parts.
    """

    cfg: T5Config
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, ids, mask):
        cfg, length = self.cfg, ids.shape[1]
        axes = layout.axes(_normal, "vocab", "embed")
        x = self.param("embed", axes, (cfg.vocab_size, cfg.width))[ids].astype(jnp.float32)
        axes = layout.axes(nn.initializers.normal(cfg.width**-0.5), None, None)
        bias = self.param("bias", axes, (cfg.num_buckets, cfg.num_heads)).astype(jnp.float32)
        bias = bias[buckets(length, cfg.num_buckets, cfg.max_distance)].transpose(2, 0, 1)[None]
        shared = Shared(bias=bias, mask=mask)
        carry, sequence = ((x,), None, jnp.int32(0)), order.full(text=length)
        (x,), *_ = stack(cfg.blocks, self.compute, carry, shared, sequences=(sequence,))
        return Norm("rms", cfg.norm_eps, name="norm")(x)


@functools.lru_cache(maxsize=32)
def buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """int32 [T, T]: the bucket of the distance from each query (row) to each key (column).

    Half of the buckets are for keys behind the query. Of each half, n buckets, the first n/2 hold
    one distance each; bucket n/2 + j begins at n/2 (max_distance / (n/2))^(j / (n/2)), the last one
    never ends. Computed in whole numbers, since some bounds are whole.
    """
    half = num_buckets // 2
    exact = half // 2
    bounds = list(range(1, exact + 1))
    for j in range(1, half - exact):  # d >= exact (max / exact)^(j / (half - exact))
        n, d = half - exact, bounds[-1]
        while d**n * exact**j < max_distance**j * exact**n:
            d += 1
        bounds.append(d)
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    found = np.searchsorted(np.array(bounds), np.abs(distance), side="right")
    return (found + half * (distance > 0)).astype(np.int32)


def encode(params, cfg: T5Config, compute: Compute, ids, mask) -> jax.Array:
    """Embeddings of texts: float32 [B, T, D]; rows where `mask` is False mean nothing.

    Args:
        params: as `init` makes them, of any type.
        ids: int32 [B, T].
        mask: bool [B, T], at least one True per row.
    """
    return T5(cfg, compute).apply({"params": params}, ids, mask)


def init(cfg: T5Config, key: jax.Array) -> dict:
    """Random parameters, float32, in boxes with their axes (see nn/layout.py).

    Queries begin smaller by sqrt(head_dim), since the logits are not scaled.
    """
    params = T5(cfg).init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]
    queries = params["blocks"]["attn"]["wq"]
    box = queries["kernel"]
    queries["kernel"] = box.replace_boxed(box.value * cfg.head_dim**-0.5)
    return params


def shapes(cfg: T5Config):
    """The shapes of the parameters, in boxes with their axes."""
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))
