"""What several tests share."""

import dataclasses
import functools
import importlib.util
import math
import pathlib
import tempfile

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from examples.digits import arrays
from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.nn import ar, flextok, layout
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Blocks, from_dict
from flextok_jax.nn.tokenizer_config import Bottleneck, Sites, TokenizerConfig, Tokens
from flextok_jax.nn.vae_config import VAEConfig, identity_vae
from flextok_jax.training.ar_stage import PAPER, ARStage
from flextok_jax.training.distill_stage import DistillStage
from flextok_jax.training.tokenizer_stage import TokenizerStage
from flextok_jax.training.vae_stage import VAEStage

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
ROOT = GOLDEN.parent.parent

TINY = TokenizerConfig(
    vae=identity_vae(),
    sites=Sites(grid=(4, 4), patch_size=2),
    tokens=Tokens(16),
    bottleneck=Bottleneck(levels=(8, 5, 5)),
    encoder=Blocks(width=64, depth=2, head_dim=32),
    decoder=Blocks(width=64, depth=3, head_dim=32),
)


_TEMPORARY = tempfile.TemporaryDirectory()  # Removed at the end of the process.


@functools.cache
def digits_folder() -> str:
    """A folder train/, test/ of digits in the order of `arrays`, 160 and 297, with metadata.csv."""
    root = pathlib.Path(_TEMPORARY.name) / "digits"
    for split in ("train", "test"):
        images, labels = (array[:160] if split == "train" else array for array in arrays(split))
        (root / split).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / split / f"{i:04d}.png")
        lines = [f"{i:04d}.png,{label}\n" for i, label in enumerate(labels)]
        (root / split / "metadata.csv").write_text("file_name,label\n" + "".join(lines))
    return str(root)


def changed(cfg: TokenizerConfig, **fields) -> TokenizerConfig:
    """A configuration with other values of some fields: encoder__depth=1 and so on."""
    tree = dataclasses.asdict(cfg)
    for path, value in fields.items():
        *parents, name = path.split("__")
        functools.reduce(dict.__getitem__, parents, tree)[name] = value
    return from_dict(TokenizerConfig, tree)


def last(channels_first):
    """[B, C, H, W] -> [B, H, W, C]."""
    return np.transpose(channels_first, (0, 2, 3, 1))


def relative(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a - b).max() / np.abs(b).max()


@functools.cache
def golden_tokenizer() -> FlexTok:
    return FlexTok.from_pretrained(GOLDEN / "tokenizer")


@functools.cache
def golden_io() -> dict:
    return load_file(GOLDEN / "tokenizer" / "io.safetensors")


def random_like(shapes, seed: int = 0) -> dict:
    """Parameters of these shapes without the zeros that a fresh model's heads and gates have."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        fan_in = shape.shape[-2] if len(shape.shape) > 1 else 4
        return (rng.standard_normal(shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, layout.unbox(shapes))


@functools.cache
def random_params(cfg: TokenizerConfig, seed: int = 0) -> dict:
    return random_like(flextok.shapes(cfg), seed)


def stage_params(stage) -> dict:
    """Random parameters of a stage; its `init` is not compiled, which takes longest."""
    return random_like(jax.eval_shape(stage.init, jax.random.key(0)))


def tiny_tokenizer(cfg: TokenizerConfig = TINY) -> FlexTok:
    return FlexTok(cfg, random_params(cfg))


def small_vae(channels: int = 4) -> VAEConfig:
    return VAEConfig(latent_channels=channels, block_out=(32, 32), layers_per_block=1)


def new_params(init) -> dict:
    """The parameters of a new model, by `init` of its network or its stage, compiled as one."""
    return jax.jit(lambda key: layout.unbox(init(key)))(jax.random.key(0))


@functools.cache
def ar_params(cfg: ARConfig) -> dict:
    return new_params(functools.partial(ar.init, cfg))


def tiny_generator(cfg: TokenizerConfig) -> ImageGenerator:
    """A class-conditional AR model of random weights over the tokens of a tiny tokenizer."""
    tok = tiny_tokenizer(cfg)
    sizes = dict(width=32, depth=1, head_dim=16, mlp_hidden=64, num_classes=10)
    ar_cfg = ARConfig(vocab_size=cfg.vocab_size, num_tokens=cfg.num_tokens, **sizes)
    return ImageGenerator(ar_cfg, ar_params(ar_cfg), tok)


def config_file(name: str):
    """configs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIGS = {name: config_file(name) for name in ("vae", "tokenizer", "distill", "ar", "lab")}


def shipped(name: str, variant: str):
    """(stage, configuration) of a shipped variant; its data is not opened."""
    config = CONFIGS[name].get_config(variant)
    if config.stage == "ar":
        levels, continuous = config.model.levels, config.model.channels
        ids = 0 if continuous else math.prod(levels) if levels else PAPER.vocab_size
        return ARStage(config, PAPER._replace(vocab_size=ids)), config
    config.evaluation.num_images = 0
    if name == "vae":
        return VAEStage(config), config
    if name == "distill":
        teacher = TokenizerConfig() if variant == "imagenet" else None
        return DistillStage(config, teacher), config
    cfg = None if config.vae.source == "identity" else VAEConfig(latent_channels=16)
    return TokenizerStage(config, vae_config=cfg), config
