"""The smallest number of tokens: what is chosen on given curves, and what the curves are."""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, TINY, changed, random_params, relative, tiny_tokenizer
from PIL import Image
from test_lpips import files  # noqa: F401 (a fixture)
from test_recompilation import lowered

from flextok_jax import FlexTok, cli, criteria, lengths
from flextok_jax.commands import lengths as command
from flextok_jax.data import shards
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.flow import path
from flextok_jax.nn import flextok
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition
from flextok_jax.nn.images import psnr, to_float

CFG = changed(TINY, tokens__count=8, encoder__depth=1, decoder__depth=1)
COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def tok():
    return FlexTok(CFG, random_params(CFG))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


# What is chosen.

CURVES = {  # Values at 1, 2, 4, 8 tokens: (first, stable) for the target 5, None: not met.
    "rises": ([1, 5, 6, 7], (2, 2)),
    "dips": ([5, 4, 6, 7], (1, 4)),
    "falls at the end": ([1, 6, 6, 4], (2, None)),
    "always": ([5, 5, 5, 5], (1, 1)),
    "never": ([1, 2, 3, 4], (None, None)),
    "at the end": ([1, 2, 3, 5], (8, 8)),
}


def chosen(curves, counts=COUNTS, **how):
    """`lengths.smallest` on whole curves [n, counts], and the calls that it makes."""
    calls = []

    def values(rows, k):
        calls.append((k, len(rows)))
        return np.asarray(curves, np.float32)[rows, counts.index(k)]

    return *lengths.smallest(values, len(curves), counts, **how), calls


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("rule", lengths.RULES)
def test_the_smallest_count_that_meets(rule, larger):
    curves = np.array([curve for curve, _ in CURVES.values()])
    wanted = [pair[lengths.RULES.index(rule)] for _, pair in CURVES.values()]
    sign = 1 if larger else -1
    k, met, found, _ = chosen(sign * curves, target=5 * sign, rule=rule, larger_is_better=larger)
    assert met.tolist() == [x is not None for x in wanted]
    assert k.tolist() == [x or 8 for x in wanted] and k.dtype == np.int32
    known = ~np.isnan(found)
    np.testing.assert_array_equal(found[known], (sign * curves)[known])


def test_images_that_are_decided_leave():
    curves = [curve for curve, _ in CURVES.values()]
    *_, calls = chosen(curves, target=5)
    assert calls == [(1, 6), (2, 4), (4, 2), (8, 2)]
    *_, calls = chosen(curves, target=5, rule="stable")
    assert calls == [(8, 6), (4, 4), (2, 3), (1, 2)]
    *_, calls = chosen(curves, within=0)
    assert calls[0] == (8, 6) and [k for k, _ in calls] == [8, 1, 2, 4]
    *_, calls = chosen([[5, 4, 3, 2]], target=1)
    assert calls == [(1, 1)]


@pytest.mark.parametrize("larger", [True, False])
def test_rules_on_random_curves_equal_their_definitions(larger):
    rng, delta = np.random.default_rng(1), 0.25
    curves = rng.integers(0, 9, (200, 4)) / 8
    sign = 1 if larger else -1
    limits = {"target": np.full(200, 0.5 * sign), "within": sign * curves[:, -1] - delta}
    for name, limit in limits.items():
        how = {name: 0.5 if name == "target" else delta}
        meets = sign * curves >= limit[:, None]
        stable = np.logical_and.accumulate(meets[:, ::-1], axis=1)[:, ::-1]
        picks = []
        for rule, ok in (("first", meets), ("stable", stable)):
            k, met, *_ = chosen(curves, rule=rule, larger_is_better=larger, **how)
            wanted = np.where(ok.any(1), ok.argmax(1), 3)
            np.testing.assert_array_equal(k, np.array(COUNTS)[wanted])
            np.testing.assert_array_equal(met, ok.any(1))
            picks.append(k)
        assert (picks[0] <= picks[1]).all() and (picks[0] < picks[1]).any()
        assert name == "target" or met.all()


# What the values are.


def noise(key, seed, draw, shape=(8, 8, 3)):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, seed), draw), shape)


