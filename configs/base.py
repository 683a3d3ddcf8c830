"""What all configurations share: keys with their defaults, and how a variant is parsed."""

from collections.abc import Callable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base(stage: str, **changes) -> ConfigDict:
    """The keys that every stage has; `changes` are set, or added, at the top level.

    Sizes of a run are 0 or small here: every variant sets its own.
    """
    config = ConfigDict(
        dict(
            stage=stage,
            seed=0,
            total_steps=0,
            batch_size=0,
            log_every=100,
            eval_every=0,  # 0: at the end only
            init_from="",  # a released model or a workdir: fine-tuning
            freeze=(),  # regexes over whole parameter paths, such as "encoder/.*"
            ema_decay=0.999,
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: the devices that are left
            checkpoint=dict(every=1000, keep=2),
            max_skipped_in_row=20,  # steps without a finite gradient, then the run stops
            profile="",  # "A:B": steps A to B, recorded in DIR/profile
            wandb=dict(project=""),  # of Weights & Biases, for the numbers of DIR/metrics.jsonl
            compute=dict(dtype="float32"),
            evaluation=dict(num_images=256, batch_size=128),
            data=dict(
                source="folder",  # see docs/data.md
                path="",
                name="",
                split="train",
                eval_split="validation",
                max_unreadable=0.1,  # share of the images; a larger one stops the run
                image_size=16,
                crop="none",
                crop_scale=(0.08, 1.0),
                flip=False,
                quarter_turns=False,
                shift=0,
                rotate=0.0,
                zoom=0.0,
                color=0.0,
                paired=False,  # images are two side by side: what is read, and what is wanted
            ),
            optim=dict(
                rule="adam",  # or "muon" for kernels of convolutions, attention and MLPs
                lr=1e-3,
                warmup_steps=1000,
                final_lr_fraction=0.0,
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                weight_decay=0.05,
                grad_clip=1.0,
                accumulate=1,
                mup_base_width=placeholder(int),
                mu_dtype=placeholder(str),
            ),
        )
    )
    for key, value in changes.items():
        config[key] = value
    return config


def imagenet(config: ConfigDict) -> None:
    """ImageNet 256x256 from TFDS, randomly cropped and flipped [assumed]."""
    config.data.update(
        source="tfds", name="imagenet2012", image_size=256, crop="random", flip=True
    )  # fmt: skip


def choose(
    arg: str,
    variants: dict[str, Callable[[], ConfigDict]],
    sizes: dict[str, Callable[[ConfigDict, int], None]],
) -> ConfigDict:
    """The configuration of "VARIANT,size=NUMBER,...".

    Args:
        arg: what follows the colon of --config=FILE.py:.
        variants: name → what makes its configuration.
        sizes: name → what sets it.

    Raises:
        ValueError: a variant or a size is unknown, or a size no number.
    """
    variant, *items = arg.split(",")
    if variant not in variants:
        raise ValueError(f"variant {variant!r}: allowed are {', '.join(variants)}")
    config = variants[variant]()
    for item in items:
        name, _, value = item.partition("=")
        if name not in sizes:
            raise ValueError(
                f"{name!r} cannot be set after the variant: allowed are {', '.join(sizes)}; "
                "anything else by --config.KEY=VALUE"
            )
        sizes[name](config, int(value))
    return config
