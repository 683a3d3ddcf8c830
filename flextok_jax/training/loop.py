"""The one training loop. It serves every stage and never asks which one it runs."""

import itertools
import json
import logging
import os
import pathlib
import signal
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from clu.metrics import LastValue
from jax.experimental import multihost_utils

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.io import storage
from flextok_jax.io.checkpoint import Checkpoints, WorkdirError, flatten, json_config
from flextok_jax.parallel.mesh import compiler_options, make_mesh
from flextok_jax.parallel.sharding import param_shardings
from flextok_jax.training.batches import on_mesh
from flextok_jax.training.checks import check_config
from flextok_jax.training.logs import RunLog, write_atomic
from flextok_jax.training.profile import Profile
from flextok_jax.training.signals import StopSignals
from flextok_jax.training.skips import Skips
from flextok_jax.training.stage import Stage
from flextok_jax.training.state import TrainState, build

PLACES = ("source", "origin")  # In `export_config`: where a network lies, not which one it is.

log = logging.getLogger(__name__)


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

    Args:
        stage: see training/stage.py.
        config: a ConfigDict.
        workdir: DIR; gets DIR/checkpoints, DIR/saved.json, DIR/config.json, DIR/metrics.jsonl,
            DIR/tb and, if asked for, DIR/profile.

    Raises:
        WorkdirError: DIR holds a run with another configuration, its checkpoints are unreadable or
            lost, or one cannot be written.
        Diverged: max_skipped_in_row steps were skipped; the state before them is saved.
        ValueError: numbers that are too small, or do not fit each other.
    """
    # The order of a run:
    #   mesh -> shapes -> newest checkpoint, or init_from, or init -> logs -> data -> compile
    #   for each step: batch -> step -> metrics merge on the device
    #     the step before is finished: was it skipped?
    #     when a record is due: begin it, and write the one before (the host waits for nothing new)
    #     when a save is due: save; when an evaluation is due: evaluate the averaged parameters
    #     leave after a signal or a preemption notice, saved
    workdir, total = pathlib.Path(workdir).absolute(), config.total_steps
    plain, mesh = json_config(config), make_mesh(**config.mesh)
    check_config(config, mesh)
    with (
        jax.set_mesh(mesh),
        StopSignals() as signals,
        Checkpoints(workdir, plain, config.checkpoint.keep) as checkpoints,
    ):
        program = build(stage, config, mesh)
        state = _first_state(stage, config, program, checkpoints)
        start, stopped = int(state.step), None
        skips = Skips(state, config.max_skipped_in_row)
        profile = Profile(config.profile, workdir, start, total)
        _describe(workdir, plain, stage, program, continued=start > 0)
        frozen = stage.load_frozen()
        frozen = jax.device_put(frozen, param_shardings(mesh, frozen))
        evaluators = stage.evaluators()

        def evaluation_due(step):
            every = config.eval_every and step % config.eval_every == 0
            return bool(evaluators) and step > 0 and (every or step == total)

        def evaluate(step, ema):
            for name, evaluator in evaluators.items():
                for metric, value in evaluator(ema, frozen, mesh):
                    run_log.add(step, {f"eval/{name}/{metric}": value})

        with RunLog(workdir, start, total) as run_log, profile:
            if evaluation_due(start):  # The run may have ended between saving and evaluating.
                done = any(name.startswith("eval/") for name in run_log.resumed)
                if not multihost_utils.broadcast_one_to_all(np.bool_(done)):
                    evaluate(start, state.ema)
            run_log.flush()
            if start >= total:
                log.info("step %d of %d is reached: nothing left to train", start, total)
                return Outcome(state, None)

            pipeline = make_pipeline(
                config.data, seed=config.seed, batch_size=config.batch_size, train=True
            )
            batches = on_mesh(pipeline.iterate(start), mesh)
            step_fn, batches = _compile(program.step, mesh, state, frozen, batches)
            window, previous, watch = None, None, Stopwatch(start)
            for step, batch in enumerate(batches, start + 1):
                profile.before(step, previous)
                state, metrics = step_fn(state, frozen, batch)
                window = metrics if window is None else _merge(window, metrics)
                if previous is not None:
                    jax.block_until_ready(previous)  # Two steps in flight: the device never waits,
                    skips.see(step - 1, previous)  # and batches do not pile up on it.
                previous = metrics
                profile.after(step, metrics)
                run_log.advance()
                checkpoints.poll()

                stopped = signals.received
                if checkpoints.reached_preemption(step):
                    stopped = stopped or signal.SIGTERM
                last = bool(stopped) or step == total
                every = config.checkpoint.every
                saving = last or (every and step % every == 0)
                if last or skips.too_many:
                    skips.see(step, metrics)
                    _stop_if_diverged(skips, state, checkpoints)
                evaluating = evaluation_due(step) and not stopped

                if saving or evaluating or step % config.log_every == 0:
                    if watch.done == step - 1:  # Nothing to time yet but this step.
                        jax.block_until_ready(metrics)
                        seconds = watch.lap(step)
                    else:
                        seconds = watch.lap(step - 1)
                    speed = {"step_time": seconds, "images_per_s": config.batch_size / seconds}
                    run_log.add(step, _compute(window) | speed)
                    window = None
                    if saving:
                        run_log.flush()  # What is saved is logged, whatever happens then.
                        checkpoints.save(step, state)
                    if evaluating:
                        evaluate(step, state.ema)
                        run_log.flush()
                    if saving or evaluating:  # Both wait for the step; their time is not its time.
                        watch = Stopwatch(step)
                if last:
                    break
    if stopped:
        log.warning("stopped by %s after step %d, which is saved", stopped.name, step)
    return Outcome(state, stopped)


class Stopwatch:
    """Seconds per step, over steps that are known to be finished."""

    def __init__(self, done: int):
        self.done, self._since = done, time.perf_counter()

    def lap(self, done: int) -> float:
        """The mean since the last lap; step `done` has just finished."""
        now = time.perf_counter()
        seconds = (now - self._since) / (done - self.done)
        self.done, self._since = done, now
        return seconds


def _stop_if_diverged(skips, state, checkpoints):
    """Saves the last good state, if that is still to do, and raises, after too many skips."""
    if skips.too_many:
        newest = checkpoints.newest()
        if newest is None or newest < skips.good:
            newest = skips.good
            checkpoints.save(newest, skips.last_good(state))
        raise skips.error(newest)


def _first_state(stage, config, program, checkpoints) -> TrainState:
    """The newest checkpoint; without one what `init_from` names; without that a new model."""
    state = checkpoints.restore(program.shapes)
    if state is not None:
        log.info("continuing from step %d", state.step)
        return state
    if config.init_from:
        log.info("starting from %s", config.init_from)
        return program.init_from(stage.init_from(config.init_from))
    log.info("starting from step 0: no checkpoint was ever completed here")
    return program.init()


def _describe(workdir, plain, stage, program, continued: bool):
    """DIR/config.json, and the table of parameters in the log.

    Raises:
        WorkdirError: a frozen network is not the one that the run was begun with, or the file does
            not tell.
    """
    path, model = workdir / "config.json", json.loads(json.dumps(stage.export_config()))
    if continued and path.exists():
        try:
            old, new = (flatten(x) for x in (storage.read_json(path)["model"], model))
        except (ValueError, KeyError, AttributeError) as error:
            raise WorkdirError(
                f"{path} is damaged ({error}): it tells which frozen networks the run was begun "
                "with. If those are the same still, remove it; it is written anew"
            ) from error
        different = [
            f"{key}: {old[key]} before, {new[key]} now"
            for key in sorted(old.keys() & new.keys())
            if old[key] != new[key] and not key.endswith(PLACES)
        ]
        if different:
            raise WorkdirError(
                f"{workdir} was begun with another frozen network, which was since replaced or "
                "trained further. Put it back, or use a new workdir:\n  " + "\n  ".join(different)
            )
    if jax.process_index() == 0:
        about = {"config": plain, "model": model}
        write_atomic(path, json.dumps(about, indent=2) + "\n")
        table = parameter_overview.get_parameter_overview(
            program.shapes.params, include_stats="sharding"
        )
        log.info("parameters:\n%s", table)


def _compile(step, mesh, state, frozen, batches):
    """The executable for these arguments, the one compilation of a run; and all the batches.

    Ahead of time, so that it is not timed as a step, and that a batch of another shape is an error
    instead of another compilation.
    """
    first = next(batches)
    begin = time.perf_counter()
    lowered = step.lower(state, frozen, first)
    executable = lowered.compile(compiler_options=compiler_options(mesh))
    log.info("compiled the step in %.1f s", time.perf_counter() - begin)
    return executable, itertools.chain([first], batches)


@jax.jit
def _merge(window, metrics):
    """The averages of a window and one more step, without skipped steps where there are others."""

    def pick(both, old, new):
        return jnp.where(_finite(metrics), jnp.where(_finite(window), both, new), old)

    merged = {name: metric.merge(metrics[name]) for name, metric in window.items()}
    return {
        name: metric
        if isinstance(metric, LastValue)
        else jax.tree.map(pick, metric, window[name], metrics[name])
        for name, metric in merged.items()
    }


def _finite(metrics):
    """Whether a step was not skipped, or a window has such a step: as the step itself tells."""
    return jnp.isfinite(metrics["loss"].total) & jnp.isfinite(metrics["grad_norm"].total)


@jax.jit
def _compute(window):
    values = {}
    for name, metric in window.items():
        value = metric.compute()
        if isinstance(value, dict):
            values |= {f"{name}/{key}": part for key, part in value.items()}
        else:
            values[name] = value
    return values
