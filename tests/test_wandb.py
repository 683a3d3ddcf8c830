"""Weights & Biases get what metrics.jsonl gets. Without a network: its offline mode."""

import json
import struct
import sys

import pytest
from test_training_state import ToyStage, get_config

from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training import checks, loop


def messages(path):
    """The byte strings of a .wandb file, which is a log of LevelDB after a header of 7 bytes."""
    data, at, whole, block = path.read_bytes(), 7, b"", 32768
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # The only or the last piece of a message.
            yield whole
            whole = b""


def history(workdir):
    """(records of numbers, run ids) in the files that `wandb sync` would send, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, ids = [], []
    files = workdir.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(files, key=lambda path: path.parent.name):
        for record in map(Record.FromString, messages(path)):
            if record.HasField("run"):
                ids.append(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                names = {x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in items}
                records.append({k: v for k, v in names.items() if not k.startswith("_")})
    return records, ids


@pytest.mark.slow
def test_wandb_gets_the_numbers_and_a_continued_run_is_the_same_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for total in (2, 4):
        config = get_config(total_steps=total, wandb__project="tokens", eval_every=2)
        loop.train(ToyStage(config), config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    found, ids = history(tmp_path / "run")
    assert [x["step"] for x in found] == [x["step"] for x in written] == [1, 2, 3, 4]
    for ours, theirs in zip(written, found, strict=True):
        scalars = {k: v for k, v in ours.items() if not isinstance(v, list) and v is not None}
        assert scalars.items() <= theirs.items()
        for name, values in ours.items():
            if isinstance(values, list):
                assert [theirs[f"{name}/{i:03d}"] for i in range(len(values))] == values
    assert set(ids) == {(tmp_path / "run" / "wandb_id").read_text()}


def test_without_the_package_a_project_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb.project='tokens'.*pip install"):
        checks.check_config(
            get_config(wandb__project="tokens"), make_mesh(data=1, fsdp=1, tensor=1)
        )
