"""What several tests share."""

import functools
import pathlib
import tempfile

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from examples.digits import arrays
from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.nn import ar, flextok
from flextok_jax.nn.config import ARConfig, FlexTokConfig, VAEConfig, identity_vae

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
ROOT = GOLDEN.parent.parent

TINY = FlexTokConfig(
    vae=identity_vae(),
    grid=(4, 4),
    patch_size=2,
    num_tokens=16,
    levels=(8, 5, 5),
    enc_width=64,
    enc_depth=2,
    dec_width=64,
    dec_depth=3,
    head_dim=32,
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


@functools.cache
def random_params(cfg: FlexTokConfig, seed: int = 0) -> dict:
    """Parameters without the zeros that a fresh model's heads and gates have."""
    shapes = jax.eval_shape(lambda key: flextok.init(cfg, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(shape):
        fan_in = shape.shape[-2] if len(shape.shape) > 1 else 4
        return (rng.standard_normal(shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def tiny_tokenizer(cfg: FlexTokConfig = TINY) -> FlexTok:
    return FlexTok(cfg, random_params(cfg))


def small_vae(channels: int = 4) -> VAEConfig:
    return VAEConfig(latent_channels=channels, block_out=(32, 32), layers_per_block=1)


def tiny_generator(cfg: FlexTokConfig) -> ImageGenerator:
    """A class-conditional AR model of random weights over the tokens of a tiny tokenizer."""
    tok = tiny_tokenizer(cfg)
    sizes = dict(width=32, depth=1, head_dim=16, mlp_hidden=64, num_classes=10)
    ar_cfg = ARConfig(vocab_size=cfg.vocab_size, num_tokens=cfg.num_tokens, **sizes)
    return ImageGenerator(ar_cfg, ar.init(ar_cfg, jax.random.key(0)), tok)
