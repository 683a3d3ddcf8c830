"""The autoregressive Transformer over ordered tokens (REFERENCE section 9).

RMSNorm before attention and SwiGLU, learned positions, a learned start (SOS) to which the class is
added; text enters by cross-attention in every block. Output position i predicts token i.

B batch, T positions of a call, L positions of the model, V ids, D width, H heads.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import attention, layers, layout
from flextok_jax.nn.config import ARConfig, Compute

SOS = -1  # The "token" before the first one.


class ARCondition(NamedTuple):
    """What each sequence is conditioned on; None where the model has no such condition.

    Attributes:
        labels: int32 [B]; a negative label is the null condition: nothing is added.
        text: float [B, T, E], embeddings of a text encoder.
        text_mask: bool [B, T], False at padding; at least one True per row.
    """

    labels: jax.Array | None = None
    text: jax.Array | None = None
    text_mask: jax.Array | None = None


class BlockCache(NamedTuple):
    """What one block remembers between calls. Heads lie outside of positions: products with one
    query then read it as it is.

    Attributes:
        k, v: [B, H, S, head_dim], keys and values of the positions below `index`; what lies at
            later positions is never read. S is the room, at most L.
        cross: keys and values of the text, two times [B, H, T, head_dim]; None where they are to
            be computed from the text, and without text.
        index: int32 [], position of the next input.
    """

    k: jax.Array
    v: jax.Array
    cross: tuple[jax.Array, jax.Array] | None
    index: jax.Array


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32 and cast back, times a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        return rms_norm(x, scale, self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis; scale: [D]. Keeps the type of x."""
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return y * jnp.broadcast_to(scale.astype(x.dtype), y.shape)


class Attention(nn.Module):
    """Multi-head attention without biases; logits scaled by 1/sqrt(head_dim)."""

    cfg: ARConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, source, core):
        """Queries from x [B, T, D], keys and values from `source`.

        Args:
            x: [B, T, D].
            source: [B, S, D], or keys and values that were computed before.
            core: (q, k, v) -> ([B, T, H, head_dim], anything).

        Returns:
            ([B, T, D], what `core` returned beside).
        """
        cfg = self.cfg

        def dense(name):
            return nn.Dense(
                cfg.width, use_bias=False, dtype=self.dtype, kernel_init=layers.xavier, name=name
            )

        def heads(name, y, norm):
            y = dense(name)(y).reshape(*y.shape[:-1], cfg.num_heads, cfg.head_dim)
            return RMSNorm(cfg.norm_eps, name=norm)(y) if cfg.qk_norm and norm else y

        q = heads("wq", x, "q_norm")
        if not isinstance(source, tuple):
            source = heads("wk", source, "k_norm"), heads("wv", source, None)
        y, kept = core(q, *source)
        return dense("proj")(y.reshape(x.shape)), kept


