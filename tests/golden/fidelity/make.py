"""Makes the reference numbers of this folder, with PyTorch and the package torch-fidelity.

    pip install torch==2.13.0 numpy tqdm pillow safetensors
    pip install --no-deps torch-fidelity==0.4.0
    python tests/golden/fidelity/make.py

io.safetensors: what torch-fidelity's InceptionV3 makes of random images with random weights, and
its metrics of random features. Weights, images and features are drawn by the functions below and
not stored. torch-fidelity imports torchvision for its data sets and transforms; none is used here,
so empty modules stand in for it.
"""

import pathlib
import sys
import types
import zlib

import numpy as np

EVERY = 13  # Of the pixels of resized images, along both axes.


def random_tensor(name: str, shape) -> np.ndarray:
    """A weight of InceptionV3, float32: what is drawn depends on its name and shape only."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) > 1:
        std = np.sqrt(2 / np.prod(shape[1:]))
        return (std * random.randn(*shape)).astype(np.float32)
    return (0.1 * random.randn(*shape)).astype(np.float32)


def images() -> dict[str, np.ndarray]:
    """uint8 [B, 3, H, W]: smaller and larger than the network's 299 x 299 pixels."""
    random = np.random.RandomState(0)

    def draw(*shape):
        return random.randint(0, 256, shape).astype(np.uint8)

    return {"small": draw(2, 3, 32, 48), "large": draw(1, 3, 400, 310)}


def features() -> dict[str, np.ndarray]:
    """float64: of `real` and of `made` images, of `few` images (less than features), and logits."""
    random = np.random.RandomState(1)
    mix = random.randn(24, 24)
    return {
        "real": random.randn(150, 24) @ mix,
        "made": 0.8 * random.randn(120, 24) @ mix + 0.3,
        "few": random.randn(10, 24) @ mix,
        "logits": 3 * random.randn(103, 12),
    }


def fidelity():
    """The package, without torchvision."""
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
    datasets, transforms = (sys.modules[f"torchvision.{x}"] for x in ("datasets", "transforms"))
    datasets.CIFAR10 = datasets.CIFAR100 = datasets.STL10 = object
    transforms.functional = sys.modules["torchvision.transforms.functional"]
    import torch_fidelity

    return torch_fidelity


def inception(names, folder):
    """torch-fidelity's extractor of the features `names`, with the weights above."""
    import torch

    kind = fidelity().FeatureExtractorInceptionV3

    class Random(kind):
        def load_state_dict(self, _):  # Called when it is made, with what the file holds.
            for name, tensor in self.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    tensor.copy_(torch.tensor(random_tensor(name, tuple(tensor.shape))))

    path = pathlib.Path(folder) / "empty.pth"
    torch.save({}, path)
    return Random("inception", list(names), feature_extractor_weights_path=str(path))


def main():
    import tempfile

    import torch
    from safetensors.numpy import save_file

    io = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = inception(("2048", "logits_unbiased"), folder)
        from torch_fidelity import interpolate_compat_tensorflow as resize

        for name, batch in images().items():
            batch = torch.tensor(batch)
            pool, logits = model(batch)
            io |= {f"{name}_features": pool.numpy(), f"{name}_logits": logits.numpy()}
            resized = resize.interpolate_bilinear_2d_like_tensorflow1x(
                batch.float(), size=(299, 299), align_corners=False
            )
            io[f"{name}_resized"] = np.ascontiguousarray(resized.numpy()[..., ::EVERY, ::EVERY])

    from torch_fidelity import metric_fid, metric_isc, metric_prc

    given = {name: torch.tensor(x) for name, x in features().items()}
    for name in ("made", "few"):
        both = [metric_fid.fid_features_to_statistics(given[x]) for x in ("real", name)]
        (value,) = metric_fid.fid_statistics_to_metric(*both, False).values()
        io[f"fid_{name}"] = np.float64([value])
    score = metric_isc.isc_features_to_metric(given["logits"])
    io["inception_score"] = np.float64(list(score.values()))
    pr = metric_prc.calculate_precision_recall_full(given["made"], given["real"])
    io["precision_recall"] = np.float64(pr)
    save_file(io, pathlib.Path(__file__).parent / "io.safetensors")


if __name__ == "__main__":
    main()
