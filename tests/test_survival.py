"""The short form of tests/torture.py: every kind of fault once, on a small model.

What damage does to a checkpoint: test_checkpoint.py.
"""

import os
import random
import re
import subprocess
import sys

import pytest
import torture
from common import ROOT
from conftest import CACHE
from torture import why_no_namespace

FAULTS = (
    "kill -9 at a random moment",
    "kill -9 in a save",
    "kill -9 in its commit",
    "kill -9 after its commit",
    "SIGTERM",
    "changed",
    "full disk",
)


def test_faults_are_survived_bitwise():
    amounts = ["--rounds=1", "--damages=1", "--losses=0", "--disks=1", "--toy"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "torture.py"), *amounts],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all survived"
    for fault in FAULTS:
        if fault == "full disk" and why_no_namespace():
            assert "full disk: skipped: " in done.stdout
            continue
        tried, survived = re.search(rf"^{fault} +(\d+) +(\d+)", done.stdout, re.MULTILINE).groups()
        assert tried == survived == "1", done.stdout


def test_a_fault_whose_moment_is_never_seen_is_given_up(tmp_path, monkeypatch):
    class Quick:
        """A run that is over before it is hit."""

        def __init__(self, workdir):
            workdir.mkdir()

        def hit(self, *_):
            return False

    monkeypatch.setattr(torture, "Run", Quick)
    monkeypatch.setattr(torture, "check_end", lambda *_: None)
    table = torture.Table()
    with pytest.raises(torture.Fault, match="20 runs ended before its moment was seen"):
        torture.one_round(tmp_path / "run", random.Random(0), 1.0, {}, table)
    assert sum(table.failed.values()) == sum(table.tried.values()) == 1
