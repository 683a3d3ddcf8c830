"""Makes the reference numbers of this folder, with PyTorch and transformers.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/dinov2/make.py

A small DINOv2 of random weights as transformers saves it (config.json, model.safetensors), and in
io.safetensors its patch features of the images that `images` draws: of the size it has positions
for, of a larger one that is not square, and of a smaller one.
"""

import pathlib

import numpy as np

SIZES = {"native": (70, 70), "larger": (98, 84), "smaller": (42, 56)}


def images() -> dict[str, np.ndarray]:
    """float32 [2, 3, H, W] in [-1, 1]."""
    random = np.random.RandomState(0)
    return {
        name: random.uniform(-1, 1, (2, 3, *size)).astype(np.float32)
        for name, size in SIZES.items()
    }


def main():
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    here, random = pathlib.Path(__file__).parent, np.random.RandomState(1)
    Dinov2Model(config).save_pretrained(here)
    weights = load_file(here / "model.safetensors")
    for name in sorted(weights):
        shape = weights[name].shape
        one = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1"))
        std = np.sqrt(1 / np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name else 0.5
        weights[name] = (one + std * random.randn(*shape)).astype(np.float32)
    save_file(weights, here / "model.safetensors", {"format": "pt"})

    model = Dinov2Model.from_pretrained(here).eval()
    mean, std = (
        torch.tensor(x).reshape(1, 3, 1, 1)
        for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # its image processor's
    )
    with torch.no_grad():
        io = {
            name: model(((torch.tensor(x) + 1) / 2 - mean) / std).last_hidden_state[:, 1:].numpy()
            for name, x in images().items()
        }
    save_file({name: np.ascontiguousarray(x) for name, x in io.items()}, here / "io.safetensors")


if __name__ == "__main__":
    main()
