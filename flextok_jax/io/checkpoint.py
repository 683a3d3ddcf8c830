"""Checkpoints in DIR/checkpoints: the only file that calls Orbax."""

import itertools
import json
import logging
import os
import pathlib
import re
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flextok_jax.io import storage
from flextok_jax.io.checksums import checksums, differing

# Keys that may change between the runs of one workdir: where it runs and by which of several ways
# to compute the same, what it reports, when it gives up, and how long it is (total_steps also
# stretches the schedule of the learning rate that is still to come). Not optim.accumulate: every
# microbatch draws its own noise, so another number of them is another run.
HARMLESS = (
    r"total_steps|log_every|eval_every|max_skipped_in_row|profile|data\.max_unreadable"
    r"|(checkpoint|mesh|evaluation)\..*|compute\.(attention|remat|scan)"
)

# DIR/saved.json names the newest completed checkpoint. It lies outside of DIR/checkpoints to tell
# "none was completed yet" from "they are lost".
MARK = "saved.json"

log = logging.getLogger(__name__)


class WorkdirError(RuntimeError):
    """A workdir that cannot be continued or read; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one run: state, its checksums, and the configuration that made it.

    Orbax writes into a temporary folder and renames it when it is complete, and notices files that
    are missing or too short. What it does not notice, changed bytes, the checksums do.
    """

    def __init__(self, workdir: str | os.PathLike, config: dict, keep: int | None = None):
        """Opens (or makes) DIR/checkpoints.

        Args:
            workdir: DIR.
            config: the full configuration in JSON terms.
            keep: how many checkpoints stay, None: all.
        """
        self._workdir = os.path.abspath(workdir)
        self._folder = pathlib.Path(self._workdir) / "checkpoints"
        self._config = config
        self._manager = _manager(
            self._workdir,
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._saving = None  # The step whose save is in flight.

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            self._finish()
        except WorkdirError:
            if exc[0] is None:  # Else what ended the run is the better explanation.
                raise
        finally:
            self._manager.close()

    def save(self, step: int, state: Any):
        """Starts a save; the arrays are copied before it returns, the files follow.

        Raises:
            WorkdirError: the save before this one, or the beginning of this one, failed.
        """
        self._finish()
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    checksums=ocp.args.JsonSave(checksums(state) | _config_sum(self._config)),
                    config=ocp.args.JsonSave(self._config),
                ),
                force=True,
            )
        except Exception as error:  # A full disk shows itself as several exceptions.
            raise self._failed(error) from error

    def poll(self):
        """Looks after the save in flight: notes its completion, raises its failure. Costs nothing.

        Raises:
            WorkdirError: it failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._finish()

    def newest(self) -> int | None:
        """The newest step that is saved, or is being saved."""
        return max(self._manager.all_steps(), default=None)

    def _finish(self):
        """Waits for the save in flight and notes that it is complete."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if jax.process_index() == 0:
                with storage.atomic(pathlib.Path(self._workdir) / MARK) as path:
                    path.write_text(json.dumps({"step": self._saving}) + "\n", encoding="utf-8")
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
        """The newest state that can be read, on the shardings of `shapes`; None if none was saved.

        Newer checkpoints that cannot be read are named, with the reason, and moved to
        DIR/unreadable, so that their steps can be saved again. All processes take the same one: the
        newest that each of them can read.

        Raises:
            WorkdirError: the configurations differ, no checkpoint can be read, or there is none
                although one had been completed.
        """
        # What process 0 sees; another process may see less of a file system that lags behind.
        mark, *steps = _of_process_0([self._mark(), *sorted(self._manager.all_steps())[::-1]])
        failures = {}
        for step in steps:
            saved, reason = _try_together(lambda: self._read_config(step))
            if reason is None:
                self._refuse_differences(saved)
                state, reason = _try_together(lambda: self._read_state(step, shapes))
            if reason is None:
                reason = self._damage(step, state)
            if reason is None:
                if step < mark and mark not in failures:
                    log.warning(
                        "checkpoint %d had been completed and is gone: continuing from "
                        "checkpoint %d", mark, step,
                    )  # fmt: skip
                self._set_aside(failures, step)
                return state
            failures[step] = reason
        if failures:
            raise _unreadable(self._workdir, failures)
        if mark >= 0:
            raise WorkdirError(
                f"{self._workdir} has lost its checkpoints: step {mark} had been saved, and now "
                f"{self._folder} holds none. Training does not start over on its own: restore "
                "them from a backup, or use a new workdir"
            )
        return None

    def _mark(self) -> int:
        """The step that DIR/saved.json names; -1 without that file."""
        path = pathlib.Path(self._workdir) / MARK
        try:
            return int(storage.read_json(path)["step"])
        except FileNotFoundError:
            return -1
        except (ValueError, KeyError, TypeError) as error:
            raise WorkdirError(
                f"{path} is damaged ({_reason(error)}): it names the newest completed checkpoint. "
                "If the checkpoints beside it are whole, remove it"
            ) from error

    # Handlers are called without their checkpointer, which would wait, here, for processes whose
    # reading has failed.

    def _read_config(self, step: int) -> dict:
        folder = self._manager.directory / str(step) / "config"
        config = ocp.JsonCheckpointHandler().restore(folder)
        reason = _mismatch(_config_sum(config), _read_checksums(self._manager, step))
        if reason:
            raise ValueError(reason)
        return config

    def _read_state(self, step: int, shapes: Any) -> Any:
        folder = self._manager.directory / str(step) / "state"
        handler, args = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(shapes)
        handler.metadata(folder)  # Reads what only `restore_ema` needs: both take the same one.
        return handler.restore(folder, args=args)

    def _damage(self, step: int, state: Any) -> str | None:
        """What the checksums say against the state that was read. All processes call it."""
        expected, reason = _try_together(lambda: _read_checksums(self._manager, step))
        return reason or _mismatch(checksums(state), expected)

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
        folder = self._folder.parent / "unreadable"
        for step, reason in failures.items():
            log.warning(
                "checkpoint %d is unreadable (%s): continuing from checkpoint %d; the unreadable "
                "one was moved to %s", step, reason, good, folder,
            )  # fmt: skip
            if jax.process_index() == 0:
                folder.mkdir(exist_ok=True)
                names = (f"{step}" if i == 0 else f"{step}.{i}" for i in itertools.count())
                target = next(folder / name for name in names if not (folder / name).exists())
                (self._folder / str(step)).rename(target)
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


