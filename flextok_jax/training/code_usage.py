"""How much of the codebook each token position uses."""

import flax
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class CodeUsage(metrics.Metric):
    """Counts of every id at every position.

    Attributes:
        counts: int32 [R, V].
    """

    counts: jax.Array

    @classmethod
    def empty(cls):
        """Merges with any other."""
        return cls(counts=jnp.zeros((), jnp.int32))

    @classmethod
    def from_ids(cls, ids: jax.Array, vocab_size: int, mask: jax.Array | None = None):
        """ids: int32 [B, R]; mask: bool [B], which images count."""
        weight = jnp.ones(ids.shape[:1], jnp.int32) if mask is None else mask.astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :], ids.shape)
        weight = jnp.broadcast_to(weight[:, None], ids.shape)
        counts = jnp.zeros((ids.shape[1], vocab_size), jnp.int32)
        return cls(counts=counts.at[positions, ids].add(weight))

    def merge(self, other):
        return CodeUsage(counts=self.counts + other.counts)

    def reduce(self):
        return self

    def compute(self) -> dict[str, jax.Array]:
        """Per position [R]: "usage", the share of all ids that occurred, and "perplexity"."""
        p = self.counts / jnp.maximum(jnp.sum(self.counts, axis=1, keepdims=True), 1)
        entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=1)
        return {
            "usage": jnp.mean((self.counts > 0).astype(jnp.float32), axis=1),
            "perplexity": jnp.exp(entropy),
        }
