"""How images and times become vectors: patches, positions, sinusoidal times.

B batch, N patches, D width, C latent channels, p patch side.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import haar, layout
from flextok_jax.nn.block import normal, xavier, zeros
from flextok_jax.nn.tokenizer_config import Sites, Text
from flextok_jax.nn.windows import Windows


def dense(
    features: int, dtype, name: str, init=xavier, names=("embed", None), bias: bool = True
) -> nn.Dense:
    """A linear layer; `names` are the logical axes of its kernel, (in, out)."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=layout.axes(init, *names),
        bias_init=layout.axes(zeros, names[1] if names[1] == "hidden" else None),
        name=name,
    )


def conv(features: int, name: str) -> nn.Conv:
    """A 3x3 convolution in float32 that keeps the size."""
    kernel = layout.axes(nn.initializers.lecun_normal(), None, None, None, None)
    bias = layout.axes(zeros, None)
    return nn.Conv(features, (3, 3), padding=1, kernel_init=kernel, bias_init=bias, name=name)


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
    """Latents to patch vectors with their positions, see `placed`."""

    sites: Sites
    width: int
    dtype: jnp.dtype
    bias: bool = True

    @nn.compact
    def __call__(self, latents: jax.Array) -> dict[str, jax.Array]:
        """latents: [B, h, w, C] -> {"patches": [B, N, D]} and perhaps {"class": [B, 1, D]}.

        With `levels` patches are [B, S N, D], scale after scale.
        """
        side, levels = self.sites.patch_size, self.sites.levels
        grid, (sequence, values) = tuple(s // side for s in latents.shape[1:3]), self.sites.repeat

        def project(x, name="patch_emb"):
            names = (None, "embed")
            return dense(self.width, self.dtype, name, names=names, bias=self.bias)(x)

        x = latents.astype(self.dtype)
        if self.sites.strides:
            x = Windows(self.sites.strides, self.dtype, name="windows")(x)
        else:
            x = patchify(x, side)
        if levels:
            parts = haar.split(x, side, levels)
            x = jnp.concatenate([project(p, f"patch_emb_{i}") for i, p in enumerate(parts)], axis=1)
            return placed(self, self.sites, x, grid)
        x = project(jnp.tile(x, (1, 1, values)) if values > 1 else x)
        x = jnp.tile(x, (1, sequence, 1)) if sequence > 1 else x
        return placed(self, self.sites, x, grid)


def placed(module: nn.Module, sites: Sites, x: jax.Array, used) -> dict[str, jax.Array]:
    """Patch vectors with their positions, as segments of a sequence.

    Args:
        module: whose parameters the positions are: a table "sincos" only so that it is kept as a
            file has it (it is never trained, see `is_fixed`); or learned "positions" [1 + N, D] and
            "class_token" [D].
        x: [B or 1, n, D], of the patches of a `used` grid, the top left of `sites.grid`; of several
            scales the same patches again.

    Returns:
        {"patches": [B or 1, n, D]}; with learned positions {"class": [B or 1, 1, D]} before it.

    Raises:
        ValueError: `used` is larger than `sites.grid`.
    """
    (rows, columns), most, width = used, sites.grid, x.shape[-1]
    if rows > most[0] or columns > most[1]:
        raise ValueError(f"{rows}x{columns} patches: the model has positions for {most}")

    def added(x, table):
        table = table[:rows, :columns].reshape(1, rows * columns, width).astype(x.dtype)
        return x + jnp.tile(table, (1, sites.levels + 1, 1))

    if sites.positions == "none":
        return {"patches": x}
    if sites.positions == "sincos":
        init = layout.axes(lambda _: sincos_table(most, width), None, None, None)
        return {"patches": added(x, module.param("sincos", init))}
    first = module.param("class_token", layout.axes(normal, None), (width,))
    shape = (1 + most[0] * most[1], width)
    table = module.param("positions", layout.axes(normal, None, None), shape)
    first = jnp.broadcast_to((first + table[0])[None, None].astype(x.dtype), (len(x), 1, width))
    return {"class": first, "patches": added(x, table[1:].reshape(*most, width))}


def read_text(module: nn.Module, cfg: Text, text, like: jax.Array):
    """The features of texts as a segment of a sequence.

    Args:
        module: whose parameters "text_proj" and "text_pos" [T, D] are.
        text: float [B, T, E]; None, for a `padded` one: no text.
        like: [B, n, D], another segment.

    Returns:
        ([B, T, D], bool [B, T]: where there is something to attend to; None: everywhere).

    Raises:
        ValueError: there is no text, and the model needs one.
    """
    batch, _, width = like.shape
    if text is None:
        if not cfg.padded:
            raise ValueError(f"text=None: must be [{batch}, {cfg.length}, {cfg.dim}]")
        text = jnp.zeros((batch, cfg.length, cfg.dim))
    axes = layout.axes(normal, None, None)
    positions = module.param("text_pos", axes, (cfg.length, width)).astype(like.dtype)
    x = dense(width, like.dtype, "text_proj", names=(None, "embed"))(text.astype(like.dtype))
    there = jnp.any(text != 0, axis=-1) if cfg.padded else None
    return x + jnp.broadcast_to(positions[None], x.shape), there


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
