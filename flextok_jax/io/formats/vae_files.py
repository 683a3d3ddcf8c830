"""VAE checkpoints in the diffusers AutoencoderKL layout: `config.json` and safetensors files.

The weights are one file, several with an index, or, where there is nothing else, in float16.
"""

import dataclasses
import re

import jax

from flextok_jax.io import sources, storage
from flextok_jax.io.formats import names, weights
from flextok_jax.io.paths import as_path
from flextok_jax.io.sources import VAE_HALF
from flextok_jax.io.sources import VAE_WEIGHTS as WEIGHTS
from flextok_jax.nn import vae
from flextok_jax.nn.vae_config import VAEConfig

_ALLOWED = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "latents_mean": None, "latents_std": None,
    "shift_factor": None,
}  # fmt: skip
_BLOCK = "encoder.down_blocks.{}.resnets.0.conv1.weight"
SCALING_FACTOR = 0.18215  # Of diffusers, for files that do not name it (Stable Diffusion's first).


def infer_layout(tensors: dict, known: VAEConfig, prefix: str = "") -> VAEConfig:
    """The VAE's configuration, by its tensors where those tell more than `known`.

    Args:
        tensors: name -> array, modern attention names.
        known: norm_groups, scaling_factor, sample_posterior.
        prefix: of the VAE's names among them.

    Raises:
        ValueError: the tensors are not those of an AutoencoderKL.
    """

    vae = {n.removeprefix(prefix): t.shape for n, t in tensors.items() if n.startswith(prefix)}
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", _BLOCK.format(0))
    for name in needed:
        if len(vae.get(name, ())) != 4:
            raise ValueError(f"no VAE: the tensor {prefix + name} of four dimensions is missing")
    blocks = [vae[name] for i in range(len(vae)) if (name := _BLOCK.format(i)) in vae]
    layer = r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight"
    return dataclasses.replace(
        known,
        in_channels=vae[needed[0]][1],
        latent_channels=vae[needed[1]][1],
        block_out=tuple(shape[0] for shape in blocks),
        layers_per_block=sum(bool(re.fullmatch(layer, name)) for name in vae),
        mid_attention="encoder.mid_block.attentions.0.to_q.weight" in vae,
        quant_conv="quant_conv.weight" in vae,
        post_quant_conv="post_quant_conv.weight" in vae,
    )


INDEX = f"{WEIGHTS}.index.json"


def load_folder(source, scaling_factor: float | None = None) -> tuple[VAEConfig, dict]:
    """A VAE folder or hub id -> (configuration, parameters as nested float32 NumPy arrays).

    Raises:
        FileNotFoundError: as `sources.find`, or there are no weights.
        ValueError: an option that is not implemented, or wrong tensors, all listed.
    """
    folder = sources.find(source, ("config.json",), (INDEX,))
    released = storage.read_json(folder / "config.json")
    factor = released.get("scaling_factor", SCALING_FACTOR)
    factor = factor if scaling_factor is None else scaling_factor
    problems = names.refused(released, _ALLOWED)
    if not isinstance(factor, int | float):
        problems.append(
            f"scaling_factor={factor!r}: set vae.scaling_factor (of a command: --scaling-factor)"
        )
    if problems:
        raise ValueError(f"{folder}/config.json: " + "; ".join(problems))
    known = VAEConfig(norm_groups=released.get("norm_num_groups", 32), scaling_factor=float(factor))
    files = (WEIGHTS, VAE_HALF)
    with weights.opened(source, folder, lambda name: True, files=files) as tensors:
        tensors = names.modern(tensors)
        cfg = infer_layout(tensors, known)
        shapes = jax.eval_shape(lambda key: vae.init_vae(cfg, key), jax.random.key(0))
        return cfg, names.to_params(names.entries(shapes, names.vae_name), tensors, folder)


def save_folder(folder, cfg: VAEConfig, params):
    """Writes a VAE as diffusers reads it; returns the path of its weights."""
    folder = as_path(folder)
    tensors = names.to_tensors(names.entries(params, names.vae_name), params)
    storage.write(folder / WEIGHTS, tensors, {"format": "pt"})
    levels = len(cfg.block_out)
    config = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(cfg.block_out),
        "down_block_types": ["DownEncoderBlock2D"] * levels, "in_channels": cfg.in_channels,
        "latent_channels": cfg.latent_channels, "layers_per_block": cfg.layers_per_block,
        "mid_block_add_attention": cfg.mid_attention, "norm_num_groups": cfg.norm_groups,
        "out_channels": cfg.in_channels, "scaling_factor": cfg.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": cfg.post_quant_conv, "use_quant_conv": cfg.quant_conv,
    }  # fmt: skip
    storage.write_json(folder / "config.json", config)
    return folder / WEIGHTS
