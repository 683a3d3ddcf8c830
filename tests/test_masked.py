"""Masked generation: the schedule, what a pass may change, and a plain loop beside it."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from common import relative
from test_ar import CLASS, logits, random_params, tokens

from flextok_jax import ImageGenerator
from flextok_jax.nn import ar, generation, masked
from flextok_jax.nn.config import Compute

MASKED = dataclasses.replace(CLASS, depth=1, masked=True)
L, V = MASKED.num_tokens, MASKED.vocab_size


@functools.cache
def generator():
    return ImageGenerator(MASKED, random_params(MASKED))


def test_every_position_sees_all_others_and_none_what_is_masked():
    params, ids = random_params(MASKED), tokens(MASKED)
    given = ar.ARCondition(np.arange(3, dtype=np.int32))
    known = np.where(np.arange(L) % 3 == 0, ar.SOS, ids)
    whole = np.asarray(logits(params, MASKED, Compute(), known, given))
    for changed in (4, L - 1):
        other = known.copy()
        other[:, changed] = (other[:, changed] + 1) % V
        found = np.asarray(logits(params, MASKED, Compute(), other, given))
        assert (np.abs(found - whole).max(axis=-1) > 1e-4).all()
    short = logits(params, MASKED, Compute(), known[:, :5], given)
    known[:, 5:] = ar.SOS
    assert relative(short, logits(params, MASKED, Compute(), known, given)[:, :5]) < 1e-5
    with pytest.raises(ValueError, match="group=2: a masked model has no groups"):
        dataclasses.replace(MASKED, group=2)


def test_each_pass_fills_what_the_cosine_says():
    fills = -np.diff((32, *masked.left(32, 8)))
    assert fills.tolist() == [3, 3, 2, 3, 3, 4, 4, 10]
    for unknown, passes in ((1, 8), (5, 8), (16, 1), (256, 8), (256, 256)):
        still = masked.left(unknown, passes)
        assert len(still) == min(unknown, passes) and still[-1] == 0
        assert (np.diff((unknown, *still)) < 0).all()


def test_training_hides_a_share_of_the_schedule():
    hidden = np.asarray(masked.draw(jax.random.key(0), 4096, 16))
    counts = hidden.sum(axis=1)
    assert counts.min() >= 1 and counts.max() == 16
    # E arccos(u) / (pi / 2) = 2 / pi; each place is hidden equally often.
    assert abs(counts.mean() / 16 - 2 / math.pi) < 0.02
    assert np.abs(hidden.mean(axis=0) - hidden.mean()).max() < 5 * (0.25 / 4096) ** 0.5


def plain(known, labels, scales, passes, temperature, seed):
    """The sampler, one sample and one pass after the other, in NumPy."""
    gen, found = generator(), known.copy()
    for row, key in enumerate(generation.sample_keys(seed, len(known))):
        still = masked.left(int((known[row] < 0).sum()), passes)
        for i, left in enumerate(still):
            x = np.asarray(gen.logits(found[row : row + 1], labels=labels[row : row + 1]))[0]
            u = np.asarray(gen.logits(found[row : row + 1]))[0]
            x = u + scales[:, None] * (x - u)
            t = temperature * (1 - (i + 1) / len(still))
            keys = jax.random.split(jax.random.fold_in(key, i), L + 1)
            noisy = x + t * np.stack([jax.random.gumbel(k, (V,)) for k in keys[1:]])
            ids = noisy.argmax(axis=-1)
            sure = x[np.arange(L), ids] + t * np.asarray(jax.random.gumbel(keys[0], (L,)))
            unknown = np.flatnonzero(found[row] < 0)
            again = unknown[np.argsort(sure[unknown])][:left]
            found[row, unknown] = ids[unknown]
            found[row, again] = ar.SOS
    return found


@pytest.mark.parametrize("given, temperature", ((0, 2.0), (5, 0.0)))
def test_generation_is_that_of_a_plain_loop(given, temperature):
    labels, scales = np.arange(3), np.linspace(0.5, 3.0, L).astype(np.float32)
    prefix = tokens(MASKED)[:, :given]
    known = np.full((3, L), ar.SOS, np.int32)
    known[:, :given] = prefix
    how = dict(guidance_scale=scales, temperature=temperature, passes=4, key=3, prefix=prefix)
    found = np.asarray(generator().generate_tokens(labels, **how))
    np.testing.assert_array_equal(found, plain(known, labels, scales, 4, temperature, 3))
    np.testing.assert_array_equal(found[:, :given], prefix)
    assert 0 <= found.min() and found.max() < V and len(np.unique(found)) > 5
    if temperature:
        other = generator().generate_tokens(labels, **how | {"key": 4})
        assert (np.asarray(other) != found).any()
        fewer = generator().generate_tokens(labels, **how, num_tokens=4)
        np.testing.assert_array_equal(fewer, found[:, :4])


def test_what_a_masked_model_cannot_do_is_refused():
    for passes in (0, 1.5):
        with pytest.raises(ValueError, match=f"passes={passes}"):
            generator().generate_tokens([0], passes=passes)
    ordered = ImageGenerator(CLASS, random_params(CLASS))
    with pytest.raises(ValueError, match="passes=4"):
        ordered.generate_tokens([0], passes=4)
    with pytest.raises(ValueError, match="-1"):
        ordered.logits([[3, -1]])
    with pytest.raises(ValueError, match="id -2 in tokens.*or -1"):
        generator().logits([[3, -2]])
