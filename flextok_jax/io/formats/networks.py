"""Networks that a person names files of: DINOv2, InceptionV3 (FID) and LPIPS.

Published are a folder (DINOv2) and PyTorch files:
`pt_inception-2015-12-05-6726825d.pth`, torchvision's `vgg16-397923af.pth` and
`weights/v0.1/vgg.pth` of the package lpips; or safetensors files with the same names. All
parameters are nested float32 NumPy arrays.

Every function raises FileNotFoundError where a file is not there, and ValueError for one that is
not understood, with a complete list of reasons.
"""

import re

import numpy as np

from flextok_jax.io import sources, storage
from flextok_jax.io.formats import names, torch_pickle
from flextok_jax.io.paths import as_path, local_copy
from flextok_jax.nn import dinov2, inception, layout, lpips

_DINOV2 = (
    ("cls", "embeddings.cls_token"),
    ("pos", "embeddings.position_embeddings"),
    ("patch_emb", "embeddings.patch_embeddings.projection"),
    ("blocks/attn/wq", "encoder.layer.{i}.attention.attention.query"),
    ("blocks/attn/wk", "encoder.layer.{i}.attention.attention.key"),
    ("blocks/attn/wv", "encoder.layer.{i}.attention.attention.value"),
    ("blocks/attn/proj", "encoder.layer.{i}.attention.output.dense"),
    ("blocks/scale_attn", "encoder.layer.{i}.layer_scale1.lambda1"),
    ("blocks/scale_mlp", "encoder.layer.{i}.layer_scale2.lambda1"),
    ("blocks/norm_([12])", r"encoder.layer.{i}.norm\1"),
    ("blocks/mlp/(fc[12])", r"encoder.layer.{i}.mlp.\1"),
    ("norm", "layernorm"),
)
_DINOV2_ALLOWED = {
    "model_type": "dinov2", "hidden_act": "gelu", "qkv_bias": True, "use_swiglu_ffn": False,
    "num_channels": 3,
}  # fmt: skip
_DINOV2_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"
)  # fmt: skip


def read(path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors or PyTorch file, name -> array."""
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return storage.read(path)[0]
    with local_copy(path) as local:
        return torch_pickle.read(local)


def load_inception(path) -> dict:
    """The parameters of `inception.features`."""
    unused = r"fc\.bias|.*\.bn\.num_batches_tracked"
    return _load(path, read(path), unused, inception.shapes(), names.by_dots)


def load_lpips(vgg, heads) -> dict:
    """The parameters of `lpips.lpips`, from the files of VGG16 and of the five linear heads."""
    tensors = read(vgg) | read(heads)
    return _load(f"{vgg} with {heads}", tensors, r"classifier\..*", lpips.shapes(), names.vae_name)


def load_dinov2(source) -> tuple[dinov2.DINOv2Config, dict]:
    """A DINOv2 (S, B, L without registers) and the parameters of `dinov2.patch_features`.

    Args:
        source: a folder with `config.json` and `model.safetensors`, or a hub id.
    """
    cfg, path = dinov2_config(source), _dinov2_folder(source) / sources.WEIGHTS
    name, unused = names.by_table(_DINOV2), r"embeddings\.mask_token"
    return cfg, _load(path, storage.read(path)[0], unused, layout.unbox(dinov2.shapes(cfg)), name)


def dinov2_config(source) -> dinov2.DINOv2Config:
    """The configuration of a DINOv2."""
    path = _dinov2_folder(source) / "config.json"
    found = storage.read_json(path)
    problems = names.refused(found, _DINOV2_ALLOWED)
    problems += [f"{k}={found.get(k)!r}" for k in _DINOV2_SIZES if type(found.get(k)) is not int]
    if problems:
        raise ValueError(f"{path} is no DINOv2 that we can read:\n  " + "\n  ".join(problems))
    width, depth, heads, image, patch = (found[key] for key in _DINOV2_SIZES)
    return dinov2.DINOv2Config(
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_hidden=int(width * found.get("mlp_ratio", 4)),
        patch_size=patch,
        grid=image // patch,
        norm_eps=found.get("layer_norm_eps", 1e-6),
    )


def _load(where, tensors: dict, unused: str, shapes, name_of) -> dict:
    tensors = {n: t for n, t in tensors.items() if not re.fullmatch(unused, n)}
    return names.to_params(names.entries(shapes, name_of), tensors, where)


def _dinov2_folder(source):
    return sources.find(source, files=(sources.WEIGHTS, "config.json"))
