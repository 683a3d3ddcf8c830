"""`config.profile`: steps recorded with JAX's profiler, for TensorBoard, XProf or Perfetto."""

import logging
import os
import pathlib
import re
from typing import Any

import jax

log = logging.getLogger(__name__)


def steps_of(text: str, total: int) -> tuple[int, int] | None:
    """(A, B) of "A:B", the first and the last step to record; None of "".

    Raises:
        ValueError: `text` is not of that form, or names no steps of a run of `total`.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise ValueError(
            f"profile={text!r}: A:B is needed, the first and the last step to record (100:105)"
        )
    first, last = map(int, found.groups())
    if not 1 <= first <= last <= total:
        raise ValueError(f"profile={text!r}: needed are steps 1 <= A <= B <= total_steps={total}")
    return first, last


class Profile:
    """Records the steps A to B of a run in DIR/profile, in process 0."""

    def __init__(self, text: str, workdir: str | os.PathLike, start: int, total: int):
        """Reads "A:B".

        Args:
            text: first and last step to record, as the log counts them; "": nothing.
            workdir: DIR.
            start: the step this run continues from. What lies before it is not recorded.
            total: the last step of the run.

        Raises:
            ValueError: see `steps_of`.
        """
        self._folder, self._on = pathlib.Path(workdir) / "profile", False
        self._first = self._last = 0
        steps = steps_of(text, total)
        if steps is None:
            return
        first, last = steps
        if last <= start:
            log.warning("profile=%s: nothing is recorded after step %d, where this run begins",
                        text, start)  # fmt: skip
        elif jax.process_index() == 0:
            self._first, self._last = max(first, start + 1), last

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stop()

    def before(self, step: int, previous: Any):
        """Begins before the first step, when `previous`, the results of the one before, is done."""
        if step == self._first:
            jax.block_until_ready(previous)
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, results: Any):
        """Ends when the results of the last step are done."""
        if step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self):
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info("recorded steps %d to %d in %s", self._first, self._last, self._folder)
