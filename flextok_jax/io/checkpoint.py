"""Checkpoints in DIR/checkpoints: the only file that calls Orbax.

On a file system Orbax writes into a temporary folder and renames it when it is complete. A bucket
has no rename: there a checkpoint counts once its mark, COMMITTED, is written, after all else.
"""

import contextlib
import functools
import json
import logging
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, is_remote

# Keys that may change between the runs of one workdir (total_steps also stretches the rest of the
# learning rate's schedule). Not optim.accumulate: every microbatch has its own noise. A frozen
# network is known by the sha256 of its parameters, wherever it lies (see training/workdirs.py).
HARMLESS = (
    r"total_steps|log_every|eval_every|max_skipped_in_row|profile|data\.(path|max_unreadable)"
    r"|(vae|tokenizer)\.source"
    r"|(checkpoint|mesh|evaluation|wandb)\..*|compute\.(attention|remat|scan)"
)
# What a run did whose configuration is from before there was the key. Those of `model` have the
# defaults of its dataclass (see training/workdirs.py).
ADDED = {
    "init_model": False,
    "optim": {"rule": "adam"},
    "data": {"paired": False},
    "time_shift": 1.0,
    "loss": {"kl_weight": 0.1},
    "repa": {"book": False},
    "text_encoder": dict(
        source="", length=32, vocab_size=1024, depth=2, num_heads=2, head_dim=32, mlp_hidden=128
    ),
}
COMMITTED = "commit_success.txt"


def _told(record: logging.LogRecord) -> bool:
    """False for traces of a failed save, which every thread logs anew: `WorkdirError` tells."""
    return not (record.exc_info and (record.name == "asyncio" or "orbax" in record.pathname))


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_told)


class WorkdirError(OSError):
    """A workdir that cannot be continued or read; the message says why and what to do."""


class Averaged(NamedTuple):
    """What inference needs of a checkpoint."""

    params: dict  # averaged, nested dictionaries of NumPy arrays
    config: dict  # of the run
    step: int
    extra: dict  # what the stage saved beside its state, in JSON terms


class Checkpoints:
    """The checkpoints of one run: state, configuration and `extra`, as `restore` read it."""

    def __init__(self, workdir: str | os.PathLike, config: dict, keep: int | None = None):
        """Opens or makes DIR/checkpoints; `config` in JSON terms; `keep` stay, None: all."""
        self._folder, self._config, self.extra = _folder(workdir), config, {}
        mode = ocp.options.AtomicityMode
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                atomicity_options=ocp.options.AtomicityOptions(
                    mode.COMMIT_FILE if is_remote(self._folder) else mode.AUTO
                ),
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
            WorkdirError: the save before this one, or the start of this one, failed.
        """
        self._finish()
        self._saving = step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(self._config),
            extra=ocp.args.JsonSave(extra or {}),
        )
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def poll(self):
        """Raises WorkdirError if a save in flight failed; does not wait for it."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._finish()

    def newest(self) -> int | None:
        """The newest step that is saved, or is being saved."""
        return max(self._manager.all_steps(), default=None)

    def _finish(self):
        if self._saving is not None:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            self._saving = None

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # A full disk shows itself as several exceptions.
            step, self._saving = self._saving, None
            raise WorkdirError(
                f"checkpoint {step} could not be written to {self._folder} ({_reason(error)}). "
                "The older ones are untouched: remove the cause and run the same command again"
            ) from error

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop after this step (once per step, by all)."""
        return self._manager.reached_preemption(step)

    def restore(self, shapes: Any) -> Any:
        """The newest state, on the shardings of `shapes`; None if there is none.

        Raises:
            WorkdirError: the configurations differ, or it cannot be read.
        """
        step = self.newest()
        if step is None:
            return None
        folder = self._folder / str(step)
        with _reading(folder):
            saved, self.extra = _read_json(folder, "config"), _read_json(folder, "extra")
        absent = ADDED | {"model": self._config.get("model", {})}
        if found := storage.differences(saved, self._config, ignore=HARMLESS, absent=absent):
            raise WorkdirError(
                f"{self._folder.parent} holds a run with another configuration. "
                "Use a new workdir, or set these back:\n  " + "\n  ".join(found)
            )
        with _reading(folder):
            state = ocp.args.StandardRestore(shapes)
            return self._manager.restore(step, args=ocp.args.Composite(state=state)).state


def restore_ema(workdir: str | os.PathLike) -> Averaged:
    """The averaged parameters of the newest checkpoint; changes nothing.

    Raises:
        WorkdirError: the folder holds no checkpoint, or it cannot be read.
    """
    folder = _folder(workdir)
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if is_remote(folder):
        steps = [step for step in steps if (folder / str(step) / COMMITTED).exists()]
    if not steps:
        raise WorkdirError(
            f"{folder.parent} holds no checkpoint: a workdir of a training run has a folder "
            "`checkpoints` with one folder per saved step"
        )
    folder, handler = folder / str(max(steps)), ocp.PyTreeCheckpointHandler()
    with _reading(folder):
        tree = handler.metadata(folder / "state").tree["ema"]
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(
            {"ema": tree}, restore_args={"ema": numpy}, partial_restore=True
        )
        ema = handler.restore(folder / "state", args=args)["ema"]
        return Averaged(ema, _read_json(folder, "config"), max(steps), _read_json(folder, "extra"))


@contextlib.contextmanager
def _reading(folder):
    try:
        yield
    except Exception as error:  # Damage shows itself as almost any exception.
        raise WorkdirError(
            f"checkpoint {folder} cannot be read ({_reason(error)}). Move it out of the workdir "
            "to use the one before it"
        ) from error


def _read_json(folder, item: str) -> dict:
    if item == "extra" and not (folder / item).exists():  # Of a workdir from before there was one.
        return {}
    return ocp.JsonCheckpointHandler().restore(folder / item)


def json_config(config) -> dict:
    """A ConfigDict as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def _folder(workdir):
    workdir = as_path(workdir)
    if str(workdir).startswith("s3://"):
        _know_s3()
    return (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"


@functools.cache
def _know_s3():
    """Lets Orbax name files in s3:// to TensorStore, which has a driver for them.

    Orbax does so for gs:// alone, and 0.12.8 has no public way to add another (its type handlers
    build the specification themselves); the driver of s3:// has the same keys, and an endpoint.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    build = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(build)
    def wrapped(directory: str, *args, **kwargs):
        if not directory.startswith("s3://"):
            return build(directory, *args, **kwargs)
        return _s3_driver(build("gs" + directory.removeprefix("s3"), *args, **kwargs))

    tensorstore_utils.build_kvstore_tspec = wrapped


def _s3_driver(spec):
    """A specification of TensorStore with the driver of s3:// instead of that of gs://."""
    if isinstance(spec, list):
        return [_s3_driver(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    spec = {key: _s3_driver(value) for key, value in spec.items()}
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        spec |= {"driver": "s3"} | ({"endpoint": endpoint} if endpoint else {})
    return spec


def _reason(error: Exception) -> str:
    if storage.FULL in str(error):
        return "the disk is full"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
