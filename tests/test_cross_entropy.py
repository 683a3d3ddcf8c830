"""The chunked cross-entropy is the plain one, in value and gradient, with less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.nn.cross_entropy import cross_entropy

B, L, D, V = 3, 10, 8, 50
WEIGHTS = np.random.RandomState(0).standard_normal((2, B, L)).astype(np.float32)


def problem(length=L, vocab=V):
    kernel, hidden = jax.random.normal(jax.random.key(0), (D, vocab)), jax.random.key(1)
    hidden = jax.random.normal(hidden, (B, length, D))
    return kernel, hidden, jax.random.randint(jax.random.key(2), (B, length), 0, vocab)


def plain(kernel, hidden, targets):
    """From the definition, in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return log_z - picked, log_z, logits.argmax(-1) == targets


def run(kernel, hidden, targets, chunk):
    return cross_entropy(lambda h: h @ kernel, hidden, targets, chunk)


def total(kernel, hidden, targets, chunk):
    """A scalar that no two positions enter alike: the loss and a z-loss, weighted."""
    out = run(kernel, hidden, targets, chunk)
    return jnp.sum(WEIGHTS[0] * out.loss) + jnp.sum(WEIGHTS[1] * out.log_z**2)


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 99])
def test_values_are_those_of_the_definition(chunk):
    args = problem()
    for ours, theirs in zip(run(*args, chunk), plain(*args), strict=True):
        assert ours.shape == (B, L)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_gradients_are_those_of_all_positions_at_once(chunk):
    args = problem()
    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=3)(*args, chunk)

    def at_once(kernel, hidden, targets):
        logits = hidden @ kernel
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        z = jax.nn.logsumexp(logits, -1)
        return jnp.sum(WEIGHTS[0] * loss) + jnp.sum(WEIGHTS[1] * z**2)

    expected_value, expected = jax.value_and_grad(at_once, (0, 1))(*args)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_large_logits_stay_finite():
    kernel, hidden, targets = problem()
    out = run(1e3 * kernel, hidden, targets, 3)
    assert np.isfinite(out.loss).all() and np.abs(out.log_z).max() > 1e3


def test_correct_means_that_the_target_has_the_largest_logit():
    kernel, hidden, _ = problem()
    best = jnp.argmax(hidden @ kernel, axis=-1)
    assert run(kernel, hidden, best, 3).correct.all()
    assert not run(kernel, hidden, (best + 1) % V, 3).correct.any()


def test_peak_memory_falls_with_the_chunk():
    args = problem(length=128, vocab=4096)

    def temporaries(chunk):
        def loss(kernel, hidden, targets):
            return jnp.mean(run(kernel, hidden, targets, chunk).loss)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = B * 128 * 4096 * 4
    assert temporaries(8) < logits / 4 < logits <= temporaries(128)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk=0"):
        run(*problem(), 0)
