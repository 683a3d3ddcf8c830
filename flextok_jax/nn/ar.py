"""The autoregressive Transformer over ordered tokens (docs/reference.md, AR models).

Norm before attention and MLP, learned positions, a learned start (SOS) to which the class is
added; text enters by cross-attention in every block. Output position i predicts token i.

Tokens may be predicted in groups (`ARConfig.group`): a group of g positions reads the g tokens
before it, and its positions attend to each other and to all groups before them. So no position sees
a token of its own group, and with g = 1 this is the usual model. A group is never smaller than the
one before it, so every token is read by the group that follows. A masked model reads all that is
known in every place (nn/masked.py).

B batch, T positions of a call, L positions of the model, V ids, D width, H heads.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import layout, velocity
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.block import Norm, normal, stack, xavier
from flextok_jax.nn.config import Compute
from flextok_jax.nn.fold import Fold, Unfold
from flextok_jax.nn.order import Sequence

SOS = -1  # The "token" before the first one.
HEAD = ("embed", "vocab")  # Axes of the head's kernel.


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


def init(cfg: ARConfig, key: jax.Array) -> dict:
    """Random parameters {"ar": {...}}, float32, in boxes with their axes (see nn/layout.py)."""
    if cfg.channels:
        params = velocity.init(cfg, key)
        if cfg.text_dim:
            source = init(cfg.source, jax.random.fold_in(key, 0))["ar"]
            params["source"] = {n: p for n, p in source.items() if n not in ("embed", "sos")}
        return {"ar": params}
    names = ("embed", "pos", "sos", "classes", "head", "blocks", "text", "norm")
    keys = dict(zip(names, jax.random.split(key, len(names))))
    keys["refiner"] = jax.random.fold_in(key, 1)

    def made(init, name, axes, *shape):
        return layout.Axes(init(keys[name], shape), axes)

    width = cfg.width
    params = {
        "embed": made(normal, "embed", ("vocab", "embed"), cfg.num_ids, width),
        "pos": made(normal, "pos", (None, "embed"), cfg.num_tokens, width),
        "sos": made(normal, "sos", (None,), width),
        "norm": _final_norm(cfg).init(keys["norm"], jnp.zeros((1, width)))["params"],
        "head": {"kernel": made(xavier, "head", HEAD, width, cfg.num_ids)},
    }
    if cfg.coarse:
        params["refiner"] = init(cfg.refiner, jax.random.fold_in(key, 0))["ar"]
        params["refiner"]["head"] = {"kernel": made(xavier, "refiner", HEAD, width, cfg.vocab_size)}
    if cfg.num_classes:
        params["classes"] = made(normal, "classes", (None, "embed"), cfg.num_classes, width)
    if cfg.text_dim:
        first, second = ("embed", "hidden"), ("hidden", "embed")
        params["text_fc1"] = {"kernel": made(xavier, "text", first, cfg.text_dim, cfg.text_hidden)}
        params["text_fc2"] = {"kernel": made(xavier, "head", second, cfg.text_hidden, width)}
    x, context = jnp.zeros((1, 1, width)), None
    if cfg.text_dim:
        context = x, jnp.ones((1, 1), bool)
    if cfg.folded:
        tokens = jnp.zeros((1, cfg.group, width))
        for name, module, like in (("fold", Fold, tokens), ("unfold", Unfold, x)):
            made = module(cfg.blocks, cfg.group, jnp.float32)
            params[name] = made.init(jax.random.fold_in(key, len(params)), like)["params"]
    trunk = Trunk(cfg, Compute())
    return {"ar": params | trunk.init(keys["blocks"], x, context)["params"]}


class Trunk(nn.Module):
    """The blocks over a whole sequence that begins at the first position."""

    cfg: ARConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, context=None) -> jax.Array:
        """x: [B, T, D]; context: see `context` -> [B, T, D]."""
        carry, options = ((x,), None, jnp.int32(0)), dict(cross=bool(self.cfg.text_dim))
        length = x.shape[1]
        ranks = tuple(range(length)) if self.cfg.folded else self.cfg.ranks[:length]
        sequences = (Sequence(("tokens",), (length,), ranks),)
        shared = (None, context, None)
        (x,), *_ = stack(
            self.cfg.blocks, self.compute, carry, shared, sequences=sequences, **options
        )
        return x


def shapes(cfg: ARConfig) -> dict:
    """The shapes of `init`'s parameters, without making them, in their boxes."""
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))


