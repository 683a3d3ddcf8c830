"""Search over tokens: equal to a plain loop, in few programs, resumable; verifiers."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, TINY, changed, relative, tiny_generator
from safetensors.numpy import load_file, save_file
from test_generation import TEXT, generator, keywords
from test_recompilation import lowered

from flextok_jax import candidates, conditions, search, token_search, verifiers
from flextok_jax.nn import attention, generation
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.images import psnr, to_float, to_uint8
from flextok_jax.parallel.rng import named

CFG = changed(TINY, tokens__count=4, encoder__depth=1, decoder__depth=1)
STEPS = dict(search_steps=1, steps=2)
BEAM = dict(beams=2, candidates=3, **STEPS)


@functools.cache
def gen():
    return tiny_generator(CFG)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * np.where(prompts % 2, -1, 1)


BRIGHT = verifiers.function(brightness)


def test_best_of_one_is_generate():
    found = search(gen(), BRIGHT, labels=[1, 2], algorithm="best_of", candidates=1, key=3, **STEPS)
    how = dict(labels=[1, 2], key=3)
    np.testing.assert_array_equal(found.tokens[:, 0], gen().generate_tokens(**how))
    np.testing.assert_allclose(found.images[:, 0], gen().generate(steps=2, **how), atol=1e-5)
    assert found.scores.shape == (2, 1) and found.cost["images"] == 4
    wanted = brightness(to_uint8(found.images[:, 0]), np.arange(2))
    np.testing.assert_allclose(found.scores[:, 0], wanted, rtol=1e-6)


def test_a_search_of_a_model_of_groups_goes_on_within_a_group():
    doubling = dataclasses.replace(gen(), config=dataclasses.replace(gen().config, group=0))
    how = dict(labels=[1, 2], key=3)
    one = dict(beams=1, candidates=1, schedule=(1, 3, 4), **STEPS)
    found = search(doubling, BRIGHT, **how, **one)
    wanted = np.asarray(doubling.generate_tokens(**how))
    np.testing.assert_array_equal(found.tokens[:, 0], wanted)
    assert (wanted != np.asarray(gen().generate_tokens(**how))).any()
    masked = dataclasses.replace(gen(), config=dataclasses.replace(gen().config, masked=True))
    with pytest.raises(ValueError, match="needs an order"):
        search(masked, BRIGHT, **how, **one)
    for verifier in (verifiers.likelihood, verifiers.agreement):
        with pytest.raises(ValueError, match="does not draw tokens in their order"):
            verifier(masked)


def plain(label, key, branch, temperature, lookahead, beams=2, candidates=3, steps=1):
    """The search of one prompt without a cache: every prefix anew, one candidate at a time."""
    gen_, tok = gen(), gen().tokenizer
    key = jax.random.fold_in(jax.random.key(key), 0)
    noise = jax.random.normal(named(key, "noise"), (1, *tok.config.latent_shape))
    others = named(key, "candidates")
    keys = [jax.random.fold_in(others, j) if j else key for j in range(beams * candidates)]

    def ranking(tokens, i, key, temperature=temperature):
        """All ids, the choice of rank 0 first."""
        row = np.zeros((1, 4), np.int32)
        row[0, : len(tokens)] = tokens
        given, null = (gen_.logits(row, labels=x)[0, i] for x in ([label], None))
        logits = null + gen_.config.guidance_scale * (given - null)
        noise = jax.random.gumbel(jax.random.fold_in(key, i), logits.shape)
        return np.argsort(-np.asarray(logits + temperature * noise), kind="stable")

    def goes_on(tokens, stop, slot, rank, first):
        for i in range(len(tokens), stop):
            split = len(first) if branch == "first" else stop - 1
            shared = keys[0 if not first else slot - slot % candidates]
            choice = ranking(tokens, i, shared if i <= split else keys[slot])
            tokens = [*tokens, int(choice[rank if i == split else 0])]
        return tokens

    def score(tokens):
        tokens = list(tokens)
        for i in range(len(tokens), min(len(tokens) + lookahead, 4)):
            tokens.append(int(ranking(tokens, i, key, 0)[0]))
        image = tok.detokenize([tokens], noise=noise, steps=steps)
        return float(brightness(to_uint8(np.asarray(image)), np.array([0]))[0]), tokens

    best = [[]]
    for stop in (1, 2, 4):
        pool = []
        for slot in range(beams * candidates):
            first = best[slot // candidates] if best[0] else []
            rank = slot % candidates if first else slot
            pool.append(goes_on(first, stop, slot, rank, first))
        scored = sorted(pool, key=lambda tokens: -score(tokens)[0])
        best = scored[:beams]
    return pool, best


@pytest.mark.parametrize(
    "branch, temperature, lookahead",
    [("last", 0.0, 0), ("last", 1.0, 0), ("first", 1.0, 0), ("first", 1.0, 1)],
)
def test_beam_search_is_a_plain_loop(branch, temperature, lookahead):
    """branch="last" with equal steps is the published algorithm; temperature 0 is its top-M."""
    how = dict(branch=branch, temperature=temperature, lookahead=lookahead)
    one = dict(BEAM, search_steps=2, results=2)
    found = search(gen(), BRIGHT, labels=[5], key=4, **how, **one)
    pool, best = plain(5, 4, steps=2, **how)
    np.testing.assert_array_equal(found.steps[0][-1].tokens, pool)
    np.testing.assert_array_equal(found.tokens[0], best)
    assert found.scores[0, 0] == found.steps[0][-1].scores.max()
    pool = found.steps[0][2].tokens
    for beam in (pool[:3], pool[3:]):  # Candidates of a beam share what they should.
        same = [len(np.unique(beam[:, i])) == 1 for i in range(4)]
        assert same == [True, True, branch == "last", False]


def test_no_setting_compiles_a_program_anew():
    run = functools.partial(search, gen(), BRIGHT, **BEAM)
    with lowered() as programs:
        run(labels=[0])
    assert len(programs) <= 17, programs
    with lowered() as programs:
        run(labels=[3, 4, 5], key=7)
    keys = {"jit(convert_element_type)", "jit(_threefry_fold_in)", "jit(dynamic_slice)"}
    assert set(programs) <= keys, programs  # Of three prompts; no network.
    with lowered() as programs:
        run(labels=[3], schedule=(1, 3, 4), branch="last", lookahead=1, temperature=0.5, top_k=9)
        run(labels=[3], search_steps=3, guidance_scale=2.0, image_guidance_scale=3.0)
    assert not programs, programs


def task(verifier=BRIGHT, labels=(1, 2), **changes):
    settings = token_search.Settings(beams=2, candidates=3, search_steps=1, **changes)
    return token_search.prepare(gen(), verifier, conditions.of_labels(labels), settings, steps=2)


def test_a_continued_search_is_the_one_run():
    one, steps = task(results=2), []
    whole = token_search.run(one, 1, on_step=steps.append)
    assert steps[0].images.dtype == np.uint8 and steps[0].images.shape == (2, 8, 8, 3)
    for count in (1, 2, 3):
        rest = []
        again = token_search.run(one, 1, done=steps[:count], on_step=rest.append)
        assert len(rest) == 3 - count
        np.testing.assert_array_equal(again.tokens, whole.tokens)
        np.testing.assert_allclose(again.scores, whole.scores, rtol=1e-5)
    for before, step in itertools.pairwise(steps):
        parents = before.tokens[step.parents]
        np.testing.assert_array_equal(step.tokens[:, : before.num_tokens], parents)
        assert set(step.parents) == set(before.kept)
        assert (np.diff(step.scores[step.kept]) <= 0).all()
        assert step.scores[step.kept[0]] == step.scores.max()


def test_the_cache_grows_without_an_effect(monkeypatch):
    run = functools.partial(search, gen(), verifiers.likelihood(gen()), labels=[1, 2], **BEAM)
    wanted = run(lookahead=1)
    monkeypatch.setattr(generation, "FIRST_LENGTH", 1)
    rooms, real = [], candidates._take
    monkeypatch.setattr(candidates, "_take", lambda *x: rooms.append(x[2]) or real(*x))
    found = run(lookahead=1)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert rooms == [4, 4] * 2  # After a first one for 2 tokens.


def test_prompts_and_batches_change_nothing():
    light = verifiers.function(lambda images, prompts: images.mean((1, 2, 3)))
    found = search(gen(), light, labels=[1, 2], key=0, **BEAM)
    keys = generation.sample_keys(0, 2)
    small = search(gen(), light, labels=[2], key=keys[1:], batch_size=4, **BEAM)
    np.testing.assert_array_equal(small.tokens[0], found.tokens[1])
    seen = []
    search(gen(), BRIGHT, labels=[2], on_step=lambda *step: seen.append(step), **BEAM)
    assert [(prompt, step.num_tokens) for prompt, step in seen] == [(0, 1), (0, 2), (0, 4)]


def test_cost_counts_what_is_run():
    dark = verifiers.function(lambda *x: -brightness(*x), "brightness")
    found = search(gen(), BRIGHT, labels=[1], judges=[BRIGHT, dark], **BEAM)
    cost = {name: value for name, value in found.cost.items() if name != "seconds"}
    assert cost == {
        "positions": 6 * 4 * 2, "images": 3 * 6 + 2, "scores": 3 * 6 + 2 + 2,
        "passes of 1 tokens": 6 * 2, "passes of 2 tokens": 6 * 2,
        "passes of 4 tokens": 6 * 2 + 2 * 2 * 2,
    }  # fmt: skip
    assert found.judged == {"brightness": found.scores, "brightness 2": -found.scores}


def test_priors():
    blind = dataclasses.replace(gen(), params=None)
    found = search(blind, BRIGHT, labels=[1], prior="uniform", **BEAM)
    first, *_, last = found.steps[0]
    assert len(np.unique(first.tokens)) == 6 and len(np.unique(last.tokens[:, 2:])) > 8
    assert 0 <= last.tokens.min() and last.tokens.max() < 200 and not found.cost["positions"]
    null = search(gen(), BRIGHT, labels=[1], prior="null", **BEAM).steps[0][0]
    logits = np.asarray(gen().logits(null.tokens[:1]))[0, 0]
    noise = jax.random.gumbel(jax.random.fold_in(generation.sample_keys(0, 1)[0], 0), (200,))
    np.testing.assert_array_equal(null.tokens[:, 0], np.argsort(-(logits + noise))[:6])


def test_texts_are_in_the_cache_once():
    """Six candidates of one prompt: its keys and values, and the null prompt's."""
    model, (given, null) = generator(TEXT), keywords(TEXT)
    one = ARCondition(text=given["text_embeddings"][:1], text_mask=given["text_mask"][:1])
    nothing = ARCondition(text=null["null_embeddings"], text_mask=null["null_mask"])
    one, nothing = generation.pad_texts(one, nothing)
    prefix = jax.ShapeDtypeStruct((6, 0), jnp.int32)
    params = jax.tree.map(jnp.asarray, model.params)
    make = functools.partial(generation.open_state, params, TEXT, model.compute)
    state = jax.eval_shape(lambda p: make(one, nothing, p, 0, 12), prefix)
    assert state.caches[0].k.shape[0] == 12 and state.caches[0].cross[0].shape[0] == 2
    model = dataclasses.replace(model, null_text=(nothing.text, nothing.text_mask))
    prompts = conditions.of_text(given["text_embeddings"], given["text_mask"], "abc")
    score = verifiers.likelihood(model)
    found = search(model, score, conditions=prompts, algorithm="best_of", candidates=2, key=5)
    assert found.images is None and found.steps[0][0].images is None
    tokens = model.generate_tokens(conditions=prompts, key=5)
    for (step,), row in zip(found.steps, tokens):
        np.testing.assert_array_equal(step.tokens[0], row)
        assert (step.tokens[0] != step.tokens[1]).any()


