"""The networks that images are looked at with: one for features, one for perceptual distance.

Both come from files that a person names, and the numbers carry the files' hashes. A network that is
not there takes its metrics away, with one line that says so.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flextok_jax.evaluation.reconstruction import padded
from flextok_jax.io import storage
from flextok_jax.io.formats import networks as files
from flextok_jax.nn import inception, lpips
from flextok_jax.nn.images import to_float
from flextok_jax.parallel.sharding import spread_batch

NO_FEATURES = (
    "FID, Inception score, precision and recall are left out: no feature network; name the file of "
    "the Inception network with --inception FILE"
)
NO_LPIPS = "LPIPS is left out: name its files with --lpips-vgg FILE --lpips-heads FILE"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network whose features are compared between sets of images.

    Attributes:
        about: for the stamp: its name, words and hashes.
        size: D, how many features there are.
        classes: how many classes its logits are of, 0: not those of the data's labels.
    """

    about: dict
    size: int
    classes: int
    _run: Callable

    def __call__(self, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """uint8 [n, H, W, 3] -> "features" float32 [n, D], "logits" float32 [n, V]."""
        features, logits = self._run(batch_size, images)
        return {"features": features, "logits": logits}


@dataclasses.dataclass(frozen=True, eq=False)
class Perceptual:
    """LPIPS with VGG16.

    Attributes:
        about: for the stamp.
    """

    about: dict
    _run: Callable

    def __call__(self, images: np.ndarray, originals: np.ndarray, batch_size: int) -> np.ndarray:
        """uint8 [n, H, W, 3] twice -> distance float64 [n]."""
        return self._run(batch_size, images, originals).astype(np.float64)


def inception_network(path, mesh: Mesh | None = None) -> FeatureNetwork:
    """InceptionV3 as FID is defined with, of a published file; see `files.load_inception`.

    Args:
        mesh: devices that a batch is cut over.
    """
    params = files.load_inception(path)
    about = {"name": "inception", "words": "InceptionV3 of FID", **hashes(path, params)}
    return FeatureNetwork(about, inception.FEATURES, 0, batched(inception.features, params, mesh))


def perceptual_network(vgg, heads, mesh: Mesh | None = None) -> Perceptual:
    """Of published files; see `files.load_lpips`."""
    params = files.load_lpips(vgg, heads)
    about = {
        "name": "lpips",
        "vgg_sha256": files.sha256(vgg),
        "heads_sha256": files.sha256(heads),
        "parameters_sha256": storage.fingerprint(params),
    }

    def distance(params, images, originals):
        return lpips.lpips(params, to_float(images), to_float(originals))

    return Perceptual(about, batched(distance, params, mesh))


def batched(function, params, mesh: Mesh | None):
    """`run(batch_size, *arrays)`: a function of (params, *arrays [B, ...]) over arrays [n, ...].

    One program serves every batch: the last one is filled up with copies of its last row.
    """
    place = jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    params, function = jax.device_put(params, place), jax.jit(function)

    def run(batch_size, *arrays):
        if not len(arrays[0]):  # Nothing could be read: as many rows of the right width.
            one = (np.zeros((1, *array.shape[1:]), array.dtype) for array in arrays)
            return jax.tree.map(lambda x: x[:0], run(batch_size, *one))
        found = []
        for first in range(0, len(arrays[0]), batch_size):
            parts = [array[first : first + batch_size] for array in arrays]
            count = len(parts[0])
            batch = spread_batch(mesh, [padded(part, batch_size) for part in parts])
            found.append(jax.tree.map(lambda x: np.asarray(x)[:count], function(params, *batch)))
        return jax.tree.map(lambda *x: np.concatenate(x), *found)

    return run


def hashes(path, params) -> dict:
    """Of the file as it was published, where that can be told, and of what is computed with."""
    return {
        "file_sha256": files.sha256(path),
        "parameters_sha256": storage.fingerprint(params),
    }