def test_flow_is_the_share_of_the_loss_that_tokens_explain(tok, images):
    """Against one image and one time at a time, with all R registers."""
    draws, key = 3, jax.random.key(4)
    how = dict(counts=(1, 3, 8), samples=draws, key=4, batch_size=3)
    found = tok.choose_length(images, target=9e9, **how)
    codes = flextok.codes_of(tok.params, CFG, jnp.asarray(found.tokens))
    x0 = to_float(images)
    t = path.mode_time((np.arange(draws) + 0.5) / draws, CFG.target.flow.mode_scale)
    velocity = jax.jit(functools.partial(flextok.velocities, tok.params, CFG, Compute()))

    def loss(i, k):
        total = 0.0
        condition = Condition(codes[i : i + 1], jnp.array([k]), jnp.array([k == 0]))
        for draw in range(draws):
            eps = noise(key, i, draw)
            x_t = t[draw] * eps + (1 - t[draw]) * x0[i]
            (v,) = velocity(x_t[None], t[draw : draw + 1], (condition,))
            total += float(jnp.mean((v[0] - (eps - x0[i])) ** 2)) / draws
        return total

    for i in (1, 6):
        null, full = loss(i, 0), loss(i, 8)
        gain = max(null - full, lengths.LEAST * null)
        wanted = [(null - loss(i, k)) / gain for k in (1, 3, 8)]
        np.testing.assert_allclose(found.values[i], wanted, rtol=2e-3, atol=2e-3)
    assert found.values.dtype == np.float32 and found.counts == (1, 3, 8)
    assert not found.met.any() and (found.num_tokens == 8).all()
    np.testing.assert_array_equal(found.tokens, tok.tokenize(images))


def test_decoded_criteria_are_those_of_detokenize(tok, images):
    """Each image has its noise, the same at every number of tokens; `samples` are averaged."""
    key, how = jax.random.key(2), dict(steps=2, guidance_scale=2.0)
    find = functools.partial(tok.choose_length, images, counts=(2, 8), key=2, samples=2, **how)
    found = find("psnr", target=1e9)
    squared = find("latent", target=-1)  # The latents are the pixels.
    own = find(lambda a, b: -np.abs(a - b).mean((1, 2, 3)), target=1e9)
    np.testing.assert_allclose(-own.values, find("mae", target=-1).values, rtol=1e-5)
    for column, k in enumerate((2, 8)):
        made, raw = 0.0, 0.0
        for draw in range(2):
            eps = jnp.stack([noise(key, i, draw) for i in range(7)])
            decoded = tok.detokenize(found.tokens, k, noise=eps, **how)
            made += psnr(decoded.clip(-1, 1), to_float(images)) / 2
            error = (decoded - to_float(images)) ** 2
            raw += error.sum((1, 2, 3)) / (to_float(images) ** 2).sum((1, 2, 3)) / 2
        assert relative(found.values[:, column], made) < 1e-4
        assert relative(squared.values[:, column], raw) < 1e-4


@pytest.mark.slow
def test_the_size_of_batches_changes_nothing_and_each_length_is_one_program(tok, images):
    def choose(criterion, batch_size, **how):
        how = dict(counts=(1, 3, 4, 8), batch_size=batch_size, key=1) | how
        with lowered() as programs:
            found = tok.choose_length(images, criterion, **how)
        return found, [x for x in programs if "_decode" in x or "flow_loss" in x]

    whole, programs = choose("psnr", 7, within=0.2, steps=2)
    assert len(programs) == 3, programs  # Of 1, 4 and 8 tokens.
    assert len(set(whole.num_tokens.tolist())) > 1  # Or else nobody leaves.
    parts, programs = choose("psnr", 3, within=0.2, steps=2)
    assert len(programs) == 3, programs
    np.testing.assert_array_equal(parts.num_tokens, whole.num_tokens)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-4)
    _, programs = choose("flow", 4, target=2.0, samples=2)
    assert len(programs) == 4, programs  # And the null condition.


def test_networks_of_files_are_criteria(files):  # noqa: F811
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    lpips, clip = criteria.lpips(*files), criteria.clip(GOLDEN / "text" / "clip_gelu")
    for network in (criteria.dino(GOLDEN / "dinov2", size=30), clip):
        cosine = network.function(network.params, images, images[[0, 0]])
        assert cosine[0] == pytest.approx(1, abs=1e-5) and cosine[1] < 0.9999
    distance = lpips.function(lpips.params, images, images[[0, 0]])
    assert distance[0] == 0 and distance[1] > 0 and not lpips.larger_is_better


