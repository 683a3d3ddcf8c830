"""A workdir: what is saved comes back bitwise, damage is noticed, another configuration refused."""

import logging
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_training_state import ToyStage, build, equal, get_config, host, make_mesh

from flextok_jax.io.checkpoint import Checkpoints, WorkdirError, json_config, restore_ema


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
            checkpoints.save(step, state)
            states[step] = host(state)
    return workdir, states


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(saved[0], tmp_path / "run")


def restore(workdir, program, **changes):
    with Checkpoints(workdir, json_config(get_config(**changes))) as checkpoints:
        return checkpoints.restore(program.shapes)


def data_files(step_folder: pathlib.Path):
    """The files of a checkpoint that hold array data, the largest first."""
    files = [p for p in step_folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(files, key=lambda p: -p.stat().st_size)


def test_the_newest_state_comes_back_bitwise(saved, program, workdir):
    state = restore(workdir, program)
    assert equal(host(state), saved[1][2])
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, program.shapes
    )


def test_an_empty_workdir_restores_nothing(tmp_path, program):
    assert restore(tmp_path, program) is None


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


def damage_truncate(folder):
    os.truncate(data_files(folder)[0], data_files(folder)[0].stat().st_size // 2)


def damage_delete(folder):
    data_files(folder)[0].unlink()


def damage_config(folder):
    os.truncate(next(p for p in (folder / "config").iterdir() if p.stat().st_size), 3)


def damage_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_silently(folder):
    """One bit of the array data, which Orbax does not notice."""
    data = bytearray(data_files(folder)[0].read_bytes())
    data[len(data) // 2] ^= 1
    data_files(folder)[0].write_bytes(data)


def damage_sharding(folder):
    """A file that `restore` could do without, but inference could not."""
    os.truncate(folder / "state" / "_sharding", 99)


def damage_config_value(folder):
    """Still JSON, of another configuration; which is then not what refuses the run."""
    path = folder / "config" / "metadata"
    text = path.read_text()
    assert '"batch_size": 8' in text
    path.write_text(text.replace('"batch_size": 8', '"batch_size": 9'))


def damage_checksums(folder):
    os.truncate(folder / "checksums" / "metadata", 9)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_delete,
        damage_config,
        damage_everything,
        damage_silently,
        damage_config_value,
        damage_sharding,
        damage_checksums,
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    damage, saved, workdir, program, caplog
):
    damage(workdir / "checkpoints" / "2")
    if damage is damage_sharding:  # The others may have hit what only training reads.
        assert restore_ema(workdir)[2] == 1
    with caplog.at_level(logging.WARNING):
        state = restore(workdir, program)
    assert equal(host(state), saved[1][1])
    assert "checkpoint 2 is unreadable" in caplog.text
    assert "continuing from checkpoint 1" in caplog.text
    # The step can be saved again; what was damaged is kept for a look.
    assert (workdir / "unreadable" / "2").is_dir()
    with Checkpoints(workdir, json_config(get_config())) as checkpoints:
        checkpoints.save(2, state)
    assert equal(host(restore(workdir, program)), saved[1][1])


def test_inference_notices_a_changed_bit_too(workdir, caplog):
    for path in data_files(workdir / "checkpoints" / "2"):  # Some hold the optimizer's arrays only.
        if path.stat().st_size > 1000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert restore_ema(workdir)[2] == 1
    assert "checkpoint 2 is unreadable" in caplog.text


def test_checkpoints_from_before_there_were_checksums_are_read(saved, program, workdir):
    shutil.rmtree(workdir / "checkpoints" / "2" / "checksums")
    (workdir / "saved.json").unlink()
    assert equal(host(restore(workdir, program)), saved[1][2])
    assert restore_ema(workdir)[2] == 2


def test_lost_checkpoints_are_not_taken_for_a_new_run(workdir, program):
    shutil.rmtree(workdir / "checkpoints" / "1")
    shutil.rmtree(workdir / "checkpoints" / "2")
    for _ in range(2):  # An empty folder, then none.
        with pytest.raises(WorkdirError, match="step 2 had been saved.*does not start over"):
            restore(workdir, program)
        shutil.rmtree(workdir / "checkpoints")
    (workdir / "saved.json").write_text("{")
    with pytest.raises(WorkdirError, match="saved.json is damaged.*remove it"):
        restore(workdir, program)


def test_a_vanished_newest_checkpoint_is_told(saved, workdir, program, caplog):
    shutil.rmtree(workdir / "checkpoints" / "2")
    with caplog.at_level(logging.WARNING):
        assert equal(host(restore(workdir, program)), saved[1][1])
    assert "checkpoint 2 had been completed and is gone" in caplog.text
    assert "continuing from checkpoint 1" in caplog.text


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_the_others(
    saved, workdir, program, monkeypatch
):
    state = program.init()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(WorkdirError, match="checkpoint 3 could not be written.*No space left"):
        with Checkpoints(workdir, json_config(get_config())) as checkpoints:
            with monkeypatch.context() as patch:
                patch.setattr("orbax.checkpoint.JsonCheckpointHandler.finalize", full)
                checkpoints.save(3, state)
                while True:  # As the loop does after every step.
                    checkpoints.poll()
    assert equal(host(restore(workdir, program)), saved[1][2])


def test_when_nothing_is_readable_it_stops_and_moves_nothing(workdir, program):
    for step in ("1", "2"):
        damage_config(workdir / "checkpoints" / step)
        damage_truncate(workdir / "checkpoints" / step)
    with pytest.raises(WorkdirError, match="(?s)does not start over.*checkpoint 2.*checkpoint 1"):
        restore(workdir, program)
    with pytest.raises(WorkdirError, match="(?s)none of the checkpoints.*checkpoint 1"):
        restore_ema(workdir)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]


