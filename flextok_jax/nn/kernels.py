"""TPU kernels (Pallas) for what is bound by memory between matrix products.

XLA reads and writes an activation several times for a normalisation, a modulation or a change of
layout. Each kernel here reads its inputs once and writes its results once, forwards and backwards:

    attend          softmax attention, with QK-norm or without, heads where they lie
    normalize       LayerNorm with its modulation, beside the residual path
    add_gated       x + gate y

They compute in float32 and round their results; but the factors of matrix products are of the
inputs' type (their sums float32), and among them, by `attend`, what is averaged over a head for
QK-norm. The compiler does not cut a kernel's work over devices, so `shard_map` does: images over
the batch axes, heads over `tensor`. B batch, T positions, D width, S segments that share a
modulation.

A block is of whole tiles, so the last one of a sequence may reach beyond it: what it reads there is
undefined and is replaced by zeros or left out of sums, what it writes there is dropped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flextok_jax.nn import layout

LANES = 128  # Blocks are multiples of it, in both dimensions.
MIN_LENGTH = 128  # Of a sequence; in a shorter one little of a block would be used.
MAX_LENGTH = 1024  # The logits of a head, [rows, T], and what is made of them lie in VMEM.
EPS = 1e-5
NEVER = -1e30  # A logit whose exp is 0, and that stays finite with another one added.
f32 = jnp.float32


def can_attend(implementation: str, length: int, width: int, head_dim: int) -> bool:
    """Whether `attend` is asked for, and takes these sizes on the mesh that is set."""
    if implementation != "pallas":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    groups = LANES * (1 if mesh.empty else mesh.shape["tensor"])  # whole ones on each device
    fits = MIN_LENGTH <= length <= MAX_LENGTH and width % groups == 0
    return fits and LANES % head_dim == 0


def can_normalize(implementation: str, lengths: tuple[int, ...], width: int) -> bool:
    """Whether `normalize` and `add_gated` are asked for, and take segments of these lengths."""
    *before, _ = lengths
    whole = all(length % LANES == 0 for length in (*before, width))
    return implementation == "pallas" and whole and sum(lengths) >= MIN_LENGTH


# --- attention ---


def attend(q, k, v, head_dim: int, scale: float, mask=None, bias=None, norm: bool = False):
    """softmax(scale n(q) n(k)^T + bias) v of every head.

    A program has the whole rows of the heads that share the lanes, of one image. So the softmax
    needs no second round (compare Dao et al., arXiv 2205.14135), and queries and keys are read as
    the projections wrote them.

    Args:
        q, k, v: [B, T, H x head_dim].
        scale: of the logits.
        mask: a NumPy bool [T, T], True where attention is allowed (every row somewhere); None is
            everywhere.
        bias: a NumPy float [T], of the keys; None is 0.
        norm: whether n is LayerNorm over a head's channels, else it is nothing.

    Returns:
        [B, T, H x head_dim].
    """
    length = q.shape[1]
    padded = -(-length // LANES) * LANES
    rows = 2 * LANES if padded % (2 * LANES) == 0 else LANES
    added = None  # to the logits, [padded, padded]
    if mask is not None or bias is not None or padded > length:
        added = np.full((padded, padded), NEVER, np.float32)
        added[:, :length] = 0 if bias is None else bias
        if mask is not None:
            added[:length, :length][~mask] = NEVER
    spans = []  # (first query, last + 1, keys): those after a span's last allowed key are left out
    for start in range(0, padded, rows):
        seen = [length - 1] if mask is None else np.flatnonzero(mask[start : start + rows].any(0))
        spans.append((start, start + rows, (int(seen[-1]) // LANES + 1) * LANES))
    masks = () if added is None else (jnp.asarray(added),)
    return _attend((head_dim, float(scale), tuple(spans), norm), q, k, v, *masks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, *masks):
    (out,) = _attention_call("attention", _attention_forward, how, (q, k, v), masks, 1)
    return out


def _attend_backward(how, saved, grad):
    q, k, v, *masks = saved
    arrays = (q, k, v, grad)
    grads = _attention_call("attention_gradient", _attention_backward, how, arrays, masks, 3)
    return (*grads, *map(jnp.zeros_like, masks))


_attend.defvjp(lambda how, *args: (_attend(how, *args), args), _attend_backward)


def _attention_call(name, kernel, how, arrays, masks, results):
    """Over images and groups of heads that fill the lanes."""
    head_dim, _, spans, _ = how
    area = sum((stop - start) * keys for start, stop, keys in spans)
    products = 2 if results == 1 else 5

    def local(*args):
        x = args[0]
        batch, length, width = x.shape
        padded = -(-length // LANES) * LANES
        block = pl.BlockSpec((1, padded, LANES), lambda b, h: (b, 0, h))
        whole = pl.BlockSpec((padded, padded), lambda b, h: (0, 0))
        return pl.pallas_call(
            functools.partial(kernel, how, length, bool(masks)),
            grid=(batch, width // LANES),
            in_specs=[block] * len(arrays) + [whole] * len(masks),
            out_specs=[block] * results,
            out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * results,
            scratch_shapes=[pltpu.VMEM((padded, LANES), f32)] * (2 if results > 1 else 0),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * batch * width * area,
                bytes_accessed=(len(arrays) + results) * x.nbytes,
                transcendentals=batch * width // head_dim * area,
            ),
            name=f"{name}_{head_dim}",
        )(*args)

    specs = [_BY_HEAD] * len(arrays) + [jax.P()] * len(masks)
    return _on_each_device(local, specs, [_BY_HEAD] * results)(*arrays, *masks)


_BY_IMAGE = jax.P(layout.BATCH_AXES)
_BY_HEAD = jax.P(layout.BATCH_AXES, None, "tensor")


def _on_each_device(f, in_specs, out_specs):
    """`f` of each device's part; `f` itself where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=tuple(in_specs), out_specs=tuple(out_specs), check_vma=False)


