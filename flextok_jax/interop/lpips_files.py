"""The weights of LPIPS from the files that a person names: VGG16, and the linear heads.

Published files are PyTorch's: torchvision's `vgg16-397923af.pth` (features and classifier) and
`weights/v0.1/vgg.pth` of the package lpips (`lin0.model.1.weight`, ...). Read are those, and
safetensors files with tensors under the same names.
"""

import pathlib

import numpy as np

from flextok_jax.interop import names, tensor_file, torch_tensors
from flextok_jax.nn import lpips


def load(vgg, heads) -> dict:
    """The parameters of `lpips.lpips` as nested float32 NumPy arrays.

    Args:
        vgg: file of VGG16; its classifier, if there, is not used.
        heads: file of the five linear heads.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file that is not understood, or one error that lists every missing, unknown
            and misshapen tensor.
    """
    tensors = {n: t for n, t in _read(vgg).items() if not n.startswith("classifier.")}
    tensors |= _read(heads)
    entries = list(names.vae_entries(lpips.shapes()))
    problems = names.compare(entries, tensors)
    if problems:
        raise ValueError(f"{vgg} and {heads} are not LPIPS's weights:\n  " + "\n  ".join(problems))
    return names.to_params(entries, tensors)


def _read(path) -> dict[str, np.ndarray]:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a .safetensors or .pth file of LPIPS")
    if path.suffix == ".safetensors":
        return tensor_file.read(path)[0]
    return torch_tensors.read(path)
