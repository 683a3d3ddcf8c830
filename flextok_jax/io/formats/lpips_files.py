"""The weights of LPIPS from the files that a person names: VGG16, and the linear heads.

Published files are PyTorch's: torchvision's `vgg16-397923af.pth` (features and classifier) and
`weights/v0.1/vgg.pth` of the package lpips (`lin0.model.1.weight`, ...). Read are those, and
safetensors files with tensors under the same names.
"""

from flextok_jax.io import weight_files
from flextok_jax.io.formats import names
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
    tensors = {n: t for n, t in weight_files.read(vgg).items() if not n.startswith("classifier.")}
    tensors |= weight_files.read(heads)
    entries = list(names.vae_entries(lpips.shapes()))
    problems = names.compare(entries, tensors)
    if problems:
        raise ValueError(f"{vgg} and {heads} are not LPIPS's weights:\n  " + "\n  ".join(problems))
    return names.to_params(entries, tensors)
