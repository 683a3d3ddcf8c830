"""A workdir's lock, its first state, and its description."""

import contextlib
import logging
import pathlib

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from flextok_jax.io import storage
from flextok_jax.io.checkpoint import WorkdirError
from flextok_jax.training.optimizer import lr_schedule
from flextok_jax.training.state import TrainState

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
    """Keeps a second run out of a workdir. The system releases the lock however a process ends."""
    if jax.process_index() != 0:
        yield
        return
    import fcntl

    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(f"another run writes into {workdir}: use a new workdir") from None
        yield


def first_state(stage, config, program, checkpoints) -> TrainState:
    """The newest checkpoint; without one what `init_from` names; without that a new model."""
    state = checkpoints.restore(program.shapes)
    if state is not None:
        log.info("continuing from step %d", state.step)
        return state
    if config.init_from:
        log.info("starting from %s", config.init_from)
        return program.init_from(stage.init_from(config.init_from))
    log.info("starting from step 0: no checkpoint was ever completed here")
    return program.init()


def check_data(workdir, extra: dict, source):
    """Refuses to continue a run on other data than it was trained on.

    Raises:
        WorkdirError: the examples' keys are others, or in another order.
    """
    before, now = extra.get("data"), source.fingerprint()
    if before not in (None, now):
        raise WorkdirError(
            f"{workdir} was trained on other data (fingerprint {before}, now {now}): the examples "
            "are others or in another order. Put them back, or use a new workdir and init_from"
        )


def describe(workdir, plain, stage, program, step: int):
    """Writes DIR/config.json, and the table of parameters into the log.

    Warns where a run that goes on after `step` has another length and thereby learning rate.

    Raises:
        WorkdirError: a frozen network is not the one that the run was trained with.
    """
    path, model = workdir / "config.json", stage.export_config()
    if step and path.exists():
        try:
            before = storage.read_json(path)
            changed = storage.differences(before["model"], model, ignore=r".*(source|origin)")
            old, new = ConfigDict(before["config"]), ConfigDict(plain)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WorkdirError(
                f"{path} is damaged ({error}). It names the frozen networks of the run: if those "
                "are still the same, remove it; it is written anew"
            ) from error
        if changed:
            raise WorkdirError(
                f"{workdir} was trained with another frozen network. Put that back, or use a new "
                "workdir:\n  " + "\n  ".join(changed)
            )
        if old.total_steps != new.total_steps:
            log.warning(
                "total_steps=%d was %d: the learning rate of the next step is %.3g instead of %.3g",
                new.total_steps, old.total_steps, lr_schedule(new)(step), lr_schedule(old)(step),
            )  # fmt: skip
    if jax.process_index() == 0:
        storage.write_json(path, {"config": plain, "model": model})
        table = parameter_overview.get_parameter_overview(
            program.shapes.params, include_stats="sharding"
        )
        log.info("parameters:\n%s", table)
