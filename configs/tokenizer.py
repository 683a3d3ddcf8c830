"""The tokenizer stage: encoder, bottleneck and decoder.

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

import dataclasses
import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import base, choose, imagenet
from examples import digits, photos
from flextok_jax.nn.tokenizer_config import TokenizerConfig

IMAGENET = ((12, 12), (18, 18), (18, 28))  # Depths of encoder and decoder.


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    return choose(arg, VARIANTS, SIZES)


def tokenizer() -> ConfigDict:
    """What every variant shares, and every key there is."""
    c = base(
        "tokenizer",
        ema_decay=0.9998,  # [assumed]
        compute=dict(dtype="float32", attention="xla", scan=True, remat="none"),
        init_model=False,  # whether the model is that of `init_from`, in place of `model`
        time_shift=1.0,  # moves the sampled times towards noise; see flow.path.shift_time
        vae=dict(source="identity", scaling_factor=placeholder(float)),
        repa=dict(
            weight=0.0,  # 0: off, because it needs files; 1 in the full-size runs [assumed]
            source="",  # facebook/dinov2-large or a folder of it; "": features in the data
            image_size=518,  # pixels that images are resized to for it [assumed]
            width=1024,  # channels of its features: 384, 768, 1024 for S, B, L
            book=False,  # whether the last codebook's tokens are aligned, not the decoder
        ),
        loss=dict(
            bottleneck_weight=1.0,  # of the bottleneck's own loss, for "vq" and "kl"
            # Of the target "values"; the last three need pixels (vae.source="identity").
            reconstruction="l2",
            lpips_weight=0.0,
            gan_weight=0.0,
            gan_start=0,
        ),
        discriminator=dict(width=64, layers=3),
        lpips=dict(vgg="", heads=""),
        model=model(),
    )
    # Other images to evaluate on, as `flextok data check` names them, than those of `data`.
    c.evaluation.data = ""
    c.optim.update(lr=5.62e-4)  # [assumed], as are the betas, weight decay and clipping
    return c


def model() -> ConfigDict:
    """Every field of `TokenizerConfig`, without the VAE and the grid of patches.

    All are at their defaults but for the sampler.

    [paper]: 64 000 ids by levels of 8, 8, 8, 5, 5, 5; mode_scale 0.25; keep "pow2" for the ImageNet
    models. [released]: heads of 64, MLPs of 8/3 the width, guidance 7.5. [assumed]: max_timestep
    1000, null_prob 0.2.
    """
    fields = dataclasses.asdict(TokenizerConfig())
    del fields["vae"], fields["sites"]["grid"]
    # As good as 40 Euler steps on the digits: docs/performance.md, Decoding.
    fields["target"]["flow"]["sampler"].update(solver="multistep", steps=8)
    return ConfigDict(fields)


def _digits() -> ConfigDict:
    """1 500 real 16x16 digits in pixel space.

    The shipped model `demo-digits` is this variant at full length with optim.rule="adam", half an
    hour on two CPU cores; its metrics lie beside its weights. JAX_NUM_CPU_DEVICES=2 makes two
    devices of one CPU, which is faster.
    """
    c = tokenizer()
    c.total_steps, c.batch_size = 25_000, 32
    c.log_every, c.eval_every, c.checkpoint.every = 100, 5000, 1000
    c.ema_decay = 0.999
    c.evaluation.num_images, c.evaluation.batch_size = 297, 160
    # An 8x8 drawing scaled to 16x16 in three equal channels repeats each value 12 times, so it
    # shows through noise early: without a shift, of 12^(1/2) = 3.5 at least, the decoder does not
    # begin to use its tokens for long.
    c.time_shift = 6.0
    c.data.path = digits.folder()
    c.model.sites.patch_size, c.model.tokens.count = 4, 16
    c.model.bottleneck.levels = (8, 5, 5, 5)  # 1 000 ids: few enough for a small AR model's head
    # A single head of 64 learns where to look more slowly.
    c.model.encoder.update(width=64, depth=2, head_dim=16)
    c.model.decoder.update(width=64, depth=4, head_dim=16)
    c.model.target.flow.null_prob = 0.1
    c.model.target.flow.sampler.guidance_scale = 3.0
    # The quickstart's 2 500 steps: 18.7 dB from 16 tokens, with Adam 14.2. 25 000 were not tried.
    c.optim.update(rule="muon", lr=3e-3, warmup_steps=200, final_lr_fraction=0.01)
    c.compute.scan = False  # a small model on a CPU runs faster unrolled
    return c


def _photos() -> ConfigDict:
    """Windows of the embedded photographs, 64x64, in the latents of configs/vae.py:photos.

    --config.vae.source=runs/vae_photos: that VAE is trained first. Half an hour on a CPU core;
    eight photographs teach colours and edges, not objects.
    """
    c = tokenizer()
    c.total_steps, c.batch_size = 3000, 16
    c.log_every, c.eval_every, c.checkpoint.every = 100, 2500, 500
    c.ema_decay = 0.999
    c.evaluation.update(num_images=14, batch_size=14)
    c.time_shift = 3.0
    c.data.update(path=photos.folder(), image_size=64, crop="window")
    c.data.update(flip=True, quarter_turns=True)
    c.data.color = 0.14  # as its VAE
    c.model.sites.patch_size, c.model.tokens.count = 1, 32
    c.model.bottleneck.levels = (8, 5, 5, 5)
    c.model.encoder.update(width=96, depth=3, head_dim=32)
    c.model.decoder.update(width=128, depth=4, head_dim=32)
    c.model.target.flow.null_prob = 0.1
    c.model.target.flow.sampler.guidance_scale = 1.5
    c.optim.update(lr=2e-3, warmup_steps=200, final_lr_fraction=0.01)
    c.compute.scan = False
    return c


def _emoji() -> ConfigDict:
    """Emoji in 32 tokens, in the latents of configs/vae.py:emoji; the shipped model `demo-emoji`.

    --config.vae.source=runs/vae_emoji --config.data.path=FOLDER of examples/emoji/make_data.py. Its
    page, flextok_jax/demos/emoji/MODEL.md, has the commands that encode the images once.
    """
    c = _photos()
    c.total_steps, c.eval_every = 10_000, 5000
    c.evaluation.update(num_images=64, batch_size=64)
    c.data.update(path="", crop="center", flip=False, quarter_turns=False, color=0.0)
    c.model.encoder.update(width=144, head_dim=24)
    c.model.decoder.update(width=144, depth=5, head_dim=24)
    c.model.target.flow.log_normal_time, c.time_shift = True, 6.0
    c.model.target.flow.sampler.update(steps=3, time_shift=6.0, guidance_scale=1.0)
    c.optim.update(rule="muon", lr=3e-3)
    return c


def _folder() -> ConfigDict:
    """A person's own images, some thousands, as 64x64 pixels without a VAE.

    Under an hour on two CPU cores. docs/small-and-large.md says what was measured, and how to make
    it smaller or larger.
    """
    c = tokenizer()
    c.total_steps, c.batch_size = 12_000, 16
    c.log_every, c.eval_every, c.checkpoint.every = 100, 4000, 500
    c.ema_decay = 0.999
    c.evaluation.update(num_images=64, batch_size=64)
    # Random crops and mirroring are left out: the small model needs more steps with them.
    c.data.update(image_size=64, crop="center")
    c.model.sites.patch_size, c.model.tokens.count = 8, 64
    c.model.bottleneck.levels = (8, 5, 5, 5)
    c.model.encoder.update(width=96, depth=2, head_dim=24)
    c.model.decoder.update(width=96, depth=4, head_dim=24)
    # A velocity holds the noise of a patch, 192 numbers, which a width of 96 cannot carry.
    c.model.target.flow.predicts = "image"
    # Nearly all times between 0.77 and 0.998, and steps of sampling there too: large pictures show
    # through noise early, and then tokens have nothing to add.
    c.model.target.flow.log_normal_time, c.time_shift = True, 24.0
    c.model.target.flow.null_prob = 0.1
    # The steps are long near t = 0, where multistep's extrapolation fails. Guidance of 2 takes
    # twice the time and loses 0.8 dB for 5 emoji of 315 that keep their group (docs/
    # small-and-large.md); APG's limit on the norm of an update is for latents: here it leaves
    # nothing of the guidance.
    c.model.target.flow.sampler.update(
        solver="euler", time_shift=24.0, guidance_scale=1.0, norm_guidance=False
    )
    c.optim.update(rule="muon", lr=4e-3, warmup_steps=200, final_lr_fraction=0.01)
    c.compute.scan = False
    return c


def _folder_gpu() -> ConfigDict:
    """A person's own images, 64x64 pixels without a VAE, on one GPU: 62 million parameters.

    For larger images name a VAE: --config.vae.source=EPFL-VILAB/flextok_vae_c16
    --config.data.image_size=256 --config.model.sites.patch_size=2.
    """
    c = tokenizer()
    c.total_steps, c.batch_size = 100_000, 128
    c.log_every, c.eval_every = 100, 5000
    c.ema_decay = 0.9995
    c.data.update(image_size=64, crop="random", crop_scale=(0.5, 1.0), flip=True)
    c.model.sites.patch_size, c.model.tokens.count = 4, 64
    c.model.encoder.update(width=384, depth=6)
    c.model.decoder.update(width=512, depth=8)
    c.model.target.flow.sampler.guidance_scale = 2.0
    c.optim.update(lr=4e-4)
    return c


def _imagenet(enc: int, dec: int) -> ConfigDict:
    """The full-size models on ImageNet 256x256, batch 2048 [authors].

    200 B "tokens" (16x16-pixel regions, 256 per image) for the ImageNet models and 250 B for the
    DFN one [authors]: 381 470 steps and 476 837 steps of 2048 images.
    """
    c = tokenizer()
    c.total_steps, c.batch_size = 381_470, 2048
    c.log_every, c.eval_every = 100, 10_000
    c.checkpoint.every = 5000
    c.compute.update(dtype="bfloat16", remat="full")  # bfloat16 [assumed]
    c.evaluation.update(num_images=256, batch_size=256)
    c.vae.source = "EPFL-VILAB/flextok_vae_c16"  # frozen; its posterior is sampled [assumed]
    imagenet(c)
    c.model.encoder.update(width=64 * enc, depth=enc)  # [paper]
    c.model.decoder.update(width=64 * dec, depth=dec)  # [paper]
    sampler = c.model.target.flow.sampler
    sampler.guidance_scale = 15.0 if enc == dec == 12 else 7.5  # [paper], [released]
    sampler.update(solver="euler", steps=25)
    c.optim.update(
        warmup_steps=5000,  # [assumed]
        mup_base_width=256,  # [assumed]
    )
    return c


def _set_width(config: ConfigDict, value: int) -> None:
    config.model.encoder.width = config.model.decoder.width = value


VARIANTS = {
    "digits": _digits,
    "photos": _photos,
    "emoji": _emoji,
    "folder": _folder,
    "folder_gpu": _folder_gpu,
    **{f"d{enc}_d{dec}": functools.partial(_imagenet, enc, dec) for enc, dec in IMAGENET},
}
SIZES = {
    "width": _set_width,
    "batch": lambda c, value: c.update(batch_size=value),
    "image": lambda c, value: c.data.update(image_size=value),
    "enc_depth": lambda c, value: c.model.encoder.update(depth=value),
    "dec_depth": lambda c, value: c.model.decoder.update(depth=value),
    "num_tokens": lambda c, value: c.model.tokens.update(count=value),
}
