"""Softmax attention: one call that hides XLA, cuDNN (CUDA GPUs) and Pallas kernels (TPUs).

B batch, T queries, S keys, D width, H heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flextok_jax.nn import kernels
from flextok_jax.nn.order import Sequence

# What the TPU kernels leave for the backward pass, by name, for a remat policy.
RESIDUALS = "attention"


def layer_norm(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """LayerNorm over the last axis without scale and bias, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    head_dim: int,
    sequence: Sequence,
    implementation: str = "xla",
    scale: float | None = None,
    normalize: bool = False,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale n(q) n(k)^T + bias) v within a sequence, computed in float32 inside.

    Args:
        q, k, v: [B, T, D], heads side by side.
        head_dim: channels of a head.
        sequence: who attends to whom, and the bias of keys.
        implementation: "xla" makes the logits in memory, "cudnn" and "pallas" do not. Where a
            kernel does not take the sizes, "pallas" is "xla".
        scale: of the logits; 1 / sqrt(head_dim) by default.
        normalize: whether n is LayerNorm over a head's channels (QK-norm); else it is nothing.
        bias: float32 [1, H, T, T], added to the logits, where the sequence has none of its own.
        mask: bool [B, T], False at padding: keys that nobody attends to.

    Returns:
        [B, T, D].
    """
    batch, length, width = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    if bias is not None or mask is not None:
        q, k, v = (x.reshape(batch, length, -1, head_dim) for x in (q, k, v))
        if normalize:
            q, k = layer_norm(q), layer_norm(k)
        if (own := sequence.key_bias()) is not None:
            bias = jnp.broadcast_to(own[None, None, None], (1, 1, length, length)).astype(q.dtype)
        keys = None if mask is None else mask[:, None, None, :]
        if (order := sequence.mask()) is not None:
            keys = order[None, None] if keys is None else keys & order[None, None]
        out = jax.nn.dot_product_attention(q, k, v, bias, keys, scale=scale, implementation="xla")
        return out.reshape(batch, length, width)
    bias = sequence.key_bias()
    if kernels.can_attend(implementation, length, width, head_dim):
        out = kernels.attend(q, k, v, head_dim, scale, sequence.mask(), bias, normalize)
        return checkpoint_name(out, RESIDUALS)
    q, k, v = (x.reshape(batch, length, -1, head_dim) for x in (q, k, v))
    if normalize:
        q, k = layer_norm(q), layer_norm(k)
    if bias is not None:
        bias = jnp.broadcast_to(bias[None, None, None], (1, 1, length, length)).astype(q.dtype)

    def softmax(q, k, v, mask=None, bias=None, causal=False):
        mask, queries = None if mask is None else mask[None, None], q.shape[1]
        how = "xla" if implementation == "pallas" else implementation
        if how == "cudnn" and not (mask is None and bias is None):
            q, k, v, mask, bias = even(q, k, v, mask, bias)
        out = jax.nn.dot_product_attention(
            q, k, v, bias, mask, scale=scale, is_causal=causal, implementation=how
        )
        return out[:, :queries]

    if sequence.is_causal:
        out = softmax(q, k, v, bias=bias, causal=True)
    elif (n := sequence.head) and bias is None:
        head = softmax(q[:, :n], k[:, :n], v[:, :n])
        tail = softmax(q[:, n:], k, v, sequence.mask()[n:])
        out = jnp.concatenate([head, tail], axis=1)
    else:
        out = softmax(q, k, v, sequence.mask(), bias)
    return out.reshape(batch, length, width)


def rotate(x: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Rotary positions (Su et al., arXiv 2104.09864) of queries or keys [B, T, D], in float32.

    In each head the channels (2i, 2i + 1) of position t are turned by t theta^(-2i / head_dim).
    """
    frequencies = 1 / np.float32(theta) ** (np.arange(0, head_dim, 2, np.float32) / head_dim)
    angles = np.outer(np.arange(x.shape[1]), frequencies).astype(np.float32)
    cos, sin = (jnp.asarray(f(angles))[None, :, None] for f in (np.cos, np.sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.broadcast_to(cos, a.shape), jnp.broadcast_to(sin, a.shape)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def even(q, k, v, mask=None, bias=None):
    """Filled up to even numbers of queries and keys, which cuDNN's gradient with a bias needs.

    Args:
        q, k, v: [B, T or S, H, head_dim].
        mask: bool [1, 1, T, S], or None: everywhere. bias: [1, 1, T, S], or None.

    Returns:
        All five; the mask keeps the keys that were added from being seen.
    """
    odd = q.shape[1] % 2, k.shape[1] % 2
    if not any(odd):
        return q, k, v, mask, bias
    if mask is None:
        mask = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool)

    def pad(x, *added):
        return jnp.pad(x, [(0, n) for n in added])

    mask = pad(mask, 0, 0, *odd)
    if odd[0]:  # What is added as a query may attend to the first key.
        mask = mask.at[..., -1, 0].set(True)
    q, k, v = pad(q, 0, odd[0], 0, 0), pad(k, 0, odd[1], 0, 0), pad(v, 0, odd[1], 0, 0)
    return q, k, v, mask, None if bias is None else pad(bias, 0, 0, *odd)


def attend_cached(q, k, v, keys, values, index, head_dim: int, ranks: tuple[int, ...] = ()):
    """Attention of new positions to themselves and to those in a cache.

    Args:
        q, k, v: [B, T, D] of the positions index, index + 1, ….
        keys, values: the cache, [B, H, S, head_dim]: heads lie outside of positions, so that
            products with one query read it as it is.
        index: int32 [], how many positions are filled.
        ranks: of all positions, S of them or more; (): each its number.

    Returns:
        ([B, T, D], the keys and the values with the new positions).
    """
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v))
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, heads_first(new), index, axis=2)
        for old, new in ((keys, k), (values, v))
    )
    if ranks:
        given = jnp.asarray(ranks)[: keys.shape[2]]
        own = jax.lax.dynamic_slice_in_dim(given, index, q.shape[1])
    else:
        given, own = jnp.arange(keys.shape[2]), index + jnp.arange(q.shape[1])
    mask = given[None, :] <= own[:, None]
    out = jax.nn.dot_product_attention(
        q, heads_first(keys), heads_first(values), mask=mask[None, None]
    )
    return out.reshape(*q.shape[:2], -1), keys, values


def attend_across(q, keys, values, mask, head_dim: int) -> jax.Array:
    """Attention to another sequence.

    Args:
        q: [B, T, D].
        keys, values: [C, H, S, head_dim], where C divides B: row i attends to row i modulo C.
        mask: bool [C, S], True where there is something to attend to.

    Returns:
        [B, T, D].
    """
    count, length = keys.shape[0], q.shape[1]
    # Rows with the same keys are further queries of one row.
    heads = q.reshape(-1, count, length, q.shape[2] // head_dim, head_dim).swapaxes(0, 1)
    out = jax.nn.dot_product_attention(
        heads.reshape(count, -1, *heads.shape[3:]), heads_first(keys), heads_first(values),
        mask=mask[:, None, None, :],
    )  # fmt: skip
    return out.reshape(count, -1, *q.shape[1:]).swapaxes(0, 1).reshape(q.shape)


def heads_first(x: jax.Array) -> jax.Array:
    """[B, S, H, head_dim] <-> [B, H, S, head_dim]."""
    return x.swapaxes(1, 2)
