"""A loss or gradient that is not finite: the step is named; too many in a row end the run, safely.

Also `config.profile`, which records steps.
"""

import json
import logging
import shutil
import types

import jax.numpy as jnp
import pytest
from test_training_state import ToyStage, equal, get_config, host

from flextok_jax import config_flag, main
from flextok_jax.io.checkpoint import Checkpoints, json_config
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training import loop
from flextok_jax.training.skips import Diverged
from flextok_jax.training.state import build


class Faulty(ToyStage):
    """The loss of the steps in `bad` is not a number."""

    bad = ()

    def loss(self, params, frozen, batch, key, step):
        loss, logged = super().loss(params, frozen, batch, key, step)
        return jnp.where(jnp.isin(step + 1, jnp.array(self.bad, int)), jnp.nan, loss), logged


def run(workdir, bad=(), **changes):
    config = get_config(**changes)
    stage = Faulty(config)
    stage.bad = bad
    return loop.train(stage, config, workdir)


def saved(workdir, **changes):
    """The newest checkpoint."""
    config = get_config(**changes)
    shapes = build(ToyStage(config), config, make_mesh(**config.mesh)).shapes
    with Checkpoints(workdir, json_config(config)) as checkpoints:
        return checkpoints.restore(shapes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the state after 2 steps, and after 6) of a run without faults."""
    workdir = tmp_path_factory.mktemp("whole")
    shorter = host(run(workdir / "short", total_steps=6, checkpoint__every=2).state)
    for step in ("4", "6"):
        shutil.rmtree(workdir / "short" / "checkpoints" / step)
    return host(saved(workdir / "short", checkpoint__every=2)), shorter


def test_each_skipped_step_is_named_also_the_last(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = run(tmp_path, bad=(3, 6))
    assert int(outcome.state.skipped) == 2
    named = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert [line.split(":")[0] for line in named] == ["step 3 skipped", "step 6 skipped"]
    assert "its loss is nan (1 in a row of at most 20, 2 in all)" in named[1]


def test_the_averages_of_a_record_are_those_of_the_steps_that_were_not_skipped(tmp_path):
    def records(log_every):
        workdir = tmp_path / str(log_every)
        run(workdir, bad=(1, 4, 5, 6), log_every=log_every, checkpoint__every=0)
        return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    each, pairs = records(1), records(2)
    assert [r["skipped"] for r in pairs] == [1, 2, 4]
    names = ["loss", "grad_norm", "by_half", "codes/mean", "codes/count"]
    for pair, good in zip(pairs, (each[1], each[2])):
        assert [pair[name] for name in names] == [good[name] for name in names]
    assert pairs[2]["loss"] is None  # There is nothing to average.


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good_state(tmp_path, whole):
    changes = dict(max_skipped_in_row=3, checkpoint__every=0)
    with pytest.raises(Diverged, match="steps 3 to .* state after step 2.*kept in checkpoint 2"):
        run(tmp_path, bad=(3, 4, 5, 6), **changes)
    assert equal(host(saved(tmp_path)), whole[0])
    with pytest.raises(Diverged, match="checkpoint 2"):  # Starting again does not cure it,
        run(tmp_path, bad=(3, 4, 5, 6), **changes)
    outcome = run(tmp_path, **changes)  # but what is kept can be trained further.
    assert equal(host(outcome.state), whole[1])


def test_checkpoints_made_in_between_keep_the_same_parameters(tmp_path, whole):
    with pytest.raises(Diverged, match="steps 3 to 6 .*step 2.*kept in checkpoint 4"):
        run(tmp_path, bad=(3, 4, 5, 6, 7), max_skipped_in_row=3, checkpoint__every=2)
    state = host(saved(tmp_path))
    assert (state.step, state.skipped) == (4, 2) and equal(state.params, whole[0].params)


def test_as_many_as_allowed_are_survived(tmp_path):
    outcome = run(tmp_path, bad=(1, 2, 4, 5), max_skipped_in_row=3)
    assert (int(outcome.state.step), int(outcome.state.skipped)) == (6, 4)


def test_profile_records_the_steps_it_names_and_not_those_of_the_past(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="flextok_jax"):
        run(tmp_path, total_steps=4, profile="2:3")
    assert f"recorded steps 2 to 3 in {tmp_path / 'profile'}" in caplog.text
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    caplog.clear()
    run(tmp_path, total_steps=5, profile="1:4")  # Another value does not make another run.
    assert "profile=1:4: nothing is recorded after step 4" in caplog.text
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")) == [trace]


def test_the_command_ends_with_the_error_and_not_as_if_preempted(monkeypatch, tmp_path):
    def diverge(*_):
        raise Diverged("steps 3 to 5 were all skipped")

    monkeypatch.setattr(loop, "train", diverge)
    monkeypatch.setitem(main.STAGES, "toy", "test_training_state:ToyStage")
    values = dict.fromkeys(("_COORDINATOR", "_NUM_PROCESSES", "_PROCESS_ID"))
    for name, value in (values | dict(_WORKDIR=tmp_path)).items():
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(config_flag, "CONFIG", types.SimpleNamespace(value=get_config()))
    with pytest.raises(SystemExit, match="^error: steps 3 to 5"):  # A text makes it exit code 1.
        main.main(["main"])
    monkeypatch.setattr(loop, "train", lambda *_: int("a bug, not a wrong number"))
    with pytest.raises(ValueError, match="a bug"):  # Its trace is wanted.
        main.main(["main"])


@pytest.mark.parametrize(
    "text, message",
    [("7", "A:B is needed"), ("0:2", "1 <= A"), ("3:2", "A <= B"), ("2:7", "total_steps=6")],
)
def test_a_profile_of_no_steps_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=f"profile='{text}': .*{message}"):
        run(tmp_path, profile=text)
