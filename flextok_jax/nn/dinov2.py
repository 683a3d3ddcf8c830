"""DINOv2: a Vision Transformer whose patch features describe what is where in an image.

Oquab et al., arXiv 2304.07193; the models without registers, S, B and L.

B images, P patches, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.nn import layout, order
from flextok_jax.nn.block import Norm, normal, stack, xavier, zeros
from flextok_jax.nn.config import Blocks, Compute

# Of the colours in 0..1 that it was trained on (ImageNet's).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """A DINOv2 model.

    Attributes:
        width: D.
        depth: number of blocks.
        num_heads: attention heads, each D / num_heads wide.
        mlp_hidden: hidden width of the MLPs.
        patch_size: pixels per patch side.
        grid: patches per side that there are learned positions for; others are interpolated.
        norm_eps: epsilon of every LayerNorm.
    """

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_hidden: int = 4096
    patch_size: int = 14
    grid: int = 37
    norm_eps: float = 1e-6

    @property
    def blocks(self) -> Blocks:
        """The Transformer's blocks."""
        return Blocks(
            width=self.width,
            depth=self.depth,
            head_dim=self.width // self.num_heads,
            mlp_hidden=self.mlp_hidden,
            norm="affine",
            norm_eps=self.norm_eps,
            qk_norm="none",
            mlp="gelu",
            bias=True,
            layer_scale=True,
        )


class DINOv2(nn.Module):
    """Normalised images [B, H, W, 3] -> features of the class token and of patches [B, 1 + P, D].

    H and W are multiples of the patch size. The features have passed the last LayerNorm.
    """

    cfg: DINOv2Config
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images):
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        size = (cfg.patch_size, cfg.patch_size)
        embed = nn.Conv(
            cfg.width, size, size, padding="VALID", dtype=dtype, name="patch_emb",
            kernel_init=layout.axes(xavier, None, None, None, "embed"),
            bias_init=layout.axes(zeros, None),
        )  # fmt: skip
        x = embed(images)
        batch, rows, columns, _ = x.shape
        first = self.param("cls", layout.axes(normal, None, None, None), (1, 1, cfg.width))
        axes = layout.axes(normal, None, None, "embed")
        positions = self.param("pos", axes, (1, 1 + cfg.grid**2, cfg.width))
        first = jnp.broadcast_to(first.astype(dtype), (batch, 1, cfg.width))
        x = jnp.concatenate([first, x.reshape(batch, -1, cfg.width)], axis=1)
        x = x + interpolate(positions, rows, columns).astype(dtype)
        compute = dataclasses.replace(self.compute, remat="none")  # It has no backward pass.
        carry, sequence = ((x,), None, jnp.int32(0)), order.full(patches=x.shape[1])
        (x,), *_ = stack(cfg.blocks, compute, carry, (None,) * 3, sequences=(sequence,))
        return Norm("affine", cfg.norm_eps, name="norm")(x.astype(jnp.float32))


def interpolate(positions, rows: int, columns: int):
    """Positions [1, 1 + side^2, D] of a square grid -> float32 [1, 1 + rows * columns, D].

    Bicubic, in the convention of PyTorch (a = -0.75, no antialiasing, centres of pixels aligned);
    the class token's stays. An equal grid comes out as it is.
    """
    positions = positions.astype(jnp.float32)
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[0, 1:].reshape(side, side, -1)
    weights = _cubic(rows, side), _cubic(columns, side)
    grid = jnp.einsum("ia,jb,abd->ijd", *weights, grid, precision="highest")
    return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


def _cubic(new: int, old: int) -> np.ndarray:
    """[new, old]: the weights of the old positions at each new one (Keys 1981, with a = -0.75)."""
    a, place = -0.75, (np.arange(new) + 0.5) * (old / new) - 0.5
    low = np.floor(place).astype(int)
    out = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        t = np.abs(place - low - offset)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * (t**3 - 5 * t**2 + 8 * t - 4)
        index = np.clip(low + offset, 0, old - 1)  # Beyond the border its value goes on.
        np.add.at(out, (np.arange(new), index), np.where(t <= 1, near, far))
    return out.astype(np.float32)


def features(params, cfg: DINOv2Config, compute: Compute, images) -> jax.Array:
    """Images [B, H, W, 3] in [-1, 1] -> float32 [B, 1 + P, D]: the class token's, then patches'.

    Args:
        images: H and W multiples of the patch size; there are positions for 518 x 518 pixels in
            published models, and they are interpolated for others.

    Raises:
        ValueError: a side is no multiple of the patch size.
    """
    if images.shape[1] % cfg.patch_size or images.shape[2] % cfg.patch_size:
        raise ValueError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels: DINOv2 takes multiples of "
            f"{cfg.patch_size}"
        )
    mean, std = (jnp.asarray(x)[None, None, None] for x in (MEAN, STD))
    x = ((images.astype(jnp.float32) + 1) / 2 - mean) / std
    return DINOv2(cfg, compute).apply({"params": params}, x)


def patch_features(params, cfg: DINOv2Config, compute: Compute, images) -> jax.Array:
    """What is where: the features of patches, [B, P, D], row after row; see `features`."""
    return features(params, cfg, compute, images)[:, 1:]


def shapes(cfg: DINOv2Config):
    """The shapes of the parameters, in boxes with their axes."""
    images = jax.ShapeDtypeStruct((1, cfg.patch_size, cfg.patch_size, 3), jnp.float32)
    return jax.eval_shape(DINOv2(cfg).init, jax.random.key(0), images)["params"]
