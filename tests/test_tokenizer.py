"""FlexTok as a user holds it: the contract of its methods, and what they refuse."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    GOLDEN,
    ROOT,
    TINY,
    changed,
    relative,
    small_vae,
    tiny_generator,
    tiny_tokenizer,
)

from flextok_jax import FlexTok
from flextok_jax.nn import flextok
from flextok_jax.nn.config import Compute

R, SIDE, IDS = TINY.num_tokens, 8, 200
WITH_VAE = dataclasses.replace(TINY, vae=small_vae())


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def vae_tok():
    return tiny_tokenizer(WITH_VAE)


def pixels(batch=2, height=SIDE, width=SIDE, seed=0):
    shape = (batch, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tokens(batch=2, k=4, seed=0):
    return np.random.default_rng(seed).integers(0, IDS, (batch, k), dtype=np.int32)


def test_shapes_and_types_are_those_of_the_contract(tok):
    assert tok.num_tokens == R
    ids, registers = tok.tokenize(pixels(), 3), tok.registers(pixels(), 3)
    assert (ids.shape, ids.dtype) == ((2, 3), jnp.int32)
    assert (registers.shape, registers.dtype) == ((2, 3, 3), jnp.float32)
    assert tok.tokenize(pixels()).shape == (2, R)
    images = tok.detokenize(ids, steps=2)
    assert (images.shape, images.dtype) == ((2, SIDE, SIDE, 3), jnp.float32)


def test_a_model_is_shown_in_one_line(tok):
    shown = "FlexTok('memory': 8x8 pixels, 16 tokens of 200 ids)"
    assert repr(tok) == shown
    gen = dataclasses.replace(tiny_generator(TINY), tokenizer=tok)
    assert repr(gen) == f"ImageGenerator('memory': 16 tokens, by 10 classes; {shown})"


def test_uint8_images_equal_the_same_images_as_floats(tok):
    whole = pixels(seed=1)
    floats = whole / np.float32(127.5) - 1
    for images in (floats, jnp.asarray(floats), floats.astype(np.float64), jnp.asarray(whole)):
        np.testing.assert_array_equal(tok.tokenize(images), tok.tokenize(whole))
        assert relative(tok.registers(images), tok.registers(whole)) < 1e-5


def test_floats_from_0_to_1_are_warned_of_where_they_were_passed(tok):
    with pytest.warns(UserWarning, match=r"0..1.*\(2 x - 1\)") as told:
        tok.tokenize(pixels() / np.float32(255))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tok.tokenize(pixels() / np.float32(127.5) - 1)


def test_ids_are_decided_by_products_of_the_highest_precision():
    """Whatever is set for all others: TF32 and bfloat16 products change ids."""
    tok = tiny_tokenizer(changed(WITH_VAE, encoder__depth=1))

    def lowered(compute):
        def tokenize(images):
            return flextok.tokens_of(tok.params, tok.config, compute, images)[1]

        with jax.default_matmul_precision("bfloat16"):
            return jax.jit(tokenize).lower(np.zeros((1, 16, 16, 3), np.float32)).as_text()

    products = [
        line for line in lowered(Compute()).splitlines()
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line
    ]  # fmt: skip
    assert len(products) > 20 and all("HIGHEST" in line for line in products), products
    assert "HIGHEST" not in lowered(Compute("bfloat16"))


BAD_IMAGES = {
    "rank": (pixels()[0], r"\(8, 8, 3\).*\[B, H, W, 3\]"),
    "channels": (pixels()[..., :1], r"\(2, 8, 8, 1\).*\[B, H, W, 3\]"),
    "empty": (pixels()[:0], "empty batch.*at least one"),
    "range": (pixels().astype(np.float32), r"from 0 to 255.*\[-1, 1\].*127.5.*uint8"),
    "nan": (np.full((1, 8, 8, 3), np.nan, np.float32), r"nan.*finite and in \[-1, 1\]"),
    "infinite": (np.full((1, 8, 8, 3), -np.inf), r"-inf.*finite and in \[-1, 1\]"),
    "type": (pixels().astype(np.int64), r"int64.*uint8, or float in \[-1, 1\]"),
    "bool": (pixels() > 0, r"bool.*uint8, or float in \[-1, 1\]"),
    "not divisible": (pixels(height=7), "7x8.*multiple of 2.*at most 8x8"),
    "too large": (pixels(width=10), "8x10.*multiple of 2.*at most 8x8"),
    "no pixels": (pixels(height=0), "0x8.*multiple of 2"),
}


@pytest.mark.parametrize("images, message", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_images_that_do_not_fit_are_refused(tok, images, message):
    for method in (tok.tokenize, tok.registers):
        with pytest.raises(ValueError, match=message):
            method(images)


@pytest.mark.parametrize("k", [0, R + 1, -1, 2.0, True, "4", (1, 2)])
def test_numbers_of_tokens_to_encode_outside_1_to_R_are_refused(tok, k):
    with pytest.raises(ValueError) as error:
        tok.tokenize(pixels(), k)
    assert f"num_tokens={k!r}: must be an int in 1..16" in str(error.value)


BAD_CODES = {
    "too large": (dict(tokens=[[3, IDS]]), r"token id 200: must be in 0\.\.199"),
    "negative": (dict(tokens=[[-5, 3]]), r"token id -5: must be in 0\.\.199"),
    "float": (dict(tokens=tokens() * 1.0), r"float64 of shape \(2, 4\): must be integers"),
    "rank": (dict(tokens=tokens()[0]), r"of shape \(4,\): must be integers \[B, k\]"),
    "too many": (dict(tokens=tokens(2, R + 1)), r"\(2, 17\): must be .* k in 1\.\.16"),
    "none": (dict(tokens=tokens(2, 0)), r"\(2, 0\): must be .* k in 1\.\.16"),
    "empty": (dict(tokens=tokens(0, 4)), r"\(0, 4\): must be .* B >= 1"),
    "keep 0": (dict(num_tokens=0), r"num_tokens=0: must be in 1\.\.4"),
    "keep more": (dict(num_tokens=5), r"num_tokens=5: must be in 1\.\.4"),
    "keep per image": (dict(num_tokens=[1, 5]), r"num_tokens=5: must be in 1\.\.4"),
    "keep shape": (dict(num_tokens=[1, 2, 3]), r"\[1, 2, 3\]: must be an int, or 2 ints.*1\.\.4"),
    "keep float": (dict(num_tokens=2.5), r"num_tokens=2.5: must be an int, or 2 ints"),
    "keep bool": (dict(num_tokens=True), "num_tokens=True: must be an int"),
    "noise batch": (dict(noise=np.zeros((1, 8, 8, 3))), r"\(1, 8, 8, 3\): must be \(2, 8, 8, 3\)"),
    "noise rank": (dict(noise=np.zeros((2, 8, 8))), r"\(2, 8, 8\): must be \(2, 8, 8, 3\)"),
    "noise channels": (
        dict(noise=np.zeros((2, 8, 8, 4))),
        r"\(2, 8, 8, 4\): must be \(2, 8, 8, 3\)",
    ),
    "noise size": (dict(noise=np.zeros((2, 9, 8, 3))), "9x8.*multiple of 2"),
    "noise against size": (
        dict(noise=np.zeros((2, 8, 8, 3)), image_size=4),
        r"\(2, 8, 8, 3\): must be \(2, 4, 4, 3\)",
    ),
    "steps 0": (dict(steps=0), "steps=0: must be an int, at least 1"),
    "steps float": (dict(steps=2.5), "steps=2.5: must be an int, at least 1"),
    "size odd": (dict(image_size=5), "5x5: each side must be a multiple of 2 .* at most 8x8"),
    "size large": (dict(image_size=(8, 16)), "8x16: each side must be a multiple of 2"),
    "size float": (dict(image_size=4.0), "4.0x4.0: each side must be a multiple of 2"),
    "size of three": (dict(image_size=(4, 4, 3)), r"\(4, 4, 3\): must be a side or \(H, W\)"),
    "guidance words": (dict(guidance_scale="strong"), "'strong': must be a number or a callable"),
    "guidance array": (dict(guidance_scale=[1.0, 2.0]), "must be a number or a callable"),
    "guidance nan": (dict(guidance_scale=float("nan")), "nan.*must be finite"),
}


@pytest.mark.parametrize("arguments, message", BAD_CODES.values(), ids=BAD_CODES.keys())
def test_arguments_of_detokenize_that_do_not_fit_are_refused(tok, arguments, message):
    with pytest.raises(ValueError, match=message):
        tok.detokenize(**{"tokens": tokens(), **arguments})


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_numbers_that_are_not_finite_are_no_result(tok, part):
    params = tok.params | {part: jax.tree.map(lambda x: x * np.nan, tok.params[part])}
    bad = dataclasses.replace(tok, params=params, origin="MODEL")
    calls = {
        "encoder": [lambda: bad.tokenize(pixels()), lambda: bad.registers(pixels())],
        "decoder": [lambda: bad.detokenize(tokens(), steps=2)],
    }
    for call in calls[part]:
        with pytest.raises(ValueError, match=f"MODEL: the {part} .*not finite, for 2 of 2"):
            call()


def test_any_integer_type_of_tokens_will_do(tok):
    wanted = tok.detokenize(tokens(), steps=2)
    for ids in (tokens().astype(np.uint8), tokens().astype(np.int64), jnp.asarray(tokens())):
        np.testing.assert_array_equal(tok.detokenize(ids, np.int64(4), steps=2), wanted)
    as_list = tok.detokenize(tokens().tolist(), [4, 4], steps=2)
    np.testing.assert_array_equal(as_list, wanted)


@pytest.mark.slow
def test_smaller_images_use_the_top_left_of_the_position_table(tok):
    """A model whose tables end there gives the same."""

    def cut(path, leaf):
        return leaf[:2, :3] if "sincos" in jax.tree_util.keystr(path) else leaf

    small = FlexTok(
        changed(TINY, sites__grid=(2, 3)), jax.tree_util.tree_map_with_path(cut, tok.params)
    )
    images = pixels(height=4, width=6)
    assert relative(tok.registers(images), small.registers(images)) < 1e-5
    ids = tok.tokenize(images)
    np.testing.assert_array_equal(ids, small.tokenize(images))
    out = tok.detokenize(ids, image_size=(4, 6), steps=2)
    assert relative(out, small.detokenize(ids, steps=2)) < 1e-5
    assert out.shape == images.shape


def test_image_size_is_a_side_or_a_pair_and_noise_has_its_own(tok):
    ids = tokens()
    square = tok.detokenize(ids, image_size=4, steps=2)
    np.testing.assert_array_equal(tok.detokenize(ids, image_size=(4, 4), steps=2), square)
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    np.testing.assert_array_equal(tok.detokenize(ids, noise=noise, steps=2), square)


def test_without_a_key_everything_is_deterministic_and_noise_is_of_seed_0(tok, vae_tok):
    images = pixels(height=16, width=16)
    np.testing.assert_array_equal(vae_tok.registers(images), vae_tok.registers(images))
    first = tok.detokenize(tokens(), steps=2)
    for key in (None, 0, np.int32(0), jax.random.key(0)):
        np.testing.assert_array_equal(tok.detokenize(tokens(), steps=2, key=key), first)
    assert relative(tok.detokenize(tokens(), steps=2, key=1), first) > 1e-2


def test_a_key_samples_the_posterior_reproducibly(vae_tok):
    images = pixels(4, 16, 16)
    mean, one = vae_tok.tokenize(images), vae_tok.tokenize(images, key=1)
    np.testing.assert_array_equal(vae_tok.tokenize(images, key=1), one)
    np.testing.assert_array_equal(vae_tok.tokenize(images, key=jax.random.key(1)), one)
    np.testing.assert_array_equal(vae_tok.tokenize(images, 4, key=1), one[:, :4])
    assert (one != mean).any() and (vae_tok.tokenize(images, key=2) != one).any()


def test_the_identity_vae_has_nothing_to_sample(tok):
    np.testing.assert_array_equal(tok.tokenize(pixels(), key=7), tok.tokenize(pixels()))


def test_noise_overrides_the_key(tok):
    noise = np.random.default_rng(3).standard_normal((2, 8, 8, 3))
    with_key = tok.detokenize(tokens(), steps=2, noise=noise, key=5)
    np.testing.assert_array_equal(with_key, tok.detokenize(tokens(), steps=2, noise=noise))
    np.testing.assert_array_equal(with_key, tok.detokenize(tokens(), steps=2, noise=noise.tolist()))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_callable_that_is_constant_equals_the_constant(tok, normalized):
    def decode(scale):
        return tok.detokenize(tokens(), steps=3, guidance_scale=scale, norm_guidance=normalized)

    assert relative(decode(lambda t: 3.0), decode(3.0)) < 1e-6
    assert relative(decode(3.0), decode(1.0)) > 1e-3
    # A callable runs both passes; at 1 they give what one pass gives.
    assert relative(decode(lambda t: 1.0), decode(1.0)) < 1e-5


def test_the_guidance_that_is_not_given_is_that_of_the_model(tok):
    own = dataclasses.replace(tok, config=changed(TINY, target__flow__sampler__guidance_scale=2.5))
    given = tok.detokenize(tokens(), steps=2, guidance_scale=2.5)
    assert relative(own.detokenize(tokens(), steps=2), given) < 1e-6


def run_alone(code: str, *arguments) -> dict:
    """Runs a script in a fresh process; what it prints last is JSON."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_inference_imports_nothing_of_training():
    code = """
import json, sys
import flextok_jax
at_import = sorted(sys.modules)
tok = flextok_jax.FlexTok.from_pretrained(sys.argv[1])
import numpy as np
ids = tok.tokenize(np.zeros((1, 64, 64, 3), np.uint8), 1)
tok.detokenize(ids, steps=1, guidance_scale=1.0)
print(json.dumps([at_import, sorted(sys.modules)]))
"""
    at_import, in_use = run_alone(code, GOLDEN / "tokenizer")
    assert "jax" not in at_import  # The public names are lazy.
    training = {
        "grain", "tensorflow_datasets", "orbax", "clu", "ml_collections", "tensorflow", "torch",
        "optax", "sklearn", "tensorboardX",
    }  # fmt: skip
    assert "safetensors" in in_use
    assert training.isdisjoint(in_use) and training.isdisjoint(at_import)
    assert not any(name.startswith("flextok_jax.training") for name in in_use)


