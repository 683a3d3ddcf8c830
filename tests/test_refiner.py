"""Coarse ids, then all ids from them: the map, one distribution of both steps, generation."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from test_ar import CLASS, TEXT, condition, random_params, tokens

from flextok_jax import ImageGenerator
from flextok_jax.nn import ar, fsq, generation, refiner
from flextok_jax.nn.config import Compute

FIELDS = dict(vocab_size=60, levels=(5, 4, 3), coarse=(2, 2, 1), depth=1)
COARSE = dataclasses.replace(CLASS, **FIELDS)
FIRST = dataclasses.replace(COARSE, vocab_size=COARSE.num_ids, levels=(), coarse=())
L, V = COARSE.num_tokens, COARSE.vocab_size
logits = jax.jit(refiner.logits, static_argnames=("cfg", "compute"))


@functools.cache
def generator():
    return ImageGenerator(COARSE, random_params(COARSE))


def test_a_coarse_id_is_a_cell_of_neighbouring_levels():
    cells = refiner.cells(COARSE)
    assert COARSE.num_ids == 3 * 2 * 3 and set(cells) == set(range(18))
    codes = np.asarray(fsq.indices_to_codes(np.arange(V), COARSE.levels))
    for cell in range(18):
        spread = np.ptp(codes[cells == cell], axis=0)
        assert (spread <= np.array([1, 1, 0]) / np.array([2, 2, 1])).all()
    for i in range(V):
        a, b, c = i % 5, i // 5 % 4, i // 20
        assert cells[i] == a // 2 + 3 * (b // 2) + 6 * c
    fine = dataclasses.replace(COARSE, coarse=(1, 1, 1))
    np.testing.assert_array_equal(refiner.cells(fine), np.arange(V))
    assert not refiner.cells(dataclasses.replace(COARSE, coarse=(5, 4, 3))).any()


@pytest.mark.parametrize("base", (CLASS, TEXT), ids=("class", "text"))
def test_both_steps_are_one_distribution(base):
    cfg = dataclasses.replace(base, **FIELDS)
    params, ids, given = random_params(cfg), tokens(cfg), condition(cfg)
    found = np.asarray(logits(params, cfg, Compute(), ids, given))
    cells = refiner.cells(cfg)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, rtol=1e-5)
    first = dataclasses.replace(cfg, vocab_size=18, levels=(), coarse=())
    coarse = np.asarray(ar.logits(params, first, Compute(), cells[ids], given), np.float64)
    coarse -= np.log(np.exp(coarse).sum(axis=-1, keepdims=True))
    for cell in range(18):  # All ids of a cell are as likely as the cell.
        together = np.log(np.exp(found[..., cells == cell]).sum(axis=-1))
        np.testing.assert_allclose(together, coarse[..., cell], atol=1e-4)
    # A later id changes no coarse prediction, and within cells all others.
    other = ids.copy()
    other[:, 7] = (other[:, 7] + 2) % 5 + other[:, 7] // 5 * 5
    assert (cells[other] != cells[ids]).any(axis=1).all()
    changed = np.asarray(logits(params, cfg, Compute(), other, given))
    assert (np.abs(changed - found)[:, :7].max(axis=-1) > 1e-5).all()
    again = np.stack([np.exp(changed[..., cells == c]).sum(axis=-1) for c in range(18)], axis=-1)
    np.testing.assert_allclose(np.log(again[:, :8]), coarse[:, :8], atol=1e-4)


def test_cells_of_one_id_leave_nothing_to_refine():
    cfg = dataclasses.replace(COARSE, coarse=(1, 1, 1))
    first = dataclasses.replace(cfg, levels=(), coarse=())
    params, ids = random_params(cfg), tokens(cfg)
    wanted = jax.nn.log_softmax(ar.logits(params, first, Compute(), ids, condition(cfg)))
    found = logits(params, cfg, Compute(), ids, condition(cfg))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("given, temperature", ((0, 1.0), (5, 0.0)))
def test_generation_is_that_of_a_plain_loop(given, temperature):
    gen, cells, labels = generator(), refiner.cells(COARSE), np.arange(3)
    scales = np.linspace(0.5, 3.0, L).astype(np.float32)
    prefix = tokens(COARSE)[:, :given]
    how = dict(guidance_scale=scales, temperature=temperature, key=3)
    found = np.asarray(gen.generate_tokens(labels, prefix=prefix, **how))
    first = ImageGenerator(FIRST, gen.params)
    coarse = np.asarray(first.generate_tokens(labels, prefix=cells[prefix], **how))
    np.testing.assert_array_equal(cells[found], coarse)
    np.testing.assert_array_equal(found[:, :given], prefix)
    some = np.array([np.flatnonzero(cells == c)[0] for c in range(18)])[coarse]  # Of these cells.
    (x, u) = (np.asarray(gen.logits(some, labels=c)) for c in (labels, None))
    noise = np.zeros_like(x)
    if temperature:
        for i in range(L):
            keys = jax.vmap(jax.random.fold_in, (0, None))(generation.sample_keys(3, 3), L + i)
            noise[:, i] = jax.vmap(lambda k: jax.random.gumbel(k, (V,)))(keys)
    inside = cells == coarse[..., None]
    # Within a cell logits differ from those of the refiner by one number.
    scores = np.where(inside, u + scales[:, None] * (x - u) + temperature * noise, -math.inf)
    np.testing.assert_array_equal(found[:, given:], scores.argmax(axis=-1)[:, given:])
    fewer = gen.generate_tokens(labels, prefix=prefix, num_tokens=7, **how)
    np.testing.assert_array_equal(fewer, found[:, :7])
    assert len(np.unique(found)) > 5


def test_what_a_model_with_coarse_ids_cannot_do_is_refused():
    with pytest.raises(ValueError, match="k in 12..12"):
        generator().logits(tokens(COARSE)[:, :5])
    with pytest.raises(ValueError, match="passes=4"):
        generator().generate_tokens([0], passes=4)
    for changes in ({"levels": (5, 4)}, {"levels": (5, 4, 4)}, {"masked": True}):
        with pytest.raises(ValueError, match="coarse="):
            dataclasses.replace(COARSE, **changes)
