"""What a run reports: DIR/metrics.jsonl, TensorBoard events in DIR/tb, and a progress bar."""

import json
import logging
import math
import os
import pathlib

import jax
import numpy as np

log = logging.getLogger(__name__)


class RunLog:
    """Writes one record per logged step. Does nothing in processes other than 0.

    A resumed run first drops the records beyond the step it resumes from, so that no step appears
    twice and a line torn by a crash disappears. What is added to the last record once it is written
    goes into the same line, and at every moment the file has the old line or the new one.

    Attributes:
        resumed: the values of that record, {} if there is none (and in processes other than 0).
    """

    def __init__(self, workdir: str | os.PathLike, start: int, total: int):
        """Continues the logs of `workdir` after step `start`."""
        self.resumed = {}
        self._pending = None
        self._last = None  # (step, record, bytes of the file before it) of the last line.
        self._active = jax.process_index() == 0
        if not self._active:
            return
        import tensorboardX
        import tqdm

        workdir = pathlib.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        records = [record for record in _records(self._path) if record["step"] <= start]
        write_atomic(self._path, "".join(map(_line, records)))
        if records and records[-1]["step"] == start:
            before = sum(len(_line(record).encode()) for record in records[:-1])
            self.resumed = {k: v for k, v in records[-1].items() if k != "step"}
            self._last = (start, {}, before)
            self.add(start, self.resumed)  # For TensorBoard, which forgets them with `purge_step`.
        self._events = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start)
        self._bar = tqdm.tqdm(initial=start, total=total, unit="step", disable=None)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if exc[0] is None:
            self.flush()
        if self._active:
            self._events.close()
            self._bar.close()

    def advance(self):
        """One step is done."""
        if self._active:
            self._bar.update()

    def add(self, step: int, values: dict):
        """Adds numbers or arrays, also unfinished ones on the device, to the record of `step`.

        The record is written when one for another step is begun, or by `flush`: until then the
        host need not wait for the device.
        """
        if self._pending and self._pending[0] != step:
            self.flush()
        if not self._pending:
            self._pending = (step, {})
        self._pending[1].update(values)

    def flush(self):
        """Writes what is pending. Waits for the device."""
        if not self._pending:
            return
        (step, values), self._pending = self._pending, None
        if not self._active:
            return
        record = {name: _plain(value) for name, value in jax.device_get(values).items()}
        self._write(step, record)
        for name, value in record.items():
            numbers = {name: value}
            if isinstance(value, list):
                numbers = {f"{name}/{i:03d}": x for i, x in enumerate(value)}
            for tag, number in numbers.items():
                self._events.add_scalar(tag, math.nan if number is None else number, step)
        self._events.flush()
        loss = record.get("loss")
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        if self._bar.disable:  # No terminal: lines instead of a bar.
            short = {k: v for k, v in record.items() if "/" not in k or k.startswith("eval/")}
            log.info(
                "step %d/%d  %s", step, self._bar.total,
                "  ".join(f"{k}={v if v is None else format(v, '.4g')}" for k, v in short.items()),
            )  # fmt: skip

    def _write(self, step: int, record: dict):
        """A new line, or more in the last one."""
        if self._last and self._last[0] == step:
            _, known, before = self._last
            text = self._path.read_bytes()[:before].decode()
            self._last = (step, known | record, before)
            write_atomic(self._path, text + _line({"step": step} | known | record))
        else:
            with self._path.open("ab") as file:
                self._last = (step, record, file.tell())
                file.write(_line({"step": step} | record).encode())


def write_atomic(path: pathlib.Path, text: str):
    """Writes a whole file or nothing, also if the machine is lost.

    Not by `storage.atomic`: a run has one writer, and what a kill leaves of it has a fixed name
    that the next run writes over.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
