"""The VAE stage: two networks under one loss, a measured scaling factor, files for diffusers."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import GOLDEN, relative
from safetensors.numpy import load_file

from configs import tokenizer as tokenizer_configs
from configs import vae as CONFIGS
from examples.digits import arrays
from flextok_jax.commands import model as commands
from flextok_jax.commands import options
from flextok_jax.io import models
from flextok_jax.io.checkpoint import WorkdirError
from flextok_jax.io.formats import vae_files
from flextok_jax.nn import lpips, vae
from flextok_jax.nn.vae_config import VAEConfig
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.parallel.rng import named
from flextok_jax.training import optimizer, pixel_losses
from flextok_jax.training.loop import train
from flextok_jax.training.state import build
from flextok_jax.training.vae_stage import VAEStage

FULL_SIZE = {"c4": 83_653_863, "c8": 83_709_419, "c16": 83_821_011}


def config(variant="digits,width=8,batch=8", **changes):
    """A small run with both networks, of one resolution: there is little to compile."""
    c = CONFIGS.get_config(variant)
    c.update(total_steps=12, log_every=1, eval_every=0)
    c.checkpoint.every = 6
    c.evaluation.update(num_images=20, num_latents=64, batch_size=16)
    c.mesh.data, c.model.block_out, c.optim.warmup_steps = 1, (8,), 1
    c.discriminator.update(width=8, layers=2)
    c.loss.update(gan_weight=0.5, gan_start=6)
    for key, value in changes.items():
        owner, _, name = key.rpartition("__")
        (c[owner] if owner else c)[name] = value
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of twelve steps: (workdir, outcome)."""
    workdir = tmp_path_factory.mktemp("vae")
    return workdir, train(VAEStage(config()), config(), workdir)


@pytest.fixture(scope="module")
def networks():
    """A stage, parameters, a batch, and its loss and gradient as a function of the step."""
    stage = VAEStage(config())
    params = jax.jit(stage.init)(jax.random.key(0))
    # Logits of such a size that some lie inside the hinge.
    params["discriminator"]["conv_out"]["kernel"] *= 50
    batch, key = {"image": jnp.asarray(arrays("train")[0][:8])}, jax.random.key(1)
    compiled = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))

    def loss(step):
        (value, logged), grads = compiled(params, {}, batch, key, jnp.int32(step))
        return value, {name: float(metric.compute()) for name, metric in logged.items()}, grads

    return types.SimpleNamespace(stage=stage, params=params, batch=batch, key=key, loss=loss)


def own_terms(networks, params):
    """(images, made, |x - y|, G, KL), straight from the definitions."""
    cfg, images = networks.stage.model, networks.batch["image"] / 127.5 - 1.0
    mean, logvar = vae.encode_moments(params, cfg, images)
    noise = jax.random.normal(named(networks.key, "posterior"), mean.shape)
    made = vae.decode_latents(params, cfg, mean + jnp.exp(logvar / 2) * noise)
    generator = -logits(networks, networks.params["discriminator"], made).mean()
    return images, made, jnp.abs(made - images).mean(), generator, vae.kl(mean, logvar).mean()


def logits(networks, params, images):
    return networks.stage.pixels.discriminator.apply({"params": params}, images)


@pytest.fixture(scope="module")
def own_gradients(networks):
    """Of |x - y|, of G and of the KL by the VAE's parameters, stacked."""
    gradient = jax.jit(jax.grad(lambda p, w: w @ jnp.stack(own_terms(networks, p)[2:])))
    each = [gradient(networks.params["vae"], one) for one in jnp.eye(3)]
    return jax.tree.map(lambda *g: jnp.stack(g), *each)


def close(a, b, rtol=1e-3):
    """Leaf by leaf, to `rtol` of the largest number in the tree."""
    scale = max(np.abs(y).max() for y in jax.tree.leaves(b))
    named_leaves = jax.tree_util.tree_leaves_with_path(a)
    for (path, x), y in zip(named_leaves, jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=str(path))


