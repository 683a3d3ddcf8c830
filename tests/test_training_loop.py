"""The loop: resuming is bitwise, it compiles once, whatever ends a run saves; settings."""

import json
import logging
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_state import ToyStage, equal, get_config, host

from flextok_jax import cli, main
from flextok_jax.io.checkpoint import WorkdirError, restore_ema
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training import checks, loop, optimizer, signals, workdirs


class Faulty(ToyStage):
    """The loss of the steps in `bad` is not a number."""

    bad = ()

    def loss(self, params, frozen, batch, key, step):
        loss, logged = super().loss(params, frozen, batch, key, step)
        return jnp.where(jnp.isin(step + 1, jnp.array(self.bad, int)), jnp.nan, loss), logged


def run(workdir, bad=(), **changes):
    config = get_config(**changes)
    stage = Faulty(config) if bad else ToyStage(config)
    stage.bad = bad
    return loop.train(stage, config, workdir)


def records(workdir):
    """The records, without what depends on times, and on where a run was saved."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    timed = ("step_time", "images_per_s", "bias")  # "bias": where it was saved.
    return [
        {k: v for k, v in record.items() if k not in timed} for record in map(json.loads, lines)
    ]


def steps(workdir, name="loss"):
    """The steps whose record has `name`."""
    return [r["step"] for r in records(workdir) if name in r]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing stopped: (workdir, outcome, its compilations)."""
    workdir = tmp_path_factory.mktemp("whole")
    compiled = []

    def listen(event, duration, fun_name="", **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    outcome = run(workdir, eval_every=3)
    jax.monitoring.unregister_event_duration_listener(listen)
    return workdir, outcome, compiled


def test_a_run_finishes_and_reports(whole):
    workdir, outcome, _ = whole
    assert outcome.stopped is None and int(outcome.state.step) == 6
    assert steps(workdir) == [1, 2, 3, 4, 5, 6] and steps(workdir, "eval/size/norm") == [3, 6]
    logged = [r for r in records(workdir) if "loss" in r]
    assert all({"loss", "by_half", "grad_norm", "lr", "skipped"} <= r.keys() for r in logged)
    assert len(logged[0]["codes/mean"]) == 4 and logged[0]["codes/count"] == 8
    assert "images_per_s" in (workdir / "metrics.jsonl").read_text()
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert list((workdir / "tb").glob("events*"))
    info = json.loads((workdir / "config.json").read_text())
    assert info["model"]["kind"] == "toy" and info["config"]["optim"]["b2"] == 0.99


def test_the_step_is_traced_and_compiled_once(whole, tmp_path):
    compiled = [name for name in whole[2] if "train_step" in name]
    assert len(compiled) == 1
    config = get_config()
    stage = ToyStage(config)
    loop.train(stage, config, tmp_path)
    assert stage.traces == 1


def test_resuming_is_bitwise_and_replaces_later_records(whole, tmp_path):
    run(tmp_path, eval_every=3)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    outcome = run(tmp_path, eval_every=3)
    assert equal(host(outcome.state), host(whole[1].state))
    assert records(tmp_path) == records(whole[0])


class Failing:
    """A pipeline that fails, or does something else, while the batch of `step` is fetched."""

    def __init__(self, monkeypatch, step, act):
        self.step, self.act, self.inner = step, act, loop.make_pipeline
        monkeypatch.setattr(loop, "make_pipeline", self)

    def __call__(self, *args, **kwargs):
        self.pipeline = self.inner(*args, **kwargs)
        return self

    def iterate(self, start):
        for step, batch in enumerate(self.pipeline.iterate(start), start + 1):
            if step == self.step:
                self.act()
            yield batch

    def __getattr__(self, name):
        return getattr(self.pipeline, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_continues_bitwise(number, whole, tmp_path, monkeypatch):
    Failing(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    outcome = run(tmp_path, eval_every=3)
    assert outcome.stopped == number and int(outcome.state.step) == 2
    assert signal.getsignal(number) is handler
    assert restore_ema(tmp_path)[2] == 2
    monkeypatch.undo()
    outcome = run(tmp_path, eval_every=3)
    assert equal(host(outcome.state), host(whole[1].state))
    assert records(tmp_path) == records(whole[0])


def test_a_run_goes_on_with_the_same_data_only_wherever_they_lie(tmp_path):
    config = get_config(total_steps=1)
    shutil.copytree(config.data.path, tmp_path / "data")
    config.data.path = str(tmp_path / "data")
    loop.train(ToyStage(config), config, tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    config.data.path, config.total_steps = str(tmp_path / "moved"), 2
    outcome = loop.train(ToyStage(config), config, tmp_path / "run")
    assert int(outcome.state.step) == 2
    found = restore_ema(tmp_path / "run")
    assert found.extra["bias"] == found.params["encoder"]["head"]["bias"][0]
    next((tmp_path / "moved").glob("train/*/*.png")).unlink()
    with pytest.raises(WorkdirError, match=found.extra["data"]):
        loop.train(ToyStage(config), config, tmp_path / "run")


def test_a_failure_of_the_data_saves_the_steps_before_it(whole, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("unreadable")

    Failing(monkeypatch, 6, fail)
    with pytest.raises(RuntimeError, match="unreadable"):
        run(tmp_path, eval_every=3)
    assert restore_ema(tmp_path)[2] == 5
    monkeypatch.undo()
    outcome = run(tmp_path, eval_every=3)
    assert equal(host(outcome.state), host(whole[1].state))


def test_a_failed_evaluation_loses_nothing(whole, tmp_path, monkeypatch):
    def cut_off(self):
        def fail(*args):
            raise InterruptedError
            yield

        return {"size": fail}

    monkeypatch.setattr(ToyStage, "evaluators", cut_off)
    with pytest.raises(InterruptedError):
        run(tmp_path, eval_every=3)
    assert restore_ema(tmp_path)[2] == 3 and steps(tmp_path) == [1, 2, 3]


def test_two_runs_cannot_share_a_workdir(tmp_path):
    with workdirs.locked(tmp_path):
        with pytest.raises(WorkdirError, match=str(tmp_path)):
            run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    run(tmp_path, total_steps=1)


def test_metrics_are_averaged_between_records(whole, tmp_path):
    run(tmp_path, log_every=3, checkpoint__every=4)
    assert steps(tmp_path) == [1, 3, 4, 6]  # The first loss comes at once; what is saved is logged.
    each, found = ([r for r in records(d) if "loss" in r] for d in (whole[0], tmp_path))
    np.testing.assert_allclose(found[1]["loss"], (each[1]["loss"] + each[2]["loss"]) / 2, 1e-5)
    assert found[1]["lr"] == each[2]["lr"]


def test_a_folder_of_others_is_no_workdir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WorkdirError, match="config.json"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_another_configuration_leaves_the_workdir_as_it_was(whole):
    workdir = whole[0]
    before = (workdir / "config.json").read_text(), (workdir / "metrics.jsonl").read_text()
    with pytest.raises(WorkdirError, match="seed: 3 .*4 now"):
        run(workdir, seed=4)
    assert before == (
        (workdir / "config.json").read_text(),
        (workdir / "metrics.jsonl").read_text(),
    )


def test_init_from_gives_the_parameters_of_a_new_run_only(tmp_path):
    params = ToyStage(get_config()).init_from("11")
    outcome = run(tmp_path, init_from="11", total_steps=0)
    assert equal(host(outcome.state.params), params)
    with pytest.raises(ValueError, match="decoder/head/bias"):
        run(tmp_path / "other", init_from="13")


def test_another_total_is_said_with_its_learning_rates(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="flextok_jax"):
        run(tmp_path, total_steps=1)
        run(tmp_path, total_steps=2)
    assert "encoder/patch_emb/kernel" in caplog.text
    rates = [optimizer.lr_schedule(get_config(total_steps=total))(1) for total in (1, 2)]
    assert all(f"{rate:.3g}" in caplog.text for rate in rates)  # They differ.


# Steps without a finite loss.


def test_each_skipped_step_is_named_once_also_the_last(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = run(tmp_path, bad=(1, 4, 5, 6), log_every=2, checkpoint__every=0)
    assert int(outcome.state.skipped) == 4
    named = [r.getMessage() for r in caplog.records]  # Nothing else is said of them.
    assert [int(re.match(r"step (\d+) ", line)[1]) for line in named] == [1, 4, 5, 6]
    found = {r["step"]: r for r in records(tmp_path) if "loss" in r}
    assert [found[step]["skipped"] for step in (1, 2, 4, 6)] == [1, 1, 2, 4]
    assert found[6]["loss"] is None and found[6]["by_half"] is None  # Nothing to average.
    assert found[4]["loss"] > 0  # Of step 3 alone.


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_keep_the_last_good_state(tmp_path):
    good = run(tmp_path / "good", total_steps=6, checkpoint__every=2)
    shutil.rmtree(tmp_path / "good" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "good" / "checkpoints" / "6")
    options = dict(max_skipped_in_row=3, checkpoint__every=0)
    with pytest.raises(loop.Diverged, match="3 to 5 .*max_skipped_in_row=3"):
        run(tmp_path / "bad", bad=(3, 4, 5, 6, 7), total_steps=6, **options)
    before, after = (restore_ema(tmp_path / name)[0] for name in ("good", "bad"))
    assert equal(before, after) and int(good.state.skipped) == 0
    outcome = run(tmp_path / "bad", total_steps=9, **options)  # It can be trained further.
    assert int(outcome.state.step) == 9
    outcome = run(tmp_path / "others", bad=(1, 2, 4, 5), **options)  # As many as allowed.
    assert (int(outcome.state.step), int(outcome.state.skipped)) == (6, 4)


@pytest.mark.slow
def test_profile_records_the_steps_it_names_and_not_those_of_the_past(tmp_path):
    run(tmp_path, total_steps=4, profile="2:3")
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    run(tmp_path, total_steps=5, profile="1:4")  # Another value does not make another run.
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")) == [trace]


# Settings.


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("checkpoint.every", -1),
        ("checkpoint.keep", 0),
        ("ema_decay", 1.0),
        ("data.paired", True),
        ("ema_decay", math.nan),
        ("evaluation.batch_size", 0),
        ("log_every", 0),
        ("max_skipped_in_row", 0),
        ("model.guidance_scale", math.inf),
        ("model.guidance_scale", -2.0),
        ("model.block_out", (8, 0)),
        ("optim.accumulate", 3),
        ("optim.b1", 1.0),
        ("optim.final_lr_fraction", 5.0),
        ("optim.grad_clip", 0.0),
        ("optim.eps", 0.0),
        ("optim.groups.d.lr", math.nan),
        ("optim.lr", -1.0),
        ("optim.mu_dtype", "half"),
        ("optim.rule", "sgd"),
        ("optim.warmup_steps", -1),
        ("profile", "0:2"),
        ("profile", "2:7"),
        ("profile", "7"),
        ("repa.book", True),
        ("repa.weight", -1.0),
        ("seed", -1),
        ("time_shift", 0.0),
        ("vae.scaling_factor", -1.0),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_before_anything_is_made(name, value, tmp_path):
    config = get_config()
    config.update(
        dict(
            time_shift=1.0,
            evaluation=dict(num_latents=8),
            model=dict(guidance_scale=1.0, block_out=(8, 8)),
            repa=dict(weight=0.0, book=False),
            data=dict(paired=False),
            vae=dict(scaling_factor=1.0),
        )
    )
    config.optim.groups, config.optim.warmup_steps = dict(d=dict(lr=0.1)), 0
    config.optim.rule, config.optim.mu_dtype = "adam", "float32"
    checks.check_config(config, make_mesh(**config.mesh))
    config.update_from_flattened_dict({name: value})
    with pytest.raises(loop.SettingsError, match=f"{name}="):
        loop.train(ToyStage(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_warm_up_longer_than_the_run_is_a_warning(tmp_path, caplog):
    run(tmp_path, total_steps=1, optim__warmup_steps=7)
    assert "warmup_steps=7" in caplog.text


def test_unknown_stage_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="stage='nope': allowed are .*tokenizer"):
        main.make_stage(get_config(stage="nope"))


def test_what_comes_after_training_is_a_command(tmp_path):
    assert set(main.NEXT) == set(main.STAGES)
    for stage in ("tokenizer", "ar"):
        words = main.NEXT[stage].format(tmp_path).partition(" (")[0].split()
        assert words[0] == "flextok" and str(tmp_path) in words
        cli.parse(words[1], words[2:])


COMMAND = """
from flextok_jax import main
main.STAGES["toy"] = "test_training_state:ToyStage"
main.run()
"""


def command(*arguments):
    here = pathlib.Path(__file__).resolve()
    paths = os.pathsep.join([str(here.parent), str(here.parent.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_sigterm_ends_the_command_with_its_own_exit_code(tmp_path):
    config = f"--config={pathlib.Path(__file__).with_name('test_training_state.py')}"
    process = command(config, f"--workdir={tmp_path}", "--config.total_steps=1000000")
    for line in process.stderr:
        if "step 5/" in line:
            process.terminate()
            break
    rest = process.stderr.read()
    assert process.wait() == signals.PREEMPTED, rest
    assert "stopped by SIGTERM" in rest
    last = steps(tmp_path)[-1]
    assert restore_ema(tmp_path)[2] == last >= 5
    said = json.loads((tmp_path / "config.json").read_text())["command"]
    options = f"{config} --workdir={tmp_path} --config.total_steps=1000000"
    assert said == f"python -m flextok_jax.main {options}"
    run(tmp_path, total_steps=last + 2)
    assert steps(tmp_path) == list(range(1, last + 3))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["", "parameters:", "compiled the step"])
def test_ctrl_c_ends_the_command_at_any_time(when, tmp_path):
    config = f"--config={pathlib.Path(__file__).with_name('test_training_state.py')}"
    process = command(config, f"--workdir={tmp_path}", "--config.total_steps=1000000")
    if when:
        next(line for line in process.stderr if when in line)
    else:
        time.sleep(1)  # It imports.
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[1]
    # Before the first step at once; after it the step is saved.
    assert process.returncode in (-signal.SIGINT, 130, 0), output
    assert not (when and "Traceback" in output)
    if process.returncode == 0:
        assert restore_ema(tmp_path).step >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=x", "--config.optim.learning=1"], "no key .*learning"),
        (["--config.seed=1"], "flag --workdir"),
        (["--workdir=x", "--config.checkpoint.keep=0"], "^error: checkpoint.keep=0"),
        (["--workdir=x", "--config.mesh.data=3"], "^error: mesh data=3, .* does not fit"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, message):
    config = f"--config={pathlib.Path(__file__).with_name('test_training_state.py')}"
    process = command(config, *arguments)
    output = process.communicate()[1]
    assert re.search(message, output, re.M) and process.returncode == 1
    assert "Traceback" not in output
