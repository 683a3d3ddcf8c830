"""Checkpoints in DIR/checkpoints: the only file that calls Orbax.

Orbax writes into a temporary folder and renames it when it is complete, and notices files that are
missing or cut short. Changed bits are left to the file system.
"""

import json
import logging
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, is_remote

# Keys that may change between the runs of one workdir: where it runs and by which of several ways
# to compute the same, what it reports, when it gives up, and how long it is (total_steps also
# stretches the schedule of the learning rate that is still to come). Not optim.accumulate: every
# microbatch has its own noise, so another number of them is another run.
HARMLESS = (
    r"total_steps|log_every|eval_every|max_skipped_in_row|profile|data\.(path|max_unreadable)"
    r"|(checkpoint|mesh|evaluation)\..*|compute\.(attention|remat|scan)"
)

log = logging.getLogger(__name__)


class WorkdirError(OSError):
    """A workdir that cannot be continued or read; the message says why and what to do."""


class Averaged(NamedTuple):
    """What inference needs of a checkpoint.

    Attributes:
        params: the averaged parameters, nested dictionaries of NumPy arrays.
        config: the configuration of the run.
        step: of training.
        extra: what the stage saved beside its state, in JSON terms.
    """

    params: dict
    config: dict
    step: int
    extra: dict


class Checkpoints:
    """The checkpoints of one run: state, the configuration that made it, and a stage's extra.

    Attributes:
        extra: that of the checkpoint that `restore` read.
    """

    def __init__(self, workdir: str | os.PathLike, config: dict, keep: int | None = None):
        """Opens (or makes) DIR/checkpoints.

        Args:
            workdir: DIR.
            config: the full configuration in JSON terms.
            keep: how many checkpoints stay, None: all.
        """
        self._folder, self._config, self.extra = _folder(workdir), config, {}
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )
        self._saving = None  # The step whose save is in flight.

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        try:
            self._finish()
        except WorkdirError:
            if kind is None:  # Else what ended the run is the better explanation.
                raise
        finally:
            self._manager.close()

    def save(self, step: int, state: Any, extra: dict | None = None):
        """Starts a save; the arrays are copied before it returns, the files follow.

        Args:
            step: of training.
            state: a tree of arrays.
            extra: more to know of the model than its parameters say, in JSON terms.

        Raises:
            WorkdirError: the save before this one, or the beginning of this one, failed.
        """
        self._finish()
        self._saving = step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(self._config),
            extra=ocp.args.JsonSave(extra or {}),
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # A full disk shows itself as several exceptions.
            raise self._failed(error) from error

    def poll(self):
        """Raises the failure of a save in flight as soon as it is known. Costs nothing.

        Raises:
            WorkdirError: it failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._finish()

    def newest(self) -> int | None:
        """The newest step that is saved, or is being saved."""
        return max(self._manager.all_steps(), default=None)

    def _finish(self):
        """Waits for the save in flight."""
        if self._saving is not None:
            try:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            except Exception as error:
                raise self._failed(error) from error
            self._saving = None

    def _failed(self, error: Exception) -> WorkdirError:
        step, self._saving = self._saving, None
        return WorkdirError(
            f"checkpoint {step} could not be written to {self._folder} ({_reason(error)}). "
            "The older ones are untouched: remove the cause (is the disk full?) and run the same "
            "command again"
        )

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop after this step (once per step, by all)."""
        return self._manager.reached_preemption(step)

    def restore(self, shapes: Any) -> Any:
        """The newest state that can be read, on the shardings of `shapes`; None if there is none.

        Newer checkpoints that cannot be read are named, with the reason, and renamed to
        STEP.unreadable. All processes take the same one: the newest that each of them can read.

        Raises:
            WorkdirError: the configurations differ, or there are checkpoints and none can be read.
        """
        failures = {}
        # What process 0 sees; another process may see less of a file system that lags behind.
        for step in _of_process_0(sorted(self._manager.all_steps())[::-1]):
            saved, reason = _try_together(lambda: _read_json(self._manager, step, "config"))
            if reason is None:
                if found := storage.differences(saved, self._config, ignore=HARMLESS):
                    raise WorkdirError(
                        f"{self._folder.parent} holds a run with another configuration. "
                        "Use a new workdir, or set these back:\n  " + "\n  ".join(found)
                    )
                state, reason = _try_together(lambda: self._read_state(step, shapes))
            if reason is None:
                self._set_aside(failures, step)
                self.extra = _read_json(self._manager, step, "extra")
                return state
            failures[step] = reason
        if failures:
            raise _none(self._folder, failures)
        return None

    def _read_state(self, step: int, shapes: Any) -> Any:
        # The handler without its checkpointer, which would wait for processes that cannot read.
        folder = self._manager.directory / str(step) / "state"
        handler = ocp.StandardCheckpointHandler()
        handler.metadata(folder)  # Reads what only `restore_ema` needs: both take the same step.
        return handler.restore(folder, args=ocp.args.StandardRestore(shapes))

    def _set_aside(self, failures: dict[int, str], good: int):
        for step, reason in failures.items():
            target = f"{step}.unreadable-{int(time.time())}"
            log.warning(
                "checkpoint %d is unreadable (%s): continuing from checkpoint %d; the unreadable "
                "one is now %s", step, reason, good, self._manager.directory / target,
            )  # fmt: skip
            if jax.process_index() == 0:
                (self._manager.directory / str(step)).rename(self._manager.directory / target)
        if failures:
            multihost_utils.sync_global_devices("unreadable checkpoints set aside")
            self._manager.reload()


