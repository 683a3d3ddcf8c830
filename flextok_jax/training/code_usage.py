"""How much of the codebook each token position uses."""

import flax
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class CodeUsage(metrics.Metric):
    """Counts of every id at every position, int32 [R, V]."""

    counts: jax.Array

    @classmethod
    def from_ids(cls, ids: jax.Array, vocab_size: int):
        """ids: int32 [B, R]."""
        positions = jnp.arange(ids.shape[1])[None]
        counts = jnp.zeros((ids.shape[1], vocab_size), jnp.int32)
        return cls(counts=counts.at[positions, ids].add(1))

    def merge(self, other):
        return CodeUsage(counts=self.counts + other.counts)

    def compute(self) -> dict[str, jax.Array]:
        """Per position [R]: "usage", the share of all ids that occurred, and "perplexity"."""
        p = self.counts / jnp.maximum(jnp.sum(self.counts, axis=1, keepdims=True), 1)
        entropy = jnp.sum(jax.scipy.special.entr(p), axis=1)
        return {"usage": jnp.mean(self.counts > 0, axis=1), "perplexity": jnp.exp(entropy)}
