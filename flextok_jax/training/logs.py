"""What a run reports: DIR/metrics.jsonl, TensorBoard events in DIR/tb, lines for a person, and, if
asked, Weights & Biases.

Nothing can be appended to a file in a bucket: there all are written on this machine, and copied
with every checkpoint, after every minute and at the end.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, is_remote, upload

COPIED_EVERY = 60  # seconds, to a bucket

log = logging.getLogger(__name__)


class RunLog:
    """Writes metrics as JSON lines and events, and shows progress, in process 0 only.

    Attributes:
        folder: a local one, DIR itself or what is copied to DIR; also for traces, of any process.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start: int,
        total: int,
        project: str = "",
        config: dict | None = None,
    ):
        """Continues the logs of `workdir` after step `start`: what lies beyond it is dropped.

        Args:
            project: of Weights & Biases, which gets everything as well; "": not.
            config: what is shown there, in JSON terms.
        """
        self._pending, self._active = {}, jax.process_index() == 0
        self._workdir, self._copied, self._sizes = as_path(workdir), time.monotonic(), {}
        self._temporary = None
        if is_remote(self._workdir):
            self._temporary = tempfile.TemporaryDirectory()
            self.folder = pathlib.Path(self._temporary.name)
        else:
            self.folder = self._workdir
        if not self._active:
            return
        import tensorboardX
        import tqdm

        self._path = self.folder / "metrics.jsonl"
        lines = _lines_until(self._workdir / self._path.name, start)
        storage.write_text(self._path, "".join(lines))
        self._events = tensorboardX.SummaryWriter(str(self.folder / "tb"), purge_step=start + 1)
        self._wandb = _wandb(self._workdir, self.folder, project, config) if project else None
        self._bar = tqdm.tqdm(initial=start, total=total, unit="step", disable=None)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.flush()
        if self._active:
            self._events.close()
            self._bar.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(exc[0] is not None))
        if self._temporary:
            self._copy()
            self._temporary.cleanup()

    def advance(self):
        """One step is done."""
        if self._active:
            self._bar.update()

    def add(self, step: int, values: dict):
        """Takes metrics of `step`, numbers and vectors, into the record that `flush` writes."""
        self._pending |= {"step": step} | {name: _plain(value) for name, value in values.items()}

    def flush(self, copy: bool = False):
        """Writes the record; `copy`: to a bucket now."""
        record, self._pending = self._pending, {}
        if not (record and self._active):
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        step, line, numbers = record["step"], f"step {record['step']}/{self._bar.total}", {}
        for name, value in record.items():
            parts = {name: value}
            if isinstance(value, list):
                parts = {f"{name}/{i:03d}": x for i, x in enumerate(value)}
            numbers |= {tag: number for tag, number in parts.items() if number is not None}
            if name != "step" and ("/" not in name or name.startswith("eval/")):
                shown = value if value is None else format(value, ".4g")
                line += f"  {name.removeprefix('eval/')}={shown}"
        for tag, number in numbers.items():
            self._events.add_scalar(tag, number, step)
        self._events.flush()
        if self._wandb:
            self._wandb.log(numbers)
        if self._bar.disable:
            log.info("%s", line)
        else:
            self._bar.write(line, file=sys.stderr)
        late = time.monotonic() - self._copied > COPIED_EVERY
        if self._temporary and (copy or late):
            self._copy()

    def _copy(self):
        """Copies what has grown since the last time to the bucket."""
        for file in (file for file in self.folder.rglob("*") if file.is_file()):
            name, size = file.relative_to(self.folder).as_posix(), file.stat().st_size
            if self._sizes.get(name) != size:
                try:
                    upload(file, self._workdir / name)
                except Exception as error:  # Each store has its own. The next copy has it all.
                    log.warning("%s could not be written: %s", self._workdir / name, error)
                else:
                    self._sizes[name] = size
        self._copied = time.monotonic()


def _wandb(workdir, folder: pathlib.Path, project: str, config: dict | None):
    """The run of Weights & Biases that belongs to a workdir; DIR/wandb_id names it.

    Args:
        folder: a local one, for its files.
    """
    import wandb

    file = workdir / "wandb_id"
    before = file.read_text(encoding="utf-8") if file.exists() else None
    try:
        run = wandb.init(
            project=project,
            name=workdir.name,
            id=before,
            resume="allow",
            dir=folder,
            config=config,
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise OSError(
            f"wandb.project={project!r}: {error}. Log in by `wandb login`, or set "
            f"WANDB_MODE=offline and send what is in {workdir}/wandb later by `wandb sync`"
        ) from error
    # By our own step: one that is trained again after a crash is logged again.
    run.define_metric("*", step_metric="step")
    storage.write_text(file, run.id)
    return run


@jax.jit
def merge(window, metrics):
    """The metrics of a window and one more step."""
    return {name: metric.merge(metrics[name]) for name, metric in window.items()}


@jax.jit
def compute(window):
    """The values of metrics; one that has several is taken apart."""
    values = {}
    for name, metric in window.items():
        value = metric.compute()
        parts = value.items() if isinstance(value, dict) else ()
        values |= {f"{name}/{key}": part for key, part in parts} or {name: value}
    return values


def _lines_until(path, step: int):
    """The lines of the steps up to `step`; a crash may have torn the last line."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                yield line + "\n"


def _plain(value):
    """JSON terms: floats and (nested) lists of them, None for what is not finite."""
    value = np.asarray(value, np.float64)
    if value.ndim:
        return [_plain(x) for x in value]
    return float(value) if np.isfinite(value) else None