def test_queries_of_several_rows_attend_to_shared_keys():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((6, 3, 8)).astype(np.float32)
    keys, values = rng.standard_normal((2, 2, 2, 5, 4)).astype(np.float32)
    mask = rng.random((2, 5)) < 0.7
    shared = attention.attend_across(q, keys, values, mask, 4)
    whole = (np.tile(x, (3, *[1] * (x.ndim - 1))) for x in (keys, values, mask))
    assert relative(shared, attention.attend_across(q, *whole, 4)) < 1e-6


# Verifiers.


def scores(verifier, x, count=2, prompt=0, **about):
    about = about or dict(labels=np.arange(count), names=tuple("ab"[:count]))
    prepared = verifier.prepare(conditions.Conditions(**about))
    one = jax.tree.map(lambda array: array[prompt], prepared)
    return np.asarray(verifier.function(verifier.params, one, x))


def test_likelihood_and_agreement_are_those_of_the_logits():
    tokens = np.random.default_rng(0).integers(0, 200, (5, 3), dtype=np.int32)

    def mean(labels):
        found = jax.nn.log_softmax(gen().logits(tokens, labels=labels))
        return np.take_along_axis(np.asarray(found), tokens[..., None], 2)[..., 0].mean(1)

    given = mean(np.full(5, 1))
    likely = scores(verifiers.likelihood(gen()), tokens, prompt=1)
    np.testing.assert_allclose(likely, given, rtol=1e-5)
    agreement = scores(verifiers.agreement(gen()), tokens, prompt=1)
    np.testing.assert_allclose(agreement, given - mean(None), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="no conditions"):
        verifiers.agreement(generator(dataclasses.replace(TEXT, text_dim=0, text_hidden=0)))


