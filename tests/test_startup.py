"""Several processes find each other by the environment or by flags.

That they then train what one trains: test_processes.py.
"""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from common import ROOT

from flextok_jax import main
from flextok_jax.parallel import startup

SLURM = dict.fromkeys(startup.SLURM, "0") | {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    "env, platforms, expected",
    [
        ({}, None, None),
        ({}, "cpu", None),
        ({}, "cuda", None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None, None),  # what JAX sets where there is no TPU chip
        ({}, "tpu,cpu", "tpu"),  # what JAX sets on a TPU VM
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", None),  # no metadata server, no names of hosts
        ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "tpu"),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", None),  # JAX_PLATFORMS=cpu on a TPU host
        (SLURM, "cuda", "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, "cuda", None),  # one task keeps all its GPUs
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "cuda", None),  # no srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "cuda", None),  # any pod of any cluster
    ],
)
def test_the_environment_tells_whether_there_are_others(env, platforms, expected):
    assert startup.environment(env, platforms) == expected


@pytest.fixture
def started(monkeypatch):
    """The calls of jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in startup.SLURM:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_alone_nothing_is_started(started):
    startup.start()
    assert started == []


def test_slurm_and_flags_choose_how_jax_starts(started, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    startup.start()
    startup.start("node0:1234", 2, 1)
    assert started == [
        ((), {"cluster_detection_method": "slurm"}),
        (("node0:1234", 2, 1), {"cluster_detection_method": "deactivate"}),
    ]


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("node0:1234", None, None), "--num_processes and --process_id must be given too"),
        (("node0:1234", 2, None), "--process_id must be given too"),
        ((None, None, 0), "--coordinator and --num_processes must be given too"),
        (("node0", 2, 0), "HOST:PORT is needed"),
        ((":1234", 2, 0), "HOST:PORT is needed"),
        (("node0:1234", 2, 2), "--process_id=2 must be 0 .. 1"),
        (("node0:1234", 2, -1), "--process_id=-1 must be 0 .. 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused_with_the_remedy(started, flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        startup.start(*flags)
    assert started == []


HELD = []  # Sockets, open until the tests end.


def free_port() -> int:
    """A port that nobody else is given: held, and shared with gRPC's servers, which ask for it."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("", 0))
    HELD.append(holder)
    return holder.getsockname()[1]


def losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# The true command line, with the small stage of test_training_state.
TOY = """
from flextok_jax import main
main.STAGES["toy"] = "test_training_state:ToyStage"
main.run()
"""


def test_the_command_line_tells_of_a_forgotten_flag(tmp_path):
    done = subprocess.run(
        [sys.executable, main.__file__, "--config=configs/tokenizer.py:digits"]
        + [f"--workdir={tmp_path}", "--num_processes=2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "error: --coordinator and --process_id must" in done.stderr