def _final_norm(cfg: ARConfig) -> Norm:
    return Norm(cfg.norm, cfg.norm_eps)


def final_norm(params, cfg: ARConfig, x: jax.Array) -> jax.Array:
    """The norm between the last block and the head: [..., D]."""
    return _final_norm(cfg).apply({"params": params["ar"]["norm"]}, x)


def read_by(cfg: ARConfig, tokens: jax.Array) -> jax.Array:
    """The token that each position reads: int32 [B, T] -> [B, T], T at the end of a group.

    A group of g positions reads the g tokens before it, the first group `SOS`; of a masked model
    each position its own token, `SOS` where it is not known.
    """
    if cfg.masked:
        return tokens
    ranks = np.asarray(cfg.ranks[: tokens.shape[1]])
    sizes = np.bincount(ranks)[ranks]
    padded = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=SOS)
    return padded[:, np.maximum(np.arange(len(ranks)) - sizes + 1, 0)]


def embed(params, cfg: ARConfig, dtype, previous, start, labels=None) -> jax.Array:
    """The Transformer's input at positions start, start + 1, …

    Args:
        previous: int32 [B, T], the token that each position reads (see `read_by`), or `SOS`.
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


def fold(params, cfg: ARConfig, x: jax.Array) -> jax.Array:
    """Vectors of tokens [B, T, D] to those of the blocks' positions, and ...

    T is a multiple of `cfg.folds`.
    """
    if not cfg.folded:
        return x
    return Fold(cfg.blocks, cfg.group, x.dtype).apply({"params": params["ar"]["fold"]}, x)


def unfold(params, cfg: ARConfig, x: jax.Array) -> jax.Array:
    """... back, for the head."""
    if not cfg.folded:
        return x
    return Unfold(cfg.blocks, cfg.group, x.dtype).apply({"params": params["ar"]["unfold"]}, x)


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
    """Features from which position i predicts token i, given the tokens of groups before its own.

    Args:
        tokens: int32 [B, T], T <= L. Those of the last group have no effect: nothing comes after.
            Of a masked model `SOS` where a token is not known, as those after T are not.
        condition: of the B sequences.

    Returns:
        [B, T, D] in the compute type, normalised: ready for `head`.
    """
    if tokens.shape[1] > cfg.num_tokens:
        raise ValueError(f"{tokens.shape[1]} tokens: the model has {cfg.num_tokens} positions")
    dtype, length = jnp.dtype(compute.dtype), tokens.shape[1]
    whole = cfg.ranks.index(cfg.ranks[length - 1]) + cfg.ranks.count(cfg.ranks[length - 1])
    tokens = jnp.pad(tokens, ((0, 0), (0, whole - length)), constant_values=SOS)
    x = embed(params, cfg, dtype, read_by(cfg, tokens), 0, condition.labels)
    return through(params, cfg, compute, x, condition)[:, :length]


def through(params, cfg: ARConfig, compute: Compute, x, condition: ARCondition) -> jax.Array:
    """Inputs [B, T, D] to features [B, T, D], by the blocks and the last norm."""
    blocks, text = {"blocks": params["ar"]["blocks"]}, context(params, cfg, x.dtype, condition)
    x = Trunk(cfg, compute).apply({"params": blocks}, fold(params, cfg, x), text)
    return final_norm(params, cfg, unfold(params, cfg, x))


def head_weights(params, dtype) -> jax.Array:
    """The matrix of the head in the compute type, whole along `fsdp`: [D, V]."""
    kernel = params["ar"]["head"]["kernel"]
    return layout.gather(kernel, layout.Axes(kernel, HEAD), dtype)


def head(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    """Features [..., D] -> logits float32 [..., V]; weights: see `head_weights`."""
    return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)


def logits(
    params, cfg: ARConfig, compute: Compute, tokens: jax.Array, condition: ARCondition
) -> jax.Array:
    """Teacher-forced logits, float32 [B, T, V]; see `hidden`."""
    features = hidden(params, cfg, compute, tokens, condition)
    return head(head_weights(params, features.dtype), features)
