"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import logging
import signal

import jax

PREEMPTED = 143  # Exit code after SIGTERM (128 + 15, as shells have it): saved, start me again.

log = logging.getLogger(__name__)


class StopSignals:
    """From `catch` to its exit, remembers the first SIGINT or SIGTERM in `received`.

    A second Ctrl-C interrupts at once. With several processes nothing is caught here: JAX's
    preemption service makes all stop after the same step (`reached_preemption`).
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    def catch(self):
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        log.warning("%s: saving after this step", signal.Signals(number).name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
