"""Bottlenecks: closed forms of every kind behind the one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.nn import bottleneck, layout
from flextok_jax.nn.tokenizer_config import Bottleneck

KINDS = {
    "fsq": Bottleneck("fsq", (8, 5, 5)),
    "vq": Bottleneck("vq", (), dim=3, size=7),
    "vq of any length": Bottleneck("vq", (), dim=3, size=7, normalize=False, commitment=2.0),
    "kl": Bottleneck("kl", (), dim=3),
    "none": Bottleneck("none", (), dim=3),
}


def made(cfg):
    params = layout.unbox(bottleneck.init(cfg, jax.random.key(0)))
    z = jax.random.normal(jax.random.key(1), (2, 4, bottleneck.features(cfg)))
    return params, z


@pytest.mark.parametrize("name", KINDS)
def test_tokens_give_the_codes_that_the_encoder_sent(name):
    cfg = KINDS[name]
    params, z = made(cfg)
    codes, ids, loss = bottleneck.quantize(params, cfg, z)
    assert codes.shape == (2, 4, cfg.code_dim) and codes.dtype == jnp.float32 and loss.shape == (2,)
    assert (ids is not None) == cfg.discrete == (cfg.vocab_size > 0)
    tokens = codes if ids is None else ids
    np.testing.assert_allclose(bottleneck.codes_of(params, cfg, tokens), codes, atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(bottleneck.quantize(params, cfg, z).codes ** 2))(z)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", ["vq", "vq of any length"])
def test_vq_takes_the_nearest_code_and_its_loss_is_the_formula(name):
    cfg = KINDS[name]
    params, z = made(cfg)
    book, z64 = (np.asarray(x, np.float64) for x in (params["codebook"], z))
    if cfg.normalize:
        book, z64 = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (book, z64))
    distance = np.linalg.norm(z64[:, :, None] - book, axis=-1)
    _, ids, loss = bottleneck.quantize(params, cfg, z)
    np.testing.assert_array_equal(ids, distance.argmin(-1))
    squares = (distance.min(-1) ** 2 / cfg.dim).mean(-1)
    np.testing.assert_allclose(loss, (1 + cfg.commitment) * squares, rtol=1e-4)
    # The commitment's gradient moves features, the rest of the loss the codebook.
    if not cfg.normalize:
        moved = jax.grad(lambda z: bottleneck.quantize(params, cfg, z).loss.sum())(z)
        expected = cfg.commitment * 2 * (z64 - book[distance.argmin(-1)]) / z64[0].size
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)
        straight = jax.grad(lambda z: bottleneck.quantize(params, cfg, z).codes.sum())(z)
        np.testing.assert_array_equal(straight, np.ones_like(straight))


def test_kl_is_zero_at_the_standard_normal_and_its_formula_elsewhere():
    cfg = KINDS["kl"]
    assert np.abs(bottleneck.quantize({}, cfg, jnp.zeros((2, 4, 6))).loss).max() == 0
    z = jnp.full((2, 4, 6), 0.5)
    found = bottleneck.quantize({}, cfg, z, noise=jnp.ones((2, 4, 3)))
    np.testing.assert_allclose(found.loss, 12 * 0.5 * (0.25 + np.exp(0.5) - 1 - 0.5), rtol=1e-6)
    np.testing.assert_allclose(found.codes, 0.5 + np.exp(0.25), rtol=1e-6)
    np.testing.assert_array_equal(bottleneck.quantize({}, cfg, z).codes, z[..., :3])


def test_none_is_the_identity():
    _, z = made(KINDS["none"])
    np.testing.assert_array_equal(bottleneck.quantize({}, KINDS["none"], z).codes, z)
