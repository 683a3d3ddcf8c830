"""What is checked of a configuration before anything is made of it."""

import fnmatch
import re

from jax.sharding import Mesh

from flextok_jax.nn.config import Compute
from flextok_jax.parallel.mesh import platform

# The range of every number, by the pattern of its key; those of a tuple all lie in it. A key that a
# stage does not have, and None, pass.
RANGES = {
    "seed": "[0, 4294967296)",
    "total_steps": "[0, 2147483648)",
    "batch_size": "[1, inf)",
    "log_every": "[1, inf)",
    "eval_every": "[0, inf)",
    "max_skipped_in_row": "[1, inf)",
    "ema_decay": "[0, 1)",
    "time_shift": "(0, inf)",
    "checkpoint.every": "[0, inf)",
    "checkpoint.keep": "[1, inf)",
    "condition.null_prob": "[0, 1)",
    "data.image_size": "[1, inf)",
    "data.crop_scale": "(0, 1]",
    "data.max_unreadable": "[0, 1]",
    "data.shift": "[0, inf)",
    "data.rotate": "[0, 180]",
    "data.zoom": "[0, 1)",
    "data.color": "[0, 1]",
    "discriminator.*": "[1, inf)",
    "evaluation.batch_size": "[1, inf)",
    "evaluation.num_images": "[0, inf)",
    "evaluation.num_latents": "[1, inf)",
    "loss.chunk": "[1, inf)",
    "loss.*_weight": "[0, inf)",
    "loss.gan_start": "[0, inf)",
    "loss.z_loss": "[0, inf)",
    "model.*": "(-inf, inf)",  # The dataclasses of nn/config.py check the rest, but for the VAE's:
    "model.*patch_size": "[1, inf)",
    "model.block_out": "[1, inf)",
    "model.latent_channels": "[1, inf)",
    "model.layers_per_block": "[1, inf)",
    "model.norm_groups": "[1, inf)",
    "optim.*b1": "[0, 1)",
    "optim.*b2": "[0, 1)",
    "optim.*eps": "(0, inf)",
    "optim.*lr": "(0, 1]",
    "optim.*final_lr_fraction": "[0, 1]",
    "optim.*grad_clip": "(0, inf)",
    "optim.*warmup_steps": "[0, inf)",
    "optim.*weight_decay": "[0, inf)",
    "optim.accumulate": "[1, inf)",
    "optim.mup_base_width": "[1, inf)",
    "repa.*": "[0, inf)",
    "vae.scaling_factor": "(0, inf)",
}


def check_config(config, mesh: Mesh) -> None:
    """Checks every number of a configuration, and that batches fit these devices.

    Raises:
        ValueError: with one line for each fault.
    """
    Compute(**config.get("compute", {})).check_platform(platform(mesh))
    faults = [
        f"{key}={value}: allowed is {interval}"
        for key, value in _leaves(config.to_dict())
        for pattern, interval in RANGES.items()
        if fnmatch.fnmatch(key, pattern) and not all(_within(x, interval) for x in _numbers(value))
    ]
    faults = faults or _misfits(config, mesh)
    if faults:
        raise ValueError("\n  ".join(faults))


def _misfits(config, mesh: Mesh) -> list[str]:
    """Faults of numbers that are each in range but do not fit together."""
    faults = []
    try:
        profiled_steps(config.profile, config.total_steps)
    except ValueError as error:
        faults.append(str(error))
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.optim.accumulate
    if config.batch_size % (parts * shards):
        faults.append(
            f"batch_size={config.batch_size} must be a multiple of optim.accumulate={parts} times "
            f"the {shards} devices of the mesh's data and fsdp axes"
        )
    size = config.get("evaluation", {}).get("batch_size")
    if size is not None and size % shards:
        faults.append(
            f"evaluation.batch_size={size} must be a multiple of the {shards} devices of the "
            "mesh's data and fsdp axes"
        )
    return faults


def profiled_steps(text: str, total: int) -> tuple[int, int] | None:
    """(A, B) of `config.profile`="A:B", the first and the last step to record; None of "".

    Raises:
        ValueError: `text` is not of that form, or names no steps of a run of `total`.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= total:
        raise ValueError(
            f"profile={text!r}: needed is A:B with 1 <= A <= B <= total_steps={total}, the first "
            "and the last step to record"
        )
    return first, last


def _leaves(tree: dict, prefix: str = ""):
    """(dotted key, value)."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _numbers(value) -> list[int | float]:
    """A number or those of a tuple; truth values are none."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]


def _within(value: float, interval: str) -> bool:
    """Whether a number lies in "[low, high)"; NaN lies nowhere."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)
