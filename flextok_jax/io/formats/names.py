"""Parameter trees <-> tensors under the names of other projects' files, by tables."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from flextok_jax.nn.layout import path_string

# Tables: (our path or our module, as a regular expression; the file's name, to which a module's
# weight or bias is added). {i} is the index of a block, which we stack on a leading axis.
FLEXTOK = (
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
_LEAVES = {"kernel": "weight", "scale": "weight"}
# Names of the VAE's attention layers in old diffusers files.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Entry(NamedTuple):
    """One of our parameters, or one block of it, in a file."""

    name: str  # of the tensor
    path: str  # of our parameter, "a/b/c"
    block: int | None  # index on the parameter's leading axis, None: not stacked
    third: int | None  # of the tensor (0, 1, 2), None: all of it
    shape: tuple[int, ...]  # of the whole tensor
    axes: tuple[int, ...]  # the permutation of our axes in the file
    ones: int  # axes of size 1 before them


def linear(path: str, rank: int) -> tuple[tuple[int, ...], int]:
    """(axes, ones) of an `Entry`, of PyTorch: (in, out) -> (out, in), HWIO -> OIHW."""
    if path.endswith("kernel"):
        return ((1, 0) if rank == 2 else (3, 2, 0, 1)), 0
    return tuple(range(rank)), 0


def _layout(path: str, rank: int) -> tuple[tuple[int, ...], int]:
    """(axes, ones) of an `Entry` in the released format and in our own."""
    if path.endswith("sincos"):  # (rows, cols, D) -> (1, D, rows, cols)
        return (2, 0, 1), 1
    if path.endswith("register_pos"):  # (R, D) -> (1, 1, D, R)
        return (1, 0), 2
    if path == "ar/sos":  # (D,) -> (1, 1, D)
        return (0,), 2
    return linear(path, rank)


def _to_file(entry: Entry, array):
    return array.transpose(entry.axes)[(None,) * entry.ones]


def _from_file(entry: Entry, tensor):
    return tensor[(0,) * entry.ones].transpose(np.argsort(entry.axes))


def by_table(table) -> Callable[[str], str]:
    """Our path -> the name in the file, by a table as above."""

    def name(path: str) -> str:
        module, _, leaf = path.rpartition("/")
        for ours, theirs in table:
            if found := re.fullmatch(ours, path):
                return found.expand(theirs)
            if found := re.fullmatch(ours, module):
                return f"{found.expand(theirs)}.{_LEAVES.get(leaf, leaf)}"
        raise ValueError(f"the parameter {path!r} has no name in this format")

    return name


def by_dots(path: str) -> str:
    """Our path -> the name in the file, where ours are the same modules."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def vae_name(path: str) -> str:
    """A path in our VAE -> the diffusers name; there "_0" is ".0"."""
    return re.sub(r"_(\d+)\.", r".\1.", by_dots(path))


def flextok_name(path: str) -> str:
    """A path in {"vae", "encoder", "decoder"} -> the name in a FlexTok file."""
    if path.startswith("vae/"):
        return "vae.vae." + vae_name(path.removeprefix("vae/"))
    return by_table(FLEXTOK)(path)


def entries(params, name_of: Callable[[str], str], layout: Callable = _layout) -> list[Entry]:
    """Every parameter of a file.

    Args:
        params: our parameters, or their shapes.
        name_of: our path -> the name in the file; with {i} where blocks are stacked here, and
            "#0", "#1" or "#2" behind it for a third of a tensor (along its first axis).
        layout: (our path, number of axes) -> axes and ones of the entry.
    """
    found = []
    for path, leaf in flatten(params).items():
        name, _, third = name_of(path).partition("#")
        third, stacked = int(third) if third else None, "{i}" in name
        axes, ones = layout(path, len(leaf.shape) - stacked)
        shape = (*(1,) * ones, *(leaf.shape[stacked + axis] for axis in axes))
        if third is not None:
            shape = (3 * shape[0], *shape[1:])
        for i in range(leaf.shape[0]) if stacked else (None,):
            found.append(Entry(name.replace("{i}", str(i)), path, i, third, shape, axes, ones))
    return found


