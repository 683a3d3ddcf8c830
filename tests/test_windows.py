"""Overlapping patches: the unfolding by its definition, the sizes of the published model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.nn import windows
from flextok_jax.nn.tokenizer_config import Sites


@pytest.mark.parametrize("stride", (1, 2, 3, 4))
def test_windows_are_those_of_a_loop(stride):
    x = np.random.default_rng(0).standard_normal((2, 3 * stride, 2 * stride, 2))
    found, size = windows.unfold(jnp.asarray(x), stride), 2 * stride - 1
    padded = np.pad(x, ((0, 0), *[(stride // 2,) * 2] * 2, (0, 0)))
    assert found.shape == (2, 3, 2, size * size * 2)
    for row in range(3):
        for column in range(2):
            y, x = row * stride, column * stride
            window = padded[:, y : y + size, x : x + size]
            np.testing.assert_array_equal(found[:, row, column], window.reshape(2, -1).astype("f4"))


def test_an_image_of_256_pixels_becomes_grids_of_64_32_and_16():
    x, found = jax.ShapeDtypeStruct((1, 256, 256, 1), jnp.float32), []
    for stride in (4, 2, 2):
        x = jax.eval_shape(lambda x, s=stride: windows.unfold(x, s), x)
        found.append(x.shape[1:])
    assert found == [(64, 64, 49), (32, 32, 441), (16, 16, 3969)]


def test_strides_make_a_patch():
    for strides in ((4, 2), (-4, -4)):
        with pytest.raises(ValueError, match=r"strides=\(-?4, -?\d\).*patch_size=16"):
            Sites(patch_size=16, strides=strides)
