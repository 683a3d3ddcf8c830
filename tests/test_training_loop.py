"""The loop: resuming is bitwise, it compiles once, signals save, the log has every step once."""

import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from test_training_state import ToyStage, equal, get_config, host

from flextok_jax import main
from flextok_jax.io.checkpoint import WorkdirError, restore_ema
from flextok_jax.training import loop, signals
from flextok_jax.training.logs import RunLog


def run(workdir, **changes):
    config = get_config(**changes)
    return loop.train(ToyStage(config), config, workdir)


def records(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_time(workdir):
    timed = ("step_time", "images_per_s")
    return [{k: v for k, v in r.items() if k not in timed} for r in records(workdir)]


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
    logged = records(workdir)
    assert [r["step"] for r in logged] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "by_half", "grad_norm", "lr", "skipped", "step_time", "images_per_s"}
    assert all(names <= r.keys() for r in logged)
    assert len(logged[0]["codes/mean"]) == 4 and logged[0]["codes/count"] == 8
    assert [r["step"] for r in logged if "eval/size/norm" in r] == [3, 6]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert list((workdir / "tb").glob("events*"))
    about = json.loads((workdir / "config.json").read_text())
    assert about["model"] == {"kind": "toy"} and about["config"]["optim"]["b2"] == 0.99


def test_the_step_is_traced_and_compiled_once(whole, tmp_path):
    compiled = [name for name in whole[2] if "train_step" in name]
    assert len(compiled) == 1
    config = get_config()
    stage = ToyStage(config)
    loop.train(stage, config, tmp_path)
    assert stage.traces == 1


