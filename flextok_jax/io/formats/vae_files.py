"""VAE checkpoints in the diffusers AutoencoderKL layout: `config.json` and one safetensors file."""

import json
import pathlib
import re

import jax

from flextok_jax.io import storage
from flextok_jax.io.formats import names
from flextok_jax.nn import vae
from flextok_jax.nn.config import VAEConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def infer_layout(tensors: dict, prefix: str = "", **known) -> VAEConfig:
    """The VAE's configuration from the names and shapes of its tensors.

    Args:
        tensors: name -> array, modern attention names.
        prefix: of the VAE's names among them.
        known: fields that shapes do not tell (norm_groups, scaling_factor, sample_posterior).

    Raises:
        ValueError: the tensors are not those of an AutoencoderKL.
    """

    def shape(name):
        if prefix + name not in tensors:
            raise ValueError(f"no VAE: the tensor {prefix + name} is missing")
        shape = tensors[prefix + name].shape
        if len(shape) != 4:
            raise ValueError(f"no VAE: {prefix + name} has shape {shape}, expected four dimensions")
        return shape

    def count(pattern):
        found = (re.fullmatch(re.escape(prefix) + pattern, name) for name in tensors)
        return 1 + max((int(m[1]) for m in found if m), default=-1)

    blocks = count(r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    layout = VAEConfig(
        in_channels=shape("encoder.conv_in.weight")[1],
        latent_channels=shape("decoder.conv_in.weight")[1],
        block_out=tuple(
            shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(blocks)
        ),
        layers_per_block=count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        mid_attention=prefix + "encoder.mid_block.attentions.0.to_q.weight" in tensors,
        quant_conv=prefix + "quant_conv.weight" in tensors,
        post_quant_conv=prefix + "post_quant_conv.weight" in tensors,
        **known,
    )
    if not blocks or any(width % layout.norm_groups for width in layout.block_out):
        raise ValueError(
            f"no VAE: {layout.norm_groups} groups of its norms must divide the widths of its "
            f"blocks, {layout.block_out}"
        )
    return layout


def modern_names(tensors: dict) -> tuple[dict, dict[str, str]]:
    """Tensors under today's names, and {today's name: name in the file} where they differ.

    Old diffusers files call the attention's layers query, key, value and proj_attn; wrapped
    modules of training runs leave `_checkpoint_wrapped_module.` in names.

    Raises:
        ValueError: a tensor is there under both names.
    """
    renamed, out = {}, {}
    for name, tensor in tensors.items():
        modern = name.replace("_checkpoint_wrapped_module.", "")
        modern = re.sub(
            r"(attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}{names.OLD_ATTENTION[m[2]]}.",
            modern,
        )
        if modern in out:
            raise ValueError(f"the tensor {modern} is there twice, under an old and a new name")
        if modern != name:
            renamed[modern] = name
        out[modern] = tensor
    return out, renamed


def params_of(cfg: VAEConfig, tensors: dict, where) -> dict:
    """Checked parameters of a VAE.

    Raises:
        ValueError: one error that lists every missing, unknown and misshapen tensor.
    """
    shapes = jax.eval_shape(lambda key: vae.init_vae(cfg, key), jax.random.key(0))
    entries = list(names.vae_entries(shapes))
    problems = names.compare(entries, tensors)
    if problems:
        raise ValueError(f"{where} is not a VAE we can read:\n  " + "\n  ".join(problems))
    return names.to_params(entries, tensors)


def load_folder(folder, scaling_factor: float | None = None) -> tuple[VAEConfig, dict]:
    """A VAE folder -> (configuration, parameters as nested float32 NumPy arrays).

    Args:
        folder: holds `config.json` and `diffusion_pytorch_model.safetensors`.
        scaling_factor: overrides the one in `config.json`.

    Raises:
        ValueError: a missing scaling factor, an unsupported option, wrong tensors.
        FileNotFoundError: a missing file.
    """
    folder = pathlib.Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: a VAE needs config.json and {WEIGHTS}"
            )
    released = storage.read_json(folder / "config.json")
    problems = [
        f"{key}={released[key]!r}; implemented: {allowed!r}"
        for key, allowed in (
            ("_class_name", "AutoencoderKL"),
            ("act_fn", "silu"),
            ("latents_mean", None),
            ("latents_std", None),
            ("shift_factor", None),
        )
        if released.get(key, allowed) != allowed
    ]
    if problems:
        raise ValueError(f"{folder}/config.json: " + "; ".join(problems))
    scaling_factor = released.get("scaling_factor") if scaling_factor is None else scaling_factor
    if scaling_factor is None:
        raise ValueError(
            f"{folder}/config.json names no scaling_factor: set it in the config "
            "(vae.scaling_factor)"
        )
    tensors, _ = modern_names(storage.read(folder / WEIGHTS)[0])
    cfg = infer_layout(
        tensors,
        norm_groups=released.get("norm_num_groups", 32),
        scaling_factor=float(scaling_factor),
    )
    return cfg, params_of(cfg, tensors, folder / WEIGHTS)


def save_folder(folder, cfg: VAEConfig, params) -> pathlib.Path:
    """Writes a VAE as diffusers reads it, its scaling factor included; returns the weights' path.

    Raises:
        ValueError: the identity VAE, or `folder` is a file.
    """
    folder = pathlib.Path(folder)
    if cfg.kind == "identity":
        raise ValueError("the identity VAE has no file: it is no network")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass a folder")
    tensors = names.to_tensors(list(names.vae_entries(params)), params)
    storage.write(folder / WEIGHTS, tensors, {"format": "pt"})
    with storage.atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(_diffusers_config(cfg), indent=2) + "\n", encoding="utf-8")
    return folder / WEIGHTS


def _diffusers_config(cfg: VAEConfig) -> dict:
    """The `config.json` of diffusers' AutoencoderKL."""
    levels = len(cfg.block_out)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(cfg.block_out),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": cfg.in_channels,
        "latent_channels": cfg.latent_channels,
        "layers_per_block": cfg.layers_per_block,
        "mid_block_add_attention": cfg.mid_attention,
        "norm_num_groups": cfg.norm_groups,
        "out_channels": cfg.in_channels,
        "scaling_factor": cfg.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": cfg.post_quant_conv,
        "use_quant_conv": cfg.quant_conv,
    }
