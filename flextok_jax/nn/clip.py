"""CLIP: texts and images to vectors of one space (docs/reference.md, Text encoders).

Radford et al., arXiv 2103.00020. The cosine of a text's and an image's vector says how well they
fit; times exp(logit_scale) it is CLIP's logit, and PickScore's score with PickScore's parameters.

B texts or images, D width of a tower, P channels of the common space.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn import layout, order
from flextok_jax.nn.block import Linear, Norm, normal, stack, xavier
from flextok_jax.nn.config import Blocks, Compute

# Of the colours in 0..1 that it was trained on.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Tower:
    """One of CLIP's two Transformers.

    Attributes:
        width: D.
        depth: number of blocks.
        num_heads: attention heads, each D / num_heads wide.
        mlp_hidden: hidden width of the MLPs.
        mlp: "quick_gelu" (OpenAI) or "gelu" (LAION's H).
        norm_eps: epsilon of every LayerNorm.
    """

    width: int
    depth: int
    num_heads: int
    mlp_hidden: int
    mlp: str = "quick_gelu"
    norm_eps: float = 1e-5

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
            mlp=self.mlp,
            bias=True,
        )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """A CLIP; the defaults are ViT-B/32's.

    Attributes:
        text, vision: the towers.
        projection: P.
        vocab_size: ids; the highest one ends a text.
        num_positions: ids of a text at most.
        image_size: side of its images in pixels.
        patch_size: pixels per patch side.
    """

    text: Tower = Tower(512, 12, 8, 2048)
    vision: Tower = Tower(768, 12, 12, 3072)
    projection: int = 512
    vocab_size: int = 49408
    num_positions: int = 77
    image_size: int = 224
    patch_size: int = 32

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2


class TextTower(nn.Module):
    """Ids int32 [B, T], padded behind their end in any way -> float32 [B, P], of length 1."""

    cfg: CLIPConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, ids):
        cfg, tower, length = self.cfg, self.cfg.text, ids.shape[1]
        axes = layout.axes(normal, "vocab", "embed")
        x = self.param("embed", axes, (cfg.vocab_size, tower.width))[ids]
        axes = layout.axes(normal, None, "embed")
        x = x + self.param("pos", axes, (cfg.num_positions, tower.width))[None, :length]
        x = _blocks(tower, self.compute, x, order.causal(text=length))
        # Each position knows those before it: the end of the text is told by its first end.
        x = jnp.take_along_axis(x, jnp.argmax(ids, axis=1)[:, None, None], axis=1)[:, 0]
        return _project(x, tower, cfg)


class VisionTower(nn.Module):
    """Normalised images [B, S, S, 3] -> float32 [B, P], of length 1."""

    cfg: CLIPConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images):
        cfg, tower, dtype = self.cfg, self.cfg.vision, jnp.dtype(self.compute.dtype)
        size = (cfg.patch_size, cfg.patch_size)
        embed = nn.Conv(
            tower.width, size, size, padding="VALID", use_bias=False, dtype=dtype,
            name="patch_emb", kernel_init=layout.axes(xavier, None, None, None, "embed"),
        )  # fmt: skip
        x = embed(images)
        x = x.reshape(x.shape[0], -1, tower.width)
        first = self.param("cls", layout.axes(normal, None), (tower.width,)).astype(dtype)
        first = jnp.broadcast_to(first[None, None], (x.shape[0], 1, tower.width))
        x = jnp.concatenate([first, x], axis=1)
        axes = layout.axes(normal, None, "embed")
        positions = self.param("pos", axes, (1 + cfg.num_patches, tower.width))
        x = x + positions.astype(dtype)[None]
        x = Norm("affine", tower.norm_eps, name="pre_norm")(x)
        x = _blocks(tower, self.compute, x, order.full(patches=x.shape[1]))
        return _project(x[:, 0], tower, cfg)


def _blocks(tower: Tower, compute: Compute, x, sequence):
    compute = dataclasses.replace(compute, remat="none")  # It has no backward pass.
    carry = ((x.astype(compute.dtype),), None, jnp.int32(0))
    (x,), *_ = stack(tower.blocks, compute, carry, (None,) * 3, sequences=(sequence,))
    return x


def _project(x, tower: Tower, cfg: CLIPConfig):
    """[B, D] -> float32 [B, P] of length 1, after a norm."""
    x = Norm("affine", tower.norm_eps, name="norm")(x.astype(jnp.float32))
    x = Linear(cfg.projection, ("embed", None), jnp.float32, name="proj")(x)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def text_features(params, cfg: CLIPConfig, compute: Compute, ids) -> jax.Array:
    """Vectors of texts: int32 [B, T], T at most `num_positions` -> float32 [B, P], of length 1."""
    return TextTower(cfg, compute).apply({"params": params["text"]}, ids)


def pixel_features(params, cfg: CLIPConfig, compute: Compute, pixels) -> jax.Array:
    """Vectors of images that are resized and normalised: [B, S, S, 3] -> float32 [B, P]."""
    return VisionTower(cfg, compute).apply({"params": params["vision"]}, pixels)


def image_features(params, cfg: CLIPConfig, compute: Compute, images) -> jax.Array:
    """Vectors of images: [B, H, W, 3] in [-1, 1], of any size -> float32 [B, P], of length 1.

    They are resized in floating point; the original rounds to 8 bits, which changes cosines
    between images and texts by 5e-4 to 3e-3.
    """
    return pixel_features(params, cfg, compute, preprocess(images, cfg.image_size))


def preprocess(images, size: int) -> jax.Array:
    """Images [B, H, W, 3] in [-1, 1] -> normalised [B, size, size, 3].

    The short side becomes `size`, bicubic with antialiasing (a = -0.5), then the middle is kept.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    sides = size * height // short, size * width // short
    x = (jnp.clip(images.astype(jnp.float32), -1, 1) + 1) / 2
    x = jax.image.resize(x, (x.shape[0], *sides, 3), "cubic", antialias=True)
    top, left = ((side - size) // 2 for side in sides)
    x = jnp.clip(x[:, top : top + size, left : left + size], 0, 1)
    mean, std = (jnp.asarray(value)[None, None, None] for value in (MEAN, STD))
    return (x - mean) / std


def init(cfg: CLIPConfig, key: jax.Array) -> dict:
    """Random parameters {"text", "vision", "logit_scale"}, in boxes with their axes."""
    keys = jax.random.split(key)
    ids = jnp.zeros((1, 1), jnp.int32)
    pixels = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    return {
        "text": TextTower(cfg).init(keys[0], ids)["params"],
        "vision": VisionTower(cfg).init(keys[1], pixels)["params"],
        "logit_scale": jnp.float32(2.6592),  # log(1 / 0.07)
    }


def shapes(cfg: CLIPConfig):
    """The shapes of the parameters, in boxes with their axes."""
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))
