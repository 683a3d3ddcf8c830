"""The training state, an object of arrays only, and its one transition."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flextok_jax.io import storage
from flextok_jax.nn import layout
from flextok_jax.nn.layout import path_string
from flextok_jax.parallel.rng import named, step_key
from flextok_jax.parallel.sharding import batch_sharding, param_shardings, placed, replicated
from flextok_jax.training import groups
from flextok_jax.training.optimizer import (
    lr_schedule,
    make_optimizer,
    overlay,
    select,
    trainable_paths,
)
from flextok_jax.training.stage import Params, Stage

NEVER = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class TrainState:
    """What is saved, restored and donated. No keys: randomness is a function of seed and step.

    `step` counts the batches consumed; `ema` is the moving average of `params` (a copy where a leaf
    is not trained); `opt_state` has slots of the trained leaves only, and counts skipped steps.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.ApplyIfFiniteState

    @property
    def skipped(self) -> jax.Array:
        return self.opt_state.total_notfinite


class Program(NamedTuple):
    """What is compiled for one stage, configuration and mesh.

    `shapes` has shardings: what `init` makes, `step` takes and a checkpoint is restored to.
    `step` is (state, frozen, batch) -> (state, metrics); `state` is donated.
    """

    shapes: TrainState
    init: Callable[[], TrainState]
    init_from: Callable[[Params], TrainState]
    step: Callable[[TrainState, Params, dict], tuple[TrainState, dict[str, clu_metrics.Metric]]]


def build(stage: Stage, config, mesh: Mesh) -> Program:
    """Shapes first, then shardings, then the functions that are compiled with them."""
    # A non-finite update is never applied; the loop stops the run when there are too many in a row.
    tx = optax.apply_if_finite(make_optimizer(config), max_consecutive_errors=NEVER)

    def first():
        return stage.init(named(jax.random.key(config.seed), "init"))

    boxed = jax.eval_shape(first)
    param_shapes = layout.unbox(boxed)
    trained = trainable_paths(param_shapes, stage.trainable, config.freeze)

    def start(params) -> TrainState:
        # Copies: buffers shared with each other, or with the caller, could not be donated.
        return TrainState(
            step=jnp.int32(0),
            params=jax.tree.map(jnp.copy, params),
            ema=jax.tree.map(jnp.copy, params),
            opt_state=tx.init(select(params, trained)),
        )

    shapes = jax.eval_shape(start, param_shapes)
    by_param, everywhere = param_shardings(mesh, boxed), replicated(mesh)

    def elsewhere(slot):  # A parameter has its slot in the optimizer of another group.
        return isinstance(slot, optax.MaskedNode)

    shardings = TrainState(
        step=everywhere,
        params=by_param,
        ema=by_param,
        opt_state=optax.tree.map_params(
            tx,
            lambda slot, sharding: slot if elsewhere(slot) else sharding,
            shapes.opt_state,
            select(by_param, trained),
            transform_non_params=lambda _: everywhere,
            is_leaf=elsewhere,
        ),
    )
    shapes = placed(shapes, shardings)
    start_jit = jax.jit(start, out_shardings=shardings)

    def init_from(params) -> TrainState:
        _check_params(params, param_shapes)
        return start_jit(jax.tree.map(lambda x, s: np.asarray(x, s.dtype), params, param_shapes))

    step = jax.jit(
        _make_step(stage, config, mesh, tx, trained, select(by_param, trained)),
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    init = jax.jit(lambda: start(layout.unbox(first())), out_shardings=shardings)
    return Program(shapes, init, init_from, step)


def _make_step(stage, config, mesh, tx, trained, shardings):
    """One optimizer step: gradients of the batch's groups (training/groups.py), update, average."""
    parts, size = config.optim.accumulate, config.batch_size
    schedule = lr_schedule(config)
    runs = groups.plan(stage, size, parts, mesh.shape["data"] * mesh.shape["fsdp"])

    def sharding(leading):
        return NamedSharding(mesh, PartitionSpec(*(None,) * leading, *batch_sharding(mesh).spec))

    def train_step(state: TrainState, frozen: Params, batch: dict):
        part, ema_part = select(state.params, trained), select(state.ema, trained)
        key = named(step_key(config.seed, state.step), "microbatch")

        def gradients(run, index, batch):
            """((loss, gradients), metrics): of one call, as a share of the batch's."""
            length = {} if run.length is None else {"length": run.length}

            def loss_fn(part):
                params, one = overlay(state.params, part), jax.random.fold_in(key, index)
                loss, metrics = stage.loss(params, frozen, batch, one, state.step, **length)
                return loss * (run.images / size), metrics

            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(part)
            return (loss, grads), metrics

        def add(so_far, more):
            (loss, grads), merged = so_far
            grads = jax.lax.with_sharding_constraint(grads, shardings)
            merged = {name: merged[name].merge(metric) for name, metric in more[1].items()}
            return jax.tree.map(jnp.add, (loss, grads), more[0]), merged

        rank = groups.ranks(named(key, "rank"), size, parts)
        batch = batch | jax.lax.with_sharding_constraint(stage.draw(key, rank), sharding(0))
        result, index = None, 0
        for run, items in zip(runs, groups.cut(batch, rank, runs, sharding)):
            one = functools.partial(gradients, run)
            if run.calls == 1:
                found = one(index, items)
                result = found if result is None else add(result, found)
            else:
                items = index + jnp.arange(run.calls), items
                if result is None:
                    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], items))
                    # Every metric is a sum, so zeros are an empty one.
                    result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                result, _ = jax.lax.scan(lambda x, y: (add(x, one(*y)), None), result, items)
            index += run.calls
        (loss, grads), metrics = result
        grads = jax.lax.with_sharding_constraint(grads, shardings)
        norm = optax.tree.norm(grads)

        # A skipped step moves nothing: neither does the average, and its metrics do not count.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(
            jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads), state.opt_state, part
        )
        moved = optax.apply_updates(part, updates)
        update = state.step - state.skipped  # The optimizer's own count.
        share = jnp.where(finite, 1 - ema_decay(config.ema_decay, update), 0.0)
        average, last = clu_metrics.Average.from_model_output, clu_metrics.LastValue
        metrics = {"loss": average(loss), **metrics, "grad_norm": average(norm)}
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
        return TrainState(
            step=state.step + 1,
            params=overlay(state.params, moved),
            ema=overlay(state.ema, optax.incremental_update(moved, ema_part, share)),
            opt_state=opt_state,
        ), metrics | {
            "lr": last.from_model_output(schedule(update)),
            "skipped": last.from_model_output(opt_state.total_notfinite),
            "skipped_in_row": last.from_model_output(opt_state.notfinite_count),
        }

    return train_step


def ema_decay(most: float, update):
    """min(most, (1 + n) / (10 + n)) at update n: a short run forgets its random start."""
    n = jnp.asarray(update, jnp.float32)
    return jnp.minimum(most, (1 + n) / (10 + n))


def _check_params(params, expected):
    """Raises a ValueError that names every missing, extra and misshapen leaf."""
    given, wanted = (
        {path_string(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, expected)
    )
    given = {path: list(shape) for path, shape in given.items()}
    if found := storage.differences(given, wanted, words=("given", "needed")):
        raise ValueError("init_from does not fit this configuration:\n  " + "\n  ".join(found))