@pytest.mark.slow
def test_every_mesh_gives_the_same_tokens_and_images(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    code = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")
import numpy as np
from flextok_jax import FlexTok
from flextok_jax.parallel.mesh import make_mesh

images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
plain = FlexTok.from_pretrained(sys.argv[1])
ids = plain.tokenize(images)
options = dict(num_tokens=[1, 7, 16, 4, 4], steps=2, guidance_scale=3.0)
wanted = np.asarray(plain.detokenize(ids, **options))
found = {}
for sizes in ((2, 2, 2), (8, 1, 1)):
    tok = FlexTok.from_pretrained(sys.argv[1], mesh=make_mesh(*sizes))
    kernel = tok.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
    images_again = tok.detokenize(ids, **options)
    found[str(sizes)] = dict(
        same_tokens=bool((tok.tokenize(images) == ids).all()),
        error=float(np.abs(images_again - wanted).max() / np.abs(wanted).max()),
        shape=images_again.shape,
        parts=len({str(shard.index) for shard in kernel.addressable_shards}),
        fingerprint=tok.fingerprint == plain.fingerprint,
    )
print(json.dumps(found))
"""
    found = run_alone(code, tmp_path)
    for sizes, parts in (("(2, 2, 2)", 4), ("(8, 1, 1)", 1)):
        result = found[sizes]
        assert result["same_tokens"] and result["fingerprint"], sizes
        assert result["error"] < 1e-5 and result["shape"] == [5, 8, 8, 3], sizes
        assert result["parts"] == parts, sizes
