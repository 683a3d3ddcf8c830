"""The networks of metrics: one whose features are compared, and LPIPS, from files of the user."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from flextok_jax.io import storage
from flextok_jax.io.formats import networks as files
from flextok_jax.nn import inception, lpips
from flextok_jax.parallel.sharding import padded, place, spread_batch


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network whose features are compared between sets of images.

    Attributes:
        metadata: its "name", "description" and hashes.
        size: D, how many features there are.
        classes: whether its logits are of the classes of the data's labels.
        function: (params, uint8 [B, H, W, 3]) → (features [B, D], logits [B, V]); jitted here.
        mesh: the devices that a batch is spread over; None for the default device.
    """

    metadata: dict
    size: int
    classes: bool
    function: Callable
    params: dict
    mesh: Mesh | None = None

    def __post_init__(self):
        object.__setattr__(self, "params", place(self.mesh, self.params, self.params))
        object.__setattr__(self, "function", jax.jit(self.function))

    def __call__(self, images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, H, W, 3], n at most `batch_size` → (features [n, D], logits [n, V])."""
        found = self.function(self.params, spread_batch(self.mesh, padded(images, batch_size)))
        return tuple(np.asarray(x)[: len(images)] for x in found)


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """Those whose files were named; `perceptual`: (images, originals) → {"lpips": [B]}."""

    features: FeatureNetwork | None = None
    perceptual: Callable | None = None
    perceptual_metadata: dict | None = None

    @property
    def metadata(self) -> dict:
        features = self.features and self.features.metadata
        return {"features": features, "perceptual": self.perceptual_metadata}


def inception_network(path, mesh: Mesh | None = None) -> FeatureNetwork:
    """InceptionV3 as FID is defined with, of a published file; see `files.load_inception`."""
    params = files.load_inception(path)
    metadata = {"name": "inception", "description": "InceptionV3 of FID", **hashes(path, params)}
    return FeatureNetwork(metadata, inception.FEATURES, False, inception.features, params, mesh)


def perceptual_network(vgg, heads, mesh: Mesh | None = None) -> tuple[Callable, dict]:
    """LPIPS with VGG16 of published files, see `files.load_lpips`: (function, metadata)."""
    params = files.load_lpips(vgg, heads)
    metadata = {
        "name": "lpips",
        "vgg_sha256": storage.sha256(vgg),
        "heads_sha256": storage.sha256(heads),
        "parameters_sha256": storage.fingerprint(params),
    }
    params, distance = place(mesh, params, params), jax.jit(lpips.lpips)

    def function(*both):
        return {"lpips": distance(params, *spread_batch(mesh, both))[: len(both[0])]}

    return function, metadata


def hashes(path, params) -> dict:
    """The sha256 of a file, and of its parameters."""
    return {"file_sha256": storage.sha256(path), "parameters_sha256": storage.fingerprint(params)}
