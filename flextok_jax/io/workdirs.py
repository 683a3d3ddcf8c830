"""A workdir of training as a model: averaged parameters, and what DIR/config.json says of them."""

from flextok_jax.io import storage
from flextok_jax.io.formats import names


def load(path):
    """Reads DIR/config.json and the newest checkpoint.

    Returns:
        What the stage exported: "config", the fields of the model's configuration, and which VAE
        or tokenizer it was trained with; and the `checkpoint.Averaged` parameters.

    Raises:
        ValueError: `config.json` does not describe a model, or a parameter is not finite.
        WorkdirError: the checkpoint cannot be read.
    """
    from flextok_jax.io import checkpoint

    exported = storage.read_json(path / "config.json").get("model") or {}
    if "config" not in exported:
        raise ValueError(f"{path}/config.json does not describe a model of this project")
    found = checkpoint.restore_ema(path)
    if problems := names.not_finite(names.flatten(found.params)):
        raise ValueError(f"{path}, step {found.step}:\n  " + "\n  ".join(problems))
    return exported, found
