"""Softmax attention by XLA, by cuDNN on a CUDA GPU, or by Pallas kernels on a TPU.

B batch, T queries, S keys, H heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flextok_jax.nn import kernels

# What the TPU kernels leave for the backward pass, by name, for a remat policy.
RESIDUALS = "attention"


def attend(
    q, k, v, implementation: str, scale: float, mask=None, bias=None, causal: bool = False
) -> jax.Array:
    """softmax(scale q k^T + bias) v, computed in float32 inside.

    Args:
        q: [B, T, H, head_dim]. k, v: [B, S, H, head_dim].
        implementation: "xla" makes the logits in memory, "cudnn" and "pallas" do not. "pallas" is
            for TPUs, without a bias and for sizes that `kernels.can_attend`: elsewhere it is "xla".
        scale: of the logits.
        mask: a NumPy bool [T, S], True where attention is allowed; None is everywhere.
        bias: [1, 1, 1, S] added to the logits, or None.
        causal: query i sees the keys 0 .. i only; in place of a mask.

    Returns:
        [B, T, H, head_dim].
    """
    (batch, length, heads, size), keys = q.shape, k.shape[1]
    if implementation == "pallas":
        if bias is None and length == keys and kernels.can_attend(length, heads * size, size):
            flat = (x.reshape(batch, length, heads * size) for x in (q, k, v))
            mask = np.tri(length, dtype=bool) if causal else mask
            out = checkpoint_name(kernels.attend(*flat, size, scale, mask), RESIDUALS)
            return out.reshape(q.shape)
        implementation = "xla"
    if bias is not None:
        bias = jnp.broadcast_to(bias, (1, 1, length, keys)).astype(q.dtype)
    if mask is not None:
        mask = mask[None, None]
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=scale, is_causal=causal, implementation=implementation
    )


def with_norms(
    implementation: str, length: int, width: int, head_dim: int, scale: float, mask=None
):
    """QK-norm and attention as one TPU kernel, or None where there is none for that.

    Args:
        implementation: "pallas" asks for it.
        length, width: of the queries, which are as many as the keys.
        scale, mask: see `kernels.attend`.

    Returns:
        (q, k, v) -> a result, all [B, T, D]; the result is kept by RESIDUALS.
    """
    if implementation != "pallas" or not kernels.can_attend(length, width, head_dim):
        return None
    return lambda q, k, v: checkpoint_name(
        kernels.attend(q, k, v, head_dim, scale, mask, norm=True), RESIDUALS
    )
