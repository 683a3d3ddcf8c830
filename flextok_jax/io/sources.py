"""Where models lie: a demo's name, a file, a folder, a workdir of ours, or a hub id."""

import pathlib
import re

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, is_remote

WEIGHTS = "model.safetensors"
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
OWN_TARGET = "flextok_jax.Tokenizer"  # Of tokenizers that the released format cannot hold.
AR_PREFIX = "models.ar_image_model."  # Of tensors in released AR files.
DEMOS = {"demo-digits": "digits", "demo-digits-ar": "digits_ar"}
DEMO_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "demos"
KINDS = {
    "tokenizer": "a tokenizer: load it with FlexTok.from_pretrained",
    "ar": "an AR model: load it with ImageGenerator.from_pretrained",
    "vae": "a VAE on its own: a tokenizer is trained with it (--config.vae.source)",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find(source, files=(WEIGHTS,), optional=(), revision: str | None = None):
    """The local file or folder of a source; a hub id is fetched (or found in the hub's cache).

    Args:
        source: see `FlexTok.from_pretrained`.
        files: what is needed of it.
        optional: what is fetched as well where it is there.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: nothing is there, or not all `files`; the message says what is there.
    """
    text = str(source)
    if text in DEMOS:
        return DEMO_FOLDER / DEMOS[text]
    path = as_path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a hub id, and {text} is a local path")
        # Not resolved: a hub cache links to files under other names.
        path = path if is_remote(path) else path.absolute()
        if path.is_dir() and not is_workdir(path):
            _check_complete(path, [p.name for p in path.iterdir()], files)
        return path
    if _HUB_ID.fullmatch(text) and not pathlib.Path(text).parent.is_dir():
        return _fetch(text, files, optional, revision)
    raise FileNotFoundError(
        f"{text}: no such file or folder. A model is a file, a folder, a workdir of training, a "
        f"hub id (owner/name) or one of the demos {', '.join(DEMOS)}"
    )


def weights_file(path):
    """`model.safetensors` of a folder, or the file itself.

    Raises:
        ValueError: the file is no safetensors file.
    """
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no safetensors file; convert a PyTorch file with PyTorch")
    return path


def is_workdir(path) -> bool:
    """Whether a folder is a workdir of training."""
    return (path / "checkpoints").is_dir()


def kind_of(source, revision: str | None = None) -> str | None:
    """What a source holds: "tokenizer", "ar", "vae", or None for anything else."""
    path = find(source, (), (WEIGHTS, "config.json", "config.yaml", VAE_WEIGHTS), revision)
    if is_workdir(path):
        file = path / "config.json"
        kind = (storage.read_json(file).get("model") or {}).get("kind") if file.is_file() else None
        return "tokenizer" if kind == "flextok" else kind
    if (path / VAE_WEIGHTS).is_file():
        return "vae"
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    tensors, metadata = storage.read_header(path)
    if any(name.startswith(AR_PREFIX) for name in tensors):
        return "ar"
    own = metadata.get("_target_") == OWN_TARGET
    return "tokenizer" if own or any("module_dict." in name for name in tensors) else None


def check_kind(path, kind: str) -> None:
    """Refuses a local source of another kind, saying what it is.

    Raises:
        ValueError: it holds another model.
    """
    found = kind_of(path)
    if found not in (kind, None):
        raise ValueError(f"{path} is {KINDS.get(found, repr(found))}")
    file = path / "config.json"
    if found is None and path.is_dir() and file.is_file():
        other = storage.read_json(file).get("model_type")  # As transformers names its models.
        if other is not None:
            raise ValueError(
                f"{path} is a model of the type {other!r}, not {KINDS[kind].split(':')[0]}"
            )


def _check_complete(where, there: list[str], files) -> None:
    missing = [name for name in files if name not in there]
    if missing:
        raise FileNotFoundError(f"{where} holds no {' and no '.join(missing)}: {_what(there)}")


def _what(there: list[str]) -> str:
    """What a folder with these files is, and what to do with it."""
    weights = [name for name in there if name.endswith(".safetensors")]
    indices = [name for name in there if name.endswith(".safetensors.index.json")]
    pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if "model_index.json" in there:
        return "it is a whole pipeline of diffusers; name the folder `vae` inside of it"
    if indices:
        return f"its weights are cut into several files ({indices[0]}); join them into one"
    if VAE_WEIGHTS in there:
        return "it is a VAE on its own"
    if weights:
        return f"it has {', '.join(sorted(weights)[:3])}; rename the file if that is meant"
    if pickles:
        return f"it has {pickles[0]}, which is not read; convert it to safetensors with PyTorch"
    return f"it has {', '.join(sorted(there)[:5])}" if there else "it is empty"


def _fetch(hub_id: str, files, optional, revision) -> pathlib.Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    trouble = None  # Network, rights, absence: known after one question; then only the cache.

    def fetch(name):
        nonlocal trouble
        if trouble is None:
            try:  # A download without a network would repeat this for a minute.
                address = hub.hf_hub_url(hub_id, name, revision=revision)
                hub.get_hf_file_metadata(address, timeout=10)
            except EntryNotFoundError:
                raise
            except Exception as error:
                trouble = error
        if trouble is None:
            return hub.hf_hub_download(hub_id, name, revision=revision)
        try:
            return hub.hf_hub_download(hub_id, name, revision=revision, local_files_only=True)
        except Exception:
            raise trouble from None

    found, problem = [], None
    for name in (*files, *optional):
        try:
            found.append(pathlib.Path(fetch(name)))
        except Exception as error:
            problem = error
            if name in files:
                if isinstance(error, EntryNotFoundError):
                    _check_complete(hub_id, hub.list_repo_files(hub_id, revision=revision), files)
                found = []
                break
    if found:
        return found[0].parent
    wanted = " with ".join(files) or WEIGHTS
    reason = (str(problem).strip() or repr(problem)).splitlines()[0]
    raise FileNotFoundError(
        f"{hub_id} is no local path, and {wanted} could not be fetched from the Hugging Face hub "
        f"and is not in its cache ({type(problem).__name__}: {reason}). Download it by hand into a "
        "folder, and pass that folder"
    ) from problem
