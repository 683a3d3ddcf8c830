"""Inference compiles log2(R) + 1 programs for all numbers of tokens, and nothing beside them."""

import contextlib
import math

import jax
import numpy as np
import pytest
from common import TINY, changed, tiny_generator, tiny_tokenizer

from flextok_jax import FlexTok, conditions
from flextok_jax.evaluation import reconstruction
from flextok_jax.nn import flextok

CFG = changed(TINY, tokens__count=8, encoder__depth=1, decoder__depth=1)
LENGTHS = range(1, CFG.num_tokens + 1)
MOST = math.log2(CFG.num_tokens) + 1


@contextlib.contextmanager
def lowered():
    """The names of all functions that are lowered inside, also where a cache has the program."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer(CFG).save_pretrained(folder)
    with lowered() as programs:
        tok = FlexTok.from_pretrained(folder)
    assert len(programs) <= 1, programs
    return tok


def test_tokenize_and_detokenize(tok):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    tokens = np.asarray(tok.tokenize(images))
    tok.detokenize(tokens, steps=1, key=0)  # The noise's program.
    for call in (lambda k: tok.tokenize(images, k), lambda k: tok.registers(images, k),
                 lambda k: tok.detokenize(tokens, (k, 1), steps=1 + k % 3, key=0),
                 lambda k: tok.detokenize(tokens[:, :k], steps=1, key=0)):  # fmt: skip
        with lowered() as programs:
            for k in LENGTHS:
                np.asarray(call(k))
        assert len(programs) <= MOST, programs


def test_any_number_of_steps_is_one_program(tok):
    tokens, noise = np.arange(16).reshape(2, 8), np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    how = dict(noise=noise.astype(np.float32), solver="multistep")
    tok.detokenize(tokens, steps=1, **how)
    with lowered() as programs:
        found = [tok.detokenize(tokens, steps=steps, **how) for steps in (64, 65, 130)][-1]
    assert not programs
    codes = flextok.codes_of(tok.params, tok.config, tokens)
    sampler = tok.config.sampler_with(steps=130, solver="multistep")
    at_once = jax.jit(flextok.decode, static_argnums=(1, 2, 6))
    whole = at_once(tok.params, tok.config, tok.compute, codes, keep=np.array([8, 8]),
                    noise=how["noise"], how=sampler)  # fmt: skip
    np.testing.assert_array_equal(found, whole)  # Pixels are the latents of this model.


def test_a_last_batch_that_is_not_full(tok):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    gen, seeds = tiny_generator(CFG), np.arange(4, dtype=np.uint32)

    def run(count):
        tokens = reconstruction.encode(tok, images[:count], 4, batch_size=4)
        how = (4, seeds[:count], tok.config.sampler, 0, 4)
        reconstruction.decode(tok, tokens, *how)
        labels = conditions.of_labels(seeds[:count])
        reconstruction.sample_tokens(gen, labels, seeds[:count], 4, {}, 0, batch_size=4)

    run(4)
    with lowered() as programs:
        for count in (3, 1):
            run(count)
    assert not programs


def test_generate():
    gen = tiny_generator(CFG)
    gen.generate([0, 1], key=0, steps=1)
    with lowered() as programs:
        for k in LENGTHS:
            np.asarray(gen.generate([0, 1], num_tokens=k, key=0, steps=1))
    assert len(programs) <= MOST, programs
