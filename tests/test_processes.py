"""Several real processes on this machine train, save and stop as one does.

Also what they share: a checkpoint of two processes is read by any other number of devices.
"""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from common import ROOT
from conftest import CACHE
from test_startup import TOY, free_port, losses
from test_training_state import ToyStage, get_config

from flextok_jax.training.loop import train
from flextok_jax.training.signals import PREEMPTED

pytestmark = pytest.mark.slow  # real processes

TOY_CONFIG = """
from test_training_state import get_config as toy
def get_config():
    return toy(mesh__data=-1, checkpoint__every=3)
"""
# What a process writes, told by Python's own audit events.
WATCHED = """
import os, sys
def told(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        print("WRITES", args[0], file=sys.stderr)
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        print("WRITES", args[0], file=sys.stderr)
sys.addaudithook(told)
"""
# Restores from FOLDER and writes every leaf to FILE; by any number of processes.
READ = """
import sys
import jax
import numpy as np
from flextok_jax.parallel import startup
coordinator, count, index = (arg.partition("=")[2] for arg in sys.argv[3:])
if count != "1":
    startup.start(coordinator, int(count), int(index))
from jax.experimental import multihost_utils
from test_training_state import ToyStage, build, get_config, make_mesh
from flextok_jax.io.checkpoint import Checkpoints, json_config
from flextok_jax.io.formats.names import flatten
config = get_config(mesh__data=-1, mesh__fsdp=min(2, jax.device_count()))
shapes = build(ToyStage(config), config, make_mesh(**config.mesh)).shapes
with Checkpoints(sys.argv[1], json_config(config)) as checkpoints:
    state = checkpoints.restore(shapes)
whole = multihost_utils.process_allgather(state, tiled=True)
np.savez(f"{sys.argv[2]}.{index}.npz", **flatten(whole))
"""


def start(folder, code, count, devices, arguments):
    """Starts `count` processes of `devices` devices each; `arguments`: index -> list of str."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # there are hundreds of small programs
        "JAX_DEFAULT_MATMUL_PRECISION": "float32",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    leader = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    processes = []
    for i in range(count):
        command = [sys.executable, "-c", code, *arguments(i), *leader, f"--process_id={i}"]
        with open(folder / f"{i}.log", "w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    return processes


def finish(folder, processes):
    """Waits for all: (exit codes, outputs)."""
    try:
        for process in processes:
            process.wait(300)
    finally:
        for process in processes:
            process.kill()
    outputs = [(folder / f"{i}.log").read_text() for i in range(len(processes))]
    return [process.returncode for process in processes], outputs


def train_by(folder, count, devices, *arguments, code=TOY):
    """Starts a training run in folder/run."""
    folder.mkdir(exist_ok=True)
    (folder / "toy.py").write_text(TOY_CONFIG)
    common = [f"--config={folder / 'toy.py'}", f"--workdir={folder / 'run'}", *arguments]
    return start(folder, code, count, devices, lambda i: common)


def read_by(folder, count, devices, workdirs):
    """What each of `count` processes of `devices` devices reads from its workdir."""
    processes = start(folder, READ, count, devices, lambda i: [workdirs[i], folder / "found"])
    codes, outputs = finish(folder, processes)
    assert codes == [0] * count, "\n".join(outputs)
    return [dict(np.load(folder / f"found.{i}.npz")) for i in range(count)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def runs(folder):
    """name -> outputs of its processes; the same six steps are run when they are asked for."""
    groups = {
        "two": (2, 4, "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
        "four": (4, 1, "--config.checkpoint.every=0"),
    }

    @functools.cache
    def outputs(name):
        processes = train_by(folder / name, *groups[name], code=WATCHED + TOY)
        codes, found = finish(folder / name, processes)
        assert codes == [0] * len(processes), "\n".join(found)
        return found

    config = get_config()
    train(ToyStage(config), config, folder / "one" / "run")  # one process
    return outputs


BY = ["two", "four"]


@pytest.mark.parametrize("name", BY)
def test_several_processes_train_what_one_trains(name, runs, folder):
    runs(name)
    one, several = losses(folder / "one" / "run"), losses(folder / name / "run")
    assert len(one) == 6 and one[-1] < one[0]
    assert several == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("name", BY)
def test_only_process_0_writes_outside_of_checkpoints(name, runs, folder):
    workdir = f"{folder / name / 'run'}/"

    def written(output):
        paths = [line.removeprefix("WRITES ") for line in output.splitlines()]
        return {p.removeprefix(workdir).split("/")[0] for p in paths if p.startswith(workdir)}

    first, *others = map(written, runs(name))
    assert {"metrics.jsonl", "tb", "checkpoints"} <= first
    for found in others:
        assert found <= {"checkpoints"}


@pytest.fixture(scope="module")
def alone(runs, folder):
    """The checkpoint of 2 processes of 4 devices, as one process of one device reads it."""
    runs("two")
    return read_by(folder / "1x1", 1, 1, [folder / "two" / "run"])[0]


@pytest.mark.parametrize("count, devices", [(1, 8), (4, 2)])
def test_a_checkpoint_of_two_processes_is_read_bitwise_by_others(count, devices, alone, folder):
    workdirs = [folder / "two" / "run"] * count
    found = read_by(folder / f"{count}x{devices}", count, devices, workdirs)
    assert alone["step"] == 6 and len(alone) > 20
    assert all(same(alone, leaves) for leaves in found)


def test_sigterm_to_one_process_stops_and_saves_all(folder):
    run = folder / "stopped"
    processes = train_by(run, 2, 1, "--config.total_steps=100000", "--config.checkpoint.every=0")
    deadline = time.monotonic() + 200
    while "step 5/" not in (run / "0.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(run, processes)
    assert codes == [PREEMPTED, PREEMPTED], "\n".join(outputs)
    assert "process 0 of 2" in outputs[0] and "process 1 of 2" in outputs[1]
    (saved,) = (run / "run" / "checkpoints").iterdir()
    assert int(saved.name) == len(losses(run / "run")) >= 5
    assert all(f"stopped by SIGTERM after step {saved.name}" in text for text in outputs)