def test_another_configuration_is_refused_with_every_difference(workdir, program):
    with pytest.raises(WorkdirError) as error:
        restore(workdir, program, optim__lr=0.5, freeze=("decoder/head/.*",), total_steps=99)
    assert "optim.lr: 0.01 in the workdir, 0.5 now" in str(error.value)
    assert "freeze: [] in the workdir, ['decoder/head/.*'] now" in str(error.value)
    assert "total_steps" not in str(error.value)


def test_keys_that_do_not_change_a_step_may_differ(workdir, program):
    changes = dict(total_steps=99, log_every=7, eval_every=2, checkpoint__keep=9, mesh__fsdp=-1)
    assert restore(workdir, program, **changes) is not None
    other = {"evaluation": {"batch_size": 3, "num_images": 9, "steps": 2, "num_latents": 4}}
    other["compute"] = {"attention": "pallas", "remat": "dots", "scan": False}
    with Checkpoints(workdir, json_config(get_config()) | other) as checkpoints:
        assert checkpoints.restore(program.shapes) is not None
    other["compute"]["dtype"] = "bfloat16"
    with pytest.raises(WorkdirError, match="set these back:\n  compute.dtype: [^\n]*$"):
        with Checkpoints(workdir, json_config(get_config()) | other) as checkpoints:
            checkpoints.restore(program.shapes)


def test_inference_reads_the_averaged_parameters_alone(saved, workdir):
    files = sorted(workdir.rglob("*"))
    params, config, step = restore_ema(workdir)
    assert sorted(workdir.rglob("*")) == files
    assert step == 2 and config["optim"]["lr"] == 0.01
    assert equal(params, saved[1][2].ema)
    assert {type(x) for x in jax.tree.leaves(params)} == {np.ndarray}
    damage_config(workdir / "checkpoints" / "2")
    assert restore_ema(workdir)[2] == 1


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p / "absent"])
def test_a_folder_without_checkpoints_is_named(tmp_path, make):
    with pytest.raises(WorkdirError, match="holds no checkpoint"):
        restore_ema(make(tmp_path))
    assert list(tmp_path.iterdir()) == []