# Heads that share the lanes are never cut apart, which would move channels between lanes: where
# one of them is summed over or made, the others' channels of one factor are zero. A matrix unit is
# at least as wide as the lanes, so that costs nothing.


def _attention_forward(how, length, masked, *refs):
    head_dim, scale, spans, norm = how
    (q, k, v), mask_ref, o_ref = refs[:3], refs[3] if masked else None, refs[-1]
    dtype, heads = q.dtype, _Heads(head_dim, q.dtype, norm)
    q, k, v = (_rows(ref, length) for ref in (q, k, v))
    q = (heads.normal(q)[0] * scale).astype(dtype)
    k = heads.normal(k)[0].astype(dtype)
    for start, stop, last in spans:
        rows, keys = slice(start, stop), slice(0, last)
        out = jnp.zeros((stop - start, LANES), f32)
        for lanes in heads.lanes:
            p = _dot(q[rows], jnp.where(lanes, k[keys], 0), 1, 1)
            p = p if mask_ref is None else p + mask_ref[rows, keys]
            p = heads.exponential(p, axis=1)
            one = _dot(p.astype(dtype), jnp.where(lanes, v[keys], 0), 1, 0)
            out += one / jnp.sum(p, axis=1, keepdims=True)
        o_ref[0, rows] = out.astype(dtype)


def _attention_backward(how, length, masked, *refs):
    # With keys before queries: so sums over keys are additions of rows, and of the three factors
    # that must be turned two are narrow.
    head_dim, scale, spans, norm = how
    mask_ref = refs[4] if masked else None
    dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs[-5:]
    dtype, heads = refs[0].dtype, _Heads(head_dim, refs[0].dtype, norm)
    q, k, v, do = (_rows(ref, length) for ref in refs[:4])
    (q_hat, q_rstd), (k_hat, k_rstd) = heads.normal(q), heads.normal(k)
    q, k = (q_hat * scale).astype(dtype), k_hat.astype(dtype)
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    for start, stop, last in spans:
        rows, keys = slice(start, stop), slice(0, last)
        dq = jnp.zeros((stop - start, LANES), f32)
        for lanes in heads.lanes:
            k_one, q_one = jnp.where(lanes, k[keys], 0), jnp.where(lanes, q[rows], 0)
            do_one = jnp.where(lanes, do[rows], 0)
            p = _dot(k[keys], q_one, 1, 1)
            p = p if mask_ref is None else p + mask_ref[rows, keys].T
            p = heads.exponential(p, axis=0)
            p = p / jnp.sum(p, axis=0, keepdims=True)
            dv_sum[keys] += _dot(p.astype(dtype), do_one, 1, 0)
            dp = _dot(v[keys], do_one, 1, 1)
            ds = (p * (dp - jnp.sum(p * dp, axis=0, keepdims=True))).astype(dtype)
            dk_sum[keys] += _dot(ds, q_one, 1, 0)
            dq += _dot(ds, k_one, 0, 0)
        dq = heads.normal_gradient(dq * scale, q_hat[rows], q_rstd[rows])
        dq_ref[0, rows] = dq.astype(dtype)
    dk_ref[0] = heads.normal_gradient(dk_sum[...], k_hat, k_rstd).astype(dtype)
    dv_ref[0] = dv_sum[...].astype(dtype)


