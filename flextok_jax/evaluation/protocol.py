"""How a number was made, written beside it, so that two numbers can be told to be comparable.

A stamp is a dictionary in JSON terms: the data, their crop and count, the networks and the model
with their hashes, the sampler's settings, the seeds, the versions and the commit.
"""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Iterator

import jax

LIBRARIES = ("flextok_jax", "jax", "jaxlib", "flax", "numpy", "Pillow")
ENOUGH = 50_000  # Images: below it FID is biased, and says so.


def circumstances() -> dict:
    """Versions, machine and commit: the part of a stamp that is when and where, not what."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # Run from a folder, not installed.
            versions[name] = "not installed"
    device = jax.devices()[0]
    machine = f"{device.platform}: {jax.device_count()} x {device.device_kind}"
    return {"versions": versions, "machine": machine, "commit": commit()}


def together(found: list) -> dict | str:
    """Circumstances of several processes as one: where they differ, all there were."""
    if isinstance(found[0], dict):
        return {key: together([one[key] for one in found]) for key in found[0]}
    return " and ".join(sorted(set(found)))


@functools.cache
def commit() -> str:
    """The commit of this source tree, with "+changes" where files differ; "unknown" without git."""
    root = pathlib.Path(__file__).resolve().parents[2]

    def git(*words):
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")) != root:
            return "unknown"  # Installed inside somebody else's repository.
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def differences(a, b, path: str = "") -> Iterator[str]:
    """Where two stamps differ, one line each: "sampling.steps: 20 | 50".

    Args:
        a, b: JSON values; a missing key counts as a difference.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(a.get(key, "(missing)"), b.get(key, "(missing)"), inner)
    elif a != b:
        yield f"{path}: {_short(a)} | {_short(b)}"


def warnings(about: dict, metrics: dict) -> list[str]:
    """What a reader must know before comparing the numbers with published ones.

    Args:
        about: the stamp.
        metrics: the numbers beside it.
    """
    found = []
    if "fid" in metrics:
        given = about["reference"]["from"] == "a file"  # Of as many as its maker says.
        count = min(metrics["count"], ENOUGH if given else metrics["real_count"])
        if count < ENOUGH:
            found.append(
                f"FID on {count} images, not {ENOUGH}: it is biased upwards and comparable only "
                "with FID on as many"
            )
        network = about["networks"]["features"]
        if network["name"] != "inception":
            found.append(f"FID, Inception score, precision and recall by {network['words']}")
    return found


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
