"""One Transformer block, of which encoder, decoder, AR model, T5, CLIP and DINOv2 are stacks.

Pre-norm residual branches: self-attention, cross-attention to a context where asked, MLP. Each of
the options of `Blocks` changes one thing. With `modulated` every branch is shifted, scaled and
gated by an embedding (adaLN-zero, Peebles and Xie, arXiv 2212.09748), one modulation for each named
segment of the sequence.

B batch, T positions, D width, S segments.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import attention, kernels, layout
from flextok_jax.nn.attention import heads_first, layer_norm
from flextok_jax.nn.config import Blocks, Compute
from flextok_jax.nn.order import Sequence, full

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()
ones = nn.initializers.ones_init()


class Cache(NamedTuple):
    """What one block remembers between calls.

    Attributes:
        k, v: [B, H, S, head_dim], keys and values of the positions below `index`; what lies at
            later positions is never read. S is the cache length.
        cross: keys and values of the context, two times [C, H, S', head_dim], C dividing B (see
            `attention.attend_across`); None where they are to be computed, and without a context.
        index: int32 [], position of the next input.
    """

    k: jax.Array
    v: jax.Array
    cross: tuple[jax.Array, jax.Array] | None
    index: jax.Array


class Shared(NamedTuple):
    """What all blocks of a stack get.

    Attributes:
        embedding: [B', D] with B' = B or 1, of modulated blocks.
        context: what blocks attend to across: (features [B, S, D], mask bool [B, S]).
        cache: of the only pass.
        bias, mask: of self-attention, see `attention.attend`.
    """

    embedding: jax.Array | None = None
    context: tuple | None = None
    cache: Cache | None = None
    bias: jax.Array | None = None
    mask: jax.Array | None = None


class Norm(nn.Module):
    """ "layer": LayerNorm without parameters; "affine": with scale and bias; "rms": RMSNorm."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Over the last axis, computed in float32 and cast back, then scaled. Keeps the type."""
        if self.kind == "layer":
            return layer_norm(x, self.eps)
        scale = self.param("scale", layout.axes(ones, None), (x.shape[-1],))
        if self.kind == "rms":
            return rms_norm(x, scale, self.eps)
        bias = self.param("bias", layout.axes(zeros, None), (x.shape[-1],))
        return affine_norm(x, scale, bias, self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x), computed in float32 and cast back, times scale [D]. Keeps the type of x."""
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return y * jnp.broadcast_to(scale.astype(x.dtype), y.shape)


def affine_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm with scale and bias [D], computed in float32. Keeps the type of x."""
    y = layer_norm(x.astype(jnp.float32), eps)
    scale, bias = (jnp.broadcast_to(p.astype(jnp.float32), y.shape) for p in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


class Linear(nn.Module):
    """x @ kernel (+ bias), in `dtype`.

    Attributes:
        features: of the result.
        names: logical axes of the kernel, (in, out).
        padding: zeros that are computed with after the kernel's (last rows, last columns): where a
            hidden width is little less than a multiple of 128, the lanes of a TPU. The parameter
            keeps its size.
    """

    features: int
    names: tuple
    dtype: jnp.dtype
    bias: bool = False
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, columns = self.padding
        shape = (x.shape[-1] - rows, self.features)
        kernel = self.param("kernel", layout.axes(xavier, *self.names), shape)
        kernel = kernel.astype(self.dtype)
        if rows or columns:
            kernel = _pad(((0, rows), (0, columns)), kernel)
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if not self.bias:
            return y
        bias = self.param("bias", layout.axes(zeros, None), (self.features,)).astype(self.dtype)
        return y + jnp.broadcast_to(bias, y.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pad(padding, x):
    return jnp.pad(x, padding)


def _pad_backward(padding, _, grad):
    # A barrier, because the TPU compiler fails where a gradient is cut twice: for the devices, and
    # here.
    grad = jax.lax.optimization_barrier(grad)
    return (grad[tuple(slice(a, n - b) for (a, b), n in zip(padding, grad.shape))],)


_pad.defvjp(lambda padding, x: (_pad(padding, x), None), _pad_backward)


class Attention(nn.Module):
    """Multi-head attention with separate projections of queries, keys and values."""

    cfg: Blocks
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, source, core):
        """Queries from x [B, T, D], keys and values from `source`.

        Args:
            x: [B, T, D].
            source: [B, S, D]; or keys and values that were computed before.
            core: (q, k, v), heads side by side -> ([B, T, D], anything).

        Returns:
            ([B, T, D], what `core` returned beside).
        """
        cfg = self.cfg

        def project(name, y):
            names = ("heads", "embed") if name == "proj" else ("embed", "heads")
            features = cfg.width if name == "proj" else cfg.inner
            return Linear(features, names, self.dtype, cfg.bias, name=name)(y)

        def normed(name, y):
            if cfg.qk_norm != "rms":
                return y  # "layer" is part of `attend`.
            heads = y.reshape(*y.shape[:-1], -1, cfg.head_dim)
            return Norm("rms", cfg.norm_eps, name=name)(heads).reshape(y.shape)

        q = normed("q_norm", project("wq", x))
        if not isinstance(source, tuple):
            source = normed("k_norm", project("wk", source)), project("wv", source)
        y, kept = core(q, *source)
        return project("proj", y), kept


class MLP(nn.Module):
    """ "swiglu": fc2(silu(fc1 x) · fc3 x), "geglu" with tanh-GELU; the others: fc2(gelu(fc1 x))."""

    cfg: Blocks
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        cfg, hidden = self.cfg, self.cfg.hidden
        # Filled up where less than a sixteenth is missing to a multiple of 128.
        fill = -hidden % 128
        fill = fill if 16 * fill < hidden and not cfg.bias else 0

        def up(name):
            names = ("embed", "hidden")
            return Linear(hidden, names, self.dtype, cfg.bias, (0, fill), name=name)(x)

        if cfg.mlp == "swiglu":
            y = nn.silu(up("fc1")) * up("fc3")
        elif cfg.mlp == "geglu":
            y = jax.nn.gelu(up("fc1")) * up("fc3")
        elif cfg.mlp == "quick_gelu":
            y = up("fc1")
            y = y * jax.nn.sigmoid(1.702 * y)
        else:
            y = jax.nn.gelu(up("fc1"), approximate=cfg.mlp == "gelu_tanh")
        down = Linear(cfg.width, ("hidden", "embed"), self.dtype, cfg.bias, (fill, 0), name="fc2")
        return down(y)


class Block(nn.Module):
    """One block over one or several sequences (passes) that share its weights and modulation.

    Attributes:
        cfg: its options.
        compute: how it is run.
        sequences: of each pass. (): of one pass in which all attend to all, or with a cache.
        modulated: whether it is modulated by an embedding.
        cross: whether it attends to a context.
        capture: the index of the block after which the first pass's first segment is kept.
        ranks: with a cache, those of all its positions; () where each has its own.
    """

    cfg: Blocks
    compute: Compute
    sequences: tuple[Sequence, ...] = ()
    modulated: bool = False
    cross: bool = False
    capture: int | None = None
    ranks: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, carry, shared):
        """One block.

        Args:
            carry: (passes, captured, index): a tuple of [B, T, D]; what was captured or None; the
                block's index, int32 [].
            shared: a `Shared`, or a tuple of its first fields.

        Returns:
            (carry, the cache with the new positions or None).
        """
        passes, captured, index = carry
        embedding, context, cache, bias, mask = Shared(*shared)
        cfg, dtype, how = self.cfg, jnp.dtype(self.compute.dtype), self.compute.attention
        self_attention = Attention(cfg, dtype, name="attn")
        mlp = MLP(cfg, dtype, name="mlp")
        scale = cfg.scale
        if scale is None and cfg.qk_norm == "layer":
            scale = 8.0 / cfg.head_dim  # the muP form
        modulation = self._modulation(embedding, dtype)
        norms = {
            name: Norm(cfg.norm, cfg.norm_eps, name=f"norm_{i + 1}")
            for i, name in enumerate(("attn", "cross", "mlp") if self.cross else ("attn", "mlp"))
        }
        scales = {
            name: self.param(f"scale_{name}", layout.axes(ones, None), (cfg.width,))
            for name in (norms if cfg.layer_scale else ())
        }

        def whole(sequence, q, k, v):
            if cfg.rope:
                q, k = (attention.rotate(x, cfg.head_dim, cfg.rope) for x in (q, k))
            normalize = cfg.qk_norm == "layer"
            how_to = (cfg.head_dim, sequence, how, scale, normalize, bias, mask)
            return attention.attend(q, k, v, *how_to), None

        def continued(q, k, v):
            known = cache.k, cache.v, cache.index
            y, *kept = attention.attend_cached(q, k, v, *known, cfg.head_dim, self.ranks)
            return y, kept

        def across(q, k, v):
            if k.ndim == 3:
                k, v = (heads_first(x.reshape(*x.shape[:2], -1, cfg.head_dim)) for x in (k, v))
            return attention.attend_across(q, k, v, context[1], cfg.head_dim), (k, v)

        def one_pass(x, sequence):
            lengths = sequence.lengths if sequence else x.shape[1:2]
            branch = functools.partial(self._branch, modulation, lengths, norms, scales)
            core = functools.partial(whole, sequence or full(all=x.shape[1]))
            core = core if cache is None else continued
            x, kept = branch("attn", x, lambda y: self_attention(y, y, core))
            cross = None
            if self.cross:
                known = cache is not None and cache.cross is not None
                source = cache.cross if known else context[0]
                cross_attention = Attention(cfg, dtype, name="cross")
                x, cross = branch("cross", x, lambda y: cross_attention(y, source, across))
            x, _ = branch("mlp", x, lambda y: (mlp(y), None))
            return layout.batch_first(x), kept, cross

        done = [one_pass(x, s) for x, s in zip(passes, self.sequences or (None,))]
        passes, kept, cross = zip(*done)
        if self.capture is not None:
            first = self.sequences[0]
            features = first.part(passes[0], first.names[0])
            captured = jnp.where(index == self.capture, features, captured)
        if cache is not None:
            length = passes[0].shape[1]
            cache = Cache(*kept[0], cross[0], cache.index + length)
        return (passes, captured, index + 1), cache

    def _modulation(self, embedding, dtype):
        """{branch: (shift, scale, gate)}, each [B', S, D]; {} without modulation."""
        if not self.modulated:
            return {}
        width, segments = self.cfg.width, len(self.sequences[0].names)
        # The released order: for each segment the gates, then shift and scale of each branch.
        kernel, bias = layout.axes(zeros, "embed", "hidden"), layout.axes(zeros, "hidden")
        dense = nn.Dense(
            segments * 6 * width, dtype=dtype, kernel_init=kernel, bias_init=bias, name="adaln"
        )
        parts = dense(nn.silu(embedding)).reshape(embedding.shape[0], segments, 6, width)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = (
            parts[:, :, i] for i in range(6)
        )
        return {
            "attn": (shift_attn, scale_attn, gate_attn),
            "mlp": (shift_mlp, scale_mlp, gate_mlp),
        }

    def _branch(self, modulation, lengths, norms, scales, name, x, f):
        """x + gate · f(norm(x) modulated): ([B, T, D], what f returned beside)."""
        cfg, parts = self.cfg, modulation.get(name)
        lengths = lengths if parts else (x.shape[1],)
        fused = kernels.can_normalize(self.compute.attention, lengths, cfg.width)
        if fused and cfg.norm == "layer":
            x, y, add = _fused(x, parts, lengths)
        else:
            x, y, add = _plain(x, norms[name], parts, lengths)
        y, kept = f(y)
        if name in scales:
            y = y * scales[name].astype(y.dtype)[None, None]
        return add(x, y), kept


# The two ways into and out of a branch: (x, its normalised and modulated input, what adds its
# result). `parts`: shift, scale and gate, [B', S, D] each, or None.


def _plain(x, norm, parts, lengths):
    y = norm(x)
    if parts is None:
        return x, y, jnp.add
    shift, scale, gate = (spread(part, lengths) for part in parts)
    return x, modulate(y, shift, scale), lambda x, y: x + gate * y


def _fused(x, parts, lengths):
    if parts is None:
        return *kernels.normalize(x), jnp.add
    shift, scale, gate = (jnp.broadcast_to(p, (x.shape[0], *p.shape[1:])) for p in parts)
    normalized = kernels.normalize(x, shift, scale, lengths)
    return *normalized, lambda x, y: kernels.add_gated(x, y, gate, lengths)


def spread(part: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
    """One vector per segment for each of its positions: [B', S, D] -> [B', T, D], S 1 or 2."""
    if len(set(lengths)) == 1:  # A gradient that is one sum per segment.
        return jnp.repeat(part, lengths[0], axis=1)
    first, second = lengths
    is_first = jnp.arange(first + second) < first
    return jnp.where(is_first[None, :, None], part[:, :1], part[:, 1:])


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift; shift and scale: [B or 1, T or 1, D]."""
    return x * (1 + scale) + shift


# What the backward pass finds instead of computing it again.
_KEPT = {
    "full": None,  # each block's input
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.RESIDUALS),
    ),
}


def stack(cfg: Blocks, compute: Compute, carry, shared, **options):
    """`cfg.depth` blocks, parameters stacked on a leading axis under the name "blocks".

    To be called in a module. `compute.scan=False` unrolls the loop, `compute.remat` computes parts
    of each block again in the backward pass; parameters and results are the same.

    Args:
        carry, shared: see `Block.__call__`.
        options: fields of `Block`.

    Returns:
        The carry after the last block.
    """
    carry, _ = stacked(cfg, compute, carry, shared, **options)(carry, shared)
    return carry


def stacked(cfg: Blocks, compute: Compute, carry, shared, **options):
    """What `stack` runs, to be called with (carry, shared), also several times.

    The arguments say the shapes that parameters are made with. Without `sequences` each call may
    have its own number of positions.
    """
    dtype = jnp.dtype(compute.dtype)
    one = Block(cfg, compute, **options, parent=None)
    like = jax.eval_shape(one.init, jax.random.key(0), carry, shared)["params"]

    def gathered(tree):
        return {"params": layout.gather(layout.unbox(tree["params"]), like, dtype)}

    def boxed(tree):  # What initialisation keeps.
        params = tree.get("params")
        return {"params": layout.box(layout.unbox(params), like)} if params else tree

    block = nn.map_variables(Block, "params", gathered, boxed, init=True)
    if compute.remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=_KEPT[compute.remat])
    loop = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=cfg.depth,
        unroll=1 if compute.scan else cfg.depth,
    )
    return loop(cfg, compute, name="blocks", **options)
