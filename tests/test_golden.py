"""Agreement with the numbers of the reference implementation (tests/golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import golden_io, golden_tokenizer, last, relative

from flextok_jax.flow import path
from flextok_jax.flow.sampler import Sampler
from flextok_jax.io import models
from flextok_jax.io.formats import names
from flextok_jax.nn import flextok, fsq, vae
from flextok_jax.nn.config import Blocks, Compute
from flextok_jax.nn.decoder import Condition, unconditional
from flextok_jax.nn.tokenizer_config import TokenizerConfig

COMPUTE = Compute()


@pytest.fixture(scope="module")
def io():
    return golden_io()


@pytest.fixture(scope="module")
def tok():
    return golden_tokenizer()


def kept(io):
    codes = fsq.indices_to_codes(jnp.asarray(io["tokens"], jnp.int32), (8, 8, 8, 5, 5, 5))
    return Condition(codes, jnp.asarray(io["keep_k"], jnp.int32), jnp.zeros(4, bool))


def test_registers_codes_and_tokens_agree(tok, io):
    registers = flextok.encode(tok.params, tok.config, COMPUTE, last(io["vae_latents"]))
    assert relative(registers, io["registers"]) < 1e-5
    codes, ids, _ = flextok.quantize(tok.params, tok.config, registers)
    assert relative(codes, io["quants"]) < 1e-5
    np.testing.assert_array_equal(ids, io["tokens"])


def test_codes_and_indices_are_inverse(io):
    codes = kept(io).codes
    assert relative(codes, io["quants"]) < 1e-6
    np.testing.assert_array_equal(fsq.codes_to_indices(codes, (8, 8, 8, 5, 5, 5)), io["tokens"])


def test_images_to_tokens_agree(tok, io):
    latents = vae.images_to_latents(tok.params["vae"], tok.config.vae, last(io["images"]))
    assert relative(latents, last(io["vae_latents"])) < 1e-5
    np.testing.assert_array_equal(tok.tokenize(last(io["images"])), io["tokens"])
    assert relative(tok.registers(last(io["images"])), io["registers"]) < 1e-5


def test_velocities_and_repa_features_agree(tok, io):
    conditions = (kept(io), unconditional(4, 6))
    (velocity, null), features = flextok.velocities(
        tok.params, tok.config, COMPUTE, last(io["x_t"]), io["t"], conditions, capture=1
    )
    assert relative(velocity, last(io["velocity"])) < 1e-5
    assert relative(null, last(io["velocity_null"])) < 1e-5
    assert relative(features.reshape(4, 4, 4, 128), io["repa_features"]) < 1e-5


@pytest.mark.parametrize(
    "name, scale, normalized", [("nocfg", 1.0, False), ("cfg", 3.0, False), ("apg", 7.5, True)]
)
def test_samples_agree(tok, io, name, scale, normalized):
    noise, how = last(io["noise"]), Sampler(4, scale, normalized)
    codes, keep = kept(io).codes, kept(io).keep
    latents = flextok.decode(tok.params, tok.config, COMPUTE, codes, keep, noise, how)
    assert relative(latents, last(io[f"sample_{name}_latents"])) < 1e-4
    images = tok.detokenize(
        io["tokens"], io["keep_k"], steps=4, guidance_scale=scale, norm_guidance=normalized,
        noise=noise,
    )  # fmt: skip
    assert relative(images, last(io[f"sample_{name}_images"])) < 1e-4


def test_mode_times_agree(io):
    assert relative(path.mode_time(jnp.asarray(io["mode_u"]), 0.25), io["mode_sigma"]) < 1e-6


def test_training_loss_and_every_gradient_norm_agree(tok, io):
    x0, noise, t = last(io["vae_latents"]), last(io["train_noise"]), io["train_sigma"]

    def loss(params):
        registers = flextok.encode(params, tok.config, COMPUTE, x0)
        codes = flextok.quantize(params, tok.config, registers).codes
        condition = Condition(codes, kept(io).keep, jnp.asarray(io["train_null"]))
        x_t = path.interpolate(x0, noise, t)
        (v,) = flextok.velocities(params, tok.config, COMPUTE, x_t, t, (condition,))
        per_image = path.flow_loss(v, path.target(x0, noise))
        return jnp.mean(per_image), per_image

    gradients, per_image = jax.grad(loss, has_aux=True)(tok.params)
    assert relative(per_image, io["train_loss"]) < 1e-5
    tensors = names.to_tensors(names.entries(gradients, names.flextok_name), gradients)
    wanted = {k.removeprefix("grad_norm."): v[0] for k, v in io.items() if "grad_norm." in k}
    assert len(wanted) == 52
    for name, norm in wanted.items():
        ours = np.linalg.norm(tensors[name].astype(np.float64))
        assert abs(ours - norm) <= 1e-4 * norm, name


@pytest.mark.parametrize(
    "enc, dec, counts",
    [
        (12, 12, (85_382_406, 172_448_320, 341_651_737)),
        (18, 18, (287_326_086, 578_587_456, 949_734_553)),
        (18, 28, (287_326_086, 2_169_735_744, 2_540_882_841)),
    ],
)
def test_parameter_counts_are_those_of_the_released_models(enc, dec, counts):
    encoder, decoder = (Blocks(width=64 * depth, depth=depth) for depth in (enc, dec))
    cfg = TokenizerConfig(encoder=encoder, decoder=decoder)

    def count(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    shapes = models.shapes(cfg)
    assert (count(shapes["encoder"]), count(shapes["decoder"]), count(shapes)) == counts
