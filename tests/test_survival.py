"""A run that is killed continues from its newest checkpoint and becomes the undisturbed run."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from common import ROOT
from conftest import CACHE
from test_startup import TOY, losses

from flextok_jax.io.checkpoint import restore_ema

CONFIG = """
from test_training_state import get_config as toy
def get_config():
    return toy(total_steps=40, checkpoint__every=5)
"""


def start(folder, name, workdir=None, *arguments):
    """Starts the training command with its workdir folder/name, or another; folder/NAME.log."""
    (folder / "toy.py").write_text(CONFIG)
    workdir = workdir or folder / name
    arguments = [f"--config={folder / 'toy.py'}", f"--workdir={workdir}", *arguments]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_DEFAULT_MATMUL_PRECISION": "float32",
    }
    with open(folder / f"{name}.log", "a") as log:
        command = [sys.executable, "-c", TOY, *arguments]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def checkpoints(workdir):
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


@pytest.mark.slow
def test_a_killed_run_continues_bitwise(tmp_path):
    assert start(tmp_path, "whole").wait() == 0
    killed = 0
    for least in (5, 20):  # Killed after these steps were saved.
        process = start(tmp_path, "killed")
        while process.poll() is None and max(checkpoints(tmp_path / "killed"), default=0) < least:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert start(tmp_path, "killed").wait() == 0, (tmp_path / "killed.log").read_text()
    assert killed, "both runs ended before they were killed"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    trees = [restore_ema(tmp_path / name)[0] for name in ("whole", "killed")]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *trees)))
