"""The distillation stage: a decoder of one to four steps, out of a trained tokenizer.

    python -m flextok_jax.main --config=configs/distill.py:digits --workdir=runs/fast
    python -m flextok_jax.main --config=configs/distill.py:imagenet --workdir=DIR \
        --config.init_from=RUN_OR_SOURCE --config.data.path=TFDS_DATA_DIR --config.mesh.fsdp=16

`init_from` is the teacher: any tokenizer with a flow, a workdir, a folder or a hub id. Encoder,
bottleneck and VAE stay as they are, so tokens do too, and generators of them go on working.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import base, choose, imagenet
from examples import digits


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    return choose(arg, VARIANTS, SIZES)


def _base() -> ConfigDict:
    """What every variant shares, and every key there is."""
    c = base(
        "distill",
        compute=dict(dtype="float32", attention="xla", scan=True, remat="none"),
        # How the teacher is sampled for the targets; None: as its own sampler says.
        teacher=dict(
            steps=8,
            solver="multistep",
            time_shift=placeholder(float),
            guidance_scale=placeholder(float),
            norm_guidance=placeholder(bool),
        ),
        jumps=(1, 2, 4),  # numbers of steps that the student learns: divisors of teacher.steps
        steps=2,  # one of them, its default
    )
    # Other images to evaluate on, as `flextok data check` names them, than those of `data`.
    c.evaluation.data = ""
    c.optim.update(warmup_steps=100, final_lr_fraction=0.01, weight_decay=0.0)
    return c


def _digits() -> ConfigDict:
    """A decoder of one or two steps for the tokens of `demo-digits`: minutes on a CPU core.

    Its numbers are in docs/performance.md.
    """
    c = _base()
    c.init_from = "demo-digits"
    c.total_steps, c.batch_size = 200, 32
    c.log_every, c.eval_every, c.checkpoint.every = 50, 0, 100
    c.ema_decay = 0.98
    c.evaluation.num_images, c.evaluation.batch_size = 297, 160
    c.data.path = digits.folder()
    # Four steps, two of them at t <= 1/3, are as good as more here: docs/performance.md.
    c.teacher.update(steps=4, time_shift=0.5)
    c.jumps = (1, 2)
    c.optim.update(lr=2e-3, warmup_steps=20)
    c.compute.scan = False  # a small model on a CPU runs faster unrolled
    return c


def _imagenet() -> ConfigDict:
    """A teacher of ImageNet 256x256; numbers are not tried yet."""
    c = _base()
    c.total_steps, c.batch_size = 50_000, 1024
    c.eval_every, c.checkpoint.every = 10_000, 5000
    c.ema_decay = 0.9995
    c.compute.update(dtype="bfloat16", remat="full")
    c.evaluation.update(num_images=256, batch_size=256)
    imagenet(c)
    c.optim.update(lr=1e-4, warmup_steps=1000)
    return c


VARIANTS = {"digits": _digits, "imagenet": _imagenet}
SIZES = {
    "batch": lambda c, value: c.update(batch_size=value),
    "image": lambda c, value: c.data.update(image_size=value),
}