def test_verifiers_of_images():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    found = scores(verifiers.psnr_to(to_uint8(images[:2])), images, prompt=1)
    np.testing.assert_allclose(found, psnr(images, to_float(to_uint8(images[1:2]))), rtol=1e-5)
    seen = scores(verifiers.function(lambda x, p: x[:, 0, 0, 0] + p), images, prompt=1)
    np.testing.assert_array_equal(seen, to_uint8(images)[:, 0, 0, 0] + 1)

    def logits(params, x):
        return params["scale"] * x[:, 0, :5, 0]

    network = verifiers.classifier(logits, params={"scale": np.float32(2)})
    wanted = jax.nn.log_softmax(2 * images[:, 0, :5, 0])[:, 1]
    np.testing.assert_allclose(scores(network, images, prompt=1), wanted, rtol=1e-5)
    large = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    near = verifiers.similar_to(large, GOLDEN / "dinov2", size=30)
    cosine = scores(near, large)
    assert cosine[0] == pytest.approx(1, abs=1e-5) and cosine[1] < 0.9999
    with pytest.raises(ValueError, match="psnr.*one for each of 2"):
        scores(verifiers.psnr_to(large[[0, 1, 0]]), large)


def test_clip_gives_its_logits_and_aesthetic_folds_its_head(tmp_path):
    """clip_gelu has a scale and an activation as PickScore's file has."""
    folder = GOLDEN / "text" / "clip_gelu"
    io = load_file(folder / "io.safetensors")
    prompts = json.loads((folder / "prompts.json").read_text())[:2]
    images = to_float(io["images_a"])
    logits = scores(verifiers.clip(folder), images, prompt=1, names=tuple(prompts))
    assert relative(logits, io["logits_per_image_a"][:, 1]) < 2e-2  # Resized in floating point.
    rng, channels = np.random.default_rng(0), io["image_embeds_a"].shape[1]
    sizes = {0: (6, channels), 2: (5, 6), 10: (1, 5)}
    head = {
        f"layers.{i}.{name}": rng.standard_normal(s).astype(np.float32)
        for i, shape in sizes.items()
        for name, s in (("weight", shape), ("bias", shape[:1]))
    }
    save_file(head, tmp_path / "head.safetensors")
    x = io["image_embeds_a"]
    for i in sizes:
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    found = scores(verifiers.aesthetic(folder, tmp_path / "head.safetensors"), images)
    assert relative(found, x[:, 0]) < 2e-2
    save_file({k: v for k, v in head.items() if "10" not in k}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="to 5 numbers"):
        verifiers.aesthetic(folder, tmp_path / "half.safetensors")


