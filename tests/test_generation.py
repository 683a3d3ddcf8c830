"""Generation: the cache computes what a whole pass computes, and draws follow the softmax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from test_ar import CLASS, DOUBLING, FOLDED, GROUPS, PLAIN, TEXT, condition, logits, random_params

from flextok_jax import ImageGenerator
from flextok_jax.nn import ar, generation, order
from flextok_jax.nn.block import Block, Cache
from flextok_jax.nn.config import Compute
from flextok_jax.token_sampling import _in_order

L, V = CLASS.num_tokens, CLASS.vocab_size
SCALES = np.linspace(0.5, 3.0, L).astype(np.float32)
GROUPED = {"groups": (GROUPS, 10), "folded": (FOLDED, 10), "doubling": (DOUBLING, 3)}


@functools.cache
def generator(cfg=CLASS, dtype="float32"):
    return ImageGenerator(cfg, random_params(cfg), compute=Compute(dtype))


def keywords(cfg):
    """Conditions of three samples as `generate_tokens` takes them, and the null branch's."""
    given, null = condition(cfg), condition(cfg, batch=1, seed=9)
    if cfg.text_dim:
        return (
            {"text_embeddings": given.text, "text_mask": given.text_mask},
            {"null_embeddings": null.text, "null_mask": null.text_mask},
        )
    return ({"labels": given.labels} if cfg.num_classes else {}), {}


def recomputed(cfg, scales=None, seed=None):
    """Tokens by a whole pass per token: no cache, head on every position. Greedy without a seed."""
    gen, (given, null) = generator(cfg), keywords(cfg)
    tokens = np.zeros((3, cfg.num_tokens), np.int32)
    for i in range(cfg.num_tokens):
        found = np.asarray(gen.logits(tokens, **given))[:, i]
        if scales is not None:
            other = np.asarray(gen.logits(tokens, **null))[:, i]
            found = other + scales[i] * (found - other)
        if seed is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(generation.sample_keys(seed, 3), i)
            found += np.asarray(jax.vmap(lambda k: jax.random.gumbel(k, (V,)))(keys))
        tokens[:, i] = found.argmax(axis=-1)
    return tokens


@pytest.mark.parametrize("cfg", (CLASS, TEXT), ids=("class", "text"))
def test_cached_equals_recomputed(cfg):
    given, null = keywords(cfg)
    found = generator(cfg).generate_tokens(**given, **null, temperature=0, guidance_scale=SCALES)
    expected = recomputed(cfg, SCALES)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cfg, count", GROUPED.values(), ids=GROUPED)
def test_groups_of_tokens_are_those_of_a_plain_loop(cfg, count):
    given, null = keywords(cfg)
    scales = np.linspace(0.5, 3.0, cfg.num_tokens).astype(np.float32)
    run = functools.partial(
        generator(cfg).generate_tokens, **given, **null, guidance_scale=scales, key=7
    )
    whole = np.asarray(run())
    assert len(np.unique(whole)) > 5
    np.testing.assert_array_equal(whole, recomputed(cfg, scales, seed=7))
    # A prefix and a length that cut a group.
    np.testing.assert_array_equal(run(num_tokens=count), whole[:, :count])
    np.testing.assert_array_equal(run(prefix=whole[:, :count]), whole)


@pytest.mark.parametrize("cfg, positions", ((GROUPS, 12), (FOLDED, 3)), ids=("groups", "folded"))
def test_a_cache_holds_the_positions_of_the_blocks(cfg, positions):
    run = functools.partial(generation.open_state, cfg=cfg, compute=Compute(), length=L)
    prefix, labels = np.zeros((3, 0), np.int32), ar.ARCondition(np.arange(3))
    given = dict(condition=labels, null=None, prefix=prefix, start=0)
    state = jax.eval_shape(run, random_params(cfg), **given)
    assert state.caches[0].k.shape == (3, cfg.num_heads, positions, cfg.head_dim)


def test_cached_equals_recomputed_without_a_condition():
    found = generator(PLAIN).generate_tokens(prefix=np.zeros((3, 0)), temperature=0)
    np.testing.assert_array_equal(found, recomputed(PLAIN))


