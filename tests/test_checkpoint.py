"""A workdir: what is saved comes back bitwise, damage is noticed, another configuration refused."""

import dataclasses
import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
from test_training_state import ToyStage, build, equal, get_config, host, make_mesh

from flextok_jax.io.checkpoint import Checkpoints, WorkdirError, json_config, restore_ema
from flextok_jax.training import workdirs


@pytest.fixture(scope="module")
def program():
    config = get_config()
    return build(ToyStage(config), config, make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory):
    """A workdir with checkpoints 1 and 2, which is not to be changed, and their states."""
    workdir = tmp_path_factory.mktemp("saved")
    states = {}
    with Checkpoints(workdir, json_config(get_config())) as checkpoints:
        for step in (1, 2):
            state = program.init().replace(step=np.int32(step))
            checkpoints.save(step, state, {"scaling_factor": 0.5 + step})
            states[step] = host(state)
    return workdir, states


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(saved[0], tmp_path / "run")


def restore(workdir, program, **changes):
    with Checkpoints(workdir, json_config(get_config(**changes))) as checkpoints:
        return checkpoints.restore(program.shapes)


def test_the_newest_state_comes_back_bitwise(saved, program, workdir, tmp_path):
    state = restore(workdir, program)
    assert equal(host(state), saved[1][2])
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, program.shapes
    )
    assert restore(tmp_path / "empty", program) is None


def test_what_is_saved_is_not_changed_by_the_steps_that_follow(tmp_path, program):
    """The files are written while the buffers are already donated to the next steps."""
    batch = {"image": np.zeros((8, 16, 16, 3), np.uint8), "label": np.zeros(8, np.int32)}
    state, frozen = program.init(), ToyStage(get_config()).load_frozen()
    before = host(state)
    with Checkpoints(tmp_path, json_config(get_config())) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state, _ = program.step(state, frozen, batch)
    assert equal(host(restore(tmp_path, program)), before)


def damage_config(folder):
    os.truncate(next(p for p in (folder / "config").iterdir() if p.stat().st_size), 3)


def damage_arrays(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize("damage", [damage_config, damage_arrays, shutil.rmtree])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_can_be_used(
    damage, saved, workdir, program
):
    newest = workdir / "checkpoints" / "2"
    damage(newest)
    newest.mkdir(exist_ok=True)
    for read in (lambda: restore(workdir, program), lambda: restore_ema(workdir)):
        with pytest.raises(WorkdirError, match="checkpoints/2"):
            read()
    newest.rename(workdir / "2")
    assert equal(host(restore(workdir, program)), saved[1][1]) and restore_ema(workdir).step == 1


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_the_others(
    saved, workdir, program, monkeypatch, caplog
):
    state = program.init()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(WorkdirError, match="checkpoint 3 .*the disk is full"):
        with Checkpoints(workdir, json_config(get_config())) as checkpoints:
            with monkeypatch.context() as patch:
                patch.setattr("orbax.checkpoint.JsonCheckpointHandler.finalize", full)
                checkpoints.save(3, state)
                while True:  # As the loop does after every step.
                    checkpoints.poll()
    assert not [record for record in caplog.records if record.exc_info]  # Orbax's, by thread.
    assert equal(host(restore(workdir, program)), saved[1][2])


def test_another_configuration_is_refused_with_every_difference(workdir, program):
    with pytest.raises(WorkdirError) as error:
        restore(workdir, program, optim__lr=0.5, freeze=("decoder/head/.*",), total_steps=99)
    assert "optim.lr: 0.01 there, 0.5 now" in str(error.value)
    assert "freeze: [] there, ['decoder/head/.*'] now" in str(error.value)
    assert "total_steps" not in str(error.value)


def test_keys_that_do_not_change_a_step_may_differ(workdir, program):
    changes = dict(total_steps=99, log_every=7, eval_every=2, checkpoint__keep=9, mesh__fsdp=-1)
    changes |= dict(compute__scan=False, wandb__project="tokens")
    assert restore(workdir, program, **changes) is not None


def test_a_key_that_came_later_stands_for_what_was_done_before(workdir, program):
    """The workdir lacks all of them."""
    assert restore(workdir, program, **{"optim__rule": "adam"}) is not None
    with pytest.raises(WorkdirError, match="optim.rule: 'adam' there, 'muon' now"):
        restore(workdir, program, optim__rule="muon")
    with pytest.raises(WorkdirError, match="optim.other: '.absent.' there, 0 now"):
        restore(workdir, program, optim__other=0)


def test_a_field_of_the_model_that_came_later_had_its_default():
    config, source = get_config(), types.SimpleNamespace(fingerprint=lambda: "")
    stage = ToyStage(config)
    saved = json.loads(json.dumps({"model": stage.export_config()}))
    del saved["model"]["config"]["norm_groups"]
    workdirs.identity("", saved, config, stage, source, 0)
    stage.model = dataclasses.replace(stage.model, norm_groups=7)
    with pytest.raises(WorkdirError, match="norm_groups: 32 there, 7 now"):
        workdirs.identity("", saved, config, stage, source, 0)


def test_inference_reads_the_averaged_parameters_alone(saved, workdir):
    files = sorted(workdir.rglob("*"))
    params, config, step, extra = restore_ema(workdir)
    assert sorted(workdir.rglob("*")) == files
    assert step == 2 and config["optim"]["lr"] == 0.01 and extra == {"scaling_factor": 2.5}
    assert equal(params, saved[1][2].ema)
    assert {type(x) for x in jax.tree.leaves(params)} == {np.ndarray}
    shutil.rmtree(workdir / "checkpoints" / "2" / "extra")  # As in old workdirs.
    assert restore_ema(workdir)[2:] == (2, {})


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p / "absent"])
def test_a_folder_without_checkpoints_is_named(tmp_path, make):
    with pytest.raises(WorkdirError, match="holds no checkpoint"):
        restore_ema(make(tmp_path))
    assert list(tmp_path.iterdir()) == []
