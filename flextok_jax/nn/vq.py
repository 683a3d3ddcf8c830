"""Vector quantisation (van den Oord et al., arXiv 1711.00937). Always float32.

With `normalize` features and codes are compared and used at length 1 (Yu et al., arXiv 2110.04627).
"""

import jax
import jax.numpy as jnp

from flextok_jax.nn import layout
from flextok_jax.nn.config import Bottleneck


def init(cfg: Bottleneck, key: jax.Array):
    """The codebook [size, F], uniform in ±1/size, with its axes."""
    bound = 1 / cfg.size
    book = jax.random.uniform(key, (cfg.size, cfg.dim), minval=-bound, maxval=bound)
    return layout.Axes(book, (None, None))


def quantize(codebook: jax.Array, cfg: Bottleneck, z: jax.Array):
    """The nearest code of each feature.

    Args:
        codebook: float32 [size, F].
        z: float32 [B, K, F].

    Returns:
        (codes [B, K, F] with a straight-through gradient, ids int32 [B, K], loss [B]: with z^ the
        feature and q its code, the mean over tokens and channels of
        commitment |sg(q) - z^|^2 + |q - sg(z^)|^2, where sg stops the gradient).
    """
    book, z = _unit(codebook, cfg), _unit(z, cfg)
    distance = jnp.sum(jnp.square(book), axis=1)[None, None] - 2 * jnp.matmul(
        z, book.T, precision="highest"
    )
    ids = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    q, stop = book[ids], jax.lax.stop_gradient
    loss = cfg.commitment * jnp.square(stop(q) - z) + jnp.square(q - stop(z))
    return z + stop(q - z), ids, jnp.mean(loss, axis=(1, 2))


def codes_of(codebook: jax.Array, cfg: Bottleneck, ids: jax.Array) -> jax.Array:
    """The codes of ids int32 [B, K]: float32 [B, K, F]."""
    return _unit(codebook, cfg)[ids]


def _unit(x, cfg: Bottleneck):
    if not cfg.normalize:
        return x
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
