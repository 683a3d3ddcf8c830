"""A workdir: its lock, the state a run begins with, and its description."""

import contextlib
import dataclasses
import logging

import jax
from clu import parameter_overview

from flextok_jax.io import storage
from flextok_jax.io.checkpoint import WorkdirError
from flextok_jax.io.paths import is_remote
from flextok_jax.training.optimizer import lr_schedule
from flextok_jax.training.state import TrainState

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(workdir):
    """Keeps a second run out of a workdir. The system releases the lock however a process ends.

    In a bucket there is no such lock.

    Raises:
        WorkdirError: another run holds it, or the folder has a file of ours without a run of ours.
    """
    if jax.process_index() != 0:
        yield
        return
    for name in ("config.json", "metrics.jsonl"):
        if (workdir / name).exists() and not _began(workdir):
            raise WorkdirError(f"{workdir} holds {name} but no run: use a new workdir")
    if is_remote(workdir):
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


def _began(workdir) -> bool:
    """Whether a run of ours began here. A bucket has no folder before its first checkpoint."""
    if not is_remote(workdir):
        return (workdir / "checkpoints").is_dir()
    file = workdir / "config.json"
    return file.exists() and {"config", "model"} <= storage.read_json(file).keys()


def first_state(stage, config, program, checkpoints) -> TrainState:
    """The newest checkpoint; without one what `init_from` names; without that a new model."""
    state = checkpoints.restore(program.shapes)
    if state is not None:
        log.info("continuing from step %d", state.step)
        return state
    log.info("starting from %s", config.init_from or "step 0: there is no checkpoint")
    if config.init_from:
        return program.init_from(stage.init_from(config.init_from))
    return program.init()


def identity(workdir, saved: dict, config, stage, source, step: int) -> dict:
    """What a checkpoint says of its run: {"data", "model", "total_steps"}.

    Args:
        saved: that of the checkpoint the run goes on from, {} at the start.
        source: of the training data.
        step: that the run goes on after; the learning rate there depends on total_steps.

    Raises:
        WorkdirError: the examples' keys or their order, the model or a frozen network are not the
            same. A field of the model that is not saved, from before there was it, has its default.
    """
    now = {"data": source.fingerprint(), "model": stage.export_config()}
    before = {name: saved[name] for name in now if name in saved}
    same = {name: now[name] for name in before}
    absent = {"model": {"config": dataclasses.asdict(type(stage.model)())}}
    ignore = r"model\..*(source|origin)"
    if changed := storage.differences(before, same, ignore=ignore, absent=absent):
        raise WorkdirError(
            f"{workdir} was trained with other data (other examples, or in another order), "
            "another model or frozen network. Put that back, or use a new workdir and init_from:"
            + "\n  ".join(["", *changed])
        )
    old = config.copy_and_resolve_references()
    old.total_steps = saved.get("total_steps", config.total_steps)
    if old.total_steps != config.total_steps:
        log.warning(
            "total_steps=%d was %d: the learning rate of the next step is %.3g instead of %.3g",
            config.total_steps, old.total_steps, lr_schedule(config)(step), lr_schedule(old)(step),
        )  # fmt: skip
    return now | {"total_steps": config.total_steps}


def describe(workdir, about: dict, program):
    """Writes DIR/config.json ("config", "model", "command"), and logs the table of parameters."""
    if jax.process_index() == 0:
        storage.write_json(workdir / "config.json", about)
        table = parameter_overview.get_parameter_overview(
            program.shapes.params, include_stats="sharding"
        )
        log.info("parameters:\n%s", table)