def test_the_discriminator_gets_the_gradient_of_its_own_loss_alone(networks):
    images, made, *_ = jax.jit(lambda p: own_terms(networks, p))(networks.params["vae"])

    def hinge(p):
        real, fake = (logits(networks, p, x) for x in (images, made))
        return jnp.maximum(0, 1 - real).mean() / 2 + jnp.maximum(0, 1 + fake).mean() / 2

    _, logged, grads = networks.loss(6)
    value, expected = jax.jit(jax.value_and_grad(hinge))(networks.params["discriminator"])
    assert all(np.any(x) for x in jax.tree.leaves(expected))
    close(grads["discriminator"], expected, rtol=1e-4)
    np.testing.assert_allclose(logged["d_loss"], value, rtol=1e-5)


def test_the_vae_gets_the_gradient_of_its_own_terms_with_the_adaptive_weight(
    networks, own_gradients
):
    value, logged, grads = networks.loss(6)
    norms = jnp.linalg.norm(own_gradients["decoder"]["conv_out"]["kernel"].reshape(3, -1), axis=1)
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    assert 0 < weight < 0.5e4
    np.testing.assert_allclose(logged["adaptive_weight"], weight, rtol=1e-3)
    terms = jnp.array([1, weight, 1e-6 / (16 * 16 * 3)])
    close(grads["vae"], jax.tree.map(lambda g: jnp.tensordot(terms, g, 1), own_gradients))
    total = terms @ jnp.array([logged["rec"], logged["g_loss"], logged["kl"]]) + logged["d_loss"]
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_before_its_start_the_discriminator_changes_nothing(networks, own_gradients):
    value, logged, grads = networks.loss(5)
    assert not any(np.any(x) for x in jax.tree.leaves(grads["discriminator"]))
    assert logged["d_loss"] == logged["g_loss"] == logged["adaptive_weight"] == 0
    terms = jnp.array([1, 0, 1e-6 / (16 * 16 * 3)])
    close(grads["vae"], jax.tree.map(lambda g: jnp.tensordot(terms, g, 1), own_gradients))
    np.testing.assert_allclose(value, terms[0] * logged["rec"] + terms[2] * logged["kl"], rtol=1e-5)


def test_the_adaptive_weight_is_bounded():
    weight = pixel_losses.adaptive_weight
    np.testing.assert_allclose(weight(6.0, 2.0), 6 / 2.0001, rtol=1e-6)
    assert weight(1.0, 0.0) == 1e4 and weight(2.0, 0.0) == 1e4 and weight(0.0, 0.0) == 0


def test_lpips_counts_when_its_files_are_named_and_is_said_to_be_off_when_not(caplog):
    with caplog.at_level(logging.WARNING):
        assert VAEStage(config()).load_frozen() == {} and not caplog.records  # Not asked for.
        stage = VAEStage(config(loss__lpips_weight=0.3, loss__gan_weight=0.0))
        assert stage.load_frozen() == {}
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["no LPIPS term"]
    with pytest.raises(ValueError, match="both files"):
        VAEStage(config(lpips__vgg="vgg.pth"))
    with pytest.raises(FileNotFoundError, match="vgg.pth"):
        named_files = config(lpips__vgg="vgg.pth", lpips__heads="x.pth", loss__lpips_weight=1.0)
        VAEStage(named_files).load_frozen()
    random = np.random.RandomState(0)
    frozen = jax.tree.map(
        lambda s: random.randn(*s.shape).astype(np.float32) / np.sqrt(s.size // s.shape[-1]),
        lpips.shapes(),
    )
    images = jnp.asarray(random.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    made, with_lpips = images * 0.5, {"lpips": frozen}
    value, logged = jax.jit(stage.pixels.reconstruction)(with_lpips, images, made)
    distance = logged["lpips"].compute()
    assert distance > 1e-3
    np.testing.assert_allclose(value, jnp.abs(made - images).mean() + 0.3 * distance, rtol=1e-5)


@pytest.mark.slow
def test_a_run_logs_all_terms_and_trains_both_networks(trained):
    workdir, outcome = trained
    records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["d_loss"] > 0 for r in records] == 6 * [False] + 6 * [True]
    assert records[-1]["rec"] < 0.8 * records[0]["rec"]
    for name in ("loss", "rec", "kl", "g_loss", "d_loss", "adaptive_weight", "logits/real",
                 "logits/fake", "eval/reconstruction/psnr",
                 "latent_std", "scaling_factor"):  # fmt: skip
        assert name in records[-1], name
    assert int(outcome.state.skipped) == 0
    first = jax.jit(VAEStage(config()).init)(named(jax.random.key(0), "init"))
    for name, network in outcome.state.params.items():
        moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (network, first[name])))]
        assert np.mean(moved) > 0.8, name  # Opposite hinges may cancel in a bias.


