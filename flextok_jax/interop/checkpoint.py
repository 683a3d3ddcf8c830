"""Checkpoints in DIR/checkpoints: the only file that calls Orbax."""

import itertools
import json
import logging
import os
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# Keys that may change between the runs of one workdir: where it runs, what it reports, and how long
# (total_steps also stretches the schedule of the learning rate that is still to come).
HARMLESS = r"total_steps|log_every|eval_every|(checkpoint|mesh)\..*"

log = logging.getLogger(__name__)


class WorkdirError(RuntimeError):
    """A workdir that cannot be continued or read; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one run: each holds the state and the configuration that made it."""

    def __init__(self, workdir: str | os.PathLike, config: dict, keep: int | None = None):
        """Opens (or makes) DIR/checkpoints.

        Args:
            workdir: DIR.
            config: the full configuration in JSON terms.
            keep: how many checkpoints stay, None: all.
        """
        self._workdir = os.path.abspath(workdir)
        self._config = config
        self._manager = _manager(
            self._workdir,
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._manager.close()  # Waits for the save in flight.

    def save(self, step: int, state: Any):
        """Starts a save; the arrays are copied before it returns, the files follow."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self._config)
            ),
            force=True,
        )

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop after this step (once per step, by all)."""
        return self._manager.reached_preemption(step)

    def restore(self, shapes: Any) -> Any:
        """The newest state that can be read, on the shardings of `shapes`; None if none was saved.

        Newer checkpoints that cannot be read are named, with the reason, and moved to
        DIR/unreadable, so that their steps can be saved again.

        Raises:
            WorkdirError: the configurations differ, or no checkpoint can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        failures = {}
        for step in steps:
            try:
                saved = _restore(self._manager, step, config=ocp.args.JsonRestore()).config
            except Exception as error:  # Damage shows itself as almost any exception.
                failures[step] = _reason(error)
                continue
            self._refuse_differences(saved)
            try:
                target = ocp.args.StandardRestore(shapes)
                state = _restore(self._manager, step, state=target).state
            except Exception as error:
                failures[step] = _reason(error)
                continue
            self._set_aside(failures, step)
            return state
        if failures:
            raise _unreadable(self._workdir, failures)
        return None

    def _refuse_differences(self, saved: dict):
        old, new = flatten(saved), flatten(self._config)
        differences = [
            f"{key}: {old.get(key, '(absent)')!r} in the workdir, {new.get(key, '(absent)')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, ...) != new.get(key, ...) and not re.fullmatch(HARMLESS, key)
        ]
        if differences:
            raise WorkdirError(
                f"{self._workdir} holds a run with another configuration. "
                "Use a new workdir, or set these back:\n  " + "\n  ".join(differences)
            )

    def _set_aside(self, failures: dict[int, str], good: int):
        for step, reason in failures.items():
            log.warning(
                "checkpoint %d is unreadable (%s): continuing from checkpoint %d; the unreadable "
                "one was moved to %s",
                step, reason, good, self._manager.directory.parent / "unreadable",
            )  # fmt: skip
            if jax.process_index() == 0:
                folder = self._manager.directory.parent / "unreadable"
                folder.mkdir(exist_ok=True)
                names = (f"{step}" if i == 0 else f"{step}.{i}" for i in itertools.count())
                target = next(folder / name for name in names if not (folder / name).exists())
                (self._manager.directory / str(step)).rename(target)
        if failures:
            multihost_utils.sync_global_devices("unreadable checkpoints set aside")
            self._manager.reload()


def restore_ema(workdir: str | os.PathLike) -> tuple[dict, dict, int]:
    """What inference needs of a workdir: the averaged parameters of the newest readable checkpoint.

    Returns:
        (parameters as nested dictionaries of numpy arrays, the configuration, the step)

    Raises:
        WorkdirError: the folder holds no checkpoint, or none that can be read.
    """
    workdir = os.path.abspath(workdir)
    failures = {}
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    if os.path.isdir(os.path.join(workdir, "checkpoints")):
        with _manager(workdir, handlers, create=False) as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    tree = manager.item_metadata(step)["state"].tree["ema"]
                    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                    found = _restore(
                        manager,
                        step,
                        config=ocp.args.JsonRestore(),
                        state=ocp.args.PyTreeRestore(
                            {"ema": tree}, restore_args={"ema": numpy}, partial_restore=True
                        ),
                    )
                except Exception as error:
                    failures[step] = _reason(error)
                    log.warning("checkpoint %d is unreadable: %s", step, failures[step])
                    continue
                return found.state["ema"], found.config, step
    if failures:
        raise _unreadable(workdir, failures)
    raise WorkdirError(
        f"{workdir} holds no checkpoint: a workdir of a training run has a folder `checkpoints` "
        "with one folder per saved step"
    )


def json_config(config) -> dict:
    """A ConfigDict as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _manager(workdir: str, handlers: dict | None = None, **options) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        os.path.join(workdir, "checkpoints"),
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers=handlers,
    )


def _restore(manager, step: int, **items):
    return manager.restore(step, args=ocp.args.Composite(**items))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _unreadable(workdir: str, failures: dict[int, str]) -> WorkdirError:
    lines = "\n  ".join(f"checkpoint {step}: {reason}" for step, reason in failures.items())
    return WorkdirError(
        f"none of the checkpoints in {workdir} can be read, and training does not start over on "
        f"its own. Restore one from a backup, or use a new workdir.\n  {lines}"
    )
