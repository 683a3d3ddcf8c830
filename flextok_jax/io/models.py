"""Where models come from: a demo's name, a file, a folder, a workdir of ours, or a hub id."""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.formats import flextok_config, names, vae_files
from flextok_jax.nn import flextok
from flextok_jax.nn.config import FlexTokConfig, VAEConfig, identity_vae

WEIGHTS = "model.safetensors"
DEMOS = {"demo-digits": "digits", "demo-digits-ar": "digits_ar"}
DEMO_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "demos"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A FlexTok model and all that its file must get back when it is saved again.

    Attributes:
        config: the model.
        params: {"vae", "encoder", "decoder"}, nested float32 NumPy arrays.
        metadata: the header of the file as it was, None: to be made from `config`.
        config_json: the text of the `config.json` that held the configuration, or None.
        renamed: {tensor name: name in the file} where they differ.
        origin: where it came from, in words.
        step: of training, None but for a workdir.
    """

    config: FlexTokConfig
    params: dict[str, Any]
    metadata: dict[str, str] | None = None
    config_json: str | None = None
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    origin: str = "memory"
    step: int | None = None


def load(source) -> Loaded:
    """Reads a FlexTok model from any source (see `FlexTok.from_pretrained`).

    Raises:
        FileNotFoundError: nothing is there; the message says how to get it.
        ValueError: what is there is not understood; one error lists every reason.
    """
    path = resolve(source)
    if (path / "checkpoints").is_dir():
        return _load_workdir(path)
    found = _load_released(path / WEIGHTS if path.is_dir() else path)
    return dataclasses.replace(found, origin=source) if source in DEMOS else found


def resolve(source, files=(WEIGHTS,), optional=("config.json",)) -> pathlib.Path:
    """The local file or folder of a source; a hub id is fetched (or found in the hub's cache)."""
    text = str(source)
    path = pathlib.Path(source).expanduser()
    if text in DEMOS:
        return DEMO_FOLDER / DEMOS[text]
    if path.exists():
        return path.absolute()  # Not resolved: a hub cache links to files under other names.
    if _HUB_ID.fullmatch(text) and not text.startswith("."):
        return _fetch(text, files, optional)
    raise FileNotFoundError(
        f"{text!r} is no file, no folder, no hub id (owner/name) and no demo ({', '.join(DEMOS)})"
    )


def _fetch(hub_id: str, files, optional) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = None
    for name in (*optional, *files):
        try:
            path = pathlib.Path(huggingface_hub.hf_hub_download(hub_id, name))
        except Exception as error:  # network, rights, absence: the remedy is the same
            if name in optional and isinstance(error, EntryNotFoundError | LocalEntryNotFoundError):
                continue
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise FileNotFoundError(
                f"{hub_id} is no local path, could not be fetched from the Hugging Face hub, and "
                f"{name} is not in its local cache ({type(error).__name__}: {reason}). Download "
                f"{' and '.join(files)} by hand from the hub's page of {hub_id} into "
                "a folder, and pass that folder's path instead"
            ) from error
    return path.parent


def _load_released(path: pathlib.Path) -> Loaded:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. A FlexTok model is a folder with {WEIGHTS}, such a file, or a "
            "workdir of training with a folder `checkpoints`"
        )
    tensors, metadata = storage.read(path)
    tensors, renamed = vae_files.modern_names(tensors)
    config_json = None
    config = flextok_config.parse_metadata(metadata)
    if "encoder" not in config:
        beside = path.parent / "config.json"
        if not beside.is_file():
            raise ValueError(
                f"{path} has no configuration in its metadata and there is no config.json beside it"
            )
        config = storage.read_json(beside)
        config_json = beside.read_text(encoding="utf-8")
    cfg, problems = flextok_config.read_config(config)
    if cfg is not None:
        cfg, problems, entries = _check_tensors(cfg, tensors)
    if problems:
        raise ValueError(f"{path} is not understood:\n  " + "\n  ".join(problems))
    params = names.to_params(entries, tensors)
    params.setdefault("vae", {})
    return Loaded(cfg, params, metadata, config_json, renamed, str(path))


def _check_tensors(cfg: FlexTokConfig, tensors):
    """The configuration with the VAE's layout, every problem, and the table of tensors."""
    if cfg.vae.kind != "identity":
        try:
            layout = vae_files.infer_layout(
                tensors,
                "vae.vae.",
                norm_groups=cfg.vae.norm_groups,
                scaling_factor=cfg.vae.scaling_factor,
                sample_posterior=cfg.vae.sample_posterior,
            )
            if layout.latent_channels != cfg.vae.latent_channels:
                raise ValueError(
                    f"the VAE's tensors have {layout.latent_channels} latent channels, the "
                    f"configuration says {cfg.vae.latent_channels}"
                )
        except ValueError as error:  # What the VAE should be is unknown: check all the others.
            entries = [e for e in _entries(cfg) if not e.name.startswith("vae.")]
            others = {n: t for n, t in tensors.items() if not n.startswith("vae.")}
            return cfg, [str(error), *names.compare(entries, others)], []
        cfg = dataclasses.replace(cfg, vae=layout)
    entries = _entries(cfg)
    return cfg, names.compare(entries, tensors), entries


def _entries(cfg: FlexTokConfig) -> list[names.Entry]:
    """The table of the tensors of a model's file."""
    return list(names.flextok_entries(shapes(cfg)))