# What is refused.


def test_arguments_that_do_not_fit_are_refused(tok, images):
    def refused(match, criterion="flow", model=tok, **how):
        with pytest.raises(ValueError, match=match):
            model.choose_length(images, criterion, **how)

    for counts in ((2, 1), (1, 1), (0, 1), (1, 9), (), (1.5,)):
        refused("ascending", counts=counts, within=0.1)
    refused("target=None and within=None")
    refused("target=1 and within=1", target=1, within=1)
    refused("target=nan", target=float("nan"))
    refused("within=-1", within=-1)
    refused("rule='last'.*first, stable", within=0.1, rule="last")
    refused("'ssim'.*flow, latent, psnr, mae, lpips, dino, clip.*function", "ssim", within=0.1)
    refused(r"criteria.lpips\(vgg, heads\)", "lpips", within=0.1)
    refused("steps: .*'flow' samples nothing", within=0.1, steps=4)
    refused("samples=0", within=0.1, samples=0)
    one_pass = tiny_tokenizer(changed(CFG, target__kind="values"))
    refused("'flow'.*one pass", model=one_pass, within=0.1)
    refused("steps.*one pass", "psnr", model=one_pass, within=0.1, steps=3)
    refused("samples=2.*1, because", "psnr", model=one_pass, within=0.1, samples=2)
    assert one_pass.choose_length(images, "psnr", within=50.0).num_tokens.tolist() == [1] * 7
    unordered = tiny_tokenizer(changed(CFG, tokens__order="full", tokens__keep="fixed"))
    refused("not ordered", model=unordered, within=0.1)


