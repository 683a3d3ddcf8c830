"""The one training loop. It serves every stage and never asks which one it runs."""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import pathlib
import signal
import time
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.io.checkpoint import Checkpoints, WorkdirError, json_config
from flextok_jax.nn import layout
from flextok_jax.parallel.mesh import compiler_options, describe, make_mesh
from flextok_jax.parallel.sharding import param_shardings
from flextok_jax.training import logs, workdirs
from flextok_jax.training.batches import on_mesh
from flextok_jax.training.checks import check_config, profiled_steps
from flextok_jax.training.signals import StopSignals
from flextok_jax.training.stage import Stage
from flextok_jax.training.state import TrainState, build

log = logging.getLogger(__name__)


class SettingsError(ValueError):
    """Something that the configuration names does not exist or does not fit."""


class Diverged(RuntimeError):
    """Too many steps in a row were skipped."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        state: the state after the last step, which is also the newest checkpoint.
        stopped: SIGINT or SIGTERM (also for a preemption notice), None: all steps are done.
    """

    state: TrainState
    stopped: signal.Signals | None


def train(stage: Stage, config, workdir: str | os.PathLike) -> Outcome:
    """Trains `stage` in `workdir` up to `config.total_steps`, continuing what is there.

    Whenever a run ends, by its last step, a signal or an error, its last good state is saved.

    Args:
        stage: see training/stage.py.
        config: a ConfigDict.
        workdir: DIR; gets DIR/checkpoints, DIR/config.json, DIR/metrics.jsonl,
            DIR/tb and, if asked for, DIR/profile.

    Raises:
        SettingsError, OSError: of the configuration and of what it names, before the first step.
        WorkdirError: DIR is in use, holds a run with another configuration or data, its checkpoints
            are unreadable or lost, or one cannot be written.
        Diverged: `max_skipped_in_row` steps in a row had no finite loss and gradient.
    """
    workdir, total = pathlib.Path(workdir).absolute(), config.total_steps
    with _settings():
        mesh = make_mesh(**config.mesh)
        check_config(config, mesh)
        log.info("%s", describe(mesh, config.compute.dtype))
        if (warmup := config.optim.warmup_steps) > total > 0:
            log.warning("optim.warmup_steps=%d is longer than total_steps=%d", warmup, total)
        evaluators = stage.evaluators()
        pipeline = make_pipeline(
            config.data, seed=config.seed, batch_size=config.batch_size, train=True
        )
    plain, signals = json_config(config), StopSignals()
    with (
        jax.set_mesh(mesh),
        workdirs.locked(workdir),
        signals,
        Checkpoints(workdir, plain, config.checkpoint.keep) as checkpoints,
    ):
        with _settings():
            program = build(stage, config, mesh)
            state = workdirs.first_state(stage, config, program, checkpoints)
            workdirs.check_data(workdir, checkpoints.extra, pipeline.source)
            workdirs.describe(workdir, plain, stage, program, int(state.step))
            frozen = stage.load_frozen()
        frozen = jax.device_put(layout.unbox(frozen), param_shardings(mesh, frozen))
        start = done = int(state.step)

        extra = checkpoints.extra | {"data": pipeline.source.fingerprint()}

        def save(step, state, measure=True):
            if measure:
                measured = stage.measure(state.ema, frozen, mesh)
                run_log.add(step, measured)
                extra.update(measured)
            checkpoints.save(step, state, extra)

        def evaluate(step, ema):
            for name, evaluator in evaluators.items():
                found = evaluator(ema, frozen, mesh)
                run_log.add(step, {f"eval/{name}/{metric}": x for metric, x in found})
            run_log.flush()

        with logs.RunLog(workdir, start, total) as run_log:
            if start >= total:
                if start > 0 and not multihost_utils.broadcast_one_to_all(run_log.evaluated):
                    evaluate(start, state.ema)  # The run ended between saving and evaluating.
                log.info("step %d of %d is reached: nothing left to train", start, total)
                return Outcome(state, None)

            batches = on_mesh(pipeline.iterate(start), mesh)
            step_fn, batches = _compile(program.step, mesh, state, frozen, batches)
            first_traced, last_traced = profiled_steps(config.profile, total) or (0, 0)
            window = previous = stopped = None
            signals.catch()
            watch = logs.Stopwatch(start)
            try:
                for step, batch in enumerate(batches, start + 1):
                    if step == max(first_traced, start + 1) <= last_traced:
                        jax.block_until_ready(previous)
                        jax.profiler.start_trace(workdir / "profile")
                    state, metrics = step_fn(state, frozen, batch)
                    done = step
                    window = metrics if window is None else logs.merge(window, metrics)
                    # Two steps in flight: the device never waits, and batches do not pile up.
                    if previous is not None:
                        jax.block_until_ready(previous)
                        _check_finite(step - 1, previous, config.max_skipped_in_row)
                        run_log.flush()
                    previous = metrics
                    if step == last_traced:
                        jax.block_until_ready(metrics)
                        jax.profiler.stop_trace()
                    run_log.advance()
                    checkpoints.poll()

                    stopped = signals.received
                    if checkpoints.reached_preemption(step):
                        stopped = stopped or signal.SIGTERM
                    last = bool(stopped) or step == total
                    saving = last or _due(step, config.checkpoint.every)
                    evaluating = not stopped and (step == total or _due(step, config.eval_every))
                    if last:
                        _check_finite(step, metrics, config.max_skipped_in_row)
                    if saving or evaluating or step == 1 or _due(step, config.log_every):
                        speed = config.batch_size / watch.lap(step, metrics)
                        timed = {"step_time": config.batch_size / speed, "images_per_s": speed}
                        run_log.add(step, logs.compute(window) | timed)
                        window = None
                    if saving:
                        save(step, state, measure=stopped != signal.SIGTERM)
                    if evaluating:
                        evaluate(step, state.ema)
                    if saving or evaluating:
                        watch = logs.Stopwatch(step)
                    if last:
                        break
            except Exception as error:
                _save_last_good(checkpoints, save, done, state, error)
                raise
    if stopped:
        log.warning("stopped by %s after step %d, which is saved", stopped.name, done)
    return Outcome(state, stopped)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