@functools.lru_cache(maxsize=8)
def shapes(cfg: FlexTokConfig):
    """The shapes of a model's parameters, without making them."""
    return jax.eval_shape(lambda key: flextok.init(cfg, key), jax.random.key(0))


def save(folder, model: Loaded) -> pathlib.Path:
    """Writes `model.safetensors` in the released format; returns its path."""
    tensors = names.to_tensors(_entries(model.config), model.params)
    tensors = {model.renamed.get(name, name): tensor for name, tensor in tensors.items()}
    metadata = model.metadata
    if metadata is None:
        metadata = {k: str(v) for k, v in flextok_config.write_config(model.config).items()}
    path = pathlib.Path(folder) / WEIGHTS
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{folder} is a file: pass a folder")
    storage.write(path, tensors, metadata)
    if model.config_json is not None:
        with storage.atomic(path.parent / "config.json") as temporary:
            temporary.write_text(model.config_json, encoding="utf-8")
    return path


def _load_workdir(path: pathlib.Path) -> Loaded:
    from flextok_jax.io import checkpoint

    params, _, step = checkpoint.restore_ema(path)
    about, cfg = _about(path, "flextok", config_from_dict)
    params = {name: params[name] for name in ("encoder", "decoder")}  # No projection of REPA.
    params["vae"] = vae_params(about["vae_source"], cfg.vae)
    fingerprint = storage.fingerprint(params["vae"])
    if about.get("vae_fingerprint", fingerprint) != fingerprint:
        raise ValueError(
            f"{path} was trained with another VAE than {about['vae_source']} is now: its sha256 is "
            f"{fingerprint[:16]}…, not {about['vae_fingerprint'][:16]}…. Put the VAE back as it "
            "was (before a VAE is trained further, `flextok convert` keeps a copy)"
        )
    params = jax.tree.map(np.asarray, params)
    return Loaded(cfg, params, origin=f"{path}, step {step}", step=step)


def _about(path: pathlib.Path, kind: str, config_of):
    """What a workdir's `config.json` says about its model of this kind, and its configuration."""
    file = path / "config.json"
    try:
        about = storage.read_json(file)["model"]
        if about["kind"] != kind:
            raise ValueError(f"{path} holds a model of kind {about['kind']!r}, not {kind!r}")
        return about, config_of(about["config"])
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a model of this project: {error}") from error


def config_from_dict(fields: dict) -> FlexTokConfig:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    return FlexTokConfig(**_tuples(fields) | {"vae": _vae_from_dict(fields["vae"])})


def _vae_from_dict(fields: dict) -> VAEConfig:
    return VAEConfig(**_tuples(fields))


def _tuples(fields: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


IDENTITY = "identity"
MEASURED = "eval/latents/scaling_factor"  # Where the VAE stage logs it.


def vae_config(source: str, scaling_factor: float | None = None) -> VAEConfig:
    """The configuration of the frozen VAE that `source` names ("identity", a folder, a hub id)."""
    return identity_vae() if source == IDENTITY else load_vae(source, scaling_factor)[0]


def vae_params(source: str, cfg: VAEConfig) -> dict:
    """The parameters of that VAE, {} for the identity."""
    if source == IDENTITY:
        return {}
    found, params = load_vae(source, cfg.scaling_factor)
    if dataclasses.replace(found, sample_posterior=cfg.sample_posterior) != cfg:
        raise ValueError(f"the VAE at {source} is {found}; the model was made for {cfg}")
    return params


@functools.lru_cache(maxsize=1)
def load_vae(source: str, scaling_factor: float | None = None) -> tuple[VAEConfig, dict]:
    """A VAE on its own: a workdir of the VAE stage, a folder in the diffusers layout, a hub id.

    Args:
        source: as text.
        scaling_factor: instead of the one that was measured (workdir) or recorded (folder).

    Returns:
        The configuration, and its parameters as nested float32 NumPy arrays.

    Raises:
        FileNotFoundError: nothing is there; the message says how to get it.
        ValueError: what is there is not understood, or has no scaling factor.
    """
    path = resolve(source, files=(vae_files.WEIGHTS, "config.json"), optional=())
    if not (path / "checkpoints").is_dir():
        return vae_files.load_folder(path, scaling_factor)
    from flextok_jax.io import checkpoint

    _, cfg = _about(path, "vae", _vae_from_dict)
    params, _, step = checkpoint.restore_ema(path)
    if scaling_factor is None:
        scaling_factor = _measured(path / "metrics.jsonl", step)
    return dataclasses.replace(cfg, scaling_factor=scaling_factor), params["vae"]


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


def is_vae(source) -> bool:
    """Whether a local source is a VAE on its own, as `load_vae` reads it."""
    path = pathlib.Path(source).expanduser()
    if (path / "checkpoints").is_dir() and (path / "config.json").is_file():
        return storage.read_json(path / "config.json").get("model", {}).get("kind") == "vae"
    return (path / vae_files.WEIGHTS).is_file()


def _measured(log: pathlib.Path, step: int) -> float:
    """The scaling factor that a VAE's workdir measured last, not after the checkpoint's step."""
    found = None
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # A line that a crash cut short.
        if record["step"] <= step:
            found = record.get(MEASURED) or found
    if found is None:
        raise ValueError(
            f"{log} holds no {MEASURED} up to step {step}: it is measured with each evaluation and "
            "at the end of a run. Finish the run, or set the factor (vae.scaling_factor)"
        )
    return found
