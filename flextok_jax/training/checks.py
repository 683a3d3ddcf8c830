"""What is checked of a configuration before anything is made of it."""

from jax.sharding import Mesh

from flextok_jax.nn.config import Compute
from flextok_jax.parallel.mesh import platform
from flextok_jax.training.profile import steps_of

# The smallest value of numbers whose fault would show itself only after compiling, or after
# training. Some stages have only some of them.
SMALLEST = {
    "total_steps": 0,
    "batch_size": 1,
    "log_every": 1,
    "eval_every": 0,
    "max_skipped_in_row": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "optim.accumulate": 1,
    "evaluation.num_images": 0,
    "evaluation.num_latents": 1,
    "evaluation.batch_size": 1,
    "evaluation.steps": 1,
}


def check_config(config, mesh: Mesh) -> None:
    """That a run can count, save and evaluate as configured, on these devices.

    Also that batches can be cut over microbatches and devices, which can compute as configured.

    Raises:
        ValueError: they cannot.
    """
    Compute(**config.get("compute", {})).check_platform(platform(mesh))
    for name, least in SMALLEST.items():
        value = _value(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: at least {least} is needed")
    steps_of(config.profile, config.total_steps)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = config.optim.accumulate
    if config.batch_size % (parts * shards):
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of optim.accumulate={parts} times "
            f"the {shards} devices of the mesh's data and fsdp axes"
        )
    size = _value(config, "evaluation.batch_size")
    if size is not None and size % shards:
        raise ValueError(
            f"evaluation.batch_size={size} must be a multiple of the {shards} devices of the "
            "mesh's data and fsdp axes"
        )


def _value(config, name: str):
    """The value of a dotted key; None without it."""
    for part in name.split("."):
        config = config.get(part)
        if config is None:
            return None
    return config
