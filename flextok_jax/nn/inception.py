"""InceptionV3 as the Fréchet distance uses it: the network of 2015-12-05 with 1008 classes.

Szegedy et al., arXiv 1512.00567, with what is particular to the published weights, which FID,
Inception score, precision and recall are measured with everywhere: images are resized as
TensorFlow 1 did it (no antialiasing, the first pixels of both grids coincide), averages of 3 x 3
leave out what lies beyond the border, and the last block takes a maximum in place of an average.

Parameter paths are the names in published files, split at the dots, with `kernel` for the weight
of a convolution or of the classifier. Everything is computed in float32, on every device.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # Pixels per side.
FEATURES, CLASSES = 2048, 1008


class InceptionV3(nn.Module):
    """Images [B, 299, 299, 3], (colour - 128) / 128 -> (features [B, 2048], logits [B, 1008]).

    The logits are without their bias: so the Inception score is defined by its first code and
    computed by the ADM evaluator and torch-fidelity.
    """

    @nn.compact
    def __call__(self, x):
        x = _Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = _Conv(80, name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, features in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _Grid35(features, name=f"Mixed_{name}")(x)
        x = _To17(name="Mixed_6a")(x)
        for name, features in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = _Grid17(features, name=f"Mixed_{name}")(x)
        x = _To8(name="Mixed_7a")(x)
        x = _Grid8(_average, name="Mixed_7b")(x)
        x = _Grid8(_maximum, name="Mixed_7c")(x)
        x = jnp.mean(x, axis=(1, 2))
        return x, nn.Dense(CLASSES, use_bias=False, precision="highest", name="fc")(x)


class _Conv(nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        options = dict(padding=self.padding, use_bias=False, precision="highest", name="conv")
        x = nn.Conv(self.features, self.kernel, self.stride, **options)(x)
        return nn.relu(_Norm(name="bn")(x))


class _Norm(nn.Module):
    """(x - running mean) / sqrt(running variance + 0.001) * weight + bias, per channel."""

    @nn.compact
    def __call__(self, x):
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        weight, bias, mean, var = (
            self.param(name, begin, x.shape[-1:])
            for name, begin in (
                ("weight", ones), ("bias", zeros), ("running_mean", zeros), ("running_var", ones),
            )
        )  # fmt: skip
        scale = weight * jax.lax.rsqrt(var + 1e-3)
        return (x - mean[None, None, None]) * scale[None, None, None] + bias[None, None, None]


def _average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x):
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _chain(x, *convolutions):
    """(name, features, kernel) after each other."""
    for name, features, kernel in convolutions:
        x = _Conv(features, kernel, name=name)(x)
    return x


class _Grid35(nn.Module):
    """A block on 35 x 35 positions."""

    pooled: int

    @nn.compact
    def __call__(self, x):
        one = _chain(x, ("branch1x1", 64, (1, 1)))
        five = _chain(x, ("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))
        three = _chain(
            x,
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        )
        pool = _chain(_average(x), ("branch_pool", self.pooled, (1, 1)))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class _To17(nn.Module):
    """From 35 x 35 to 17 x 17 positions."""

    @nn.compact
    def __call__(self, x):
        three = _Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        y = _chain(x, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)))
        y = _Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(y)
        return jnp.concatenate([three, y, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class _Grid17(nn.Module):
    """A block on 17 x 17 positions."""

    inner: int

    @nn.compact
    def __call__(self, x):
        c, across, down = self.inner, (1, 7), (7, 1)
        one = _chain(x, ("branch1x1", 192, (1, 1)))
        seven = _chain(
            x, ("branch7x7_1", c, (1, 1)), ("branch7x7_2", c, across), ("branch7x7_3", 192, down)
        )
        twice = _chain(
            x,
            ("branch7x7dbl_1", c, (1, 1)),
            ("branch7x7dbl_2", c, down),
            ("branch7x7dbl_3", c, across),
            ("branch7x7dbl_4", c, down),
            ("branch7x7dbl_5", 192, across),
        )
        pool = _chain(_average(x), ("branch_pool", 192, (1, 1)))
        return jnp.concatenate([one, seven, twice, pool], axis=-1)


class _To8(nn.Module):
    """From 17 x 17 to 8 x 8 positions."""

    @nn.compact
    def __call__(self, x):
        three = _chain(x, ("branch3x3_1", 192, (1, 1)))
        three = _Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = _chain(
            x,
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
        )
        seven = _Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class _Grid8(nn.Module):
    """A block on 8 x 8 positions; `pool` is what differs between the two of them."""

    pool: object

    @nn.compact
    def __call__(self, x):
        one = _chain(x, ("branch1x1", 320, (1, 1)))
        three = _chain(x, ("branch3x3_1", 384, (1, 1)))
        twice = _chain(x, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)))
        ends = [
            _chain(start, (f"{name}{end}", 384, kernel))
            for start, name in ((three, "branch3x3_2"), (twice, "branch3x3dbl_3"))
            for end, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        pool = _chain(self.pool(x), ("branch_pool", 192, (1, 1)))
        return jnp.concatenate([one, *ends, pool], axis=-1)


def resize(images):
    """[B, H, W, 3] -> float32 [B, 299, 299, 3], bilinearly as TensorFlow 1 did it."""
    x = jnp.asarray(images).astype(jnp.float32)
    for axis in (2, 1):
        size = x.shape[axis]
        place = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
        low = place.astype(np.int32)
        share = jnp.asarray((place - low).reshape([-1 if i == axis else 1 for i in range(4)]))
        first = jnp.take(x, low, axis)
        x = first + (jnp.take(x, np.minimum(low + 1, size - 1), axis) - first) * share
    return x


def features(params, images):
    """Features and logits for FID, precision, recall and the Inception score; see `InceptionV3`.

    Args:
        images: [B, H, W, 3], colours 0..255, of any size. Numbers that others can compare with are
            made of uint8.

    Returns:
        (features [B, 2048], logits without bias [B, 1008]), float32.
    """
    return InceptionV3().apply({"params": params}, (resize(images) - 128) / 128)


def shapes():
    """The shapes of the parameters."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]