def flatten(params) -> dict:
    """A tree as {"a/b/c": leaf}."""
    import jax

    return {path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}


def not_finite(tensors: Mapping) -> list[str]:
    """A line for each tensor that holds NaN or infinity."""
    return [
        f"tensor {name} holds numbers that are not finite"
        for name, t in tensors.items()
        if t.dtype.kind not in "biu" and not np.isfinite(np.asarray(t, np.float32)).all()
    ]


def to_params(entries: list[Entry], tensors: Mapping, where, problems=(), dtype=np.float32) -> dict:
    """Tensors of a file -> nested NumPy parameters of `dtype`, blocks stacked.

    `tensors` may be lazy (`storage.Lazy`): each is read once, where they are understood.

    Raises:
        ValueError: one error for the file `where` lists the `problems` known before, and every
            missing, unknown and misshapen tensor and every one that is not finite.
    """
    wanted = {e.name: e.shape for e in entries}
    problems = [
        *problems,
        *(f"missing tensor {n} of shape {s}" for n, s in wanted.items() if n not in tensors),
        *(f"unknown tensor {n}" for n in tensors if n not in wanted),
        *(
            f"tensor {n} has shape {t.shape}, expected {wanted[n]}"
            for n, t in tensors.items()
            if wanted.get(n, t.shape) != t.shape
        ),
    ]
    if problems:
        problems += not_finite(tensors)
        raise ValueError(f"{where} is not understood:\n  " + "\n  ".join(problems))
    parts, stacked = {}, {e.path for e in entries if e.block is not None}
    for e in entries:
        tensor = np.asarray(tensors[e.name])
        problems += not_finite({e.name: tensor})
        tensor = tensor if e.third is None else np.split(tensor, 3)[e.third]
        tensor = np.ascontiguousarray(_from_file(e, tensor), dtype)
        parts.setdefault(e.path, []).append(tensor)
    if problems:
        lines = "\n  ".join(dict.fromkeys(problems))
        raise ValueError(f"{where} is not understood:\n  {lines}")
    flat = {}
    for path in list(parts):  # Of large models there is no room for all of them twice.
        x = parts.pop(path)
        flat[path] = np.stack(x) if path in stacked else x[0]
    return traverse_util.unflatten_dict(flat, sep="/")


def to_tensors(entries: list[Entry], params) -> dict:
    """Parameters -> contiguous tensors under the file's names, types kept.

    Raises:
        ValueError: one error lists every tensor that is not finite.
    """
    flat, parts = flatten(params), {}
    for e in entries:
        array = np.asarray(flat[e.path])
        array = _to_file(e, array if e.block is None else array[e.block])
        parts.setdefault(e.name, {})[e.third or 0] = array
    tensors = {
        name: np.ascontiguousarray(np.concatenate([x[i] for i in range(3)]) if len(x) > 1 else x[0])
        for name, x in parts.items()
    }
    if problems := not_finite(tensors):
        raise ValueError("the parameters cannot be saved:\n  " + "\n  ".join(problems))
    return tensors


def refused(found: dict, allowed: dict) -> list[str]:
    """A line for each option of a configuration file that has another value than is allowed."""
    return [
        f"{key}={found[key]!r}; implemented: {value!r}"
        for key, value in allowed.items()
        if found.get(key, value) != value
    ]


def modern(tensors: dict) -> dict:
    """Tensors under today's names.

    Old diffusers files call the attention's layers query, key, value and proj_attn; wrapped
    modules of training runs leave `_checkpoint_wrapped_module.` in names.
    """
    return {
        re.sub(
            r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
            lambda m: OLD_ATTENTION[m[1]],
            name.replace("_checkpoint_wrapped_module.", ""),
        ): tensor
        for name, tensor in tensors.items()
    }
