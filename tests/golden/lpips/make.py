"""Makes the reference numbers of this folder, with PyTorch and the package lpips.

    pip install torch==2.13.0 lpips==0.1.4 safetensors scipy tqdm
    python tests/golden/lpips/make.py

io.safetensors: two batches of images, their distances, and what each of the five levels adds, by
the classes of the package lpips. VGG16 and heads are random, drawn by `random_weights` below from a
fixed seed instead of being stored. lpips takes VGG16's layers from torchvision, which is replaced
here by the same layers in plain torch, so the trunk is this file's and all else is the package's.

new.pth, old.pth: the same small tensors in both layouts of PyTorch's files.
"""

import pathlib
import sys

import numpy as np

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
HEADS = (64, 128, 256, 512, 512)


def random_weights() -> tuple[dict, dict]:
    """VGG16's features under torchvision's names, the heads under those of lpips; float32."""
    random, vgg, index, before = np.random.RandomState(0), {}, 0, 3
    for width in VGG16:
        if width == "M":
            index += 1
            continue
        std = np.sqrt(2 / (9 * before))
        vgg[f"features.{index}.weight"] = std * random.randn(width, before, 3, 3)
        vgg[f"features.{index}.bias"] = 0.1 * random.randn(width)
        index, before = index + 2, width
    heads = {f"lin{i}.model.1.weight": random.rand(1, n, 1, 1) for i, n in enumerate(HEADS)}
    return tuple({k: v.astype(np.float32) for k, v in d.items()} for d in (vgg, heads))


def vgg16_layers():
    """torchvision.models.vgg16().features"""
    from torch import nn

    layers, before = [], 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers)


def main():
    import types

    import torch
    from safetensors.numpy import save_file

    class Models(types.ModuleType):
        @staticmethod
        def vgg16(pretrained):
            return types.SimpleNamespace(features=vgg16_layers())

    torchvision = types.ModuleType("torchvision")
    torchvision.models = sys.modules["torchvision.models"] = Models("torchvision.models")
    sys.modules["torchvision"] = torchvision
    import lpips

    model = lpips.LPIPS(pretrained=False, pnet_rand=True, net="vgg", version="0.1", verbose=False)
    vgg, heads = random_weights()
    for name in model.net.state_dict():  # "slice1.0.weight" is "features.0.weight"
        tensor = torch.tensor(vgg["features." + name.split(".", 1)[1]])
        model.net.get_parameter(name).data = tensor
    for name, tensor in heads.items():
        getattr(model, name.split(".")[0]).model[1].weight.data = torch.tensor(tensor)

    random = np.random.RandomState(1)
    a = random.uniform(-1, 1, (3, 3, 32, 48)).astype(np.float32)
    b = np.clip(a + 0.3 * random.randn(*a.shape), -1, 1).astype(np.float32)
    b[1], b[2] = a[1], 0.5  # Equal images, and a plain one.
    with torch.no_grad():
        total, levels = model(torch.tensor(a), torch.tensor(b), retPerLayer=True)
    io = {
        "a": a,
        "b": b,
        "distance": total.flatten().numpy(),
        "levels": torch.stack([x.flatten() for x in levels]).numpy(),
    }
    here = pathlib.Path(__file__).parent
    save_file(io, here / "io.safetensors")

    grid = torch.arange(12.0).reshape(3, 4)
    small = {
        "weight": torch.nn.Parameter(grid),
        "transposed": grid.T,
        "part": grid[1:, 1:3],
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    state = torch.nn.Module().state_dict() | small  # An OrderedDict with its versions.
    torch.save(state, here / "new.pth")
    torch.save(state, here / "old.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