def _rows(ref, length, first=0):
    """The rows of a block [1, n, lanes], the first of which is `first`; zeros from `length` on."""
    x = ref[0]
    if isinstance(first, int) and first + len(x) <= length:
        return x
    number = first + jax.lax.broadcasted_iota(jnp.int32, (len(x), 1), 0)
    return jnp.where(number < length, x, jnp.zeros_like(x))


class _Heads:
    """What concerns each of the heads in a row of lanes.

    Attributes:
        lanes: bool [1, LANES] of each head.
    """

    def __init__(self, head_dim: int, dtype, norm: bool):
        def owner(axis, shape):
            lane = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return jax.lax.div(lane, jnp.full_like(lane, head_dim))

        self.lanes = [owner(1, (1, LANES)) == head for head in range(LANES // head_dim)]
        square = (LANES, LANES)
        same = owner(0, square) == owner(1, square)
        self._average = jnp.where(same, 1 / head_dim, 0).astype(dtype)
        self._norm = norm

    def _mean(self, x):
        """float32 [rows, LANES], of each head in all its lanes: by the matrix units."""
        return _dot(x.astype(self._average.dtype), self._average, 1, 0)

    def normal(self, x):
        """LayerNorm of each head, float32, and 1 / the standard deviations; [rows, LANES].

        Without `norm` x itself, and something of its shape that nobody reads.
        """
        return _normal(x, self._mean) if self._norm else (x.astype(f32), x)

    def normal_gradient(self, grad, hat, rstd):
        """Of LayerNorm's input, from that of its result `hat`."""
        return _normal_gradient(grad, hat, rstd, self._mean) if self._norm else grad

    def exponential(self, logits, axis):
        """exp of the logits, but for a factor along `axis` that a softmax does not see."""
        if not self._norm:  # Normal queries and keys give at most scale x head_dim.
            logits = logits - jnp.max(logits, axis=axis, keepdims=True)
        return jnp.exp(logits)


def _dot(a, b, axis_a, axis_b):
    # bfloat16 has no precision to choose; the setting for all products is for float32.
    precision = None if a.dtype == f32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=f32
    )


def _mean(x):
    return jnp.mean(x, axis=-1, keepdims=True)


def _normal(x, mean=_mean):
    """LayerNorm of rows, float32, and 1 / their standard deviation."""
    x = x.astype(f32)
    x = x - mean(x)
    rstd = jax.lax.rsqrt(mean(jnp.square(x)) + EPS)
    return x * rstd, rstd


def _normal_gradient(grad, hat, rstd, mean=_mean):
    """Of LayerNorm's input, from that of its result `hat`."""
    return rstd * (grad - mean(grad) - hat * mean(grad * hat))


# --- between attention and MLP ---


def normalize(x, shift=None, scale=None, lengths=None) -> tuple[jax.Array, jax.Array]:
    """x, and LayerNorm(x) (1 + scale) + shift; without scale and shift LayerNorm(x).

    x comes back for the residual path, whose gradient is then added where the other one is made.

    Args:
        x: [B, T, D].
        shift, scale: [B, S, D], or None for neither.
        lengths: positions of each segment; equal by default.
    """
    modulation = () if shift is None else (scale, shift)
    return _normalize(_starts(x, modulation, lengths), x, *modulation)


def _starts(x, vectors, lengths):
    """The first position of each segment."""
    count = vectors[0].shape[1] if vectors else 1
    lengths = lengths if lengths and vectors else (x.shape[1] // count,) * count
    return tuple(sum(lengths[:i]) for i in range(count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(starts, x, *modulation):
    (y,) = _row_call("normalize", _normalize_rows, starts, (x,), modulation, 1, 0)
    return x, y


def _normalize_backward(starts, saved, grads):
    x, *modulation = saved
    arrays, results = (x, *grads), len(modulation)
    dx, *rest = _row_call(
        "normalize_gradient", _normalize_rows_gradient, starts, arrays, modulation[:1], 1, results
    )
    return (dx, *(d.astype(m.dtype) for d, m in zip(rest, modulation)))


_normalize.defvjp(lambda *args: (_normalize(*args), args[1:]), _normalize_backward)


def add_gated(x, y, gate, lengths=None) -> jax.Array:
    """x + gate y. x, y: [B, T, D]; gate: [B, S, D]; lengths: as of `normalize`."""
    return _add_gated(_starts(x, (gate,), lengths), x, y, gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_gated(starts, x, y, gate):
    (out,) = _row_call("add_gated", _add_gated_rows, starts, (x, y), (gate,), 1, 0)
    return out


def _add_gated_backward(starts, saved, grad):
    y, gate = saved
    dy, dgate = _row_call(
        "add_gated_gradient", _add_gated_rows_gradient, starts, (y, grad), (gate,), 1, 1
    )
    return grad, dy, dgate.astype(gate.dtype)


_add_gated.defvjp(lambda *args: (_add_gated(*args), args[2:]), _add_gated_backward)


def _row_call(name, kernel, starts, arrays, vectors, results, sums):
    """Over images and blocks of rows.

    Args:
        starts: the first row of each segment.
        arrays: [B, T, D] each. vectors: [B, S, D] each.
        results: how many arrays it makes. sums: how many sums over a segment, float32 [B, S, D].
    """

    def local(*args):
        x = args[0]
        batch, length, width = x.shape
        first = [start // LANES for start in starts]  # Blocks.
        segments = len(first)

        def segment(i):
            return sum((i >= block).astype(jnp.int32) for block in first[1:]) if segments > 1 else 0

        rows = pl.BlockSpec((1, LANES, width), lambda b, i: (b, i, 0))
        vector = pl.BlockSpec((1, 1, 1, width), lambda b, i: (b, segment(i), 0, 0))
        column = (batch, segments, 1, width)  # Its last two dimensions are those of its blocks.
        out = pl.pallas_call(
            functools.partial(kernel, first, length),
            grid=(batch, -(-length // LANES)),
            in_specs=[rows] * len(arrays) + [vector] * len(vectors),
            out_specs=[rows] * results + [vector] * sums,
            out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * results
            + (jax.ShapeDtypeStruct(column, f32),) * sums,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=0, bytes_accessed=(len(arrays) + results) * x.nbytes, transcendentals=0
            ),
            name=name,
        )(*args[: len(arrays)], *(v.reshape(column) for v in args[len(arrays) :]))
        return (*out[:results], *(v.reshape(batch, segments, width) for v in out[results:]))

    specs = [_BY_IMAGE] * (len(arrays) + len(vectors))
    return _on_each_device(local, specs, [_BY_IMAGE] * (results + sums))(*arrays, *vectors)


def _normalize_rows(first, length, x_ref, *refs):
    y = _normal(x_ref[0])[0]
    if len(refs) > 1:
        scale_ref, shift_ref = refs[:2]
        y = y * (1 + scale_ref[0, 0].astype(f32)) + shift_ref[0, 0].astype(f32)
    refs[-1][0] = y.astype(x_ref.dtype)


def _normalize_rows_gradient(first, length, x_ref, residual_ref, grad_ref, *refs):
    x, grad = (_block(ref, length) for ref in (x_ref, grad_ref))
    hat, rstd = _normal(x)
    grad = grad.astype(f32)
    if len(refs) > 1:
        scale_ref, dx_ref, dscale_ref, dshift_ref = refs
        _add_rows(first, dscale_ref, grad * hat)
        _add_rows(first, dshift_ref, grad)
        grad = grad * (1 + scale_ref[0, 0].astype(f32))
        refs = [dx_ref]
    dx = residual_ref[0].astype(f32) + _normal_gradient(grad, hat, rstd)
    refs[0][0] = dx.astype(x_ref.dtype)


def _add_gated_rows(first, length, x_ref, y_ref, gate_ref, out_ref):
    out = x_ref[0].astype(f32) + gate_ref[0, 0].astype(f32) * y_ref[0].astype(f32)
    out_ref[0] = out.astype(x_ref.dtype)


def _add_gated_rows_gradient(first, length, y_ref, grad_ref, gate_ref, dy_ref, dgate_ref):
    y, grad = (_block(ref, length).astype(f32) for ref in (y_ref, grad_ref))
    dy_ref[0] = (gate_ref[0, 0].astype(f32) * grad).astype(y_ref.dtype)
    _add_rows(first, dgate_ref, grad * y)


def _block(ref, length):
    """The rows of this program's block, zeros beyond the sequence."""
    whole = length % LANES == 0
    return ref[0] if whole else _rows(ref, length, pl.program_id(1) * LANES)


def _add_rows(first, sum_ref, rows):
    """Adds the sum over rows to what the segment's earlier blocks left there.

    first: the number of each segment's first block.
    """
    block = pl.program_id(1)

    @pl.when(functools.reduce(jnp.logical_or, [block == number for number in first]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[0, 0] += jnp.sum(rows, axis=0, keepdims=True)
