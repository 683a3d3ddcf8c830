"""How much of the codebook each token position uses, of the tokens that images keep."""

import flax
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class CodeUsage(metrics.Metric):
    """Counts of every id at every position, int32 [R, V]."""

    counts: jax.Array

    @classmethod
    def from_ids(cls, ids: jax.Array, keep: jax.Array, num_tokens: int, vocab_size: int):
        """Of the tokens that images keep.

        Args:
            ids: int32 [B, K], K <= R.
            keep: int32 [B], how many of an image's ids count.
            num_tokens: R.
            vocab_size: V.
        """
        positions = jnp.arange(ids.shape[1])[None]
        counted = (positions < keep[:, None]).astype(jnp.int32)
        counts = jnp.zeros((num_tokens, vocab_size), jnp.int32)
        return cls(counts=counts.at[positions, ids].add(counted))

    def merge(self, other):
        return CodeUsage(counts=self.counts + other.counts)

    def compute(self) -> dict[str, jax.Array]:
        """Per position [R]: "usage", the share of all ids that occurred, and "perplexity"."""
        p = self.counts / jnp.maximum(jnp.sum(self.counts, axis=1, keepdims=True), 1)
        entropy = jnp.sum(jax.scipy.special.entr(p), axis=1)
        return {"usage": jnp.mean(self.counts > 0, axis=1), "perplexity": jnp.exp(entropy)}
