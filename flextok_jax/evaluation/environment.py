"""What a metric depends on beside its settings: versions, devices, precision, commit."""

import importlib.metadata
import pathlib
import platform
import subprocess

import jax

from flextok_jax import __version__
from flextok_jax.parallel.mesh import PRECISION

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "Pillow")
ENOUGH = 50_000  # Images: FID of fewer is biased.


def product_precision() -> str:
    """The precision of float32 matrix products where a model does not ask for another."""
    kind = jax.default_backend()
    default = f"{PRECISION.get(kind, 'float32')} (the default of {kind})"
    return jax.config.jax_default_matmul_precision or default


def environment() -> dict:
    """Versions, devices and commit, in JSON terms."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "versions": {"python": platform.python_version(), "flextok_jax": __version__, **versions},
        "devices": f"{device.platform}: {jax.device_count()} x {device.device_kind}",
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this source tree, with "+changes" where files differ; "unknown" without git."""
    root = pathlib.Path(__file__).resolve().parents[2]
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always"]
    command += ["--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def warnings(metadata: dict, metrics: dict) -> list[str]:
    """What to know before the metrics are compared with published ones."""
    if "fid" not in metrics:
        return []
    found, network = [], metadata["networks"]["features"]
    given = metadata["reference"]["source"] == "file"  # Its number of images is not known.
    count = min(metrics["count"], ENOUGH if given else metrics["real_count"])
    if count < ENOUGH:
        found.append(f"FID of {count} images is biased upwards: published ones are of {ENOUGH}")
    if network["name"] != "inception":
        found.append(f"FID, precision and recall by {network['description']}, not by Inception")
    return found