def test_resuming_is_bitwise(whole, tmp_path):
    run(tmp_path, total_steps=6, eval_every=3)  # The schedule depends on total_steps: keep it,
    shutil.rmtree(tmp_path / "checkpoints" / "6")  # and go back by losing the newest checkpoint.
    outcome = run(tmp_path, total_steps=6, eval_every=3)
    assert equal(host(outcome.state), host(whole[1].state))
    assert without_time(tmp_path) == without_time(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_continues_bitwise(number, whole, tmp_path, monkeypatch):
    pipeline = loop.make_pipeline

    class Killing:
        """Sends the signal while the batch of step 2 is fetched."""

        def __init__(self, *args, **kwargs):
            self.inner = pipeline(*args, **kwargs)

        def iterate(self, start):
            for step, batch in enumerate(self.inner.iterate(start), start + 1):
                if step == 2:
                    os.kill(os.getpid(), number)
                yield batch

    monkeypatch.setattr(loop, "make_pipeline", Killing)
    handler = signal.getsignal(number)
    outcome = run(tmp_path, eval_every=3)
    assert outcome.stopped == number and int(outcome.state.step) == 2
    assert signal.getsignal(number) is handler
    assert restore_ema(tmp_path)[2] == 2
    monkeypatch.undo()
    outcome = run(tmp_path, eval_every=3)
    assert equal(host(outcome.state), host(whole[1].state))
    assert without_time(tmp_path) == without_time(whole[0])


def test_records_beyond_the_checkpoint_are_replaced(whole, tmp_path):
    run(tmp_path, eval_every=3)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    run(tmp_path, eval_every=3)
    assert without_time(tmp_path) == without_time(whole[0])


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path):
    run(tmp_path, total_steps=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    run(tmp_path, total_steps=3)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert records(tmp_path)[-1].keys() == {"step", "eval/size/norm"}
    before = (tmp_path / "metrics.jsonl").read_text()
    outcome = run(tmp_path, total_steps=3)  # Once more: nothing is left to do.
    assert int(outcome.state.step) == 3 and (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_cut_off_in_its_evaluation_loses_no_record(whole, tmp_path, monkeypatch):
    def cut_off(self):
        def fail(*args):
            raise InterruptedError
            yield

        return {"size": fail}

    monkeypatch.setattr(ToyStage, "evaluators", cut_off)
    for _ in range(2):  # In the loop, and when the evaluation is to be made up for.
        with pytest.raises(InterruptedError):
            run(tmp_path, eval_every=3)
        assert restore_ema(tmp_path)[2] == 3
        assert [(r["step"], "loss" in r) for r in records(tmp_path)] == [
            (i, True) for i in (1, 2, 3)
        ]
    monkeypatch.undo()
    run(tmp_path, eval_every=3)
    assert without_time(tmp_path) == without_time(whole[0])


def test_a_damaged_description_is_named_with_the_remedy(whole, tmp_path):
    run(tmp_path, eval_every=3)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    for text in ("", "{}", '{"model": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WorkdirError, match="config.json is damaged .*remove it"):
            run(tmp_path, eval_every=3)
    (tmp_path / "config.json").unlink()
    run(tmp_path, eval_every=3)
    assert without_time(tmp_path) == without_time(whole[0])


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path):
    with RunLog(tmp_path, 0, 3) as log:
        log.add(1, {"loss": 1.0})
        log.flush()
        (tmp_path / "metrics.jsonl").rename(tmp_path / "old.jsonl")
        for name in ("loss", "eval/psnr"):
            log.add(2, {name: 2.0})
            log.flush()
    assert records(tmp_path) == [{"step": 2, "loss": 2.0, "eval/psnr": 2.0}]


def test_metrics_are_averaged_between_records(whole, tmp_path):
    run(tmp_path, log_every=2)
    each, pairs = records(whole[0]), records(tmp_path)
    assert [r["step"] for r in pairs] == [2, 3, 4, 6]  # 3 is saved, so it is logged.
    np.testing.assert_allclose(pairs[0]["loss"], (each[0]["loss"] + each[1]["loss"]) / 2, 1e-6)
    assert pairs[0]["lr"] == each[1]["lr"]


def test_another_configuration_leaves_the_workdir_as_it_was(whole):
    workdir = whole[0]
    before = (workdir / "config.json").read_text(), (workdir / "metrics.jsonl").read_text()
    with pytest.raises(WorkdirError, match="seed: 3 in the workdir, 4 now"):
        run(workdir, seed=4)
    assert before == (
        (workdir / "config.json").read_text(),
        (workdir / "metrics.jsonl").read_text(),
    )


def test_an_attention_that_these_devices_do_not_have_is_refused(tmp_path):
    config = get_config()
    config.compute = {"attention": "pallas"}
    with pytest.raises(ValueError, match="'pallas' is for TPUs; these devices are 'cpu'"):
        loop.train(ToyStage(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_gives_the_parameters_of_a_new_run_only(tmp_path):
    config = get_config(init_from="11", total_steps=1, optim__lr=0.0)
    params = ToyStage(config).init_from("11")
    outcome = run(tmp_path, init_from="11", total_steps=1, optim__lr=0.0)
    assert equal(host(outcome.state.params), params)
    with pytest.raises(ValueError, match="missing decoder/head/bias"):
        run(tmp_path / "other", init_from="13")


def test_start_up_says_what_it_does_and_what_the_parameters_are(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="flextok_jax"):
        run(tmp_path, total_steps=1)
        run(tmp_path, total_steps=2)
    assert "starting from step 0" in caplog.text and "continuing from step 1" in caplog.text
    assert "encoder/patch_emb/kernel" in caplog.text and "Total: " in caplog.text


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of optim.accumulate=3"):
        run(tmp_path, optim__accumulate=3)


@pytest.mark.parametrize(
    "name, value",
    [
        ("checkpoint.keep", 0),
        ("checkpoint.keep", -1),
        ("checkpoint.every", -1),
        ("log_every", 0),
        ("eval_every", -1),
        ("batch_size", 0),
        ("optim.accumulate", 0),
        ("max_skipped_in_row", 0),
        ("evaluation.num_images", -1),
        ("evaluation.num_latents", 0),
        ("evaluation.batch_size", 0),
        ("evaluation.steps", 0),
    ],
)
def test_a_number_that_is_too_small_is_refused_before_anything_is_made(name, value, tmp_path):
    config = get_config()
    config.evaluation = dict(num_images=8, num_latents=8, batch_size=8, steps=2)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=f"^{name}={value}: at least [01] is needed"):
        loop.train(ToyStage(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_works_outside_the_main_thread(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(tmp_path, total_steps=1)))
    thread.start()
    thread.join()
    assert outcomes[0].stopped is None


def test_unknown_stage_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="stage='nope': allowed are .*tokenizer"):
        main.make_stage(get_config(stage="nope"))


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
    assert restore_ema(tmp_path)[2] == records(tmp_path)[-1]["step"] >= 5
    last = records(tmp_path)[-1]["step"]
    run(tmp_path, total_steps=last + 2)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, last + 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=x", "--config.optim.learning=1"], "no key .*learning"),
        (["--config.seed=1"], "flag --workdir"),
        (["--workdir=x", "--config.checkpoint.keep=0"], "^error: checkpoint.keep=0: at least 1"),
        (["--workdir=x", "--config.mesh.data=3"], "^error: mesh data=3, .* does not fit"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, message):
    config = f"--config={pathlib.Path(__file__).with_name('test_training_state.py')}"
    process = command(config, *arguments)
    output = process.communicate()[1]
    assert re.search(message, output, re.M) and process.returncode == 1
    assert "Traceback" not in output
