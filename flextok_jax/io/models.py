"""FlexTok models and VAEs from any source (see sources.py), and back into files."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np

from flextok_jax.io import sources, storage, workdirs
from flextok_jax.io.formats import flextok_config, names, peers, vae_files
from flextok_jax.io.formats.flextok_config import config_from_dict
from flextok_jax.io.paths import as_path
from flextok_jax.nn import flextok, layout
from flextok_jax.nn.config import from_dict
from flextok_jax.nn.tokenizer_config import TokenizerConfig
from flextok_jax.nn.vae_config import VAEConfig, identity_vae

IDENTITY = "identity"
NULL_TEXT = "null_text.npy"
TRAINED = ("encoder", "bottleneck", "decoder")  # The parts of a tokenizer beside its VAE.


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A FlexTok model and what its file must get back when it is saved again.

    Attributes:
        config: the model.
        params: {"vae", "encoder", "decoder"}, nested float32 NumPy arrays.
        metadata: the header of the file, None: to be made from `config`.
        origin: where it came from, in words.
        step: of training, None but for a workdir.
        workdir: the path of that, else None.
        null_text: float32 [T, E], of a file NULL_TEXT beside a peer's, None: there is none.
        teacher: of a distilled model, the sha256 over the parameters of the one it came from.
    """

    config: TokenizerConfig
    params: dict[str, Any]
    metadata: dict[str, str] | None = None
    origin: str = "memory"
    step: int | None = None
    workdir: Any = None
    teacher: str | None = None
    null_text: np.ndarray | None = None


def trained(params) -> dict:
    """The part of a tokenizer's parameters that its training changes."""
    return {name: params[name] for name in TRAINED if name in params}


@functools.lru_cache(maxsize=1)
def load_once(source: str) -> tuple[Loaded, str]:
    """`load`, and the sha256 over the parameters; the last one is kept in memory."""
    loaded = load(source)
    return loaded, storage.fingerprint(loaded.params)


def load(source, revision: str | None = None) -> Loaded:
    """Reads a FlexTok model from any source (see `FlexTok.from_pretrained`).

    Raises:
        FileNotFoundError: as `sources.find`.
        ValueError: it is another kind of model, or not understood; one error lists every reason.
    """
    optional = ("config.json", NULL_TEXT, *peers.FILES)
    path = sources.find(source, optional=optional, revision=revision)
    sources.check_kind(path, "tokenizer")
    if found := peers.find(path):
        file, read = found
        beside = file.parent / NULL_TEXT
        text = storage.read_array(beside) if beside.is_file() else None
        name = sources.name_of(source, path) or str(source)
        return Loaded(*read(file), origin=name, null_text=text)
    if sources.is_workdir(path):
        return _load_workdir(path)
    found, name = _load_file(sources.weights_file(path)), sources.name_of(source, path)
    return dataclasses.replace(found, origin=name) if name else found


def _load_file(path) -> Loaded:
    tensors, metadata = storage.read(path)
    if metadata.get("_target_") == sources.OWN_TARGET:
        cfg = config_from_dict(json.loads(metadata["config"]))
        params = names.to_params(_own_entries(cfg), tensors, path)
        teacher = metadata.get("teacher")
        return Loaded(cfg, {"vae": {}} | params, origin=str(path), teacher=teacher)
    tensors, config = names.modern(tensors), flextok_config.parse_metadata(metadata)
    if "encoder" not in config:
        beside = path.parent / "config.json"
        if not beside.is_file():
            raise ValueError(f"{path} has no configuration in its header or a config.json beside")
        config = storage.read_json(beside)
        metadata = {key: str(value) for key, value in config.items()}
    cfg, problems = flextok_config.read_config(config)
    if problems:
        raise ValueError(f"{path} is not understood:\n  " + "\n  ".join(problems))
    if cfg.vae.kind != IDENTITY:
        try:
            cfg = dataclasses.replace(cfg, vae=vae_files.infer_layout(tensors, cfg.vae, "vae.vae."))
        except ValueError as error:  # What the VAE should be is unknown: check all the others.
            problems = [str(error)]
            cfg = dataclasses.replace(cfg, vae=identity_vae(cfg.vae.latent_channels))
            tensors = {n: t for n, t in tensors.items() if not n.startswith("vae.")}
    params = {"vae": {}} | names.to_params(_entries(cfg), tensors, path, problems)
    return Loaded(cfg, params, metadata, str(path))


