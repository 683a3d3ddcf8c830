"""The programs of a configuration with arguments that have shapes and places but no values."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flextok_jax import generator, tokenizer
from flextok_jax.aot import flops
from flextok_jax.flow import sampler
from flextok_jax.nn import ar, flextok, lpips, vae
from flextok_jax.nn.config import Compute, VAEConfig
from flextok_jax.nn.generation import Sampling
from flextok_jax.nn.images import to_float
from flextok_jax.parallel.sharding import batch_sharding, param_shardings, replicated
from flextok_jax.training.ar_stage import ARStage
from flextok_jax.training.checks import check_config
from flextok_jax.training.state import build
from flextok_jax.training.tokenizer_stage import TokenizerStage
from flextok_jax.training.vae_stage import VAEStage

PROGRAMS = {
    "vae": ("train",),
    "tokenizer": ("train", "vae", "tokenize", "detokenize"),
    "ar": ("train", "generate"),
}


class Program(NamedTuple):
    """Something to compile.

    Attributes:
        lower: () -> jax.stages.Lowered, with the mesh set.
        flops: model FLOPs of the whole call on all devices, None where they are not counted.
        state: arguments that stay between calls (parameters, optimizer), as shapes.
    """

    lower: Callable[[], jax.stages.Lowered]
    flops: int | None
    state: dict


def make(name: str, config, mesh: Mesh) -> Program:
    """The program `name` of a configuration file on a mesh.

    The training step takes moments of the VAE or tokens that were made before; "vae" makes the
    moments of one microbatch. That of a VAE takes images, and has its LPIPS term and its
    discriminator. The others are what FlexTok and ImageGenerator run, on batches of
    `config.evaluation.batch_size` in the configuration's compute type.

    Raises:
        ValueError: the stage has no such program, or a batch cannot be cut over the devices.
    """
    allowed = PROGRAMS.get(config.stage, ())
    if name not in allowed:
        raise ValueError(
            f"--program={name}: a configuration of the stage {config.stage!r} has "
            f"{', '.join(allowed) or 'none'}"
        )
    check_config(config, mesh)
    if config.stage == "vae":
        return _vae(VAEStage(config), config, mesh)
    if config.stage == "ar":
        return _ar(name, ARStage(config, made_by={}), config, mesh)
    return _tokenizer(name, TokenizerStage(config, vae_config=_vae_config(config)), config, mesh)


def _vae(stage, config, mesh) -> Program:
    size = config.data.image_size
    frozen = _placed({"lpips": lpips.shapes()}, mesh) if stage.weights.lpips_weight else {}
    batch = {"image": _array(mesh, (config.batch_size, size, size, 3), jnp.uint8)}
    one = {"image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)}
    key, step = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    total = flops.products(
        jax.grad(lambda *args: stage.loss(*args)[0]),
        *(jax.eval_shape(stage.init, key), frozen, one, key, step),
    )
    return _step(stage, config, mesh, frozen, batch, config.batch_size * total)


def _vae_config(config) -> VAEConfig | None:
    """The released VAE without reading it; another source is read."""
    channels = {f"EPFL-VILAB/flextok_vae_c{c}": c for c in (4, 8, 16)}.get(config.vae.source)
    return None if channels is None else VAEConfig(latent_channels=channels)


def _tokenizer(name, stage, config, mesh) -> Program:
    cfg, compute = stage.model, stage.compute
    frozen = _shapes(lambda: {"vae": vae.init_vae(cfg.vae, jax.random.key(0))}, mesh)
    batch = config.batch_size if name == "train" else config.evaluation.batch_size
    batch = config.batch_size // config.optim.accumulate if name == "vae" else batch
    (height, width), channels = cfg.image_size, cfg.vae.latent_channels
    small = (height // cfg.vae.downsample, width // cfg.vae.downsample)
    images = _array(mesh, (batch, height, width, 3), jnp.uint8)
    if name == "train":
        moments = {"moments": _array(mesh, (batch, *small, 2 * channels), jnp.bfloat16)}
        return _step(stage, config, mesh, {}, moments, batch * flops.tokenizer(cfg))
    if name == "vae":
        moments = functools.partial(_moments.lower, frozen["vae"], images, cfg.vae, compute)
        return Program(moments, None, frozen)
    params = _shapes(lambda: flextok.init(cfg, jax.random.key(0)), mesh)
    if name == "tokenize":
        options = dict(cfg=cfg, compute=compute, count=cfg.num_tokens)
        return Program(
            lambda: tokenizer._encode.lower(params, images, None, **options), None, params
        )
    tokens = _array(mesh, (batch, cfg.num_tokens), jnp.int32)
    keep = _array(mesh, (batch,), jnp.int32)
    noise = _array(mesh, (batch, *small, channels), jnp.float32)
    schedule = sampler.guidance_schedule(cfg.guidance_scale, config.evaluation.steps)
    scales = jax.ShapeDtypeStruct(np.shape(schedule), jnp.float32, sharding=replicated(mesh))
    guided = cfg.guidance_scale != 1
    options = dict(cfg=cfg, compute=compute, guided=guided, normalized=guided)
    return Program(
        lambda: tokenizer._decode.lower(params, tokens, keep, noise, scales, **options),
        None,
        params,
    )


@jax.jit(static_argnums=(2, 3))
def _moments(params, images, cfg, compute: Compute):
    images = to_float(images)
    return vae.encode_moments(params, cfg, images, jnp.dtype(compute.dtype))


def _ar(name, stage, config, mesh) -> Program:
    cfg = stage.model
    batch = config.batch_size if name == "train" else config.evaluation.batch_size
    tokens = _array(mesh, (batch, cfg.num_tokens), jnp.int32)
    label = _array(mesh, (batch,), jnp.int32)
    text = _text(cfg, (batch,), mesh)
    if name == "train":
        about = text if cfg.text_dim else {"label": label}
        null = {"null_text": _text(cfg, (), mesh)} if cfg.text_dim else {}
        total = batch * flops.ar_model(cfg, TEXT_LENGTH if cfg.text_dim else 0)
        return _step(stage, config, mesh, null, {"tokens": tokens} | about, total)
    params = _shapes(lambda: ar.init(cfg, jax.random.key(0)), mesh)
    condition = ar.ARCondition(**text) if cfg.text_dim else ar.ARCondition(labels=label)
    prefix = _array(mesh, (batch, 0), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(mesh))
    scalar = {kind: jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.float32)}
    how = Sampling(
        guidance=jax.ShapeDtypeStruct((cfg.num_tokens,), jnp.float32),
        temperature=scalar[jnp.float32],
        top_k=scalar[jnp.int32],
        top_p=scalar[jnp.float32],
    )
    start, stop = scalar[jnp.int32], scalar[jnp.int32]
    return Program(
        lambda: generator._generate.lower(
            params, cfg=cfg, compute=stage.compute, condition=condition, null=condition,
            prefix=prefix, keys=keys, sampling=how, start=start, stop=stop,
        ),
        None,
        params,
    )  # fmt: skip


TEXT_LENGTH = 128  # Positions of a text embedding, as the captions of the text models are cut.


def _text(cfg, batch: tuple[int, ...], mesh) -> dict:
    if not cfg.text_dim:
        return {}
    place = replicated(mesh) if not batch else batch_sharding(mesh)
    shape = (*batch, TEXT_LENGTH)
    return {
        "text": jax.ShapeDtypeStruct((*shape, cfg.text_dim), jnp.bfloat16, sharding=place),
        "text_mask": jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=place),
    }


def _step(stage, config, mesh, frozen, batch, total) -> Program:
    program = build(stage, config, mesh)
    return Program(lambda: program.step.lower(program.shapes, frozen, batch), total, program.shapes)


def _shapes(init, mesh):
    return _placed(jax.eval_shape(init), mesh)


def _placed(shapes, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        param_shardings(mesh, shapes),
    )


def _array(mesh, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
