"""Short sequences equal long ones: prefixes of registers, and the folding identity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import TINY, random_params, relative, tiny_tokenizer

from flextok_jax.flow import sampler
from flextok_jax.nn import flextok
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition
from flextok_jax.training.distill_stage import student

R = TINY.num_tokens
KS = (1, 2, 7, R - 1, R)


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@functools.partial(jax.jit, static_argnames=("cfg", "how"))
def plain_latents(params, cfg, codes, keep, noise, how):
    """The full-length path: all R registers in every pass, the null pass too."""
    batch = noise.shape[0]
    conditions = [Condition(codes, keep, jnp.zeros(batch, bool))]
    if how.guided:
        conditions.append(Condition(codes, keep, jnp.ones(batch, bool)))

    def step(x, t, length, guided):
        # One pass at a time, each image with its own time.
        t, length = (jnp.broadcast_to(x, (batch,)) for x in (t, length))
        return tuple(
            flextok.velocities(params, cfg, Compute(), x, t, (c,), length=length)[0]
            for c in (conditions if guided else conditions[:1])
        )

    start, steps = sampler.start(noise), how.schedule()
    return sampler.integrate(step, start, steps, 0, how.steps, how.method).x


def plain_decode(tok, tokens, keep, noise, how):
    codes = flextok.codes_of(tok.params, tok.config, jnp.asarray(tokens))
    return plain_latents(tok.params, tok.config, codes, jnp.asarray(keep), noise, how)


@pytest.mark.parametrize("k", KS)
def test_first_registers_do_not_need_the_others(tok, images, k):
    assert relative(tok.registers(images, k), tok.registers(images)[:, :k]) < 1e-5
    np.testing.assert_array_equal(tok.tokenize(images, k), tok.tokenize(images)[:, :k])


def test_a_decoder_of_jumps_folds_as_others_do(images):
    jumping = tiny_tokenizer(student(TINY, steps=2, time_shift=0.5))
    tokens, noise = jumping.tokenize(images), jax.random.normal(jax.random.key(5), (3, 8, 8, 3))
    for keep in (3, (1, 7, R)):
        plain = plain_decode(
            jumping, tokens, np.broadcast_to(keep, (3,)), noise, jumping.config.sampler
        )
        assert relative(jumping.detokenize(tokens, keep, noise=noise), plain) < 1e-5


LATE = sampler.Sampler(3, 3.0, False, "multistep", guidance_interval=(0.0, 0.5))


@pytest.mark.parametrize(
    "keep, how",
    [(2, LATE)]
    + [
        (keep, sampler.Sampler(3, scale, normalized))
        for scale, normalized in [(1.0, False), (3.0, False), (7.5, True)]
        for keep in [*KS, (1, 7, R), (2, 2, 3)]
    ],
)
def test_folded_decoding_equals_the_plain_path(tok, images, keep, how):
    tokens = np.asarray(tok.tokenize(images))
    noise = jax.random.normal(jax.random.key(5), (3, 8, 8, 3))
    ours = tok.detokenize(tokens, keep, noise=noise, **dataclasses.asdict(how))
    keep = np.broadcast_to(np.asarray(keep, np.int32), (3,))
    plain = plain_decode(tok, tokens, keep, noise, how)
    assert relative(ours, plain) < 1e-5


def test_a_prefix_alone_equals_all_tokens_cut_to_it(tok, images):
    tokens = tok.tokenize(images)
    cut = tok.detokenize(tokens, 5, steps=2, key=1)
    np.testing.assert_array_equal(tok.detokenize(tokens[:, :5], steps=2, key=1), cut)


def test_shapes_follow_the_tokens():
    """The sequence lengths themselves: N + K, N + K + 1 and N + 1."""
    params, seen = random_params(TINY), []
    original = jax.nn.dot_product_attention

    def spy(q, k, v, *args, **options):
        seen.append(k.shape[1])
        return original(q, k, v, *args, **options)

    jax.nn.dot_product_attention = spy
    try:
        n, k = 16, 4
        jax.eval_shape(
            lambda p, x: flextok.encode(p, TINY, Compute(), x, k), params, jnp.zeros((1, 8, 8, 3))
        )
        assert max(seen) == n + k
        seen.clear()
        jax.eval_shape(
            lambda p, x: flextok.decode(
                p, TINY, Compute(), jnp.zeros((1, k, 3)), jnp.array([k]), x
            ),
            params,
            jnp.zeros((1, 8, 8, 3)),
        )
        assert sorted(set(seen)) == [n + 1, n + k + 1]
    finally:
        jax.nn.dot_product_attention = original
