"""A small convolutional classifier of the digits: accuracy, and features in place of Inception's.

Trained here on the 1 500 training digits, slightly shifted, turned and zoomed; its parameters are
classifier.safetensors. Distances of its features compare models of these digits with each other,
and with nothing else.

    python -m examples.digits.classifier OUT.safetensors      # trains it again: half a minute
"""

import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from examples import image_folder
from examples.digits import arrays
from flextok_jax.data import transforms
from flextok_jax.evaluation import networks
from flextok_jax.io import storage
from flextok_jax.nn.images import to_float

SIDE, CLASSES, FEATURES = 16, 10, 64
FILE = pathlib.Path(__file__).parent / "classifier.safetensors"
_STEPS, _BATCH, _RATE = 3000, 64, 2e-3
_AUGMENTED = transforms.Transform(SIDE, shift=1, rotate=10.0, zoom=0.1)


class _Network(nn.Module):
    """Images [B, 16, 16, 3] in [-1, 1] -> (features [B, 64], logits [B, 10])."""

    @nn.compact
    def __call__(self, x):
        for features in (16, 32, 64):
            x = nn.silu(nn.Conv(features, (3, 3), 2)(x))
        x = nn.silu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return x, nn.Dense(CLASSES)(x)


@functools.cache
def parameters() -> dict:
    """The parameters in FILE."""
    return traverse_util.unflatten_dict(storage.read(FILE)[0], sep="/")


@jax.jit
def features(params, images):
    """Features and logits of digits.

    Args:
        params: `parameters()`.
        images: float [B, 16, 16, 3] in [-1, 1].

    Returns:
        (features float32 [B, 64], logits float32 [B, 10]).
    """
    return _Network().apply({"params": params}, images)


def folder() -> str:
    """The path of {train,test}/{0..9}/NNNN.png as in `digits.folder`, features NNNN.npy beside.

    These are [1, 64]: for models that are to know what an image shows.
    """
    return image_folder("digits_features", _with_features)


def _with_features():
    for split in ("train", "test"):
        images, labels = arrays(split)
        found = np.asarray(features(parameters(), to_float(images))[0])
        for i, (image, label) in enumerate(zip(images, labels)):
            path = f"{split}/{label}/{i:04d}"
            yield f"{path}.png", image
            yield f"{path}.npy", found[i : i + 1]


def correct(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image is classified as its label.

    Args:
        images: uint8 [n, 16, 16, 3].
        labels: int [n].

    Returns:
        bool [n].
    """
    _, logits = features(parameters(), to_float(images))
    return np.argmax(logits, axis=1) == labels


def feature_network(mesh=None) -> networks.FeatureNetwork:
    """The classifier for FID and its like; comparable among models of these digits only.

    Args:
        mesh: devices that a batch is cut over.
    """
    params = parameters()
    description = "a small classifier of digits trained by this project"
    metadata = {"name": "digits", "description": description, **networks.hashes(FILE, params)}

    def run(params, images):
        return features(params, to_float(images))

    return networks.FeatureNetwork(metadata, FEATURES, True, run, params, mesh)


def train(seed: int = 0) -> dict:
    """Adam on the training digits, shifted, turned and zoomed a little: new parameters."""
    digits, labels = arrays("train")
    network = _Network()
    rate = optax.cosine_decay_schedule(_RATE, _STEPS)
    optimizer = optax.adamw(rate, weight_decay=1e-2)

    def loss(params, images, labels):
        _, logits = network.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, images, labels):
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    params = network.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    state, rng = optimizer.init(params), np.random.RandomState(seed)
    for _ in range(_STEPS):
        rows = rng.randint(len(digits), size=_BATCH)
        draws = rng.random_sample((_BATCH, transforms.NUM_DRAWS))
        images = to_float(_AUGMENTED.augment(digits[rows], draws))
        params, state = step(params, state, images, labels[rows])
    return params


def main() -> None:
    """Trains, writes the file that is named, and prints the accuracy on the validation digits."""
    params = train()
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    storage.write(pathlib.Path(sys.argv[1]), flat, {})
    images, labels = arrays("test")
    _, logits = features(params, to_float(images))
    print(f"{np.sum(np.argmax(logits, 1) == labels)} of {len(labels)} validation digits")


if __name__ == "__main__":
    main()
