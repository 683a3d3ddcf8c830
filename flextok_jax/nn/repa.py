"""REPA: early features of the decoder are aligned with those of a pretrained network.

Yu et al., arXiv 2410.06940: patch features of the noised image, after a few blocks, pass a small
MLP, and its mean cosine similarity to the features of the clean image is raised.

Of a tokenizer with several codebooks the tokens of one book may be aligned instead, by InfoNCE (van
den Oord et al., arXiv 1807.03748) of the whole image.

B images, N patches of the decoder, D its width, P patches of the other network, E its width.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import dinov2, layers, layout
from flextok_jax.nn.attention import layer_norm
from flextok_jax.nn.block import zeros
from flextok_jax.nn.config import Compute
from flextok_jax.nn.dinov2 import DINOv2Config
from flextok_jax.nn.images import to_float

BLOCK = 1  # Features are taken after this block of the decoder, counted from 0.
# Added to squared lengths: at 0, where the projection begins, the cosine then has a gradient.
SMALL = 1e-4


class Projection(nn.Module):
    """LayerNorm, D -> 4D, SiLU, 4D -> 4D, SiLU, 4D -> E, which begins at zero."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        hidden = 4 * x.shape[-1]
        x = layer_norm(x)
        for name in ("fc1", "fc2"):
            axes = ("embed", "hidden") if name == "fc1" else ("hidden", "embed")
            x = nn.silu(layers.dense(hidden, self.dtype, name, names=axes)(x))
        return layers.dense(self.width, self.dtype, "fc3", zeros, ("embed", "hidden"))(x)


def init(features: int, width: int, key: jax.Array) -> dict:
    """Parameters of the projection from D=`features` to E=`width`, float32, in their boxes."""
    return Projection(width, jnp.float32).init(key, jnp.zeros((1, 1, features)))["params"]


def targets(params, cfg: DINOv2Config, compute: Compute, images, size: int) -> jax.Array:
    """The features of DINOv2 that the decoder's are compared with.

    Args:
        params, cfg: of DINOv2.
        images: uint8 [B, H, W, 3].
        size: pixels per side that they are resized to, a multiple of its patch size.

    Returns:
        float32 [B, P, E].
    """
    images = to_float(images)
    images = jax.image.resize(images, (len(images), size, size, 3), "cubic")
    return dinov2.patch_features(params, cfg, compute, images)


def similarity(params, features, targets, dtype) -> jax.Array:
    """The mean cosine similarity over an image's positions.

    Args:
        params: of the projection.
        features: [B, N, D], of a square grid, row after row.
        targets: [B, P, E], of a square grid; the projected features are resized to it bilinearly.
        dtype: of the projection. Cosines are float32.

    Returns:
        float32 [B], within -1..1.

    Raises:
        ValueError: the targets are of another width, or of a grid that is not square.
    """
    batch, positions, width = targets.shape
    ours, theirs = math.isqrt(features.shape[1]), math.isqrt(positions)
    expected = params["fc3"]["bias"].shape[-1]
    if theirs**2 != positions or ours**2 != features.shape[1] or width != expected:
        raise ValueError(
            f"REPA: targets {targets.shape} for features {features.shape}: both grids must be "
            f"square, and the projection makes {expected} channels (repa.width)"
        )
    like = jax.eval_shape(Projection(width, dtype).init, jax.random.key(0), features)["params"]
    params = layout.gather(params, like, dtype)
    x = Projection(width, dtype).apply({"params": params}, features)
    x = x.astype(jnp.float32).reshape(batch, ours, ours, width)
    x = jax.image.resize(x, (batch, theirs, theirs, width), "linear").reshape(targets.shape)
    y = targets.astype(jnp.float32)
    lengths = jnp.sum(x * x, axis=-1) + SMALL, jnp.sum(y * y, axis=-1) + SMALL
    return jnp.mean(jnp.sum(x * y, axis=-1) * jax.lax.rsqrt(lengths[0] * lengths[1]), axis=-1)


def init_contrast(features: int, width: int, key: jax.Array) -> dict:
    """Parameters of the linear layer from E=`features` to F=`width`, float32, in their boxes."""
    return layers.dense(width, jnp.float32, None).init(key, jnp.zeros((1, features)))["params"]


def contrast(params, codes: jax.Array, targets: jax.Array) -> jax.Array:
    """Symmetric InfoNCE between images and targets: which target belongs to which image.

    With u the mean code of an image and v its target through the linear layer, logits are u v^T, of
    all pairs in the batch; neither is normalised.

    Args:
        params: of `init_contrast`.
        codes: float32 [B, K, F]; their mean counts.
        targets: [B, P, E]; their mean counts.

    Returns:
        float32 [B]: the mean of the two cross-entropies of each image and its target.
    """
    layer = layers.dense(codes.shape[-1], jnp.float32, None)
    v = layer.apply({"params": params}, jnp.mean(targets.astype(jnp.float32), axis=1))
    logits = jnp.mean(codes, axis=1) @ v.T
    own = jnp.diagonal(logits)
    by_image, by_target = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    return (by_image + by_target) / 2 - own
