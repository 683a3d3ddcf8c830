"""A flow over token vectors: its source, its guidance, a plain loop beside it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from common import relative
from scipy.special import log_softmax
from scipy.stats import norm
from test_ar import CLASS, TEXT, condition, random_params

from flextok_jax import ImageGenerator
from flextok_jax.nn import ar, generation, layout, token_flow
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


def test_texts_are_kept_wide_and_apart():
    rng = np.random.default_rng(0)
    mean, logvar, samples = rng.normal(size=(3, 4, K, F)).astype(np.float32)
    found = token_flow.source_loss(mean, logvar, samples)
    density = norm.logpdf(samples[:, None], mean, np.exp(logvar / 2)).sum((2, 3))
    width = 0.5 * np.sum((0.3 * mean) ** 6 + np.exp(logvar) - 1 - logvar, axis=(1, 2))
    np.testing.assert_allclose(found, width - np.diag(log_softmax(density, axis=1)), rtol=1e-4)
    same = np.zeros_like(mean)  # One text: every sample may be of each of them.
    np.testing.assert_allclose(token_flow.source_loss(same, same, samples), np.log(4), rtol=1e-5)
    pull = jax.grad(lambda x: token_flow.source_loss(x, same, x + samples).sum())(same)
    assert np.abs(pull).max() > 0.1
    assert np.abs(pull.sum(0)).max() < 1e-5  # Equal texts do not push each other away.


@BOTH
def test_losses_of_a_new_model(cfg):
    size, rng = 300, np.random.default_rng(0)
    tokens = 1 + rng.normal(size=(size, K, F)).astype(np.float32)
    given = jax.tree.map(lambda x: np.repeat(x, size // 3, axis=0), condition(cfg))
    null, params = np.arange(size) % 2 == 0, fresh(cfg)
    args = cfg, Compute(), tokens, given, null, jax.random.key(1)
    found = token_flow.losses(params, *args)
    mean, variance, source = 0.0, 1.0, np.zeros(size)
    if cfg.text_dim:
        mean, logvar = token_flow.source(params, cfg, Compute(), given)
        variance, (_, noises) = np.exp(logvar), jax.random.split(jax.random.key(1))
        samples = mean + np.sqrt(variance) * jax.random.normal(noises, tokens.shape)
        source = token_flow.source_loss(mean, logvar, samples)
    np.testing.assert_allclose(found.source, source, rtol=1e-5)
    # Of zero velocity the mean of (source - x0)^2; 5 standard errors of 10,800 numbers.
    x0 = tokens / cfg.scale
    wanted = np.mean(x0**2) + np.mean(mean**2 + variance) - 2 * np.mean(mean) * np.mean(x0)
    assert abs(np.mean(found.flow) - wanted) < 5 * 1.5 * wanted / (size * K * F) ** 0.5


@pytest.mark.parametrize("shift", (1.0, 9.0))
def test_the_time_shift_moves_the_times_towards_the_source(shift):
    params, labels = random_params(NOISE), np.arange(6) % 3
    x0 = np.random.default_rng(0).normal(size=(6, K, F)).astype(np.float32)
    args = condition(NOISE)._replace(labels=labels), np.zeros(6, bool), jax.random.key(1)
    found = token_flow.losses(params, NOISE, Compute(), NOISE.scale * x0, *args, shift)
    times, noises = jax.random.split(jax.random.key(1))
    t = jax.nn.sigmoid(jax.random.normal(times, (6,)))
    t, noise = shift * t / (1 + (shift - 1) * t), jax.random.normal(noises, x0.shape)
    x = t[:, None, None] * noise + (1 - t[:, None, None]) * x0
    error = token_flow.velocity(params, NOISE, Compute(), x, t, labels) - (noise - x0)
    np.testing.assert_allclose(found.flow, np.mean(error**2, axis=(1, 2)), rtol=1e-4)


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
