"""The memory of a step: closed forms of small programs, and runs that would not fit."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from test_training_state import ToyStage, get_config

from flextok_jax.parallel import sharding
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training import loop, memory

N = 4 * 1000  # bytes of a row
MESH = make_mesh(1, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "function, rows",
    [
        (lambda x: jnp.exp(jnp.sin(x)), 2),  # one is made from the other
        (lambda x: jnp.exp(jnp.sin(jnp.cos(x))), 2),  # the first is gone when the third is made
        (lambda x: jnp.exp(x) + jnp.sin(x) * jnp.cos(x), 4),  # three, and their product
        (jax.jit(lambda x: jnp.exp(jnp.sin(x))), 2),  # a call's result counts once
        (lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=5)[1], 7),
    ],
)
def test_the_peak_of_a_program_counts_what_is_alive(function, rows):
    jaxpr = jax.make_jaxpr(function)(jnp.zeros(1000)).jaxpr
    assert memory.peak(jaxpr) == rows * N


def test_a_gradient_keeps_what_the_backward_pass_needs():
    def loss(x, depth):
        for _ in range(depth):
            x = jnp.sin(x)
        return x.sum()

    peaks = [
        memory.peak(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(jnp.zeros(1000), depth).jaxpr)
        for depth in (10, 20)
    ]
    assert peaks[1] - peaks[0] == 10 * N


def test_a_run_that_does_not_fit_is_refused_before_it_is_compiled(tmp_path, monkeypatch, caplog):
    config = get_config()
    kept = run_with(100, config, tmp_path / "model", monkeypatch)  # Not even the model fits.
    assert not (tmp_path / "model" / "config.json").exists()  # Nothing was made of it.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled"))
    run_with(kept + 10, config, tmp_path / "step", monkeypatch)


@pytest.mark.parametrize("there, refused", [(200, False), (160, False), (150, True)])
def test_a_step_is_refused_where_it_needs_clearly_more(monkeypatch, caplog, there, refused):
    """The estimate of these steps, 200 bytes, may be a quarter too high."""
    monkeypatch.setattr(memory, "available", lambda: there)
    shapes = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.NamedSharding(MESH, jax.P()))
    jaxpr = jax.make_jaxpr(jnp.sin)(jnp.zeros(49))
    with pytest.raises(memory.OutOfMemory) if refused else contextlib.nullcontext():
        memory.check(shapes, MESH, jaxpr)
    assert bool(caplog.records) == (there == 160)


def run_with(there, config, workdir, monkeypatch):
    """Runs with so many bytes of memory; the bytes of the state."""
    states = []

    def check(shapes, mesh, jaxpr=None):
        states.append(sum(map(sharding.local_bytes, jax.tree.leaves(shapes))))
        return plain(shapes, mesh, jaxpr)

    plain = memory.check
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda: there)
        patch.setattr(memory, "check", check)
        with pytest.raises(memory.OutOfMemory, match="needs about .*batch_size"):
            loop.train(ToyStage(config), config, workdir)
    return states[0]


def test_xla_s_lack_of_memory_is_explained():
    with pytest.raises(memory.OutOfMemory, match="out of memory: .*GB. Set a smaller batch_size"):
        with memory.explained():
            jnp.zeros((2**30, 2**20), jnp.uint8).block_until_ready()
    with pytest.raises(ZeroDivisionError), memory.explained():
        _ = 1 / 0
