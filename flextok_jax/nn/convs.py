"""Residual convolutions between images and a coarse grid of features.

Two kinds (see `Convs`): "attentive", VQGAN (Esser et al., arXiv 2012.09841), of the parts of
nn/vae.py; and "plain" (Chang et al., arXiv 2202.04200), whose images are in [0, 1] inside.

Letters: B images, H, W pixels, h, w positions of the grid, D channels.
"""

import flax.linen as nn
import jax.numpy as jnp

from flextok_jax.nn import vae
from flextok_jax.nn.vae import Layers


class PlainResnet(Layers):
    """Pre-norm block without biases: [B, h, w, any] -> [B, h, w, features].

    Where the channels change, a 1x1 convolution of the block's own result takes the place of its
    input in the sum: such a block is no residual one.
    """

    features: int = 0

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, "conv1", bias=False)(nn.silu(self.norm("norm1")(x)))
        y = self.conv(self.features, "conv2", bias=False)(nn.silu(self.norm("norm2")(y)))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, "conv_shortcut", kernel=1, padding=0, bias=False)(y)
        return x + y


class _Parts(Layers):
    """What encoder and decoder share."""

    def resnet(self, features, name):
        plain = self.cfg.kind == "plain"
        return self.part(PlainResnet if plain else vae.Resnet, name, features)

    def level(self, x, i, layers):
        """The residual blocks of resolution i, 0 is the finest."""
        for j in range(layers):
            x = self.resnet(self.cfg.block_out[i], f"level_{i}_resnet_{j}")(x)
            if self.cfg.kind == "attentive" and i == len(self.cfg.block_out) - 1:
                x = self.part(vae.Attention, f"level_{i}_attention_{j}")(x)
        return x

    def middle(self, x):
        x = self.resnet(x.shape[-1], "mid_0")(x)
        if self.cfg.kind == "attentive":
            x = self.part(vae.Attention, "mid_attention")(x)
        return self.resnet(x.shape[-1], "mid_1")(x)

    def pointwise(self, features):
        return self.conv(features, "pointwise", kernel=1, padding=0)


class ConvEncoder(_Parts):
    """Images [B, H, W, any] -> float32 [B, h, w, channels].

    Attributes:
        channels: of the result; of "plain" these are `cfg.features`.
    """

    channels: int = 0

    @nn.compact
    def __call__(self, x):
        cfg, plain = self.cfg, self.cfg.kind == "plain"
        x = (x + 1) / 2 if plain else x
        x = self.conv(cfg.block_out[0], "conv_in", bias=not plain)(x)
        for i in range(len(cfg.block_out)):
            x = self.level(x, i, cfg.layers)
            if i < len(cfg.block_out) - 1:
                down = self.part(vae.Downsample, f"down_{i}") if not plain else _halved
                x = down(x)
        x = nn.silu(self.norm("norm_out")(self.middle(x)))
        if plain:
            return self.conv(self.channels, "conv_out", kernel=1, padding=0)(x).astype(jnp.float32)
        x = self.conv(cfg.features, "conv_out")(x)
        return self.pointwise(self.channels)(x).astype(jnp.float32)


class ConvDecoder(_Parts):
    """Features [B, h, w, any] -> images float32 [B, H, W, channels]."""

    channels: int = 3

    @nn.compact
    def __call__(self, x):
        cfg, plain = self.cfg, self.cfg.kind == "plain"
        x = x if plain else self.pointwise(cfg.features)(x)
        x = self.middle(self.conv(cfg.block_out[-1], "conv_in")(x))
        for i in reversed(range(len(cfg.block_out))):
            x = self.level(x, i, cfg.layers + (not plain))
            if i > 0:
                x = self.part(vae.Upsample, f"up_{i}")(x)
        x = nn.silu(self.norm("norm_out")(x))
        x = self.conv(self.channels, "conv_out")(x).astype(jnp.float32)
        return 2 * x - 1 if plain else x


def _halved(x):
    """Means of 2x2 positions: [B, h, w, D] -> [B, h/2, w/2, D]."""
    return nn.avg_pool(x, (2, 2), (2, 2))
