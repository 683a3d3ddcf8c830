"""The one training loop. It serves every stage and never asks which one it runs."""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import signal
import time
from typing import NamedTuple

import jax

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.io.checkpoint import Checkpoints, WorkdirError, json_config
from flextok_jax.io.paths import as_path, is_remote
from flextok_jax.nn import layout
from flextok_jax.parallel.mesh import compiler_options, describe, make_mesh
from flextok_jax.parallel.sharding import param_shardings
from flextok_jax.training import logs, memory, workdirs
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
    """The state after the last step, and the signal that stopped the run (None: none did)."""

    state: TrainState
    stopped: signal.Signals | None


def train(stage: Stage, config, workdir: str | os.PathLike, command: str | None = None) -> Outcome:
    """Trains `stage` in `workdir` up to `config.total_steps`, continuing what is there.

    Whenever a run ends, by its last step, a signal or an error, its last good state is saved.

    Args:
        stage: see training/stage.py.
        config: a ConfigDict.
        workdir: DIR, also in a bucket; gets DIR/checkpoints, config.json, metrics.jsonl, tb, and
            profile if asked.
        command: what started the run, for DIR/config.json.

    Raises:
        SettingsError, OSError: of the configuration and of what it names, before the first step.
        WorkdirError: DIR is in use, holds a run with another configuration or data, its checkpoints
            are unreadable or lost, or one cannot be written.
        Diverged: `max_skipped_in_row` steps in a row had no finite loss and gradient.
        OutOfMemory: a step needs more memory than a device has, said before it is compiled where
            that can be seen.
    """
    workdir, total = as_path(workdir), config.total_steps
    workdir = workdir if is_remote(workdir) else workdir.absolute()
    with _settings():
        mesh = make_mesh(**config.mesh)
        check_config(config, mesh)
        log.info("%s", describe(mesh, config.compute.dtype))
        if (warmup := config.optim.warmup_steps) > total > 0:
            log.warning("optim.warmup_steps=%d is longer than total_steps=%d", warmup, total)
        evaluators = stage.evaluators()
        pipeline = make_pipeline(
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            train=True,
            text=stage.captions,
            embedding=stage.embedding,
        )
    plain, signals = json_config(config), StopSignals()
    with (
        jax.set_mesh(mesh),
        workdirs.locked(workdir),
        signals,
        memory.explained(),
        Checkpoints(workdir, plain, config.checkpoint.keep) as checkpoints,
    ):
        with _settings():
            program = build(stage, config, mesh)
            memory.check(program.shapes, mesh)
            state = workdirs.first_state(stage, config, program, checkpoints)
            start = done = int(state.step)
            extra = checkpoints.extra | workdirs.identity(
                workdir, checkpoints.extra, config, stage, pipeline.source, start
            )
            about = {"config": plain, "model": extra["model"], "command": command}
            workdirs.describe(workdir, about, program)
            frozen = stage.load_frozen()
        frozen = jax.device_put(layout.unbox(frozen), param_shardings(mesh, frozen))

        with logs.RunLog(workdir, start, total, config.wandb.project, plain) as run_log:
            if start >= total:
                log.info("step %d of %d is reached: nothing left to train", start, total)
                return Outcome(state, None)

            batches = on_mesh(pipeline.iterate(start), mesh)
            step_fn, batches = _compile(program, mesh, state, frozen, batches)
            first_traced, last_traced = profiled_steps(config.profile, total)
            window = previous = stopped = None
            timed, since = start, time.perf_counter()
            signals.catch()
            try:
                for step, batch in enumerate(batches, start + 1):
                    if step == max(first_traced, start + 1) <= last_traced:
                        jax.block_until_ready(previous)
                        jax.profiler.start_trace(run_log.folder / "profile")
                    state, metrics = step_fn(state, frozen, batch)
                    done = step
                    window = metrics if window is None else logs.merge(window, metrics)
                    # Two steps in flight: the device never waits, and batches do not pile up.
                    if previous is not None:
                        _check_finite(step - 1, previous, config.max_skipped_in_row)
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
                    if not (saving or evaluating or step == 1 or _due(step, config.log_every)):
                        continue
                    if last:
                        _check_finite(step, metrics, config.max_skipped_in_row)
                    run_log.add(step, jax.device_get(logs.compute(window)))
                    seconds = (time.perf_counter() - since) / (step - timed)
                    speed = config.batch_size / seconds
                    run_log.add(step, {"step_time": seconds, "images_per_s": speed})
                    if saving:
                        if stopped != signal.SIGTERM:
                            extra |= (measured := stage.measure(state.ema, frozen, mesh))
                            run_log.add(step, measured)
                        checkpoints.save(step, state, extra)
                    if evaluating:
                        for name, evaluator in evaluators.items():
                            found = evaluator(state.ema, frozen, mesh)
                            run_log.add(step, {f"eval/{name}/{metric}": x for metric, x in found})
                    run_log.flush(copy=saving)
                    if last:
                        break
                    window, timed, since = None, step, time.perf_counter()
            except Exception as error:
                _save_last_good(checkpoints, done, state, extra, error)
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


def _compile(program, mesh, state, frozen, batches):
    """The executable, the one compilation of a run; and all the batches.

    In a thread, so that Ctrl-C need not wait for it.
    """
    first, begin = next(batches), time.perf_counter()
    traced = program.step.trace(state, frozen, first)
    memory.check(program.shapes, mesh, traced.jaxpr)
    lowered = traced.lower()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        executable = pool.submit(lowered.compile, compiler_options(mesh)).result()
    log.info("compiled the step in %.1f s", time.perf_counter() - begin)
    return executable, itertools.chain([first], batches)


def _check_finite(step: int, metrics: dict, limit: int):
    """Waits for a step and reports that it was skipped; Diverged after `limit` in a row."""
    row, count = (int(metrics[name].total) for name in ("skipped_in_row", "skipped"))
    if row:
        log.warning(
            "step %d skipped: its loss or gradient is not finite (%d in a row of at most %d, %d in "
            "all)", step, row, limit, count,
        )  # fmt: skip
    if row >= limit:
        raise Diverged(
            f"steps {step - row + 1} to {step} were skipped, their loss or gradient was not "
            f"finite: max_skipped_in_row={limit} is reached. The last good state is saved. Look at "
            "the data, or start a new workdir with a smaller optim.lr and init_from=THIS_WORKDIR"
        )


def _save_last_good(checkpoints, done: int, state, extra: dict, error: Exception):
    """Saves the state after step `done`, if an error ends the run before that was due."""
    gone = any(x.is_deleted() for x in jax.tree.leaves(state))  # Donated to a step that failed.
    alone = jax.process_count() == 1  # Others would have to take part.
    if gone or not alone or isinstance(error, WorkdirError) or done <= (checkpoints.newest() or 0):
        return
    try:
        checkpoints.save(done, state, extra)
        log.warning("step %d, the last good one, is saved", done)
    except WorkdirError as failure:
        log.warning("%s", failure)
