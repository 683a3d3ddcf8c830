"""A workdir of training as a model: averaged parameters, and what DIR/config.json says of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.formats import names


class Workdir(NamedTuple):
    """A model in a workdir.

    Attributes:
        params: the averaged parameters, nested NumPy arrays.
        config: the fields of the model's configuration, in JSON terms.
        info: the rest of what the stage exported: which VAE or tokenizer it was trained with.
        step: of training.
        extra: what the stage saved beside its state.
    """

    params: dict
    config: dict[str, Any]
    info: dict[str, Any]
    step: int
    extra: dict[str, Any]


def load(path) -> Workdir:
    """Reads the newest checkpoint and DIR/config.json.

    Raises:
        ValueError: `config.json` does not describe a model, or a parameter is not finite.
        WorkdirError: no checkpoint can be read.
    """
    from flextok_jax.io import checkpoint

    file = path / "config.json"
    try:
        info = dict(storage.read_json(file)["model"])
        config, _ = info.pop("config"), info.pop("kind")
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a model of this project: {error!r}") from error
    found = checkpoint.restore_ema(path)
    params = jax.tree.map(np.asarray, found.params)
    if problems := names.not_finite(names.flatten(params)):
        raise ValueError(f"{path}, step {found.step}:\n  " + "\n  ".join(problems))
    return Workdir(params, config, info, found.step, found.extra)
