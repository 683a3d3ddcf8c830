"""Softmax attention by XLA, by cuDNN on a CUDA GPU, or by Pallas kernels on a TPU.

B batch, T queries, S keys, H heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flextok_jax.nn import kernels, layout

# What the TPU kernels leave for the backward pass, by name, for a remat policy.
RESIDUALS = "attention"
BLOCK = 128  # A TPU kernel's lengths are multiples of it.


def attend(
    q, k, v, implementation: str, scale: float, mask=None, bias=None, causal: bool = False
) -> jax.Array:
    """softmax(scale q k^T + bias) v, computed in float32 inside.

    Args:
        q: [B, T, H, head_dim]. k, v: [B, S, H, head_dim].
        implementation: "xla" makes the logits in memory, "cudnn" and "pallas" do not. "pallas" is
            for TPUs, and for lengths that are multiples of 128 without a bias: elsewhere "xla".
        scale: of the logits.
        mask: a NumPy bool [T, S], True where attention is allowed; None is everywhere.
        bias: [1, 1, 1, S] added to the logits, or None.
        causal: query i sees the keys 0 .. i only; in place of a mask.

    Returns:
        [B, T, H, head_dim].
    """
    length, keys = q.shape[1], k.shape[1]
    if implementation == "pallas":
        if bias is None and length == keys and length % BLOCK == 0:
            return _splash(q, k, v, scale, np.tri(length, dtype=bool) if causal else mask)
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
        kernels.attend(q, k, v, head_dim, scale, mask), RESIDUALS
    )


def _splash(q, k, v, scale, mask):
    """Splash attention: block-sparse flash attention (Dao et al., arXiv 2205.14135) for TPUs.

    The compiler does not cut a kernel's work over devices, so `shard_map` does: images over the
    batch axes, heads over `tensor`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = q.shape[1]
    if mask is None:
        mask = splash.FullMask((length, length))
    else:
        mask = splash.NumpyMask(mask)
    size = max(size for size in (128, 256, 512) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    minor = splash.QKVLayout.SEQ_MINOR  # 64 channels as the minor dimension would fill half a lane
    layouts = {f"{x}_layout": minor for x in "qkv"}
    sizes = splash.BlockSizes(
        **dict.fromkeys(names, size), use_fused_bwd_kernel=True, **layouts
    )

    def local(q, k, v):
        heads = q.shape[2]
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            residual_checkpoint_name=RESIDUALS,
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v)
    spec = jax.P(layout.BATCH_AXES, None, "tensor")
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)
