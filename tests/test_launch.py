"""The launch scripts, with stand-ins for gcloud and Slurm that refuse what is not documented."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
import yaml
from common import ROOT

# The dev extra puts it beside the interpreter, which need not be on PATH.
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONFIG, WORKDIR = "--config=configs/tokenizer.py:digits", "--workdir=gs://b/runs/x"
TRAIN = [CONFIG, WORKDIR, "--config.data.path=a b"]
SLICE = ["--name=t", "--zone=z", "--accelerator=v5litepod-8", "--runtime=r"]
PACKED = ("flextok_jax", "configs", "examples", "launch", "setup.py", "README.md", "LICENSE")
STANDINS = {
    "nvidia-smi": 'echo "$DRIVER"',
    # sbatch runs the job's script as job 7; the options of its lines are in $FAKE/sbatch.
    "sbatch": 'cat >"$FAKE/job"; (printf "%s\\n" "$@"; sed -n "s/^#SBATCH //p" "$FAKE/job") '
    '>"$FAKE/sbatch"; SLURM_JOB_ID=7 bash "$FAKE/job"',
    "srun": 'echo "$*" >>"$FAKE/srun"; exit "$CODE"',
    "scontrol": 'echo "$*" >>"$FAKE/scontrol"',
    # The training: waits for $FAKE/over if $WAIT is set, and ends with $CODE.
    "venv/python": 'echo "$JAX_PLATFORMS: $*"; until [ -z "${WAIT:-}" ] || [ -e "$FAKE/over" ]; '
    'do sleep 0.05; done; exit "${CODE:-0}"',
}


class Launch:
    """Runs copies of the scripts; `fake` is the folder of the stand-ins."""

    def __init__(self, folder):
        self.fake, self._source, self._bin = folder, folder / "src", folder / "bin"
        self._source.mkdir()
        for name in PACKED[:4]:
            (self._source / name).mkdir()
        for name in PACKED[4:]:
            shutil.copy(ROOT / name, self._source)
        for script in (ROOT / "launch").iterdir():
            shutil.copy(script, self._source / "launch")
        self._venv = folder / "venv"
        for name, text in STANDINS.items():
            path = self._venv / "bin" / "python" if "/" in name else self._bin / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        shutil.copy(ROOT / "tests" / "fakes" / "gcloud", self._bin)
        (self._bin / "gcloud").chmod(0o755)
        self._sum = subprocess.check_output(["cksum", "setup.py"], cwd=ROOT, text=True).strip()

    def __call__(self, script, *arguments, extras="train,tpu,gs", **variables):
        """(exit code, output); `extras`: those that count as installed."""
        (self._venv / ".installed").write_text(f"{self._sum} {extras}\n")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "SLURM", "JAX"))}
        paths = {"PATH": f"{self._bin}:{os.environ['PATH']}", "FAKE": self.fake, "VENV": self._venv}
        done = subprocess.run(
            [self._source / "launch" / script, *arguments],
            env={k: str(v) for k, v in (clean | paths | {"TPU_POLL": "0"} | variables).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def answers(self, states: str, workers: str = "none"):
        """What gcloud will answer, one after the other, and begins a new list of calls."""
        (self.fake / "states").write_text(states.replace(" ", "\n"))
        (self.fake / "workers").write_text(workers.replace(", ", "\n"))
        (self.fake / "calls").write_text("")

    @property
    def calls(self):
        return [json.loads(line) for line in (self.fake / "calls").read_text().splitlines()]

    def kinds(self):
        """The calls in short: create, delete, scp, and what ssh ran; without looks."""
        words = []
        for kind, *rest in self.calls:
            ssh = [w for w in rest if w.startswith("--command=")]
            found = ssh and re.search(r"worker.sh (\w+)", ssh[0])[1]
            words.append(found or kind)
        return [word for word in words if word not in ("describe", "state")]


@pytest.fixture
def launch(tmp_path):
    return Launch(tmp_path)


def test_a_run_from_nothing_to_the_end(launch):
    launch.answers("NOT_FOUND PROVISIONING ACTIVE", "none, running running, exit:0 exit:0")
    code, out = launch("tpu.sh", "run", *SLICE, "--spot", "--", *TRAIN)
    assert code == 0, out
    assert launch.kinds() == ["create", "scp", "setup", "start"]
    create, copy, setup, start = (c for c in launch.calls if "state" not in c[-2] and len(c) > 4)
    assert {"--spot", "--node-id=t", "--zone=z"} <= set(create)
    assert "launch/worker.sh start '--config" in start[-2] and "a b'" in start[-2]
    assert setup[-2].endswith("worker.sh setup")
    with tarfile.open(copy[1]) as archive:
        assert {name.partition("/")[0] for name in archive.getnames()} == set(PACKED)
    # The other commands know the rest by the name.
    launch.answers("ACTIVE", "exit:0 running")
    code, out = launch("tpu.sh", "status", "--name=t")
    assert code == 0 and out.split()[:3] == ["ACTIVE", "flextok-worker", "host0"]
    assert launch("tpu.sh", "logs", "--name=t", "--worker=1", "--lines=2")[0] == 0
    assert {"--worker=1", "--command=flextok/launch/worker.sh log 2 "} <= set(launch.calls[-1])
    assert launch("tpu.sh", "delete", "--name=t")[0] == 0
    assert launch.kinds()[-1] == "delete" and "--zone=z" in launch.calls[-1]


RUN = ["create", "scp", "setup", "start"]


@pytest.mark.parametrize(
    "states, workers, after, code",
    [
        ("ACTIVE", "exit:0 exit:0", [], 0),
        # Preempted: another slice.
        ("SUSPENDED NOT_FOUND ACTIVE", "none, exit:0", ["delete", *RUN], 0),
        # Saved and stopped, or the hosts were restarted: the same slice.
        ("ACTIVE", "lost exit:143, running, exit:0", ["start"], 0),
        ("ACTIVE", "running exit:1, exit:1 exit:143, exit:0", ["log", "start"], 0),
        ("FAILED NOT_FOUND ACTIVE", "exit:0", ["delete", "create"], 0),
        ("ACTIVE", "exit:1 exit:1", ["log", "start"] * 2 + ["log"], 1),
    ],
)
def test_what_a_supervised_run_does(launch, states, workers, after, code):
    launch.answers("ACTIVE", "exit:0")
    launch("tpu.sh", "run", *SLICE, "--retries=2", "--", *TRAIN)
    launch.answers(states, workers)
    found, out = launch("tpu.sh", "resume", "--name=t")
    assert found == code and launch.kinds() == after, out


def test_a_run_is_not_started_twice(launch):
    launch.answers("ACTIVE", "running")
    code, out = launch("tpu.sh", "run", *SLICE, "--", *TRAIN)
    assert code == 2 and "resume --name=t" in out and launch.kinds() == []


def test_a_dry_run_prints_every_command_and_calls_none(launch):
    flags = ["--project=p", "--create-flags=--network=n --reserved", "--ssh-flags=--internal-ip"]
    code, out = launch("tpu.sh", "run", *SLICE, *flags, "--slices=2", "--dry-run", "--", *TRAIN)
    g, at = "gcloud compute tpus queued-resources", "--zone=z --project=p"
    everywhere = "--node=all --worker=all --internal-ip"
    lines = out.splitlines()
    assert code == 0 and lines[:2] == [
        f"{g} create t --node-count=2 --node-prefix=t --accelerator-type=v5litepod-8 "
        f"--runtime-version=r --network=n --reserved {at}",
        f"{g} describe t '--format=value(state.state)' {at}",
    ]
    assert lines[2].startswith(f"{g} scp ") and all(everywhere in line for line in lines[2:])
    for word in ("create", "status", "logs", "delete"):
        code, out = launch("tpu.sh", word, *SLICE, "--dry-run")
        assert code == 0 and out.startswith(g), out
    assert not (launch.fake / "calls").exists()


@pytest.mark.parametrize(
    "arguments, key",
    [
        (["run", "--zone=z", "--", *TRAIN], "--name="),
        (["run", "--name=t", "--", *TRAIN], "--zone="),
        (["run", "--name=t", "--zone=z", "--", *TRAIN], "--accelerator="),
        (["run", *SLICE], "--workdir="),
        (["run", *SLICE, "--", TRAIN[0]], "--workdir="),
        (["run", *SLICE, "--", TRAIN[0], "--workdir=runs/x"], "--workdir=runs/x"),
        (["run", *SLICE, "--", TRAIN[0], "--workdir=/home/x"], "--workdir=/home/x"),
        (["run", *SLICE, "--", TRAIN[0], "--workdir=gs://b"], "--workdir=gs://b"),
        (["run", *SLICE, "--sopt", "--", *TRAIN], "--sopt"),
        (["resume", *SLICE], "--workdir="),
        (["status", *SLICE, "--", *TRAIN], "`run`"),
        (["explode"], "./launch/tpu.sh run"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_asked_for(launch, arguments, key):
    code, out = launch("tpu.sh", *arguments)
    assert code == 2 and key in out
    assert not (launch.fake / "calls").exists()


def test_a_worker_runs_one_training_and_keeps_its_exit_code(launch):
    at = {"HOME": launch.fake / "home", "WAIT": "1", "CODE": "143"}
    assert launch("worker.sh", "setup", **at)[0] == 0
    assert launch("worker.sh", "state", **at)[1].endswith(" none\n")
    assert launch("worker.sh", "start", *TRAIN, **at) == (0, "")
    assert launch("worker.sh", "state", **at)[1].endswith(" running\n")
    assert launch("worker.sh", "start", *TRAIN, **at)[0] == 1
    (launch.fake / "over").touch()
    while launch("worker.sh", "state", **at)[1].endswith(" running\n"):
        time.sleep(0.05)
    assert launch("worker.sh", "state", **at)[1].endswith(" exit:143\n")
    log = launch("worker.sh", "log", "1", **at)[1]
    assert log == f": -u -m flextok_jax.main {' '.join(TRAIN)}\n"
    (launch.fake / "home" / "flextok-run" / "exit").unlink()
    assert launch("worker.sh", "state", **at)[1].endswith(" lost\n")


SLURM = ["--nodes=1", "--gpus-per-node=h100:2", "--time=1:00:00"]
# https://slurm.schedmd.com/sbatch.html
SBATCH = r"--(nodes|gpus-per-node|ntasks-per-node|time|job-name|open-mode)=.+|--requeue"
SIGNAL = r"--signal=([RB]+:)?[A-Z0-9]+(@[0-9]+)?"


@pytest.mark.parametrize("code, driver", [(143, "580.65.06"), (1, "550.54.15")])
def test_a_slurm_job_is_queued_again_after_143_only(launch, code, driver):
    extras = "train,cuda13" if driver.startswith("58") else "train,cuda12"
    variables = dict(extras=extras, DRIVER=driver, CODE=code)
    assert launch("slurm.sh", *SLURM, "--", *TRAIN, **variables)[0] == code
    options = (launch.fake / "sbatch").read_text().splitlines()
    assert options[:3] == SLURM and "--ntasks-per-node=2" in options
    assert all(re.fullmatch(f"{SBATCH}|{SIGNAL}", option) for option in options)
    started = (launch.fake / "srun").read_text()
    assert started.startswith("--kill-on-bad-exit=1 ") and started.endswith(f"{TRAIN[2]}\n")
    assert (launch.fake / "scontrol").exists() == (code == 143)


def test_a_slurm_dry_run_prints_the_job(launch):
    code, out = launch("slurm.sh", *SLURM, "--dry-run", "--", *TRAIN)
    assert code == 0 and not (launch.fake / "sbatch").exists()
    assert out.startswith(f"sbatch {' '.join(SLURM)} <<'JOB'\n#!/bin/bash\n")
    for wrong in (SLURM[:1], [*SLURM, "--"], [*SLURM[:1], "--", *TRAIN]):
        assert launch("slurm.sh", *wrong)[0] == 2
    code, out = launch("slurm.sh", "--nodes", "2", *SLURM[1:], "--", *TRAIN)
    assert code == 2 and "--nodes=2" in out


def test_the_gpus_of_one_machine(launch):
    arguments = {"extras": "train,cuda13", "DRIVER": "580.65.06"}
    code, out = launch("gpu.sh", "train", "--config=c", "--workdir=d", **arguments)
    assert code == 0 and out == "cuda: -m flextok_jax.main --config=c --workdir=d\n"
    code, out = launch("gpu.sh", "tokenize", "--model", "a b", "--dry-run")
    command = "flextok tokenize --dtype bfloat16 --batch-size 128 --model 'a b'"
    assert code == 0 and out.splitlines()[-1].endswith(command)
    for words in (["--help"], []):
        code, out = launch("gpu.sh", *words)
        assert code == (0 if words else 2) and "./launch/gpu.sh train --config=" in out


def test_the_jobset_restarts_on_143_and_counts_other_failures():
    text = (ROOT / "launch" / "jobset.yaml").read_text()
    names = sorted(set(re.findall(r"\$\{([A-Z_]+)\}", text)))
    for name in names:  # each is explained above
        assert re.search(rf"^#   {name}\b", text, re.M), name
        value = "2" if name in ("SLICES", "HOSTS", "CHIPS") else name.lower()
        text = text.replace(f"${{{name}}}", value)
    found = yaml.safe_load(text)
    assert found["spec"]["failurePolicy"]["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == spec["parallelism"] == spec["completions"] == 2
    codes = [rule.get("onExitCodes") for rule in spec["podFailurePolicy"]["rules"]]
    assert {"containerName": "train", "operator": "In", "values": [143]} in codes


def test_no_zone_or_bucket_is_written_into_the_scripts():
    for path in (*SCRIPTS, ROOT / "launch" / "jobset.yaml"):
        text = path.read_text()
        zones = re.findall(r"\b(?:us|europe|asia)-[a-z]+\d-[a-z]\b", text)
        assert not zones and not re.search(r"gs://[a-z0-9]", text), path.name


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck_passes():
    command = [SHELLCHECK, "-x", "-P", "launch", *(str(p.relative_to(ROOT)) for p in SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
