"""The networks that images are looked at with: one for features, one for perceptual distance.

Both come from files that a person names, and the numbers carry the files' hashes. A network that is
not there takes its metrics away, with one line that says so.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from flextok_jax.evaluation import digits_network
from flextok_jax.evaluation.pictures import from_uint8
from flextok_jax.interop import inception_files, lpips_files, tensor_file, weight_files
from flextok_jax.nn import inception, lpips

NO_FEATURES = (
    "FID, Inception score, precision and recall are left out: no feature network; name the file of "
    "the Inception network with --inception FILE"
)
NO_LPIPS = "LPIPS is left out: name its files with --lpips-vgg FILE --lpips-heads FILE"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network whose features are compared between sets of images.

    Attributes:
        about: for the stamp: its name, words, file and sha256.
        classes: how many classes its probabilities are of, 0: not those of the data's labels.
    """

    about: dict
    classes: int
    _call: Callable

    def __call__(self, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """uint8 [n, H, W, 3] -> "features" float32 [n, D], "logits" float32 [n, V]."""
        found = [self._call(part) for part in batches(images, batch_size)]
        features, logits = (np.concatenate(x)[: len(images)] for x in zip(*found))
        return {"features": features, "logits": logits}


def inception_network(path) -> FeatureNetwork:
    """InceptionV3 as FID is defined with, of a published file; see `inception_files.load`."""
    params = jax.device_put(inception_files.load(path))
    about = {"name": "inception", "words": "InceptionV3 of FID", **_hashes(path, params)}
    return FeatureNetwork(about, 0, lambda images: jax.device_get(_inception(params, images)))


def digits_features() -> FeatureNetwork:
    """The classifier of digits that comes with the package; see `digits_network`."""
    params = digits_network.parameters()

    def call(images):
        return jax.device_get(digits_network.features(params, from_uint8(images)))

    about = {
        "name": "digits",
        "words": "a small classifier of digits trained by this project, not the Inception network: "
        "compare them among models of these digits only",
        **_hashes(digits_network.FILE, params),
    }
    return FeatureNetwork(about, digits_network.CLASSES, call)


@dataclasses.dataclass(frozen=True, eq=False)
class Perceptual:
    """LPIPS with VGG16.

    Attributes:
        about: for the stamp.
        params: of `nn.lpips.lpips`.
    """

    about: dict
    params: dict

    def __call__(self, images: np.ndarray, originals: np.ndarray, batch_size: int) -> np.ndarray:
        """uint8 [n, H, W, 3] twice -> distance float64 [n]."""
        found = [
            np.asarray(_lpips(self.params, from_uint8(a), from_uint8(b)))
            for a, b in zip(batches(images, batch_size), batches(originals, batch_size))
        ]
        return np.concatenate(found)[: len(images)].astype(np.float64)


def perceptual_network(vgg, heads) -> Perceptual:
    """Of published files; see `lpips_files.load`."""
    params = jax.device_put(lpips_files.load(vgg, heads))
    about = {"name": "lpips", "vgg": _hashes(vgg, params), "heads": _hashes(heads, params)}
    return Perceptual(about, params)


def batches(array: np.ndarray, size: int):
    """Parts of `size` rows; the last is filled up with copies of its last row."""
    for first in range(0, len(array), size):
        part = array[first : first + size]
        yield np.pad(part, [(0, size - len(part))] + [(0, 0)] * (array.ndim - 1), mode="edge")


def _hashes(path, params) -> dict:
    """Of the file as it was published, where that can be told, and of what is computed with."""
    return {
        "file_sha256": weight_files.published_sha256(path),
        "parameters_sha256": tensor_file.fingerprint(params),
    }


_inception = jax.jit(inception.features)
_lpips = jax.jit(lpips.lpips)
