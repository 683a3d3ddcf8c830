"""The launch scripts, against fakes of gcloud and Slurm that refuse what is not documented."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from common import ROOT

yaml = pytest.importorskip("yaml")
# The dev extra puts it beside the interpreter, which need not be on PATH.
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)

FAKES = ROOT / "tests" / "fakes"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONFIG, WORKDIR = "--config=configs/tokenizer.py:digits", "--workdir=/gcs/b/runs/x"
TRAIN = [CONFIG, WORKDIR, "--config.data.path=a b"]
LIMIT = 600  # seconds: whoever takes longer hangs, however slow the machine
SLICE = ["--name=t", "--zone=z", "--accelerator=v5litepod-8", "--runtime=r", "--bucket=b"]


@pytest.fixture
def launch(tmp_path):
    """launch(script, *arguments, **environment) -> (exit code, output); state in launch.fake."""
    fake, bin_, venv = tmp_path / "fake", tmp_path / "bin", tmp_path / "venv"
    shutil.copytree(FAKES, bin_)
    for folder in (fake, venv / "bin"):
        folder.mkdir(parents=True)
    shutil.copytree(ROOT / "launch", tmp_path / "src" / "launch")  # .cache is made beside it
    for name in ("flextok_jax", "configs", "examples"):
        (tmp_path / "src" / name).mkdir()
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "src")
    shutil.move(bin_ / "python", venv / "bin" / "python")
    for path in (*bin_.iterdir(), venv / "bin" / "python"):
        path.chmod(0o755)
    shutil.copy(venv / "bin" / "python", venv / "bin" / "flextok")
    checksum = subprocess.check_output(["cksum", "setup.py"], cwd=ROOT, text=True).strip()

    def environment(extra="train,tpu", **variables):
        (venv / ".installed").write_text(f"{checksum} {extra}\n")  # as if just installed
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "SLURM", "JAX"))}
        return clean | {
            "PATH": f"{bin_}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAKE": str(fake),
            "VENV": str(venv),
            "TPU_POLL": "0.05",
            "TRAINING": " ".join(TRAIN),
            **variables,
        }  # fmt: skip

    def command(script, *arguments):
        return [str(tmp_path / "src" / "launch" / script), *arguments]

    def run(script, *arguments, **variables):
        done = subprocess.run(
            command(script, *arguments),
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        return done.returncode, done.stdout

    def calls():
        return [json.loads(line) for line in (fake / "calls").read_text().splitlines()]

    run.fake, run.calls, run.environment, run.command = fake, calls, environment, command
    yield run
    (fake / "over").touch()
    for group in fake.glob("workers/*/flextok-run/group"):
        try:
            os.killpg(int(group.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_for(file):
    deadline = time.time() + LIMIT
    while not file.exists():
        assert time.time() < deadline, file
        time.sleep(0.05)


def attempts(launch):
    return sorted((launch.fake / "attempts").read_text().splitlines())


def test_a_run_from_nothing_to_the_end(launch):
    code, out = launch("tpu.sh", "run", *SLICE, "--spot", "--", *TRAIN)
    assert code == 0, out
    made = launch.calls()[1]  # after a look whether it is there already
    assert made[0] == "create" and {"--spot", "--node-id=t", "--zone=z"} <= set(made)
    assert attempts(launch) == ["attempt of 0 from step 0", "attempt of 1 from step 0"]
    assert (launch.fake / "mounts").read_text() == "b /gcs/b\n" * 2
    assert "delete" not in [call[0] for call in launch.calls()]
    # The other commands know the rest by the name, also when it was created once more.
    assert launch("tpu.sh", "create", *SLICE[:4])[0] == 0
    code, out = launch("tpu.sh", "status", "--name=t")
    assert code == 0 and "ACTIVE" in out and len(re.findall("exit:0", out)) == 2, out
    code, out = launch("tpu.sh", "logs", "--name=t", "--worker=1", "--lines=2")
    assert code == 0 and out == "step 5/6\nstep 6/6\n"
    code, out = launch("tpu.sh", "resume", "--name=t")
    assert code == 0 and "training: done" in out, out
    code, out = launch("tpu.sh", "delete", "--name=t")
    assert code == 0 and not (launch.fake / "state").exists()


def test_a_preempted_slice_is_replaced_and_the_run_continues(launch):
    code, out = launch("tpu.sh", "run", *SLICE, "--spot", "--", *TRAIN, PLAY="preemption")
    assert code == 0, out
    kinds = [call[0] for call in launch.calls()]
    assert kinds.count("create") == 2 and kinds.count("delete") == 1 and kinds.count("scp") == 2
    first, second = (call for call in launch.calls() if call[0] == "create")
    assert first == second
    assert {"attempt of 0 from step 0", "attempt of 0 from step 3"} <= set(attempts(launch))
    assert (launch.fake / "bucket" / "step.0").read_text() == "6\n"
    assert "preempted" in out and "fault" not in out


def test_exit_143_means_start_again_without_a_new_slice(launch):
    code, out = launch("tpu.sh", "run", *SLICE, "--", *TRAIN, PLAY="notice")
    assert code == 0, out
    kinds = [call[0] for call in launch.calls()]
    assert kinds.count("create") == 1 and kinds.count("scp") == 1
    again = [f"attempt of {i} from step {s}" for i in (0, 1) for s in (0, 3)]
    assert attempts(launch) == again
    assert "fault" not in out


def test_faults_are_retried_and_then_given_up(launch):
    code, out = launch("tpu.sh", "run", *SLICE, "--", *TRAIN, PLAY="fault")
    assert code == 0 and "fault 1 of 3" in out and "fault 2" not in out, out
    assert "step 3/6" in out  # the end of the log is shown


def test_a_fault_without_end_is_given_up(launch):
    code, out = launch("tpu.sh", "run", *SLICE, "--retries=2", "--", *TRAIN, PLAY="always")
    assert code == 1 and "fault 3 of 2" in out and "given up" in out, out
    assert attempts(launch).count("attempt of 0 from step 6") == 2


def test_a_run_that_lost_its_supervision_is_resumed_not_doubled(launch):
    supervised = subprocess.Popen(
        launch.command("tpu.sh", "run", *SLICE, "--", *TRAIN),
        env=launch.environment(PLAY="hang"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(launch.fake / "played.1")
    os.killpg(supervised.pid, signal.SIGKILL)
    supervised.wait()
    code, out = launch("tpu.sh", "status", "--name=t")
    assert len(re.findall("running", out)) == 2, out
    code, out = launch("tpu.sh", "run", *SLICE, "--", *TRAIN)
    assert code == 2 and "resume --name=t" in out
    for group in launch.fake.glob("workers/*/flextok-run/group"):  # both hosts restart
        os.killpg(int(group.read_text()), signal.SIGKILL)
    code, out = launch("tpu.sh", "resume", "--name=t")
    assert code == 0, out
    assert attempts(launch) == [f"attempt of {i} from step {s}" for i in (0, 1) for s in (0, 3)]


def test_a_worker_runs_one_training_and_keeps_its_exit_code(launch, tmp_path):
    at = {"HOME": str(tmp_path / "home"), "PLAY": "hang", "WORKER": "0"}
    host = subprocess.check_output(["hostname"], text=True).strip()
    assert launch("worker.sh", "state", **at) == (0, f"flextok-worker {host} none\n")
    assert launch("worker.sh", "start", *TRAIN, **at) == (0, "")
    assert launch("worker.sh", "state", **at) == (0, f"flextok-worker {host} running\n")
    code, out = launch("worker.sh", "start", *TRAIN, **at)
    assert code == 1 and "a run is going on" in out
    wait_for(launch.fake / "played.0")
    assert launch("worker.sh", "stop", **at)[0] == 0
    assert launch("worker.sh", "state", **at) == (0, f"flextok-worker {host} exit:143\n")
    assert attempts(launch) == ["attempt of 0 from step 0"]


def test_looking_at_a_worker_disturbs_neither_other_looks_nor_a_start(launch, tmp_path):
    at = {"HOME": str(tmp_path / "home"), "WORKER": "0"}
    run = tmp_path / "home" / "flextok-run"
    run.mkdir(parents=True)
    (run / "exit").write_text("0\n")
    with open(run / "lock", "w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert launch("worker.sh", "state", **at)[1].endswith(" exit:0\n")
        start = subprocess.Popen(
            launch.command("worker.sh", "start", *TRAIN),
            env=launch.environment(**at),
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(0.5)  # Enough for it to come to the lock; if not, it waits for nothing.
    assert start.communicate()[1] == "" and start.returncode == 0


def test_several_slices_are_one_request_and_every_host_of_each_trains(launch):
    code, out = launch("tpu.sh", "run", *SLICE, "--slices=2", "--", *TRAIN)
    assert code == 0, out
    made = next(call for call in launch.calls() if call[0] == "create")
    assert {"--node-count=2", "--node-prefix=t"} <= set(made)
    assert len(attempts(launch)) == 4


def test_a_dry_run_prints_every_command_and_calls_none(launch):
    flags = ["--project=p", "--create-flags=--network=n --reserved", "--ssh-flags=--internal-ip"]
    code, out = launch("tpu.sh", "run", *SLICE, *flags, "--dry-run", "--", *TRAIN)
    assert code == 0 and not (launch.fake / "calls").exists()
    g, at = "gcloud compute tpus queued-resources", "--zone=z --project=p"
    everywhere = "--node=all --worker=all --internal-ip"
    create = (
        f"{g} create t --node-id=t --accelerator-type=v5litepod-8 --runtime-version=r "
        f"--network=n --reserved {at}"
    )
    lines = out.splitlines()
    assert lines.count(create) == 2
    assert f"{g} describe t '--format=value(state.state)' {at}" in lines
    assert f"{g} delete t --force --quiet {at}" in lines
    assert sum(line.startswith(f"{g} scp ") and everywhere in line for line in lines) == 2
    start = [line for line in lines if "worker.sh start" in line]
    assert len(start) == 2 and everywhere in start[0] and "a b" in start[0]
    for word in ("create", "setup", "status", "logs", "delete"):
        code, out = launch("tpu.sh", word, *SLICE, "--dry-run")
        assert code == 0 and out.startswith(g), out
    assert not (launch.fake / "calls").exists()
    assert launch("tpu.sh", "resume", "--name=t", "--zone=z")[0] == 2  # nothing was saved


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["run", "--zone=z", "--", *TRAIN], "--name=NAME"),
        (["run", "--name=t", "--", *TRAIN], "--zone=... is needed (or TPU_ZONE)"),
        (["run", "--name=t", "--zone=z", "--", *TRAIN], "--accelerator="),
        (["run", *SLICE], "nothing to train"),
        (["run", *SLICE, "--", TRAIN[0]], "--workdir="),
        (["run", *SLICE, "--", TRAIN[0], "--workdir=runs/x"], "lost with the slice"),
        (["run", *SLICE[:4], "--", TRAIN[0], "--workdir=runs/x"], "full path"),
        (["run", *SLICE, "--sopt", "--", *TRAIN], "unknown option --sopt"),
        (["resume", *SLICE], "nothing to train"),
        (["status", *SLICE, "--", *TRAIN], "only `run`"),
        (["explode"], "./launch/tpu.sh run"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_asked_for(launch, arguments, complaint):
    code, out = launch("tpu.sh", *arguments)
    assert code == 2 and complaint in out
    assert not (launch.fake / "calls").exists()


def test_the_fake_refuses_what_gcloud_does_not_know(launch):
    env = launch.environment()
    for words in (
        "compute tpus tpu-vm ssh t --zone=z",
        "compute tpus queued-resources create t --zone=z --preemptible",
        "compute tpus queued-resources create t --zone=z --accelerator-type=a --runtime-version=r",
        "compute tpus queued-resources delete t --zone=z --force=yes",
        "compute tpus queued-resources describe t",
    ):
        done = subprocess.run(["gcloud", *words.split()], env=env, capture_output=True, text=True)
        assert done.returncode == 2 and "ERROR" in done.stderr, words


SLURM = ["--nodes=1", "--gpus-per-node=h100:2", "--time=1:00:00"]


def test_a_slurm_job_that_ran_out_of_time_is_queued_again(launch):
    code, out = launch(
        "slurm.sh", *SLURM, "--", *TRAIN, extra="train,cuda13", DRIVER="580.65.06", PLAY="notice"
    )
    log = (launch.fake / "slurm-7.out").read_text()
    assert code == 0 and "Submitted batch job 7" in out, out + log
    assert (launch.fake / "codes").read_text() == "143\n0\n", log
    assert attempts(launch) == [f"attempt of {i} from step {s}" for i in (0, 1) for s in (0, 3)]
    assert (launch.fake / "sbatch").read_text().split() == SLURM


def test_a_slurm_job_that_failed_stays_failed(launch):
    launch("slurm.sh", *SLURM, "--", *TRAIN, extra="train,cuda12", DRIVER="550.54.15", PLAY="fault")
    assert (launch.fake / "codes").read_text() == "1\n"


def test_a_slurm_dry_run_prints_the_job(launch):
    code, out = launch("slurm.sh", *SLURM, "--dry-run", "--", *TRAIN)
    assert code == 0 and not (launch.fake / "sbatch").exists()
    assert out.startswith(f"sbatch {' '.join(SLURM)} <<'JOB'\n#!/bin/bash\n")
    assert "#SBATCH --ntasks-per-node=2\n" in out and "'--config.data.path=a b'" in out
    for wrong in (SLURM[:1], [*SLURM, "--"], [*SLURM[:1], "--", *TRAIN]):
        assert launch("slurm.sh", *wrong)[0] == 2
    code, out = launch("slurm.sh", "--nodes", "2", *SLURM[1:], "--", *TRAIN)
    assert code == 2 and out == "error: --nodes=2 is needed, with an = instead of a space\n"


def test_training_on_the_gpus_of_one_machine(launch):
    arguments = {"extra": "train,cuda13", "DRIVER": "580.65.06"}
    env = launch.environment(**arguments)
    python = pathlib.Path(env["VENV"]) / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\necho "$JAX_PLATFORMS: $*"\n')
    code, out = launch("gpu.sh", "train", "--config=c", "--workdir=d", **arguments)
    assert code == 0 and out == "cuda: -m flextok_jax.main --config=c --workdir=d\n"


def test_a_gpu_dry_run_and_the_help_need_no_gpu(launch):
    code, out = launch("gpu.sh", "tokenize", "--model", "a b", "--dry-run", DRIVER="none")
    *setup, last = out.splitlines()
    venv = launch.environment()["VENV"]
    assert code == 0 and last.endswith(
        "flextok tokenize --dtype bfloat16 --batch-size 128 --model 'a b'"
    )
    assert last.startswith(venv) and "source launch/common.sh" in setup
    code, out = launch("gpu.sh", "--dry-run", "train", *TRAIN, DRIVER="none")
    assert code == 0 and out.endswith(f"-m flextok_jax.main {CONFIG} {WORKDIR} '{TRAIN[2]}'\n")
    for words in (["--help"], ["train", "--help"], []):
        code, out = launch("gpu.sh", *words, DRIVER="none")
        assert code == (0 if words else 2) and "./launch/gpu.sh train --config=" in out


def test_the_jobset_restarts_on_143_and_counts_other_failures():
    text = (ROOT / "launch" / "jobset.yaml").read_text()
    names = sorted(set(re.findall(r"\$\{([A-Z_]+)\}", text)))
    values = {name: "2" if name in ("SLICES", "HOSTS", "CHIPS") else name.lower() for name in names}
    for name in names:  # each is explained above
        assert re.search(rf"^#   {name}\b", text, re.M), name
        text = text.replace(f"${{{name}}}", values[name])
    found = yaml.safe_load(text)
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and found["kind"] == "JobSet"
    policy = found["spec"]["failurePolicy"]
    assert policy["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == spec["parallelism"] == spec["completions"] == 2
    assert spec["backoffLimit"] == 0
    codes = [rule.get("onExitCodes") for rule in spec["podFailurePolicy"]["rules"]]
    assert {"containerName": "train", "operator": "In", "values": [143]} in codes
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 2


def test_nothing_of_ours_is_written_into_the_scripts():
    for path in (*SCRIPTS, ROOT / "launch" / "jobset.yaml"):
        text = path.read_text()
        zones = re.findall(r"\b(?:us|europe|asia)-[a-z]+\d-[a-z]\b", text)
        assert not zones and not re.search(r"gs://[a-z0-9]", text), path.name


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck_passes():
    command = [SHELLCHECK, "-x", "-P", "launch", *(str(p.relative_to(ROOT)) for p in SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
