"""What a metric depends on beside its settings: versions, devices, precision, commit."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

import jax

LIBRARIES = ("flextok_jax", "jax", "jaxlib", "flax", "numpy", "Pillow")
ENOUGH = 50_000  # Images: FID of fewer is biased.
_DEFAULT_PRECISION = {"cpu": "float32", "gpu": "TF32", "tpu": "bfloat16"}


def product_precision() -> str:
    """The precision of float32 matrix products where a model does not ask for another."""
    chosen = jax.config.jax_default_matmul_precision
    default = _DEFAULT_PRECISION.get(jax.devices()[0].platform, "unknown")
    return chosen or f"{default} (the default of {jax.devices()[0].platform})"


def environment() -> dict:
    """Versions, devices and commit, in JSON terms."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # Run from a folder, not installed.
            versions[name] = "not installed"
    device = jax.devices()[0]
    devices = f"{device.platform}: {jax.device_count()} x {device.device_kind}"
    return {"versions": versions, "devices": devices, "commit": commit()}


@functools.cache
def commit() -> str:
    """The commit of this source tree, with "+changes" where files differ; "unknown" without git."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"  # Installed, perhaps inside another repository.
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def warnings(metadata: dict, metrics: dict) -> list[str]:
    """What to know before the metrics are compared with published ones."""
    found = []
    if "fid" in metrics:
        given = metadata["reference"]["source"] == "file"  # Its number of images is not known.
        count = min(metrics["count"], ENOUGH if given else metrics["real_count"])
        if count < ENOUGH:
            found.append(
                f"FID of {count} images, not {ENOUGH}: it is biased upwards and comparable only "
                "with FID of as many images"
            )
        network = metadata["networks"]["features"]
        if network["name"] != "inception":
            found.append(
                f"FID, Inception score, precision and recall by {network['description']}, not by "
                "the Inception network"
            )
    return found
