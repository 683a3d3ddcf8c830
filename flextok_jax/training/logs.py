"""What a run reports: DIR/metrics.jsonl, TensorBoard events in DIR/tb, and lines for a person."""

import contextlib
import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np

from flextok_jax.io import storage

log = logging.getLogger(__name__)


class RunLog:
    """Writes metrics as JSON lines and events, and shows progress, in process 0 only.

    A resumed run first drops the lines beyond the step it resumes from, and a line torn by a crash.

    Attributes:
        evaluated: the file has an evaluation of the step that the run begins at.
    """

    def __init__(self, workdir: str | os.PathLike, start: int, total: int):
        """Continues the logs of `workdir` after step `start`."""
        self._pending, self.evaluated = {}, False
        self._active = jax.process_index() == 0
        if not self._active:
            return
        import tensorboardX
        import tqdm

        workdir = pathlib.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        records = [record for record in _records(self._path) if record["step"] <= start]
        storage.write_text(self._path, "".join(map(_line, records)))
        self.evaluated = any(r["step"] == start and _evaluation(r) for r in records)
        self._events = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start + 1)
        self._bar = tqdm.tqdm(initial=start, total=total, unit="step", disable=None)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(Exception) if exc[0] else contextlib.nullcontext():
            self.flush()
        if self._active:
            self._events.close()
            self._bar.close()

    def advance(self):
        """One step is done."""
        if self._active:
            self._bar.update()

    def add(self, step: int, values: dict):
        """Takes metrics of `step`, also unfinished ones on the device; `flush` writes them."""
        if self._pending.get("step") != step:
            self.flush()
        self._pending |= {"step": step} | values

    def flush(self):
        """Writes what is pending. Waits for the device."""
        pending, self._pending = self._pending, {}
        if not (pending and self._active):
            return
        step = pending.pop("step")
        record = {name: _plain(value) for name, value in jax.device_get(pending).items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step} | record))
        for name, value in record.items():
            parts = {name: value}
            if isinstance(value, list):
                parts = {f"{name}/{i:03d}": x for i, x in enumerate(value)}
            for tag, number in parts.items():
                if number is not None:
                    self._events.add_scalar(tag, number, step)
        self._events.flush()
        self._show(step, record)

    def _show(self, step: int, record: dict):
        """The loss beside the bar and a line for an evaluation; without a bar a line for all."""
        if record.get("loss") is not None:
            self._bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)
        found = _evaluation(record)
        if self._bar.disable:
            found = {name: value for name, value in record.items() if "/" not in name} | found
        line = f"step {step}/{self._bar.total}"
        for name, value in found.items():
            line += f"  {name}={value if value is None else format(value, '.4g')}"
        if self._bar.disable:
            log.info("%s", line)
        elif found:
            self._bar.write(line, file=sys.stderr)


class Stopwatch:
    """Seconds per step, over steps that are known to be finished."""

    def __init__(self, done: int):
        self._done, self._since = done, time.perf_counter()

    def lap(self, step: int, metrics) -> float:
        """The mean since the last lap; step - 1 is finished, `metrics` are those of `step`."""
        if self._done == step - 1:  # Nothing to time yet but this step.
            jax.block_until_ready(metrics)
        else:
            step -= 1
        now = time.perf_counter()
        seconds = (now - self._since) / (step - self._done)
        self._done, self._since = step, now
        return seconds


@jax.jit
def merge(window, metrics):
    """The metrics of a window and one more step."""
    return {name: metric.merge(metrics[name]) for name, metric in window.items()}


@jax.jit
def compute(window):
    values = {}
    for name, metric in window.items():
        value = metric.compute()
        if isinstance(value, dict):
            values |= {f"{name}/{key}": part for key, part in value.items()}
        else:
            values[name] = value
    return values


def _evaluation(record: dict) -> dict:
    """The metrics of evaluators in a record."""
    return {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _records(path: pathlib.Path) -> list[dict]:
    """Every whole record."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning("%s: dropped a torn line", path)
    return records


def _plain(value):
    """JSON terms: floats and (nested) lists of them, None for what is not finite."""
    value = np.asarray(value, np.float64)
    if value.ndim:
        return [_plain(x) for x in value]
    return float(value) if np.isfinite(value) else None