def _read_checksums(manager, step: int) -> dict[str, int] | None:
    """None: the checkpoint is from before there were any."""
    folder = manager.directory / str(step) / "checksums"
    return ocp.JsonCheckpointHandler().restore(folder) if folder.exists() else None


def _mismatch(found: dict[str, int], expected: dict[str, int] | None) -> str | None:
    """Why `found` is not what was saved, or None."""
    wrong = [] if expected is None else differing(found, expected)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"it is not what was saved: {wrong[0]}{more}" if wrong else None


def _config_sum(config: dict) -> dict[str, int]:
    return {"config": zlib.crc32(json.dumps(config, sort_keys=True).encode())}


def restore_ema(workdir: str | os.PathLike) -> tuple[dict, dict, int]:
    """What inference needs of a workdir: the averaged parameters of the newest readable checkpoint.

    Returns:
        (parameters as nested dictionaries of numpy arrays, the configuration, the step)

    Raises:
        WorkdirError: the folder holds no checkpoint, or none that can be read.
    """
    workdir = os.path.abspath(workdir)
    failures = {}
    handlers = {name: ocp.JsonCheckpointHandler() for name in ("config", "checksums")}
    handlers["state"] = ocp.PyTreeCheckpointHandler()
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
                    ema = found.state["ema"]
                    sums = checksums({"ema": ema}) | _config_sum(found.config)
                    reason = _mismatch(sums, _read_checksums(manager, step))
                except Exception as error:
                    reason = _reason(error)
                if reason is None:
                    return ema, found.config, step
                failures[step] = reason
                log.warning("checkpoint %d is unreadable: %s", step, reason)
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
