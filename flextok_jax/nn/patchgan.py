"""A discriminator of patches: each output classifies a part of the image as real or made.

Isola et al., arXiv 1611.07004 (PatchGAN): 4x4 convolutions that halve the resolution, then two that
keep it. Where they use batch normalisation, here is GroupNorm: it needs no running state (the
discriminator stays a pure function of its parameters), and the logits of an image do not depend on
which others are in the batch, on which device, or whether they are real or made.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

_NORMAL = nn.initializers.normal(0.02)  # Standard deviation as in the paper.


class PatchGAN(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> logits float32 [B, h, w, 1], h about H / 2^layers.

    Attributes:
        width: channels of the first layer; they double with each layer, up to 8 times.
        layers: how many halve the resolution. With 3, an output sees 70 x 70 pixels.
        dtype: of the convolutions. Parameters, norms and results are float32.
    """

    width: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        def conv(x, features, stride, name, bias=True):
            options = {"padding": 1, "dtype": self.dtype, "kernel_init": _NORMAL, "name": name}
            return nn.Conv(features, (4, 4), stride, use_bias=bias, **options)(x)

        x = nn.leaky_relu(conv(images, self.width, 2, "conv_0"), 0.2)
        for i in range(1, self.layers + 1):
            features = self.width * 2 ** min(i, 3)
            x = conv(x, features, 2 if i < self.layers else 1, f"conv_{i}", False)
            # 32 groups, or as many as divide; the variance about the mean, as in the VAE.
            options = {"dtype": jnp.float32, "use_fast_variance": False, "name": f"norm_{i}"}
            x = nn.GroupNorm(math.gcd(features, 32), **options)(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(x, 1, 1, "conv_out").astype(jnp.float32)