def test_ensembles_by_rank_and_zscore():
    members = [verifiers.psnr_to(np.zeros((8, 8, 3))), (BRIGHT, 3.0)]
    table = np.array([[1.0, 2.0, 2.0, 9.0], [0.0, 0.0, 0.0, 5.0]])
    ranks = np.array([[0, 1.5, 1.5, 3], [1, 1, 1, 3]]) / 3
    both = verifiers.ensemble(members)
    np.testing.assert_allclose(both.combine(table), [0.25, 0.75] @ ranks)
    z = (table - table.mean(1, keepdims=True)) / table.std(1, keepdims=True)
    found = verifiers.ensemble(members, "zscore").combine(table)
    np.testing.assert_allclose(found, [0.25, 0.75] @ z)
    assert both.name == "psnr+brightness"
    with pytest.raises(ValueError, match="how='mean'"):
        verifiers.ensemble(members, "mean")
    with pytest.raises(ValueError, match="weight above 0"):
        verifiers.ensemble([(BRIGHT, 0)])
    found = search(gen(), verifiers.ensemble([BRIGHT, verifiers.likelihood(gen())]), labels=[1],
                   **BEAM)  # fmt: skip
    assert 0 <= found.scores[0, 0] <= 1


# What is refused.


def test_a_verifier_that_returns_nonsense_is_named():
    def broken(images, prompts):
        return np.where(np.arange(len(images)) == 1, np.nan, 0.0)

    def scalar(images, prompts):
        return np.float32(1)

    def fails(images, prompts):
        raise KeyError("gone")

    def run(f, **how):
        return search(gen(), verifiers.function(f), labels=[1], **BEAM, **how)

    with pytest.raises(ValueError, match="broken.*not finite for 1 of 6"):
        run(broken)
    with pytest.raises(ValueError, match=r"scalar.*\(6,\)"):
        run(scalar)
    with pytest.raises(KeyError) as error:
        run(fails)
    assert "verifier fails" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="verifiers.function"):
        search(gen(), broken, labels=[1])