@contextlib.contextmanager
def _settings():
    """Marks what fails because of a setting: there the message says more than the trace."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _compile(step, mesh, state, frozen, batches):
    """The executable for these arguments, the one compilation of a run; and all the batches.

    Ahead of time, so that it is not timed as a step, and that a batch of another shape is an error
    instead of another compilation; in a thread, so that Ctrl-C need not wait for it.
    """
    first = next(batches)
    begin = time.perf_counter()
    lowered = step.lower(state, frozen, first)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        executable = pool.submit(lowered.compile, compiler_options(mesh)).result()
    log.info("compiled the step in %.1f s", time.perf_counter() - begin)
    return executable, itertools.chain([first], batches)


def _check_finite(step: int, metrics: dict, limit: int):
    """Reports a step that was skipped; raises Diverged after `limit` of them in a row."""
    row, count = (int(metrics[name].total) for name in ("skipped_in_row", "skipped"))
    if row:
        log.warning(
            "step %d skipped: its loss or gradient is not finite (%d in a row of at most %d, %d in "
            "all)", step, row, limit, count,
        )  # fmt: skip
    if row >= limit:
        raise Diverged(
            f"steps {step - row + 1} to {step} were all skipped, because their loss or gradient "
            f"was not finite: max_skipped_in_row={limit} is reached. The last good state is saved. "
            "Look at the data of these steps, or start a new workdir with a smaller optim.lr and "
            "init_from=THIS_WORKDIR; a larger max_skipped_in_row lets the same run go on"
        )


def _save_last_good(checkpoints, save, done: int, state, error: Exception):
    """Saves the state after step `done`, if an error ends the run before that was due."""
    gone = any(x.is_deleted() for x in jax.tree.leaves(state))  # Donated to a step that failed.
    alone = jax.process_count() == 1  # Others would have to take part.
    if gone or not alone or isinstance(error, WorkdirError) or done <= (checkpoints.newest() or 0):
        return
    try:
        save(done, state, measure=False)
        log.warning("step %d, the last good one, is saved", done)
    except Exception as failure:
        log.warning("step %d could not be saved (%s)", done, failure)