def test_features_through_the_cache_are_those_of_a_whole_pass():
    """Block by block, with room to spare and garbage beyond what is filled."""
    cfg, params = TEXT, random_params(TEXT)["ar"]
    layer = jax.tree.map(lambda p: p[0], params["blocks"])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 6, cfg.width)).astype(np.float32)
    text = rng.standard_normal((3, 4, cfg.width)).astype(np.float32)
    context = text, np.ones((3, 4), bool)
    whole_block = Block(cfg.blocks, Compute(), (order.causal(tokens=6),), cross=True)
    block = Block(cfg.blocks, Compute(), cross=True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(block, x, context, cache):
        carry = ((x,), None, jnp.int32(0))
        ((x,), *_), cache = block.apply({"params": layer}, carry, (None, context, cache))
        return x, cache

    whole, _ = run(whole_block, x, context, None)
    junk = 1e3 * jnp.ones((3, cfg.num_heads, 9, cfg.head_dim))
    parts, cache = [], Cache(junk, junk, None, jnp.int32(0))
    for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
        y, cache = run(block, part, context, cache)
        context = None, context[1]  # The cache has the text's keys and values now.
        parts.append(y)
    assert relative(np.concatenate(parts, axis=1), whole) < 1e-5
    assert int(cache.index) == 6


def test_the_cache_grows_without_an_effect(monkeypatch):
    expected = generator().generate_tokens([0, 1, 2], key=3)
    lengths = []
    grow = generation._grow
    monkeypatch.setattr(generation, "FIRST_LENGTH", 4)
    monkeypatch.setattr(generation, "_grow", lambda c, n: lengths.append(n) or grow(c, n))
    anew = functools.partial(generation.generate)  # No program of `generate` itself fits it.
    anew = jax.jit(anew, static_argnames=("cfg", "compute"))
    monkeypatch.setattr("flextok_jax.token_sampling._in_order", anew)
    np.testing.assert_array_equal(generator().generate_tokens([0, 1, 2], key=3), expected)
    assert sorted(set(lengths)) == [4, 8, 12]


def test_top_k_1_equals_greedy():
    gen = generator()
    greedy = gen.generate_tokens([0, 1, 2], temperature=0)
    np.testing.assert_array_equal(gen.generate_tokens([0, 1, 2], top_k=1, key=5), greedy)
    np.testing.assert_array_equal(gen.generate_tokens([0, 1, 2], top_p=1e-6, key=5), greedy)
    assert (np.asarray(gen.generate_tokens([0, 1, 2], key=5)) != np.asarray(greedy)).any()


def test_sampled_frequencies_agree_with_the_softmax():
    cfg = dataclasses.replace(CLASS, vocab_size=8)
    gen, count, temperature = ImageGenerator(cfg, random_params(cfg)), 4096, 1.7
    labels = np.full(count, 2)
    found = gen.generate_tokens(
        labels, num_tokens=2, temperature=temperature, top_k=6, guidance_scale=2.0, key=1
    )
    found = np.asarray(found)
    first = np.bincount(found[:, 0], minlength=8) / count
    likely = first.argmax()
    second = found[found[:, 0] == likely, 1]

    def softmax(tokens, position):
        c = gen.logits([tokens], labels=[2])[0, position]
        u = gen.logits([tokens])[0, position]
        x = np.asarray(u + 2.0 * (c - u)) / temperature
        x[np.argsort(x)[:2]] = -np.inf
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    for frequencies, expected, n in (
        (first, softmax([0, 0], 0), count),
        (np.bincount(second, minlength=8) / len(second), softmax([likely, 0], 1), len(second)),
    ):
        assert (expected == 0).sum() == 2 and (frequencies[expected == 0] == 0).all()
        deviation = np.sqrt(expected * (1 - expected) / n)
        assert (np.abs(frequencies - expected) <= 4 * deviation).all()
        assert expected.max() < 0.95


def by_sorting(x, temperature, top_k, top_p):
    """REFERENCE section 9, line by line, for rows without equals at the edge of top-p."""
    x = x.astype(np.float64)
    if top_k:
        x = np.where(x < np.sort(x)[-top_k], -np.inf, x)
    if top_p:
        order = np.argsort(x)
        p = np.exp((x - x.max()) / temperature)
        drop = np.cumsum(p[order] / p.sum()) <= 1 - top_p
        drop[-1] = False
        x[order[drop]] = -np.inf
    return np.isfinite(x)


@pytest.mark.parametrize("top_k, top_p", ((5, 0.0), (0, 0.7), (9, 0.6), (0, 0.999), (0, 1e-9)))
def test_filters_drop_what_sorting_drops(top_k, top_p):
    rows = 3 * np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    for temperature in (0.5, 2.0):
        how = np.float32(temperature), np.int32(top_k), np.float32(top_p)
        kept = np.asarray(generation.keep_likely(rows, *how))
        expected = np.stack([by_sorting(row, temperature, top_k, top_p) for row in rows])
        np.testing.assert_array_equal(np.isfinite(kept), expected)
        np.testing.assert_array_equal(kept[expected], rows[expected])
        assert 0 < expected.sum() < expected.size


def test_equals_are_kept_by_both_filters():
    row = np.array([[0.0, 2.0, 1.0, 1.0, -3.0]], np.float32)
    expected = [[False, True, True, True, False]]
    for top_k, top_p in ((2, 0.0), (0, 0.6)):
        kept = generation.keep_likely(row, np.float32(1), np.int32(top_k), np.float32(top_p))
        np.testing.assert_array_equal(np.isfinite(kept), expected)


def test_filters_off_or_wide_change_nothing():
    rows = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    for top_k, top_p in ((0, 0.0), (40, 0.0), (99, 0.0), (0, 1.0)):
        kept = generation.keep_likely(rows, np.float32(1), np.int32(top_k), np.float32(top_p))
        np.testing.assert_array_equal(kept, rows)


@pytest.mark.parametrize("given", (1, 5, 11))
@pytest.mark.parametrize("cfg", (CLASS, TEXT), ids=("class", "text"))
def test_a_continued_prefix_is_the_one_run(cfg, given):
    gen, (condition, null) = generator(cfg), keywords(cfg)
    run = functools.partial(gen.generate_tokens, **condition, **null, guidance_scale=2.0, key=4)
    whole = np.asarray(run())
    np.testing.assert_array_equal(run(prefix=whole[:, :given]), whole)


def test_fewer_tokens_are_a_prefix_of_more():
    run = functools.partial(generator().generate_tokens, [0, 1, 2], key=4)
    whole = np.asarray(run())
    for count in (1, 6, L):
        np.testing.assert_array_equal(run(num_tokens=count), whole[:, :count])


def test_guidance_is_a_number_an_array_or_a_callable_of_the_position():
    run = functools.partial(generator().generate_tokens, [0, 1, 2], key=4)
    by_array = np.asarray(run(guidance_scale=SCALES))
    np.testing.assert_array_equal(run(guidance_scale=lambda i: SCALES[i]), by_array)
    short = run(guidance_scale=SCALES[:5], num_tokens=5)
    np.testing.assert_array_equal(short, by_array[:, :5])
    np.testing.assert_array_equal(run(guidance_scale=np.full(L, 1.5)), run())  # the default
    assert (by_array != np.asarray(run())).any()
    # 0 is the null branch, 1 the condition alone, which runs without the null branch.
    null = generator().generate_tokens(prefix=np.zeros((3, 0)), key=4)
    np.testing.assert_array_equal(run(guidance_scale=0), null)
    almost = run(guidance_scale=np.float32(1 + 1e-6))
    np.testing.assert_array_equal(run(guidance_scale=1), almost)


def test_bfloat16_follows_float32():
    """The logits of its own greedy tokens, in float32, are within rounding of the best ones."""
    labels = [0, 1, 2]
    tokens = generator(CLASS, "bfloat16").generate_tokens(labels, temperature=0, guidance_scale=1)
    exact = np.asarray(generator().logits(tokens, labels=labels))
    chosen = np.take_along_axis(exact, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    assert (exact.max(axis=-1) - chosen).max() < 0.05 * np.abs(exact).max()


def test_values_of_arguments_compile_nothing_anew():
    run = functools.partial(generator().generate_tokens, [0, 1, 2])
    _in_order.clear_cache()
    run(), run(guidance_scale=1)
    assert _in_order._cache_size() == 2
    for arguments in (
        {"num_tokens": 3}, {"temperature": 0}, {"temperature": 0.3}, {"top_k": 4}, {"top_p": 0.4},
        {"guidance_scale": 7}, {"guidance_scale": lambda i: i}, {"key": 8}, {"guidance_scale": 1},
    ):  # fmt: skip
        run(**arguments)
    assert _in_order._cache_size() == 2
    for given in range(1, 9):
        run(prefix=np.zeros((3, given), int))
    assert _in_order._cache_size() == 2 + 4  # room for 1, 2, 4 and 8 tokens


def test_the_null_branch_of_teacher_forcing_is_a_negative_label():
    ids = np.random.default_rng(0).integers(0, V, (2, 4), dtype=np.int32)
    expected = logits(
        random_params(CLASS), CLASS, Compute(), ids, ar.ARCondition(np.array([-1, -1], np.int32))
    )
    np.testing.assert_array_equal(generator().logits(ids), expected)
