"""Parameter trees <-> tensors under the names of released FlexTok and diffusers files.

The table says where each of our parameters lies in a file; the file's shapes follow from ours. So
missing, extra and misshapen tensors come out of one comparison.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

from flextok_jax.nn.layout import path_string

# (our path, released name); {i} is the index of a block, which we stack on a leading axis.
FLEXTOK_NAMES = (
    ("encoder/patch_emb", "encoder.module_dict.enc_patch_emb.patch_proj"),
    ("encoder/sincos", "encoder.module_dict.enc_posemb_module.posembs"),
    ("encoder/registers", "encoder.module_dict.enc_register_module.registers"),
    ("encoder/blocks/(attn|mlp)/(w[qkv]|proj|fc[123])",
     r"encoder.module_dict.enc_transformer.blocks.{i}.\1.\2"),
    ("encoder/head", "encoder.module_dict.enc_to_latents.proj"),
    ("decoder/register_proj", "decoder.module_dict.dec_from_latents.proj"),
    ("decoder/register_pos", "decoder.module_dict.dec_registers_posemb_module.posembs"),
    ("decoder/mask", "decoder.module_dict.dec_nested_dropout.dropout_mask_token"),
    ("decoder/null", "decoder.module_dict.dec_latent_dropout.nullcond"),
    ("decoder/patch_emb", "decoder.module_dict.dec_noise_patch_emb.patch_proj"),
    ("decoder/sincos", "decoder.module_dict.dec_patches_posemb_module.posembs"),
    ("decoder/time_mlp_0", "decoder.module_dict.dec_time_embedder.mlp.0"),
    ("decoder/time_mlp_1", "decoder.module_dict.dec_time_embedder.mlp.2"),
    ("decoder/blocks/adaln", "decoder.module_dict.dec_transformer.blocks.{i}.adaLN_modulation.1"),
    ("decoder/blocks/(attn|mlp)/(w[qkv]|proj|fc[123])",
     r"decoder.module_dict.dec_transformer.blocks.{i}.\1.\2"),
    ("decoder/head_adaln", "decoder.module_dict.dec_to_patches.adaLN_modulation.1"),
    ("decoder/head", "decoder.module_dict.dec_to_patches.proj"),
)  # fmt: skip

# Names of the VAE's attention layers in old diffusers files.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: which part of which of our parameters it is.

    Attributes:
        name: the tensor's name in the file.
        path: our parameter, "a/b/c".
        block: index on the parameter's leading axis, None when it is not stacked.
        shape: the tensor's shape in the file.
    """

    name: str
    path: str
    block: int | None
    shape: tuple[int, ...]


def _to_file(path: str, array):
    """Our layout to the file's (works on arrays; shapes are taken from a dummy)."""
    if path.endswith("kernel"):  # Linear (in, out) -> (out, in); convolution HWIO -> OIHW
        return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    if path.endswith("sincos"):  # (rows, cols, D) -> (1, D, rows, cols)
        return array.transpose(2, 0, 1)[None]
    if path.endswith("register_pos"):  # (R, D) -> (1, 1, D, R)
        return array.T[None, None]
    if path == "ar/sos":  # (D,) -> (1, 1, D)
        return array[None, None]
    return array


def _from_file(path: str, tensor):
    """The inverse of `_to_file`."""
    if path.endswith("kernel"):
        return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)
    if path.endswith("sincos"):
        return tensor[0].transpose(1, 2, 0)
    if path.endswith("register_pos"):
        return tensor[0, 0].T
    if path == "ar/sos":
        return tensor[0, 0]
    return tensor


def vae_name(path: str) -> str:
    """Our VAE path (without the leading "vae/") -> the diffusers name."""
    *modules, leaf = path.split("/")
    leaf = "bias" if leaf == "bias" else "weight"
    return ".".join([re.sub(r"_(\d+)$", r".\1", m) for m in modules] + [leaf])


def _flextok_name(path: str) -> str:
    if path.startswith("vae/"):
        return "vae.vae." + vae_name(path.removeprefix("vae/"))
    module, _, leaf = path.rpartition("/")
    for ours, theirs in FLEXTOK_NAMES:
        if re.fullmatch(ours, path):
            return re.sub(ours, theirs, path)
        if leaf in ("kernel", "bias") and re.fullmatch(ours, module):
            return re.sub(ours, theirs, module) + (".weight" if leaf == "kernel" else ".bias")
    raise ValueError(f"the parameter {path!r} has no name in the released format")


def flextok_entries(params) -> Iterator[Entry]:
    """Every tensor of a FlexTok file, for parameters (or shapes) {"vae", "encoder", "decoder"}."""
    return entries(params, _flextok_name)


def vae_entries(params) -> Iterator[Entry]:
    """Every tensor of a diffusers AutoencoderKL file, for the parameters of a VAE."""
    return entries(params, vae_name)


def entries(params, name_of: Callable[[str], str]) -> Iterator[Entry]:
    """Every tensor of a file.

    Args:
        params: our parameters, or their shapes.
        name_of: our path -> the name in the file; with {i} where blocks are stacked here.
    """
    for path, leaf in flatten(params).items():
        name = name_of(path)
        if "{i}" not in name:
            yield Entry(name, path, None, file_shape(path, leaf.shape))
            continue
        for i in range(leaf.shape[0]):
            yield Entry(name.replace("{i}", str(i)), path, i, file_shape(path, leaf.shape[1:]))


def file_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file of the parameter at `path` (of one block of it)."""
    return _to_file(path, np.empty(shape, np.bool_)).shape if 0 not in shape else shape


def flatten(params) -> dict:
    """A tree as {"a/b/c": leaf}."""
    import jax

    return {path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten` for nested dicts."""
    tree = {}
    for path, leaf in flat.items():
        node = tree
        *modules, last = path.split("/")
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = leaf
    return tree


def compare(entries: list[Entry], tensors: dict) -> list[str]:
    """What is wrong with a file's tensors: one line for each missing, extra, misshapen one."""
    wanted = {e.name: e for e in entries}
    problems = [
        f"missing tensor {name} of shape {e.shape}"
        for name, e in wanted.items()
        if name not in tensors
    ]
    problems += [f"unknown tensor {name}" for name in tensors if name not in wanted]
    problems += [
        f"tensor {name} has shape {tuple(t.shape)}, expected {wanted[name].shape}"
        for name, t in tensors.items()
        if name in wanted and tuple(t.shape) != wanted[name].shape
    ]
    return problems


def to_params(entries: list[Entry], tensors: dict) -> dict:
    """Tensors (checked by `compare`) -> nested float32 NumPy parameters, blocks stacked."""
    parts = {}
    for e in entries:
        array = np.ascontiguousarray(_from_file(e.path, np.asarray(tensors[e.name], np.float32)))
        parts.setdefault(e.path, []).append((e.block, array))
    flat = {}
    for path, arrays in parts.items():
        stacked = arrays[0][0] is not None
        flat[path] = (
            np.stack([a for _, a in sorted(arrays, key=lambda x: x[0])])
            if stacked
            else (arrays[0][1])
        )
    return unflatten(flat)


def to_tensors(entries: list[Entry], params) -> dict:
    """Parameters -> contiguous tensors under the file's names, types kept."""
    flat = flatten(params)
    tensors = {}
    for e in entries:
        array = np.asarray(flat[e.path])
        array = array if e.block is None else array[e.block]
        tensors[e.name] = np.ascontiguousarray(_to_file(e.path, array))
    return tensors