def test_arguments_that_do_not_fit_are_refused():
    def refused(match, verifier=BRIGHT, model=None, **how):
        with pytest.raises(ValueError, match=match):
            search(model or gen(), verifier, **(dict(labels=[1]) | how))

    refused("algorithm='mcts'.*beam, best_of", algorithm="mcts")
    refused("branch='middle'.*first, last", branch="middle")
    refused("prior='x'.*model, null, uniform", prior="x")
    refused("beams=0", beams=0)
    refused("lookahead=-1", lookahead=-1)
    for schedule in ((2, 1), (1, 1), (0, 1), (1, 5), (1.5,)):
        refused("ascending", schedule=schedule)
    refused("best_of has one step", algorithm="best_of", schedule=(1, 2))
    refused("results=5: at most the 4", results=5)
    refused("uniform", prior="uniform", lookahead=1)
    refused("give one of them", text=["a"])
    refused("give labels or text", labels=None)
    refused("not a text model", labels=None, text=["a"])
    refused("label 10", labels=[10])
    refused("no tokenizer", model=dataclasses.replace(gen(), tokenizer=None))
    refused("batch_size=0", batch_size=0)
    with pytest.raises(TypeError, match="step_count"):
        search(gen(), BRIGHT, labels=[1], step_count=3)