def _of_process_0(numbers: list[int]) -> list[int]:
    """The list of process 0, in every process; the lists may be of different lengths."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    padded = np.array((numbers + [0] * count)[:count], np.int32)
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def _try_together(read) -> tuple[Any, str | None]:
    """(what `read` returns, None), or (None, why not) in every process if it fails in any."""
    found, reason = None, None
    try:
        found = read()
    except Exception as error:  # Damage shows itself as almost any exception.
        reason = _reason(error)
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.bool_(reason is not None)))
        if failed.size and reason is None:
            found, reason = None, f"process {failed[0]} cannot read it"
    return found, reason


def restore_ema(workdir: str | os.PathLike) -> Averaged:
    """The averaged parameters of the newest checkpoint that can be read; changes nothing.

    Raises:
        WorkdirError: the folder holds no checkpoint, or none that can be read.
    """
    folder, failures = _folder(workdir), {}
    if not folder.is_dir():
        raise _none(folder, failures)
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                tree = manager.item_metadata(step)["state"].tree["ema"]
                numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                args = ocp.args.PyTreeRestore(
                    {"ema": tree}, restore_args={"ema": numpy}, partial_restore=True
                )
                state = manager.restore(step, args=ocp.args.Composite(state=args)).state
                config, extra = (_read_json(manager, step, name) for name in ("config", "extra"))
                return Averaged(state["ema"], config, step, extra)
            except Exception as error:  # Damage shows itself as almost any exception.
                failures[step] = _reason(error)
                log.warning("checkpoint %d is unreadable: %s", step, failures[step])
    raise _none(folder, failures)


def _read_json(manager, step: int, item: str) -> dict:
    folder = manager.directory / str(step) / item
    if item == "extra" and not folder.exists():  # Of a workdir from before there was one.
        return {}
    return ocp.JsonCheckpointHandler().restore(folder)


def json_config(config) -> dict:
    """A ConfigDict as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def _folder(workdir):
    workdir = as_path(workdir)
    return (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _none(folder, failures: dict[int, str]) -> WorkdirError:
    if not failures:
        return WorkdirError(
            f"{folder.parent} holds no checkpoint: a workdir of a training run has a folder "
            "`checkpoints` with one folder per saved step"
        )
    lines = "\n  ".join(f"checkpoint {step}: {reason}" for step, reason in failures.items())
    return WorkdirError(
        f"none of the checkpoints in {folder.parent} can be read, and training does not start over "
        f"on its own. Restore one from a backup, or use a new workdir.\n  {lines}"
    )
