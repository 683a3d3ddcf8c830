"""What a run reports: DIR/metrics.jsonl, TensorBoard events in DIR/tb, lines for a person, and, if
asked, Weights & Biases.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys

import jax
import numpy as np

from flextok_jax.io import storage

log = logging.getLogger(__name__)


class RunLog:
    """Writes metrics as JSON lines and events, and shows progress, in process 0 only."""

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
        if not self._active:
            return
        import tensorboardX
        import tqdm

        workdir = pathlib.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        storage.write_text(self._path, "".join(_lines_until(self._path, start)))
        self._events = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start + 1)
        self._wandb = _wandb(workdir, project, config) if project else None
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

    def advance(self):
        """One step is done."""
        if self._active:
            self._bar.update()

    def add(self, step: int, values: dict):
        """Takes metrics of `step`, numbers and vectors, into the record that `flush` writes."""
        self._pending |= {"step": step} | {name: _plain(value) for name, value in values.items()}

    def flush(self):
        """Writes the record."""
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


def _wandb(workdir: pathlib.Path, project: str, config: dict | None):
    """The run of Weights & Biases that belongs to a workdir; DIR/wandb_id names it."""
    import wandb

    file = workdir / "wandb_id"
    before = file.read_text(encoding="utf-8") if file.exists() else None
    try:
        run = wandb.init(
            project=project,
            name=workdir.name,
            id=before,
            resume="allow",
            dir=workdir,
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


def _lines_until(path: pathlib.Path, step: int):
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