class Block(nn.Module):
    """Pre-norm residual block: causal self-attention, cross-attention to text if any, SwiGLU."""

    cfg: ARConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, shared):
        """One block.

        Args:
            x: [B, T, D].
            shared: (context, cache). The context is None or (text features [B, S, D], mask bool
                [B, S]); the cache is None for a whole sequence that begins at the first position.

        Returns:
            ([B, T, D], the cache with these positions, None for a whole sequence).
        """
        cfg, dtype, (context, cache) = self.cfg, jnp.dtype(self.compute.dtype), shared

        def norm(i):
            return RMSNorm(cfg.norm_eps, name=f"norm_{i}")

        def whole(q, k, v):
            how, scale = self.compute.attention, cfg.head_dim**-0.5
            return attention.attend(q, k, v, how, scale, causal=True), None

        def continued(q, k, v):
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, _heads_first(new), cache.index, axis=2)
                for old, new in ((cache.k, k), (cache.v, v))
            )
            position = cache.index + jnp.arange(q.shape[1])
            mask = jnp.arange(k.shape[2])[None, :] <= position[:, None]
            keys, values = _heads_first(k), _heads_first(v)
            return jax.nn.dot_product_attention(q, keys, values, mask=mask[None, None]), (k, v)

        def across(q, k, v):
            y = jax.nn.dot_product_attention(q, k, v, mask=context[1][:, None, None, :])
            return y, (_heads_first(k), _heads_first(v))

        y = norm(1)(x)
        core = whole if cache is None else continued
        y, kept = Attention(cfg, dtype, name="attn")(y, y, core)
        x, cross = x + y, None
        if context is not None:
            known = cache is not None and cache.cross is not None
            source = tuple(map(_heads_first, cache.cross)) if known else context[0]
            y, cross = Attention(cfg, dtype, name="cross")(norm(2)(x), source, across)
            x = x + y
        # The ratio at which SwiGLU's own rounding down gives this hidden width.
        ratio = 1.5 * (cfg.mlp_hidden + 0.5) / cfg.width
        mlp = layers.SwiGLU(cfg.width, ratio, dtype, name="mlp")
        x = x + mlp(norm(3 if cfg.text_dim else 2)(x))
        x = layout.batch_first(x)
        return x, None if cache is None else BlockCache(*kept, cross, cache.index + x.shape[1])


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, S, H, head_dim] <-> [B, H, S, head_dim]."""
    return x.swapaxes(1, 2)


def init(cfg: ARConfig, key: jax.Array) -> dict:
    """Random parameters {"ar": {...}}, float32; blocks are stacked on a leading axis."""
    keys = dict(zip(("embed", "pos", "sos", "classes", "head", "blocks", "text"),
                    jax.random.split(key, 7)))  # fmt: skip

    def normal(name, *shape):
        return layers.normal(keys[name], shape)

    x, context = jnp.zeros((1, 1, cfg.width)), None
    params = {
        "embed": normal("embed", cfg.vocab_size, cfg.width),
        "pos": normal("pos", cfg.num_tokens, cfg.width),
        "sos": normal("sos", cfg.width),
        "norm": {"scale": jnp.ones((cfg.width,))},
        "head": {"kernel": layers.xavier(keys["head"], (cfg.width, cfg.vocab_size))},
    }
    if cfg.num_classes:
        params["classes"] = normal("classes", cfg.num_classes, cfg.width)
    if cfg.text_dim:
        first, second = jax.random.split(keys["text"])
        params["text_fc1"] = {"kernel": layers.xavier(first, (cfg.text_dim, cfg.text_hidden))}
        params["text_fc2"] = {"kernel": layers.xavier(second, (cfg.text_hidden, cfg.width))}
        context = x, jnp.ones((1, 1), bool)
    blocks = layers.stack(Block, cfg, Compute(), cfg.depth, "ar/blocks")
    params["blocks"] = blocks.init(keys["blocks"], x, (context, None))["params"]
    return {"ar": params}


def embed(params, cfg: ARConfig, dtype, previous, start, labels=None) -> jax.Array:
    """The Transformer's input at positions start, start + 1, …

    Args:
        previous: int32 [B, T], the token before each position, `SOS` before the first.
        start: int or int32 [], at most L - T.
        labels: int32 [B] or None; see `ARCondition`.

    Returns:
        [B, T, D] in `dtype`.
    """
    p = params["ar"]
    first = p["sos"][None]
    if cfg.num_classes and labels is not None:
        classes = jnp.where(labels[:, None] < 0, 0, p["classes"][jnp.maximum(labels, 0)])
        first = first + classes
    is_first = (previous == SOS)[:, :, None]
    x = jnp.where(is_first, first[:, None], p["embed"][jnp.maximum(previous, 0)])
    positions = jax.lax.dynamic_slice_in_dim(p["pos"], start, previous.shape[1])
    return (x + positions[None]).astype(dtype)


def context(params, cfg: ARConfig, dtype, condition: ARCondition):
    """What blocks attend to across: (text features [B, T, D], mask [B, T]), or None without text.

    Raises:
        ValueError: a text model without text.
    """
    if not cfg.text_dim:
        return None
    if condition.text is None or condition.text_mask is None:
        raise ValueError(
            "the model is conditioned on text: give `text` and `text_mask` (the null condition is "
            "the embedding of the empty prompt)"
        )
    fc1, fc2 = (params["ar"][f"text_fc{i}"]["kernel"].astype(dtype) for i in (1, 2))
    features = jax.nn.gelu(condition.text.astype(dtype) @ fc1, approximate=cfg.text_gelu_tanh)
    return features @ fc2, condition.text_mask.astype(bool)


def hidden(
    params, cfg: ARConfig, compute: Compute, tokens: jax.Array, condition: ARCondition
) -> jax.Array:
    """Features from which position i predicts token i, given the tokens before it.

    Args:
        tokens: int32 [B, T], T <= L. The last one has no effect: nothing comes after it.
        condition: of the B sequences.

    Returns:
        [B, T, D] in the compute type, normalised: ready for `head`.
    """
    if tokens.shape[1] > cfg.num_tokens:
        raise ValueError(f"{tokens.shape[1]} tokens: the model has {cfg.num_tokens} positions")
    dtype = jnp.dtype(compute.dtype)
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=SOS)
    x = embed(params, cfg, dtype, previous, 0, condition.labels)
    shared = (context(params, cfg, dtype, condition), None)
    blocks = layers.stack(Block, cfg, compute, cfg.depth, "ar/blocks")
    x, _ = blocks.apply({"params": params["ar"]["blocks"]}, x, shared)
    return rms_norm(x, params["ar"]["norm"]["scale"], cfg.norm_eps)


def head_weights(params, dtype) -> jax.Array:
    """The matrix of the head in the compute type, whole along `fsdp`: [D, V]."""
    return layout.gather(params["ar"]["head"], "ar/head", dtype)["kernel"]


def head(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    """Features [..., D] -> logits float32 [..., V]; weights: see `head_weights`."""
    return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)


def logits(
    params, cfg: ARConfig, compute: Compute, tokens: jax.Array, condition: ARCondition
) -> jax.Array:
    """Teacher-forced logits, float32 [B, T, V]; see `hidden`."""
    features = hidden(params, cfg, compute, tokens, condition)
    return head(head_weights(params, features.dtype), features)