def _load_workdir(path) -> Loaded:
    exported, found = workdirs.load(path)
    cfg = config_from_dict(exported["config"])
    params = {n: x for n, x in found.params.items() if n in TRAINED}  # No projection of REPA.
    source, wanted = exported["vae_source"], exported.get("vae_fingerprint")
    params["vae"] = vae_params(source, cfg.vae)
    if wanted not in (None, storage.fingerprint(params["vae"])):
        raise ValueError(
            f"{path} was trained with another VAE than {source} is now: put that VAE back (sha256 "
            f"{wanted[:16]}…)"
        )
    return Loaded(
        cfg, params, origin=f"{path}, step {found.step}", step=found.step, workdir=path,
        teacher=exported.get("teacher_fingerprint"),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def shapes(cfg: TokenizerConfig):
    """The shapes of a model's parameters, without making them."""
    return layout.unbox(flextok.shapes(cfg))


def _entries(cfg: TokenizerConfig) -> list[names.Entry]:
    return names.entries(shapes(cfg), names.flextok_name)


def _own_entries(cfg: TokenizerConfig) -> list[names.Entry]:
    return names.entries(shapes(cfg), lambda path: path.replace("/blocks/", "/blocks/{i}/"))


def save(folder, model: Loaded):
    """Writes `model.safetensors`, released format where that can hold the model: its path."""
    path, cfg = as_path(folder) / sources.WEIGHTS, model.config
    if flextok_config.is_released(cfg):
        entries, config = _entries(cfg), flextok_config.write_config(cfg)
        metadata = model.metadata or {k: str(v) for k, v in config.items()}
    else:
        entries, config = _own_entries(cfg), json.dumps(dataclasses.asdict(cfg))
        metadata = {"_target_": sources.OWN_TARGET, "config": config}
        metadata |= {"teacher": model.teacher} if model.teacher else {}
    storage.write(path, names.to_tensors(entries, model.params), metadata)
    return path


def vae_config(source: str, scaling_factor: float | None = None) -> VAEConfig:
    """The configuration of the frozen VAE that `source` names ("identity", a folder, a hub id)."""
    return identity_vae() if source == IDENTITY else load_vae(source, scaling_factor)[0]


def vae_params(source: str, cfg: VAEConfig) -> dict:
    """The parameters of that VAE, {} for the identity; also of a tokenizer's VAE."""
    if source == IDENTITY:
        return {}
    if sources.kind_of(source) == "tokenizer":
        return load(source).params["vae"]
    found, params = load_vae(source, cfg.scaling_factor)
    if dataclasses.replace(found, sample_posterior=cfg.sample_posterior) != cfg:
        raise ValueError(f"the VAE at {source} is {found}; the model was made for {cfg}")
    return params


@functools.lru_cache(maxsize=1)
def load_vae(source: str, scaling_factor: float | None = None) -> tuple[VAEConfig, dict]:
    """A VAE: a workdir of the VAE stage, a folder in the diffusers layout, a tokenizer's, a hub id.

    Args:
        source: as text.
        scaling_factor: instead of the one that was measured (workdir) or recorded (folder).

    Returns:
        The configuration, and its parameters as nested float32 NumPy arrays.

    Raises:
        FileNotFoundError: as `sources.find`.
        ValueError: it is another kind of model, not understood, or has no scaling factor; or a
            tokenizer of pixels.
    """
    if sources.kind_of(source) == "tokenizer":
        cfg, params = (tokenizer := load(source)).config.vae, tokenizer.params["vae"]
        if cfg.kind == IDENTITY:
            raise ValueError(f"{source} is a tokenizer of pixels: it has no VAE")
        factor = cfg.scaling_factor if scaling_factor is None else scaling_factor
        return dataclasses.replace(cfg, scaling_factor=factor), params
    path = sources.find(source, ("config.json",))
    sources.check_kind(path, "vae")
    if not sources.is_workdir(path):
        return vae_files.load_folder(source, scaling_factor)
    exported, found = workdirs.load(path)
    factor = found.extra.get("scaling_factor") if scaling_factor is None else scaling_factor
    if factor is None:
        raise ValueError(
            f"{path}, step {found.step}, has no scaling factor: it is measured whenever a "
            "checkpoint is saved, but not on SIGTERM. Continue the run, or set vae.scaling_factor "
            "(of a command: --scaling-factor)"
        )
    cfg = from_dict(VAEConfig, exported["config"])
    return dataclasses.replace(cfg, scaling_factor=factor), found.params["vae"]


# What decides a VAE's moments, beside its parameters: not its scaling factor, nor whether the
# posterior is sampled, which come after them.
VAE_NETWORK = tuple(
    field.name
    for field in dataclasses.fields(VAEConfig)
    if field.name not in ("scaling_factor", "sample_posterior")
)


def vae_identity(cfg: VAEConfig, params) -> dict:
    """Which VAE made moments: the sha256 over its parameters, and its network."""
    network = {name: getattr(cfg, name) for name in VAE_NETWORK}
    return {"fingerprint": storage.fingerprint(params), **network}