def test_the_scaling_factor_makes_the_latents_unit_variance(trained):
    cfg, params = models.load_vae(str(trained[0]))
    images = arrays("train")[0][:200] / np.float32(127.5) - 1
    mean, _ = vae.encode_moments(params, cfg, images)
    noise = np.random.RandomState(0).randn(*mean.shape).astype(np.float32)
    latents = vae.images_to_latents(params, cfg, images, noise=noise)
    assert cfg.scaling_factor != 1 and abs(np.std(latents) - 1) < 0.03
    for a, b in zip(*map(jax.tree.leaves, (params, trained[1].state.ema["vae"])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_workdir_that_measured_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(VAEStage, "measure", lambda *_: {})
    train(VAEStage(config()), config(total_steps=1), tmp_path)
    with pytest.raises(ValueError, match="vae.scaling_factor"):
        models.load_vae(str(tmp_path))
    assert models.load_vae(str(tmp_path), 0.5)[0].scaling_factor == 0.5


def test_a_workdir_becomes_a_diffusers_folder(trained, tmp_path, capsys):
    workdir, out = str(trained[0]), tmp_path / "vae"
    commands.convert(options.Convert(model=workdir, out=str(out)))
    assert {p.name for p in out.iterdir()} == {"config.json", vae_files.WEIGHTS}
    for a, b in zip(vae_files.load_folder(out), models.load_vae(workdir), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b) if isinstance(a, dict) else None
        assert isinstance(a, dict) or a == b
    info = [commands.describe(source) for source in (workdir, out)]
    assert info[0]["sha256"] == info[1]["sha256"] and info[0]["config"] == info[1]["config"]
    commands.info(options.Info(source=str(out)))
    assert info[1]["sha256"] in capsys.readouterr().out


def test_the_reference_folder_round_trips(tmp_path):
    cfg, params = vae_files.load_folder(GOLDEN / "vae")
    vae_files.save_folder(tmp_path, cfg, params)
    old, new = (load_file(folder / vae_files.WEIGHTS) for folder in (GOLDEN / "vae", tmp_path))
    assert old.keys() == new.keys()
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    old, new = (json.loads((f / "config.json").read_text()) for f in (GOLDEN / "vae", tmp_path))
    assert new.items() <= old.items()
    missing = {k: v for k, v in old.items() if k not in new and v is not None}
    assert missing.keys() == {"_diffusers_version", "sample_size", "force_upcast"}
    again, params = vae_files.load_folder(tmp_path)
    assert again == cfg
    io = load_file(GOLDEN / "vae" / "io.safetensors")
    images = np.moveaxis(io["images"], 1, -1)
    mean, _ = jax.jit(vae.encode_moments, static_argnums=1)(params, cfg, images)
    assert relative(mean, np.moveaxis(io["mean"], 1, -1)) < 1e-5


@pytest.mark.slow
def test_a_workdir_is_the_frozen_vae_of_a_tokenizer(trained, tmp_path, monkeypatch):
    from flextok_jax import FlexTok
    from flextok_jax.training.tokenizer_stage import TokenizerStage

    c = tokenizer_configs.get_config("digits,width=64,enc_depth=1,dec_depth=1,batch=8")
    c.update(total_steps=1, eval_every=0)
    c.evaluation.num_images, c.mesh.data, c.vae.source = 0, 1, str(trained[0])
    assert int(train(TokenizerStage(c), c, tmp_path).state.skipped) == 0
    tok = FlexTok.from_pretrained(tmp_path)
    assert tok.config.vae == models.load_vae(str(trained[0]))[0]
    tokens = tok.tokenize(arrays("test")[0][:2], 4)
    assert np.isfinite(tok.detokenize(tokens, steps=1)).all()
    # The same path, but the VAE that lies there was trained further.
    load = models.load_vae

    def further(source, scaling_factor=None):
        cfg, params = load(source, scaling_factor)
        return cfg, jax.tree.map(lambda x: x * 1.01, params)

    monkeypatch.setattr(models, "load_vae", further)
    with pytest.raises(ValueError, match="trained with another VAE than"):
        FlexTok.from_pretrained(tmp_path)
    c.total_steps, before = 2, (tmp_path / "config.json").read_text()
    with pytest.raises(WorkdirError, match="vae_fingerprint: "):
        train(TokenizerStage(c), c, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_fine_tuning_starts_from_a_vae(trained):
    stage = VAEStage(config())
    params = stage.init_from(str(trained[0]))
    close(params["vae"], trained[1].state.ema["vae"], rtol=0)
    assert set(params) == {"vae", "discriminator"}
    with pytest.raises(ValueError, match="latent_channels=4.*latent_channels=1"):
        stage.init_from(str(GOLDEN / "vae"))


@pytest.mark.parametrize("variant", CONFIGS.VARIANTS)
def test_full_size_configs_describe_the_released_vaes(variant):
    stage = VAEStage(CONFIGS.get_config(variant))
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes["vae"]))
    if variant in FULL_SIZE:
        assert count == FULL_SIZE[variant]
        assert stage.model == VAEConfig(latent_channels=int(variant[1:]))
        assert sum(x.size for x in jax.tree.leaves(shapes["discriminator"])) == 2_765_633
    else:
        assert count < 3_000_000 and set(shapes) == {"vae"}


def test_each_group_has_an_optimizer_of_its_own():
    c = config(total_steps=10)
    c.optim.update(lr=0.1, warmup_steps=0, grad_clip=0.5)
    c.optim.groups.discriminator.update(lr=0.01, b1=0.5)
    params = {"vae": {"kernel": jnp.ones((2, 2))}, "discriminator": {"kernel": jnp.ones((2, 2))}}
    grads = jax.tree.map(lambda x: 100 * x, params)
    grads["discriminator"]["kernel"] *= 1e-4  # Not clipped: the other's norm is not its own.
    tx = optimizer.make_optimizer(c)
    updates, state = tx.update(grads, tx.init(params), params)
    for name, lr, b1, b2 in (("vae", 0.1, 0.9, 0.99), ("discriminator", 0.01, 0.5, 0.9)):
        alone = config(total_steps=10).unlock()
        alone.optim.update(lr=lr, b1=b1, b2=b2, warmup_steps=0, grad_clip=0.5)
        del alone.optim.groups
        own = optimizer.make_optimizer(alone)
        expected, own_state = own.update(grads[name], own.init(params[name]), params[name])
        np.testing.assert_array_equal(updates[name]["kernel"], expected["kernel"])
        inner = state.inner_states["" if name == "vae" else name]
        got = optax.tree.get(inner, "nu")[name]
        np.testing.assert_array_equal(got["kernel"], optax.tree.get(own_state, "nu")["kernel"])
    c.optim.groups.discriminator.rate = 1.0
    with pytest.raises(ValueError, match=r"groups.discriminator cannot set \['rate'\]"):
        optimizer.make_optimizer(c)


def test_slots_of_every_group_lie_as_their_parameters():
    c = config()
    program = build(VAEStage(c), c, make_mesh(devices=jax.devices()[:1]))
    slots = program.shapes.opt_state.inner_state.inner_states
    assert set(slots) == {"", "discriminator"}
    for label, network in (("", "vae"), ("discriminator", "discriminator")):
        mu = optax.tree.get(slots[label], "mu")
        assert jax.tree.leaves(mu) == jax.tree.leaves(mu[network])
        params = program.shapes.params[network]
        for slot, param in zip(*map(jax.tree.leaves, (mu[network], params))):
            assert (slot.shape, slot.sharding) == (param.shape, param.sharding)


def test_bad_configs_say_what_is_wrong():
    for change, message in (
        (dict(data__image_size=18), "image_size=18.*multiple of 16"),
        (
            dict(data__image_size=17, loss__gan_weight=0.0, model__block_out=(8, 8)),
            "image_size=17.*multiple of 2",
        ),
        (dict(loss__reconstruction="l3"), "'l3'"),
    ):
        with pytest.raises(ValueError, match=message):
            VAEStage(config(**change))
    assert dataclasses.asdict(VAEStage(config()).model)["scaling_factor"] == 1.0
