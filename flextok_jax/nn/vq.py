"""Vector quantisation (van den Oord et al., arXiv 1711.00937). Always float32.

With several books token i is of book i modulo their number, and ids count the codes of a book.
With `normalize` features and codes are compared and used at length 1 (Yu et al., arXiv 2110.04627).
"""

import jax
import jax.numpy as jnp

from flextok_jax.nn import layout
from flextok_jax.nn.tokenizer_config import Bottleneck


def init(cfg: Bottleneck, key: jax.Array):
    """The codebooks [books * size, F], one after the other, uniform in ±1/size, with their axes."""
    bound, rows = 1 / cfg.size, cfg.books * cfg.size
    book = jax.random.uniform(key, (rows, cfg.dim), minval=-bound, maxval=bound)
    return layout.Axes(book, (None, None))


def quantize(codebook: jax.Array, cfg: Bottleneck, z: jax.Array):
    """The nearest code of each feature.

    Args:
        codebook: float32 [books * size, F].
        z: float32 [B, K, F].

    Returns:
        (codes [B, K, F] with a straight-through gradient, ids int32 [B, K], loss [B]: with z^ the
        feature and q its code, the mean over tokens and channels of
        commitment |sg(q) - z^|^2 + |q - sg(z^)|^2, where sg stops the gradient).
    """
    book, z = _unit(codebook, cfg), _unit(z, cfg)
    if cfg.books == 1:
        ids = _nearest(book, z)
    else:
        ids = jnp.zeros(z.shape[:2], jnp.int32)
        for i, own in enumerate(jnp.split(book, cfg.books)):
            ids = ids.at[:, i :: cfg.books].set(_nearest(own, z[:, i :: cfg.books]))
    q, stop = book[_rows(cfg, ids)], jax.lax.stop_gradient
    loss = cfg.commitment * jnp.square(stop(q) - z) + jnp.square(q - stop(z))
    return z + stop(q - z), ids, jnp.mean(loss, axis=(1, 2))


def codes_of(codebook: jax.Array, cfg: Bottleneck, ids: jax.Array) -> jax.Array:
    """The codes of ids int32 [B, K]: float32 [B, K, F]."""
    return _unit(codebook, cfg)[_rows(cfg, ids)]


def _nearest(book, z):
    """int32 [B, K]: the row of `book` that is nearest to each of z [B, K, F]."""
    distance = jnp.sum(jnp.square(book), axis=1)[None, None] - 2 * jnp.matmul(
        z, book.T, precision="highest"
    )
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


def _rows(cfg: Bottleneck, ids):
    """The rows of all books together that ids [B, K] stand for."""
    return ids + cfg.size * (jnp.arange(ids.shape[1])[None] % cfg.books) if cfg.books > 1 else ids


def _unit(x, cfg: Bottleneck):
    if not cfg.normalize:
        return x
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
