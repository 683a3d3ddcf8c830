"""The weights of InceptionV3 from the file that a person names.

Published is `pt_inception-2015-12-05-6726825d.pth` (also as `weights-inception-...`), a PyTorch
file. Read are that, and safetensors files with tensors under the same names.
"""

from flextok_jax.io import weight_files
from flextok_jax.io.formats import names
from flextok_jax.nn import inception


def load(path) -> dict:
    """The parameters of `inception.features` as nested float32 NumPy arrays.

    The bias of the classifier is not used, as are counters that PyTorch's normalisation keeps.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a file that is not understood, or one error that lists every missing, unknown
            and misshapen tensor.
    """
    tensors = {
        name: tensor
        for name, tensor in weight_files.read(path).items()
        if name != "fc.bias" and not name.endswith(".bn.num_batches_tracked")
    }
    entries = list(names.entries(inception.shapes(), _name))
    problems = names.compare(entries, tensors)
    if problems:
        raise ValueError(f"{path} does not hold InceptionV3:\n  " + "\n  ".join(problems))
    return names.to_params(entries, tensors)


def _name(path: str) -> str:
    *modules, leaf = path.split("/")
    return ".".join([*modules, "weight" if leaf == "kernel" else leaf])
