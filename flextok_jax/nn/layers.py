"""Building blocks of both Transformers (the encoder's and the decoder's).

B batch, S sequence, D width, H heads, N patches, R registers, C latent channels, p patch side.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import attention, layout

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

# (queries, keys, values), each [B, S, H, head_dim] -> [B, S, H, head_dim]
AttentionCore = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The same of [B, S, D] -> [B, S, D] before QK-norm, which it does itself.
AttentionKernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without scale and bias, eps 1e-5, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with QK-norm and separate bias-free projections."""

    width: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, core: AttentionCore, kernel: AttentionKernel | None = None
    ) -> jax.Array:
        """x: [B, S, D] -> [B, S, D]; `core` decides who attends to whom, or `kernel` if given."""

        def dense(name):
            return nn.Dense(
                self.width, use_bias=False, dtype=self.dtype, kernel_init=xavier, name=name
            )

        q, k, v = (dense(name)(x) for name in ("wq", "wk", "wv"))
        if kernel is not None:
            return dense("proj")(kernel(q, k, v))
        q, k, v = (y.reshape(*x.shape[:-1], -1, self.head_dim) for y in (q, k, v))
        return dense("proj")(core(layer_norm(q), layer_norm(k), v).reshape(x.shape))


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x) without biases; hidden width int(2/3 * ratio * D).

    Where less than a sixteenth is missing to a multiple of 128, the width of a TPU's lanes, it
    computes with `hidden` filled up by zeros; the parameters keep their sizes.
    """

    width: int
    ratio: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, S, D] -> [B, S, D]."""
        hidden = int(2 * self.ratio * self.width / 3)
        fill = -hidden % 128
        fill = fill if 16 * fill < hidden else 0
        up = _Padded((self.width, hidden), ((0, 0), (0, fill)), self.dtype, name="fc1")
        gate = _Padded((self.width, hidden), ((0, 0), (0, fill)), self.dtype, name="fc3")
        down = _Padded((hidden, self.width), ((0, fill), (0, 0)), self.dtype, name="fc2")
        return down(nn.silu(up(x)) * gate(x))


class _Padded(nn.Module):
    """A matrix product without bias, with zeros after the kernel's last rows or columns."""

    shape: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", xavier, self.shape)
        x, kernel = x.astype(self.dtype), _pad(self.padding, kernel.astype(self.dtype))
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pad(padding, x):
    return jnp.pad(x, padding)


def _pad_backward(padding, _, grad):
    # A barrier, because the TPU compiler fails where a gradient is cut twice: for the devices, and
    # here.
    grad = jax.lax.optimization_barrier(grad)
    return (grad[tuple(slice(a, n - b) for (a, b), n in zip(padding, grad.shape))],)


_pad.defvjp(lambda padding, x: (_pad(padding, x), None), _pad_backward)


def patchify(x: jax.Array, p: int) -> jax.Array:
    """[B, h, w, C] -> [B, (h/p)(w/p), p*p*C]; a patch vector is ordered (p1, p2, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(x: jax.Array, p: int, height: int, width: int) -> jax.Array:
    """The inverse of `patchify`: [B, N, p*p*C] -> [B, height, width, C]."""
    b, _, d = x.shape
    c = d // (p * p)
    x = x.reshape(b, height // p, width // p, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, c)


def sincos_table(grid: tuple[int, int], width: int) -> jax.Array:
    """Fixed 2-D positions, float32 [rows, cols, D].

    Channels are [sin(row w), cos(row w), sin(col w), cos(col w)], w_j = 10000^(-4j/D).
    """
    omega = 10000.0 ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))

    def one_axis(n):
        angle = jnp.arange(n, dtype=jnp.float32)[:, None] * omega[None, :]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    rows, cols = grid
    half = width // 2
    row = jnp.broadcast_to(one_axis(rows)[:, None], (rows, cols, half))
    col = jnp.broadcast_to(one_axis(cols)[None, :], (rows, cols, half))
    return jnp.concatenate([row, col], axis=-1)


class PatchEmbed(nn.Module):
    """Latents to patch vectors with their fixed positions.

    The position table is a parameter only so that it is kept as the file has it; it is never
    trained (see `is_fixed`). Smaller grids use its top left.
    """

    grid: tuple[int, int]
    patch_size: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """latents: [B, h, w, C] -> [B, N, D]."""
        rows, cols = (s // self.patch_size for s in latents.shape[1:3])
        dense = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="patch_emb")
        x = dense(patchify(latents.astype(self.dtype), self.patch_size))
        table = self.param("sincos", lambda _: sincos_table(self.grid, self.width))
        if rows > self.grid[0] or cols > self.grid[1]:
            raise ValueError(f"{rows}x{cols} patches: the model has positions for {self.grid}")
        positions = table[:rows, :cols].reshape(1, rows * cols, self.width)
        return x + positions.astype(self.dtype)


def is_fixed(path: str) -> bool:
    """Whether the parameter at `path` ("a/b/c") is a fixed table: never trained or averaged."""
    return path.split("/")[-1] == "sincos"


def time_frequencies(t: jax.Array, size: int, max_timestep: float) -> jax.Array:
    """Sinusoidal features of the time: float32 [B] -> [B, size], cosines first.

    Frequencies are (1000/max_timestep) * exp(-ln(256) j / (size/2)).
    """
    half = size // 2
    j = jnp.arange(half, dtype=jnp.float32)
    freqs = (1000.0 / max_timestep) * jnp.exp(-math.log(256.0) * j / half)
    angle = t.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


# What the backward pass finds instead of computing it again.
_KEPT = {
    "full": None,  # each block's input
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.RESIDUALS),
    ),
}


def stack(block, cfg, compute, depth: int, prefix: str, **fields):
    """`depth` copies of a block module as one module, parameters stacked on a leading axis.

    The block is called as block(carry, shared) -> (carry, None). `compute.scan=False` unrolls the
    loop, `compute.remat` computes parts of each block again in the backward pass; parameters and
    results are the same. `prefix` is where the parameters lie ("encoder/blocks"), for
    `layout.gather`.
    """
    dtype = jnp.dtype(compute.dtype)
    block = nn.map_variables(
        block,
        "params",
        trans_in_fn=lambda tree: {"params": layout.gather(tree["params"], prefix, dtype)},
        init=True,
    )
    if compute.remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=_KEPT[compute.remat])
    loop = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=1 if compute.scan else depth,
    )
    return loop(cfg, compute, name="blocks", **fields)
