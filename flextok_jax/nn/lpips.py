"""LPIPS: the distance of two images as the weighted difference of VGG16's features.

Zhang et al., arXiv 1801.03924, in the version 0.1 of its weights: the features after the last ReLU
of each of the five resolutions, scaled to unit length over the channels at each position, their
squared difference weighted per channel by a learned linear head, averaged over positions, summed.

Parameter paths are the names in published files, split at the dots: `features_0` are torchvision's
`features.0` of VGG16, `lin0/model_1` the package's `lin0.model.1`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# The convolutions of VGG16: channels, per resolution.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# [-1, 1] -> the standardised colours that VGG16 was trained on (constants of version 0.1).
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Images [B, H, W, 3] in [-1, 1], twice -> distance float32 [B], 0 for equal images.

    H and W are at least 16. Parameters are used as they are given: there is nothing to train.

    Attributes:
        dtype: of the convolutions. Lengths, differences and means are float32.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, a, b):
        shift, scale = (jnp.asarray(x)[None, None, None] for x in (SHIFT, SCALE))
        x = (jnp.concatenate([a, b]) - shift) / scale
        total, index = 0.0, 0
        for level, widths in enumerate(VGG16):
            if level:
                x, index = nn.max_pool(x, (2, 2), strides=(2, 2)), index + 1
            for features in widths:
                options = {"padding": 1, "dtype": self.dtype, "name": f"features_{index}"}
                x = nn.relu(nn.Conv(features, (3, 3), **options)(x))
                index += 2  # torchvision counts the ReLUs too.
            ours, theirs = jnp.split(_unit(x.astype(jnp.float32)), 2)
            head = _Head(name=f"lin{level}")(jnp.square(ours - theirs))
            total = total + jnp.mean(head, axis=(1, 2, 3))
        return total


class _Head(nn.Module):
    """[B, h, w, D] -> [B, h, w, 1]: one non-negative weight per channel, in published files."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(1, (1, 1), use_bias=False, dtype=jnp.float32, name="model_1")(x)


def _unit(x):
    """x / (|x| + 1e-10) over the last axis. Where x is 0, so are the result and the gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    some = square > 0
    return x / (jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0) + 1e-10)


def shapes():
    """The shapes of the parameters."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]


def lpips(params, a, b, dtype=jnp.float32):
    """The distance of each pair: images [B, H, W, 3] in [-1, 1] twice -> float32 [B]."""
    return LPIPS(dtype).apply({"params": params}, a, b)
