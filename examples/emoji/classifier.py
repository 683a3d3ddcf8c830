"""A small convolutional classifier of the emoji's nine groups, for 64 x 64 pixels.

It was trained on the training emoji of examples/emoji/make_data.py, slightly shifted, turned and
zoomed; its parameters are classifier.safetensors.

    python -m examples.emoji.classifier data/emoji OUT.safetensors      # trains it again
"""

import argparse
import csv
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from flextok_jax import load_images
from flextok_jax.data import transforms
from flextok_jax.io import storage
from flextok_jax.nn.images import to_float

SIDE, FEATURES = 64, 64
GROUPS = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
FILE = pathlib.Path(__file__).parent / "classifier.safetensors"
_STEPS, _BATCH, _RATE = 3000, 64, 2e-3
_AUGMENTED = transforms.Transform(SIDE, shift=4, rotate=10.0, zoom=0.1)


def arrays(folder, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The emoji of a folder made by make_data, in the order of its list.

    Args:
        folder: such as data/emoji.
        split: "train" or "validation".

    Returns:
        (uint8 [n, 64, 64, 3], groups int [n] into GROUPS, names: n).
    """
    folder = pathlib.Path(folder)
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["file_name"].split("/")[0] == split]
    images = load_images([folder / r["file_name"] for r in rows], SIDE)
    return images, np.array([GROUPS.index(r["label"]) for r in rows]), [r["caption"] for r in rows]


class _Network(nn.Module):
    """Images [B, 64, 64, 3] in [-1, 1] -> (features [B, 64], logits [B, 9])."""

    @nn.compact
    def __call__(self, x):
        for features in (16, 32, 64, 64):
            x = nn.Conv(features, (3, 3), 2)(x)
            x = nn.silu(nn.LayerNorm()(x))
        x = nn.silu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return x, nn.Dense(len(GROUPS))(x)


@functools.cache
def parameters() -> dict:
    """The parameters in FILE."""
    return traverse_util.unflatten_dict(storage.read(FILE)[0], sep="/")


@jax.jit
def features(params, images):
    """Features and logits of emoji.

    Args:
        params: `parameters()`.
        images: float [B, 64, 64, 3] in [-1, 1].

    Returns:
        (features float32 [B, 64], logits float32 [B, 9]).
    """
    return _Network().apply({"params": params}, images)


def groups(images: np.ndarray, params: dict | None = None) -> np.ndarray:
    """The group of each image.

    Args:
        images: uint8 [n, 64, 64, 3].
        params: None: those in FILE.

    Returns:
        int [n] into GROUPS.
    """
    params = parameters() if params is None else params
    parts = (images[i : i + 256] for i in range(0, len(images), 256))
    logits = [features(params, to_float(part))[1] for part in parts]
    return np.argmax(np.concatenate(logits), axis=1)


def train(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict:
    """AdamW on changed copies, a group as often as the root of its size: new parameters.

    Args:
        images: uint8 [n, 64, 64, 3].
        labels: int [n].
    """
    network = _Network()
    optimizer = optax.adamw(optax.cosine_decay_schedule(_RATE, _STEPS), weight_decay=5e-2)

    def loss(params, images, labels):
        _, logits = network.apply({"params": params}, images)
        labels = optax.smooth_labels(jax.nn.one_hot(labels, len(GROUPS)), 0.1)
        return optax.softmax_cross_entropy(logits, labels).mean()

    @jax.jit
    def step(params, state, images, labels):
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    params = network.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    state, rng = optimizer.init(params), np.random.RandomState(seed)
    # More than half of the emoji are people.
    weight = np.bincount(labels)[labels] ** -0.5
    for _ in range(_STEPS):
        rows = rng.choice(len(images), _BATCH, p=weight / weight.sum())
        draws = rng.random_sample((_BATCH, transforms.NUM_DRAWS))
        batch = to_float(_AUGMENTED.augment(images[rows], draws))
        params, state = step(params, state, batch, labels[rows])
    return params


def main() -> None:
    """Trains, writes the file, and prints the accuracy on the validation emoji by group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder made by examples.emoji.make_data")
    parser.add_argument("out", help="a new file.safetensors")
    args = parser.parse_args()
    params = train(*arrays(args.data, "train")[:2])
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    storage.write(pathlib.Path(args.out), flat, {})
    images, labels, _ = arrays(args.data, "validation")
    right = groups(images, params) == labels
    for number, name in enumerate(GROUPS):
        print(f"{right[labels == number].sum():4} of {(labels == number).sum():4}  {name}")
    print(f"{right.sum():4} of {len(right):4} validation emoji")


if __name__ == "__main__":
    main()
