"""DINOv2 from its published folders (facebook/dinov2-small, -base, -large): config and weights."""

import re

from flextok_jax.io import models, storage
from flextok_jax.io.formats import names
from flextok_jax.nn import dinov2
from flextok_jax.nn.dinov2 import DINOv2Config

CONFIG = "config.json"
# (our path, published name); {i} is the index of a block.
_NAMES = (
    (r"cls", "embeddings.cls_token"),
    (r"pos", "embeddings.position_embeddings"),
    (r"patch_emb/", "embeddings.patch_embeddings.projection."),
    (r"blocks/(query|key|value)/", r"encoder.layer.{i}.attention.attention.\1."),
    (r"blocks/proj/", "encoder.layer.{i}.attention.output.dense."),
    (r"blocks/scale([12])", r"encoder.layer.{i}.layer_scale\1.lambda1"),
    (r"blocks/(norm[12])/", r"encoder.layer.{i}.\1."),
    (r"blocks/(fc[12])/", r"encoder.layer.{i}.mlp.\1."),
    (r"norm/", "layernorm."),
)
_UNUSED = "embeddings.mask_token"  # For training it.


def config(source) -> DINOv2Config:
    """The configuration of a model.

    Args:
        source: a folder with `config.json` and `model.safetensors`, or a hub id.

    Raises:
        FileNotFoundError: a file is not there; the message says how to get it.
        ValueError: one error that lists every option that is missing or not implemented.
    """
    path = _folder(source) / CONFIG
    found = storage.read_json(path)
    problems = [
        f"{key}={found[key]!r}; implemented: {allowed!r}"
        for key, allowed in (
            ("model_type", "dinov2"),
            ("hidden_act", "gelu"),
            ("qkv_bias", True),
            ("use_swiglu_ffn", False),
            ("num_channels", 3),
        )
        if found.get(key, allowed) != allowed
    ]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    problems += [
        f"{key}={found.get(key)!r}; a positive integer is needed"
        for key in sizes
        if not (type(found.get(key)) is int and found[key] > 0)
    ]
    if problems:
        raise ValueError(f"{path} is no DINOv2 that we can read:\n  " + "\n  ".join(problems))
    width, depth, heads, image, patch = (found[key] for key in sizes)
    return DINOv2Config(
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_hidden=int(width * found.get("mlp_ratio", 4)),
        patch_size=patch,
        grid=image // patch,
        norm_eps=found.get("layer_norm_eps", 1e-6),
    )


def load(source) -> tuple[DINOv2Config, dict]:
    """(configuration, the parameters of `dinov2.patch_features` as nested float32 NumPy arrays).

    Raises:
        FileNotFoundError: as `config` does.
        ValueError: as `config` does, or one error that lists every missing, unknown and misshapen
            tensor.
    """
    cfg, path = config(source), _folder(source) / models.WEIGHTS
    tensors = {n: t for n, t in storage.read(path)[0].items() if n != _UNUSED}
    entries = list(names.entries(dinov2.shapes(cfg), _name))
    problems = names.compare(entries, tensors)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{path} does not hold the DINOv2 of its {CONFIG}:\n  {lines}")
    return cfg, names.to_params(entries, tensors)


def _folder(source):
    folder = models.resolve(source, files=(models.WEIGHTS, CONFIG), optional=())
    for name in (CONFIG, models.WEIGHTS):
        if not (folder / name).is_file():
            files = f"{CONFIG} and {models.WEIGHTS}"
            raise FileNotFoundError(f"{folder} holds no {name}: DINOv2 is a folder with {files}")
    return folder


def _name(path: str) -> str:
    for ours, theirs in _NAMES:
        match = re.match(ours, path)
        if match:
            leaf = path[match.end() :]
            return match.expand(theirs) + {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    raise ValueError(f"the parameter {path!r} has no name in published files")
