"""Stage 0, the VAE: reconstruction, KL, LPIPS and an adversarial loss.

    python -m flextok_jax.main --config=configs/vae.py:digits --workdir=runs/vae_digits
    python -m flextok_jax.main --config=configs/vae.py:photos --workdir=runs/vae_photos
    python -m flextok_jax.main --config=configs/vae.py:c16 --workdir=DIR \
        --config.data.path=TFDS_DATA_DIR \
        --config.lpips.vgg=vgg16-397923af.pth --config.lpips.heads=lpips/weights/v0.1/vgg.pth

A variant may carry sizes after commas, which override the variant's own:
    --config=configs/vae.py:c16,width=32,layers=1,batch=4,image=32

Sources of the numbers: [paper] arXiv 2502.13967; [released] the released weights' shapes; [LDM] the
autoencoder of arXiv 2112.10752, recollected; [assumed] not published, chosen by us.
"""

import functools

from ml_collections import ConfigDict

from configs.base import base, choose, imagenet
from examples import digits, photos

CHANNELS = (4, 8, 16)  # [paper]


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    return choose(arg, VARIANTS, SIZES)


def _base() -> ConfigDict:
    """What every variant shares, and every key there is."""
    c = base(
        "vae",
        model=dict(
            latent_channels=4,
            block_out=(128, 256, 512, 512),  # [released]
            layers_per_block=2,  # [released]
            norm_groups=32,  # [released]
            mid_attention=True,  # [released]
        ),
        discriminator=dict(width=64, layers=3),  # arXiv 1611.07004
        loss=dict(
            reconstruction="l1",  # [LDM]
            kl_weight=1e-6,  # [LDM]: nats against the sum over pixels
            lpips_weight=1.0,  # [LDM]; off without the files below
            gan_weight=0.5,  # [LDM]; 0: no discriminator
            gan_start=50_000,  # [LDM]
        ),
        lpips=dict(vgg="", heads=""),  # files of VGG16 and of the linear heads
    )
    c.evaluation.num_latents = 512  # training images, for the scaling factor
    c.optim.update(
        lr=1e-4,  # [assumed], as are warm-up, betas and clipping
        final_lr_fraction=0.01,  # [assumed]
        weight_decay=0.0,  # [LDM]
        # What the discriminator's optimizer has instead, clipping of its own included.
        groups=dict(discriminator=dict(lr=1e-4, b1=0.5, b2=0.9)),  # betas [LDM]
    )
    return c


def _digits() -> ConfigDict:
    """16x16 digits to 8x8 latents of 1 channel: 600 steps take a minute on two CPU cores."""
    c = _base()
    c.total_steps, c.batch_size = 2000, 32
    c.log_every, c.eval_every, c.checkpoint.every = 100, 1000, 500
    c.ema_decay = 0.99
    c.evaluation.update(num_images=297, batch_size=160)
    c.data.update(path=digits.folder(), shift=1)
    c.model.update(
        latent_channels=1,
        block_out=(16, 32),
        layers_per_block=1,
        norm_groups=8,
        mid_attention=False,
    )
    c.loss.update(lpips_weight=0.0, gan_weight=0.0)
    c.optim.update(lr=2e-3, warmup_steps=100)
    return c


def _photos() -> ConfigDict:
    """Windows of photographs, 64x64, to 8x8 latents of 16 channels: 15 minutes on one CPU core.

    Expected: a PSNR of 27.2 dB on the validation tiles (mean of 14, posterior's mean, averaged
    weights, one run); thumbnails of as many numbers (19x19 pixels by Lanczos, enlarged bicubically)
    have 25.3. Measured by `python -m benchmarks.vae_photos runs/vae_photos`. Widths, windows and
    colours were chosen on the same tiles.
    """
    c = _base()
    c.total_steps, c.batch_size = 3000, 4
    c.log_every, c.eval_every, c.checkpoint.every = 100, 500, 500
    c.ema_decay = 0.99
    c.evaluation.update(num_images=14, num_latents=256, batch_size=14)
    c.data.update(path=photos.folder(), image_size=64, crop="window")
    c.data.update(flip=True, quarter_turns=True)
    c.data.color = 0.14  # Eight photographs have few colours: others were off by a constant.
    c.model.update(
        latent_channels=16,
        block_out=(16, 32, 64, 64),
        layers_per_block=1,
        norm_groups=1,  # more groups discard more of an image's brightness and contrast
        mid_attention=False,
    )
    c.loss.update(reconstruction="l2", lpips_weight=0.0, gan_weight=0.0)  # l2: what PSNR counts
    c.optim.update(rule="muon", lr=1e-2, warmup_steps=100)  # faster here than Adam
    return c


def _emoji() -> ConfigDict:
    """Emoji, 64x64, to 8x8 latents of 16 channels; the VAE of the shipped model `demo-emoji`.

    --config.data.path=FOLDER of examples/emoji/make_data.py.
    """
    c = _photos()
    c.total_steps, c.batch_size, c.eval_every = 3200, 8, 800
    c.evaluation.update(num_images=398, batch_size=100)
    c.data.update(path="", crop="center", color=0.1)
    return c


def _imagenet(channels: int) -> ConfigDict:
    """The full-size VAEs, 256x256 to 32x32 latents of 4, 8 or 16 channels [paper]."""
    c = _base()
    c.total_steps, c.batch_size = 500_000, 128  # [assumed]
    c.log_every, c.eval_every = 100, 10_000
    c.checkpoint.every = 5000
    c.ema_decay = 0.9999  # [assumed]
    c.compute.dtype = "bfloat16"  # [assumed]
    c.evaluation.update(num_images=2048, num_latents=1024, batch_size=128)
    c.model.latent_channels = channels
    imagenet(c)
    return c


def _width(c: ConfigDict, value: int):
    c.model.block_out = (value,) * len(c.model.block_out)


VARIANTS = {"digits": _digits, "photos": _photos, "emoji": _emoji}
VARIANTS |= {f"c{n}": functools.partial(_imagenet, n) for n in CHANNELS}
SIZES = {
    "width": _width,
    "layers": lambda c, n: c.model.update(layers_per_block=n),
    "channels": lambda c, n: c.model.update(latent_channels=n),
    "batch": lambda c, n: c.update(batch_size=n),
    "image": lambda c, n: c.data.update(image_size=n),
}
