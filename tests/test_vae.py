"""The VAE agrees with the reference numbers, counts, and its own inverse relations."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax.nn import vae
from flextok_jax.nn.vae_config import VAEConfig

KL_F4 = VAEConfig(latent_channels=4, block_out=(32, 32, 64), scaling_factor=0.88)
KL_F8 = VAEConfig(latent_channels=4, block_out=(32, 32, 32, 32), scaling_factor=3.0)
SMALL = VAEConfig(latent_channels=2, block_out=(8, 16), layers_per_block=1, norm_groups=4)
IDENTITY = VAEConfig("identity", latent_channels=3, scaling_factor=0.5)

# Compiled once per configuration and shape; the functions below are called through these.
init_vae = jax.jit(vae.init_vae, static_argnums=0)
encode_moments = jax.jit(vae.encode_moments, static_argnums=(1, 3))
decode_latents = jax.jit(vae.decode_latents, static_argnums=(1, 3))
images_to_latents = jax.jit(vae.images_to_latents, static_argnums=1)
latents_to_images = jax.jit(vae.latents_to_images, static_argnums=1)


def relative_error(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def last(x):
    """Channel-first to channel-last."""
    return np.moveaxis(x, 1, -1)


def tree_of(tensors):
    """Reference tensors, renamed and transposed to our parameter tree."""
    tree = {}
    for name, x in tensors.items():
        *path, leaf = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
        if leaf == "weight":
            leaf = "scale" if x.ndim == 1 else "kernel"
            x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = x
    return tree


@pytest.fixture(scope="module")
def reference(golden):
    io = load_file(golden / "vae/io.safetensors")
    return tree_of(load_file(golden / "vae/diffusion_pytorch_model.safetensors")), io


def small_vae(shape=(2, 8, 12, 3)):
    images = jax.random.uniform(jax.random.key(1), shape, minval=-1.0)
    return init_vae(SMALL, jax.random.key(0)), images


def test_moments_kl_and_decoded_images_agree_with_the_reference(reference):
    params, io = reference
    mean, logvar = encode_moments(params, KL_F4, last(io["images"]))
    decoded = decode_latents(params, KL_F4, last(io["mean"]))
    assert relative_error(mean, last(io["mean"])) < 1e-5
    assert relative_error(logvar, last(io["logvar"])) < 1e-5
    assert relative_error(decoded, last(io["decoded"])) < 1e-5
    assert relative_error(vae.kl(mean, logvar), io["kl"]) < 1e-5


def test_scaled_latents_agree_with_the_reference_tokenizer(golden):
    prefix, tensors = "vae.vae.", load_file(golden / "tokenizer/model.safetensors")
    params = tree_of({k[len(prefix) :]: x for k, x in tensors.items() if k.startswith(prefix)})
    io = load_file(golden / "tokenizer/io.safetensors")
    images = last(io["images"])
    moments = jnp.concatenate(encode_moments(params, KL_F8, images), axis=-1)
    assert relative_error(moments, last(io["vae_moments"])) < 1e-5
    latents = images_to_latents(params, KL_F8, images)
    assert relative_error(latents, last(io["vae_latents"])) < 1e-5
    for sampler in ("nocfg", "cfg", "apg"):
        decoded = latents_to_images(params, KL_F8, last(io[f"sample_{sampler}_latents"]))
        assert relative_error(decoded, last(io[f"sample_{sampler}_images"])) < 1e-5


def test_initial_parameters_have_the_released_names_and_shapes(reference):
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(lambda: vae.init_vae(KL_F4, jax.random.key(0))))
    assert shapes == jax.tree.map(jnp.shape, reference[0])


@pytest.mark.parametrize("channels, count", [(4, 83_653_863), (8, 83_709_419), (16, 83_821_011)])
def test_parameter_counts_equal_the_released_ones(channels, count):
    cfg = VAEConfig(latent_channels=channels)
    params = jax.eval_shape(lambda key: vae.init_vae(cfg, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_layout_options_remove_their_parameters():
    cfg = dataclasses.replace(SMALL, mid_attention=False, quant_conv=False, post_quant_conv=False)
    params = jax.eval_shape(lambda: vae.init_vae(cfg, jax.random.key(0)))
    assert set(params) == {"encoder", "decoder"}
    assert set(params["encoder"]["mid_block"]) == {"resnets_0", "resnets_1"}
    images = jnp.zeros((2, 8, 8, 3))
    latents = jax.eval_shape(lambda p: vae.images_to_latents(p, cfg, images), params)
    decoded = jax.eval_shape(lambda p, x: vae.latents_to_images(p, cfg, x), params, latents)
    assert decoded.shape == images.shape


@pytest.mark.slow
def test_enlarging_inside_the_convolution_equals_enlarging_before_it():
    """Also at the borders, for a height that is not the width, and for the gradients."""
    rng = np.random.default_rng(0)
    x, kernel, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 4, 5), (3, 3, 5, 6), (6,))
    )
    layer = vae._UpsampledConv(6, jnp.float32)

    def fused(x, kernel, bias):
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def plain(x, kernel, bias):  # What accelerators run.
        return vae.enlarged(x, kernel) + bias[None, None, None]

    large = x.repeat(2, axis=1).repeat(2, axis=2)
    names = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(large, kernel, (1, 1), "SAME", dimension_numbers=names)
    np.testing.assert_array_equal(vae.enlarged(x, kernel), out)
    shape = plain(x, kernel, bias).shape
    assert shape == (2, 6, 8, 6)
    weights = jnp.asarray(rng.normal(size=shape), jnp.float32)
    found, wanted = (
        (
            f(x, kernel, bias),
            *jax.grad(lambda *a, f=f: jnp.sum(weights * f(*a)), (0, 1, 2))(x, kernel, bias),
        )
        for f in (fused, plain)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_images_need_not_be_square():
    params, images = small_vae((1, 8, 20, 3))
    mean, logvar = encode_moments(params, SMALL, images)
    assert mean.shape == logvar.shape == (1, 4, 10, 2)
    assert decode_latents(params, SMALL, mean).shape == images.shape


def test_identity_returns_the_pixels_even_when_sampled():
    images = small_vae()[1]
    noise = jax.random.normal(jax.random.key(2), images.shape)
    assert init_vae(IDENTITY, jax.random.key(0)) == {}
    latents = images_to_latents({}, IDENTITY, images)
    np.testing.assert_array_equal(latents, images * 0.5)
    np.testing.assert_array_equal(latents_to_images({}, IDENTITY, latents), images)
    sampled = images_to_latents({}, IDENTITY, images, noise=noise)
    np.testing.assert_allclose(sampled, latents, atol=2e-6)


def test_a_sample_is_the_scaled_mean_plus_standard_deviation_times_noise(reference):
    params, io = reference
    images, mean, logvar = last(io["images"]), last(io["mean"]), last(io["logvar"])
    noise = np.random.RandomState(0).randn(*mean.shape).astype(np.float32)
    sample = images_to_latents(params, KL_F4, images, noise=noise)
    expected = 0.88 * (mean.astype(np.float64) + np.exp(logvar.astype(np.float64) / 2) * noise)
    assert relative_error(sample, expected) < 1e-5


def test_kl_is_zero_only_for_the_standard_normal():
    zeros = jnp.zeros((3, 2, 2, 4))
    np.testing.assert_array_equal(vae.kl(zeros, zeros), np.zeros(3))
    np.testing.assert_allclose(vae.kl(zeros + 1.0, zeros), np.full(3, 8.0))


def test_every_parameter_receives_a_gradient():
    params, images = small_vae()

    def loss(params):
        mean, logvar = encode_moments(params, SMALL, images)
        latents = vae.sample_posterior(mean, logvar, jnp.ones_like(mean))
        decoded = decode_latents(params, SMALL, latents)
        return jnp.mean((decoded - images) ** 2) + 1e-3 * jnp.mean(vae.kl(mean, logvar))

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.all(np.isfinite(grad)), name
        if not name.endswith("to_k/bias"):  # Shifts all logits of a query alike: no effect.
            assert np.max(np.abs(grad)) > 1e-8, name


def test_bfloat16_compute_stays_close_and_returns_float32(reference):
    params, io = reference
    mean, logvar = encode_moments(params, KL_F4, last(io["images"]), jnp.bfloat16)
    decoded = decode_latents(params, KL_F4, last(io["mean"]), jnp.bfloat16)
    for ours, name in ((mean, "mean"), (logvar, "logvar"), (decoded, "decoded")):
        expected = last(io[name])
        assert ours.dtype == jnp.float32
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < 3e-2, (name, error)


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 1), (1, 9, 8, 3), (1, 8, 0, 3)])
def test_images_that_do_not_fit_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"images of shape {shape}")):
        encode_moments({}, SMALL, jnp.zeros(shape))


def test_latents_that_do_not_fit_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=re.escape("latents of shape (1, 4, 4, 3)")):
        decode_latents({}, SMALL, jnp.zeros((1, 4, 4, 3)))
