"""A flow over token vectors: its source, its guidance, a plain loop beside it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from common import relative
from test_ar import CLASS, TEXT, condition, random_params

from flextok_jax import ImageGenerator
from flextok_jax.nn import ar, generation, layout, token_flow, vae
from flextok_jax.nn.config import Compute

CHANGES = dict(vocab_size=0, channels=3, depth=1, scale=2.5)
NOISE, SPOKEN = (dataclasses.replace(cfg, **CHANGES) for cfg in (CLASS, TEXT))
BOTH = pytest.mark.parametrize("cfg", (NOISE, SPOKEN), ids=("class", "text"))
K, F = NOISE.num_tokens, NOISE.channels


@functools.cache
def generator(cfg):
    return ImageGenerator(cfg, random_params(cfg))


def fresh(cfg):
    return layout.unbox(ar.init(cfg, jax.random.key(0)))


def asked(cfg):
    """Arguments for three samples."""
    given = condition(cfg)
    if cfg.text_dim:
        return {"text_embeddings": given.text, "text_mask": given.text_mask}
    return {"labels": given.labels}


def start(cfg, params, temperature, seed):
    """Where a plain loop begins: float32 [3, K, F]."""
    keys = generation.sample_keys(seed, 3)
    x = temperature * np.stack([jax.random.normal(key, (K, F)) for key in keys])
    if cfg.text_dim:
        mean, logvar = token_flow.source(params, cfg, Compute(), condition(cfg))
        assert np.ptp(mean, axis=0).max() > 0.01  # Texts differ.
        x = np.asarray(mean + np.exp(logvar / 2) * x)
    return x


@BOTH
def test_a_new_model_writes_its_source(cfg):
    params = fresh(cfg)
    found = ImageGenerator(cfg, params).generate_tokens(**asked(cfg), key=5, temperature=0.7)
    assert relative(found, cfg.scale * start(cfg, params, 0.7, 5)) < 1e-5


@BOTH
def test_generation_is_that_of_a_plain_loop(cfg):
    gen, scales = generator(cfg), np.linspace(0.5, 3.0, K).astype(np.float32)
    how = asked(cfg) | dict(passes=4, key=3, temperature=0.5)
    found = np.asarray(gen.generate_tokens(**how, guidance_scale=scales))
    x, labels = start(cfg, gen.params, 0.5, 3), np.arange(3)
    for i in range(4):
        t = np.full(1, 1 - i / 4, np.float32)
        given, null = (
            np.asarray(token_flow.velocity(gen.params, cfg, Compute(), x, t, some))
            for some in (0 * labels if cfg.text_dim else labels, np.full(3, -1))
        )
        x = x - (null + scales[None, :, None] * (given - null)) / 4
    assert relative(found, cfg.scale * x) < 1e-4
    plain = np.asarray(gen.generate_tokens(**how, guidance_scale=1))
    assert relative(plain, found) > 1e-2
    few = np.asarray(gen.generate_tokens(**how, guidance_scale=1, num_tokens=5))
    assert relative(few, plain[:, :5]) < 1e-5


def test_rows_without_condition_change_places():
    for null in ([0, 1, 0, 1, 1, 0], [0, 0, 1, 0], [1, 1], [0, 0, 0]):
        null = np.array(null, bool)
        found = np.asarray(token_flow.rolled(null))
        assert sorted(found) == list(range(len(null)))
        np.testing.assert_array_equal(found[~null], np.flatnonzero(~null))
        assert (found[null] != np.flatnonzero(null)).all() or null.sum() == 1
        assert null[found[null]].all()


@BOTH
def test_losses_of_a_new_model(cfg):
    size, rng = 300, np.random.default_rng(0)
    tokens = 1 + rng.normal(size=(size, K, F)).astype(np.float32)
    given = jax.tree.map(lambda x: np.repeat(x, size // 3, axis=0), condition(cfg))
    null, params = np.arange(size) % 2 == 0, fresh(cfg)
    args = cfg, Compute(), tokens, given, null, jax.random.key(1)
    found = token_flow.losses(params, *args)
    mean, variance, kl = 0.0, 1.0, np.zeros(size)
    if cfg.text_dim:
        mean, logvar = token_flow.source(params, cfg, Compute(), given)
        variance, kl = np.exp(logvar), vae.kl(mean, logvar)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5)
    # Of zero velocity the mean of (source - x0)^2; 5 standard errors of 10,800 numbers.
    x0 = tokens / cfg.scale
    wanted = np.mean(x0**2) + np.mean(mean**2 + variance) - 2 * np.mean(mean) * np.mean(x0)
    assert abs(np.mean(found.flow) - wanted) < 5 * 1.5 * wanted / (size * K * F) ** 0.5


def test_what_a_flow_cannot_do_is_refused():
    gen = generator(NOISE)
    null = np.ones((1, 2, 24), np.float32)
    for how, message in (
        (dict(top_k=3), "top_k=3"),
        (dict(top_p=0.5), "top_p=0.5"),
        (dict(prefix=np.zeros((1, 2), int)), r"shape \(1, 2\)"),
        (dict(prefix=np.zeros((1, 0), int), passes=0), "passes=0"),
        (dict(null_embeddings=null), "null_embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            gen.generate_tokens(**{"labels": [0], **how})
    with pytest.raises(ValueError, match="a flow: null_embeddings"):
        generator(SPOKEN).generate_tokens(**asked(SPOKEN), null_embeddings=null)
    with pytest.raises(ValueError, match="without logits"):
        gen.logits([[1]])
    for changes in ({"vocab_size": 5}, {"group": 2}, {"masked": True}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="channels=3|scale=0"):
            dataclasses.replace(NOISE, **changes)