def test_a_function_that_returns_nonsense_is_named(tok, images):
    def broken(a, b):
        return np.full(len(a), np.nan)

    def scalar(a, b):
        return np.float32(1)

    for function, match in (
        (broken, "broken.*finite.*image 0 from 1 "),
        (scalar, r"scalar.*\(7,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            tok.choose_length(images, function, target=1, steps=1)


# The commands.


@pytest.fixture(scope="module")
def model(tmp_path_factory, tok):
    folder = tmp_path_factory.mktemp("model")
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    """Seven images and a broken one, of two classes."""
    root = tmp_path_factory.mktemp("images")
    for i, image in enumerate(images):
        path = root / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "class0" / "x.png").write_bytes(b"this is no image")
    return str(root)


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.mark.slow
def test_lengths_are_chosen_continued_and_used(model, folder, tok, tmp_path, monkeypatch, capsys):
    """lengths, then tokenize of images and of a data set, then detokenize and a batch."""
    given, fast = ["--model", model], ["--steps", 2, "--guidance", 1]
    args = ["lengths", *given, "--images", folder, "--criterion", "psnr", "--within", 0.2, *fast]
    assert run(*args, "--out", tmp_path / "whole") == 0
    assert "1 of 8 images" in capsys.readouterr().err
    found = json.loads((tmp_path / "whole" / "lengths.json").read_text())
    chosen = {one["name"]: one["k"] for one in found["lengths"]}
    assert len(chosen) == 7 and len(set(chosen.values())) > 1
    assert found["share_met"] == 1 and found["mean_tokens"] == np.mean(list(chosen.values()))
    with np.load(tmp_path / "whole" / "curves.npz") as curves:
        assert curves["values"].shape == (7, 4) and curves["counts"].tolist() == list(COUNTS)
        at = np.searchsorted(COUNTS, curves["num_tokens"])
        values = [one["value"] for one in found["lengths"]]
        np.testing.assert_allclose(curves["values"][np.arange(7), at], values)
    assert Image.open(tmp_path / "whole" / "lengths.png").text["criterion"] == "psnr"

    # Interrupted and continued in batches of another size: the same.
    monkeypatch.setattr(command, "GROUP", 1)
    real, calls = lengths.choose, []

    def choose(tok, images, *rest, **more):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(tok, images, *rest, **more)

    monkeypatch.setattr(lengths, "choose", choose)
    again = [*args, "--out", tmp_path / "again", "--batch-size", 4]
    assert run(*again) == 130 and run(*again) == 0 and calls == [4, 3, 3]
    assert run(*again) == 0 and len(calls) == 3  # Nothing is left to do.
    same = json.loads((tmp_path / "again" / "lengths.json").read_text())["lengths"]
    assert {one["name"]: one["k"] for one in same} == chosen
    np.testing.assert_allclose([one["value"] for one in same], values, rtol=1e-4)
    assert run(*again, "--rule", "stable") == 2
    before = (pathlib.Path(folder) / "class1/1.png").read_bytes()
    Image.new("RGB", (8, 8)).save(f"{folder}/class1/1.png")  # Another image of the same name.
    assert run(*again) == 0 and calls == [4, 3, 3, 1]
    (pathlib.Path(folder) / "class1/1.png").write_bytes(before)

    file = tmp_path / "whole" / "lengths.json"
    tokens = tmp_path / "tokens.npz"
    assert run("tokenize", *given, "--images", folder, "--lengths", file, "--out", tokens) == 0
    with np.load(tokens) as saved:
        known = dict(zip(saved["names"].tolist(), saved["lengths"].tolist()))
        assert known == chosen and saved["tokens"].shape == (7, 8)
        own = dict(zip(saved["names"].tolist(), saved["tokens"]))
    more = ["--tokens", tokens, *fast]
    assert run("detokenize", *given, *more, "--out", tmp_path / "own") == 0
    assert run("detokenize", *given, *more, "--num-tokens", "1,2,4,8", "--out", tmp_path / "k") == 0
    for name, k in chosen.items():
        a, b = Image.open(tmp_path / "own/own" / name), Image.open(tmp_path / f"k/k{k:04}" / name)
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
        assert a.text["num_tokens"] == b.text["num_tokens"] == str(k)

    data = ["--data", folder, "--split", "all", "--lengths", file, "--out", tmp_path / "shards"]
    assert run("tokenize", *given, *data, "--crops", 2, "--crop-scale", 1) == 0
    source = shards.ShardSource(tmp_path / "shards", "all")
    assert {source.key(i): source.record(i).length for i in range(7)} == chosen
    cfg = types.SimpleNamespace(
        source="tokens", path=str(tmp_path / "shards"), split="all", eval_split="all",
        max_unreadable=0.1,
    )  # fmt: skip
    (batch,) = make_pipeline(cfg, seed=0, batch_size=7, train=False).eval_batches(7)
    assert batch["length"].tolist() == list(chosen.values())
    np.testing.assert_array_equal(batch["tokens"], np.stack([own[name] for name in chosen]))
    del data[4:6]
    assert run("tokenize", *given, *data, "--crops", 2, "--crop-scale", 1) == 2  # No lengths now.


def test_what_does_not_fit_is_named(model, folder, images, tmp_path, capsys):
    def refused(*arguments):
        capsys.readouterr()
        assert run(*arguments) == 2
        return capsys.readouterr().err

    args = ["lengths", "--model", model, "--images", folder, "--out", tmp_path / "out"]
    assert "--within" in refused(*args)
    assert "--within" in refused(*args, "--within", 0, "--target", 1)
    assert "ascending" in refused(*args, "--within", 0, "--counts", "2,1")
    assert "--steps" in refused(*args, "--within", 0, "--steps", 2)
    assert "--lpips-heads" in refused(*args, "--within", 0, "--criterion", "lpips")
    assert not (tmp_path / "out").exists()
    # A target that nobody reaches is a result.
    few = [*args, "--criterion", "mae", "--target", 0, "--limit", 2, "--steps", 1, "--guidance", 1]
    assert run(*few, "--counts", 1) == 0
    assert "0.0% meet" in capsys.readouterr().out
    file = tmp_path / "out" / "lengths.json"
    use = ["--lengths", file, "--out", tmp_path / "x.npz"]
    assert "6 of 8" in refused("tokenize", "--model", model, "--images", folder, *use)
    other = tmp_path / "other"
    FlexTok(CFG, random_params(CFG, seed=1)).save_pretrained(other)
    assert "sha256" in refused("tokenize", "--model", other, "--images", folder, *use)
    file.write_text("{}")
    assert "no lengths.json" in refused("tokenize", "--model", model, "--images", folder, *use)
    assert "--model" in refused("encode", "--vae", "v", "--data", folder, "--lengths", file,
                                "--out", tmp_path / "y")  # fmt: skip
