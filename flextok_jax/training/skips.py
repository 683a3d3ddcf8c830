"""Steps that changed nothing because their loss or gradient was not finite: named, and limited."""

import logging

import jax
import numpy as np

from flextok_jax.training.state import TrainState

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """Too many steps in a row were skipped; the message names them."""


class Skips:
    """Reads from the metrics of finished steps which of them were skipped.

    Attributes:
        row: the skipped steps since the last good one.
        good: the last step that changed the parameters, or where the run began.
    """

    def __init__(self, state: TrainState, limit: int):
        """Begins at `state`, of which `limit` following steps in a row may not all be skipped."""
        self.row, self.good, self._limit = [], int(state.step), limit
        self._count = self._count_at_good = int(state.skipped)

    def see(self, step: int, metrics: dict):
        """Notes what became of `step`. Waits for it: pass one that is finished."""
        count = int(metrics["skipped"].total)
        if count > self._count:
            self.row.append(step)
            loss = float(metrics["loss"].total)
            log.warning(
                "step %d skipped: %s (%d in a row of at most %d, %d in all)", step,
                "its gradient is not finite" if np.isfinite(loss) else f"its loss is {loss}",
                len(self.row), self._limit, count,
            )  # fmt: skip
        else:
            self.row, self.good, self._count_at_good = [], step, count
        self._count = count

    @property
    def too_many(self) -> bool:
        """Whether the limit is reached."""
        return len(self.row) >= self._limit

    def last_good(self, state: TrainState) -> TrainState:
        """The state after step `good`: that of now, but for the steps it has counted since."""

        def like(value, old):
            return jax.device_put(np.asarray(value, old.dtype), old.sharding)

        return state.replace(
            step=like(self.good, state.step), skipped=like(self._count_at_good, state.skipped)
        )

    def error(self, saved: int) -> Diverged:
        """What to raise, when `saved` is the checkpoint that keeps the last good state."""
        return Diverged(
            f"steps {self.row[0]} to {self.row[-1]} were all skipped, because loss or gradient "
            f"were not finite: max_skipped_in_row={self._limit} is reached. The state after step "
            f"{self.good}, the last good one, is kept in checkpoint {saved}. Look at the data of "
            "these steps, or start a new workdir with a smaller optim.lr and "
            "init_from=THIS_WORKDIR; a larger max_skipped_in_row lets the same run go on"
        )
