"""The tokenizer stage: encoder, quantiser and flow decoder.

    python -m flextok_jax.main --config=configs/tokenizer.py:digits --workdir=runs/digits
    python -m flextok_jax.main --config=configs/tokenizer.py:folder --workdir=runs/mine \
        --config.data.path=FOLDER
    python -m flextok_jax.main --config=configs/tokenizer.py:d18_d28 --workdir=DIR \
        --config.data.path=TFDS_DATA_DIR --config.mesh.fsdp=16

or from latents made ahead by `flextok encode --vae VAE` (docs/data.md), with images to evaluate:

    ... --config.data.source=encoded --config.data.path=ENCODED \
        --config.evaluation.data=tfds:imagenet2012@TFDS_DATA_DIR

A variant may carry sizes after commas, which override the variant's own:
    --config=configs/tokenizer.py:d18_d28,enc_depth=2,dec_depth=2,width=64,batch=4,image=32

Sources of the numbers: [paper] arXiv 2502.13967; [released] the released inference code and
checkpoints; [assumed] recollected or not published, chosen by us.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from examples import digits, photos

VARIANTS = ("digits", "photos", "folder", "d12_d12", "d18_d18", "d18_d28")


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    variant, *overrides = arg.split(",")
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: allowed are {', '.join(VARIANTS)}")
    small = {"digits": _digits, "photos": _photos, "folder": _folder}
    config = small.get(variant, lambda: _imagenet(variant))()
    for item in overrides:
        name, _, value = item.partition("=")
        _override(config, name, int(value))
    return config


def _base() -> ConfigDict:
    """What every variant shares, and every key there is."""
    return ConfigDict(
        dict(
            stage="tokenizer",
            seed=0,
            total_steps=0,
            batch_size=0,
            log_every=100,
            eval_every=0,
            init_from="",  # a released model or a workdir: fine-tuning
            freeze=(),  # regexes over whole parameter paths, such as "encoder/.*"
            ema_decay=0.9998,
            time_shift=1.0,  # moves the sampled times towards noise; see flow.path.shift_time
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: the devices that are left
            checkpoint=dict(every=1000, keep=2),
            max_skipped_in_row=20,  # steps without a finite gradient, then the run stops
            profile="",  # "A:B": steps A to B, recorded in DIR/profile
            compute=dict(dtype="float32", attention="xla", scan=True, remat="none"),
            evaluation=dict(
                num_images=256,
                batch_size=128,
                steps=20,
                data="",  # other images, as `flextok data check` names them, than those of `data`
            ),
            vae=dict(source="identity", scaling_factor=placeholder(float)),
            repa=dict(
                weight=0.0,  # 0: off, because it needs files; 1 in the full-size runs [assumed]
                source="",  # facebook/dinov2-large or a folder of it; "": features in the data
                image_size=518,  # pixels that images are resized to for it [assumed]
                width=1024,  # channels of its features: 384, 768, 1024 for S, B, L
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
                patch_size=2,
                num_tokens=256,
                levels=(8, 8, 8, 5, 5, 5),  # 64 000 ids [paper]
                enc_width=768,
                enc_depth=12,
                dec_width=768,
                dec_depth=12,
                head_dim=64,  # [released]
                mlp_ratio=4.0,  # [released]
                max_timestep=1000.0,  # [assumed]
                mode_scale=0.25,  # [paper]
                keep_mode="pow2",  # [paper]: ImageNet models
                null_prob=0.2,  # [assumed]
                guidance_scale=7.5,  # [released]
            ),
            optim=dict(
                lr=5.62e-4,  # [assumed]
                warmup_steps=1000,
                final_lr_fraction=0.0,
                b1=0.9,  # [assumed]
                b2=0.99,  # [assumed]
                eps=1e-8,
                weight_decay=0.05,  # [assumed]
                grad_clip=1.0,  # [assumed]
                accumulate=1,
                mup_base_width=placeholder(int),
                mu_dtype=placeholder(str),
            ),
        )
    )


def _digits() -> ConfigDict:
    """1 500 real 16x16 digits in pixel space: half an hour on two CPU cores.

    The shipped model `demo-digits` was made by this variant at full length; its numbers lie beside
    its weights. JAX_NUM_CPU_DEVICES=2 makes two devices of one CPU, which is a third faster.
    """
    c = _base()
    c.total_steps, c.batch_size = 25_000, 32
    c.log_every, c.eval_every, c.checkpoint.every = 100, 5000, 1000
    c.ema_decay = 0.999
    c.evaluation.num_images, c.evaluation.batch_size = 297, 160
    # An 8x8 drawing scaled to 16x16 in three equal channels repeats each value 12 times, so it
    # shows through noise early: without the shift, with 12^(1/2) = 3.5 at least, the decoder does
    # not begin to use its tokens for thousands of steps. 6 began at some 600 steps, 12 at 750.
    c.time_shift = 6.0
    c.data.path = digits.folder()
    c.model.update(
        patch_size=4,
        num_tokens=16,
        levels=(8, 5, 5, 5),  # 1 000 ids: few enough for a small AR model's head
        enc_width=64,
        enc_depth=2,
        dec_width=64,
        dec_depth=4,
        head_dim=16,  # a single head of 64 learns where to look more slowly
        null_prob=0.1,
        guidance_scale=3.0,
    )
    c.optim.update(lr=3e-3, warmup_steps=200, final_lr_fraction=0.01)
    c.compute.scan = False  # a small model on a CPU runs faster unrolled
    return c


def _photos() -> ConfigDict:
    """Windows of the embedded photographs, 64x64, in the latents of configs/vae.py:photos.

    --config.vae.source=runs/vae_photos: that VAE is trained first. Half an hour on a CPU core;
    eight photographs teach colours and edges, not objects.
    """
    c = _base()
    c.total_steps, c.batch_size = 3000, 16
    c.log_every, c.eval_every, c.checkpoint.every = 100, 1000, 500
    c.ema_decay = 0.999
    c.evaluation.update(num_images=14, batch_size=14)
    c.time_shift = 3.0
    c.data.update(path=photos.folder(), image_size=64, crop="window")
    c.data.update(flip=True, quarter_turns=True)
    c.data.color = 0.14  # as its VAE
    c.model.update(
        patch_size=1,
        num_tokens=32,
        levels=(8, 5, 5, 5),
        enc_width=96,
        enc_depth=3,
        dec_width=128,
        dec_depth=4,
        head_dim=32,
        null_prob=0.1,
        guidance_scale=1.5,
    )
    c.optim.update(lr=2e-3, warmup_steps=200, final_lr_fraction=0.01)
    c.compute.scan = False
    return c


def _folder() -> ConfigDict:
    """A person's own images, 64x64 pixels without a VAE, on one GPU.

    For larger images name a VAE: --config.vae.source=EPFL-VILAB/flextok_vae_c16
    --config.data.image_size=256 --config.model.patch_size=2.
    """
    c = _base()
    c.total_steps, c.batch_size = 100_000, 128
    c.log_every, c.eval_every = 100, 5000
    c.ema_decay = 0.9995
    c.data.update(image_size=64, crop="random", crop_scale=(0.5, 1.0), flip=True)
    c.model.update(
        patch_size=4,
        num_tokens=64,
        enc_width=384,
        enc_depth=6,
        dec_width=512,
        dec_depth=8,
        guidance_scale=2.0,
    )
    c.optim.update(lr=4e-4)
    return c


def _imagenet(variant: str) -> ConfigDict:
    """The full-size models on ImageNet 256x256, batch 2048 [authors].

    200 B "tokens" (16x16-pixel regions, 256 per image) for the ImageNet models and 250 B for the
    DFN one [authors]: 381 470 steps and 476 837 steps of 2048 images.
    """
    enc, dec = (int(part[1:]) for part in variant.split("_"))
    c = _base()
    c.total_steps, c.batch_size = 381_470, 2048
    c.log_every, c.eval_every = 100, 10_000
    c.checkpoint.every = 5000
    c.compute.update(dtype="bfloat16", remat="full")  # bfloat16 [assumed]
    c.evaluation.update(num_images=256, batch_size=256, steps=25)
    c.vae.source = "EPFL-VILAB/flextok_vae_c16"  # frozen; its posterior is sampled [assumed]
    c.data.update(
        source="tfds",
        name="imagenet2012",
        split="train",
        eval_split="validation",
        image_size=256,
        crop="random",  # [assumed]
        flip=True,  # [assumed]
    )
    c.model.update(enc_width=64 * enc, enc_depth=enc, dec_width=64 * dec, dec_depth=dec)  # [paper]
    c.model.guidance_scale = 15.0 if variant == "d12_d12" else 7.5  # [paper], [released]
    c.optim.update(
        warmup_steps=5000,  # [assumed]
        mup_base_width=256,  # [assumed]
    )
    return c


def _override(config: ConfigDict, name: str, value: int):
    """One size of a variant's argument."""
    if name == "width":
        config.model.enc_width = config.model.dec_width = value
    elif name == "batch":
        config.batch_size = value
    elif name == "image":
        config.data.image_size = value
    elif name in ("enc_depth", "dec_depth", "num_tokens"):
        config.model[name] = value
    else:
        raise ValueError(
            f"{name!r} cannot be set after the variant: allowed are width, batch, image, "
            "enc_depth, dec_depth, num_tokens; anything else by --config.KEY=VALUE"
        )
