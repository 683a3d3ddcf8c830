"""What is checked of a configuration before anything is made of it."""

import fnmatch
import re

from jax.sharding import Mesh

from flextok_jax.io import storage
from flextok_jax.nn.config import Compute
from flextok_jax.parallel.mesh import platform
from flextok_jax.training.optimizer import make_optimizer

# The range of every number, for the keys that match a pattern; those of a tuple all lie in it. None
# passes. What is a dataclass (most of `model`) checks itself.
RANGES = {
    "[0, 4294967296)": "seed",
    "[0, 2147483648)": "total_steps",
    "[1, inf)": "batch_size log_every max_skipped_in_row checkpoint.keep data.image_size loss.chunk"
    " discriminator.* evaluation.batch_size evaluation.num_latents optim.accumulate"
    " optim.mup_base_width model.*patch_size model.block_out model.latent_channels"
    " model.layers_per_block model.norm_groups repa.image_size repa.width"
    " jumps steps teacher.steps",
    "[0, inf)": "eval_every checkpoint.every data.shift evaluation.num_images loss.*_weight "
    "loss.gan_start loss.z_loss optim.*warmup_steps optim.*weight_decay repa.weight"
    " *guidance_scale",
    "(0, inf)": "*time_shift optim.eps optim.*.eps optim.*grad_clip vae.scaling_factor",
    "[0, 1)": "ema_decay condition.null_prob data.zoom optim.*b1 optim.*b2",
    "(0, 1]": "data.crop_scale optim.*lr",
    "[0, 1]": "data.max_unreadable data.color optim.*final_lr_fraction",
    "[0, 180]": "data.rotate",
    "[-1, 1.75]": "*.mode_scale",  # Where the times stay in [0, 1] (arXiv 2403.03206).
    "(-inf, inf)": "model.*",
}


def check_config(config, mesh: Mesh) -> None:
    """Checks every number of a configuration, the optimizer, and that batches fit these devices.

    Raises:
        ValueError: with one line for each fault.
    """
    Compute(**config.compute).check_platform(platform(mesh))
    values = storage.dotted(config.to_dict())
    faults = [
        f"{key}={value}: allowed is {interval}"
        for key, value in values.items()
        for interval, patterns in RANGES.items()
        if any(fnmatch.fnmatch(key, pattern) for pattern in patterns.split())
        and not all(_within(x, interval) for x in _numbers(value))
    ]
    if project := config.wandb.project:
        try:
            import wandb  # noqa: F401
        except ModuleNotFoundError:
            faults.append(f"wandb.project={project!r} needs wandb: pip install -e '.[wandb]'")
    if values.get("data.paired") and config.stage != "tokenizer":
        faults.append(f"data.paired=True: only a tokenizer learns from pairs, not {config.stage!r}")
    if values.get("repa.book") and not config.repa.weight:
        faults.append(f"repa.book=True needs repa.weight={config.repa.weight} to be above 0")
    if faults:
        raise ValueError("\n  ".join(faults))
    make_optimizer(config)  # It checks the rest of `optim`.
    profiled_steps(config.profile, config.total_steps)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = {
        "batch_size": (config.batch_size, config.optim.accumulate),
        "evaluation.batch_size": (config.evaluation.batch_size, 1),
    }
    for name, (size, parts) in sizes.items():
        if size % (parts * shards):
            raise ValueError(
                f"{name}={size}: must be a multiple of {parts * shards}, the {shards} devices of "
                "the mesh's data and fsdp axes" + f" times optim.accumulate={parts}" * (parts > 1)
            )


def profiled_steps(text: str, total: int) -> tuple[int, int]:
    """(A, B) of `config.profile`="A:B", the first and the last step to record; (0, 0) of ""."""
    if not text:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= total:
        raise ValueError(
            f"profile={text!r}: needed are steps A:B with 1 <= A <= B <= total_steps={total}"
        )
    return first, last


def _numbers(value) -> list[int | float]:
    """A number or those of a tuple; truth values are none."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]


def _within(value: float, interval: str) -> bool:
    """Whether a number lies in "[low, high)"; NaN lies nowhere."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)
