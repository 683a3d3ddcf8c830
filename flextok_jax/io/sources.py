"""Where models lie: a demo's name, a file, a folder, a workdir of ours, or a hub id."""

import pathlib
import re

from flextok_jax.io import hub, storage
from flextok_jax.io.formats import peers
from flextok_jax.io.paths import as_path, is_remote, reached, resolved

WEIGHTS = "model.safetensors"
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE_HALF = "diffusion_pytorch_model.fp16.safetensors"
OWN_TARGET = "flextok_jax.Tokenizer"  # Of tokenizers that the released format cannot hold.
AR_PREFIX = "models.ar_image_model."  # Of tensors in released AR files.
DEMOS = {
    "demo-emoji": "emoji",
    "demo-emoji-ar": "emoji_ar",
    "demo-emoji-t2i": "emoji_t2i",
    "demo-digits": "digits",
    "demo-digits-ar": "digits_ar",
}
DEMO_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "demos"
_NAME = r"[\w-][\w.-]*"
# Without a revision only a file may follow: owner/name/folder is taken for a path of this machine.
_HUB = re.compile(
    rf"(?P<id>{_NAME}/[\w.-]+)"
    rf"(/(?P<file>[\w.-]+\.\w+)|@(?P<revision>{_NAME})(/(?P<inside>{_NAME}(/{_NAME})*))?)?"
)
KINDS = {
    "tokenizer": "a tokenizer: load it with FlexTok.from_pretrained",
    "ar": "an AR model: load it with ImageGenerator.from_pretrained",
    "vae": "a VAE on its own: a tokenizer is trained with it (--config.vae.source)",
}
# What a folder is that holds such a file, and what to do.
_OTHERS = {
    r"model_index\.json": "a whole pipeline of diffusers: name the folder `vae` inside of it (of a "
    "hub id: owner/name@main/vae)",
    rf"{re.escape(VAE_WEIGHTS)}(\.index\.json)?": "a VAE on its own",
    r".*\.safetensors\.index\.json": "a model in several files: join them into one",
    re.escape(WEIGHTS): "another kind of model than a VAE",
    re.escape(VAE_HALF): "a VAE on its own, in half precision",
    r"diffusion_pytorch_model\..+\.safetensors": f"a VAE in another precision: rename it to "
    f"{VAE_WEIGHTS}",
    r".*\.safetensors": "a model under another name: rename the file if that is meant",
    r".*\.(bin|pt|pth|ckpt)": "a PyTorch file: convert it to safetensors with PyTorch",
}


def find(source, files=(WEIGHTS,), optional=(), revision: str | None = None):
    """The local file or folder of a source; a hub id is fetched (or found in the hub's cache).

    Args:
        source: see `FlexTok.from_pretrained`.
        files: what is needed of it.
        optional: what is fetched as well where it is there.
        revision: branch, tag or commit of a hub id that names none itself (owner/name@REVISION).

    Raises:
        FileNotFoundError: nothing is there, or not all `files`; the message says what is there.
        ValueError: a revision of a local path, two revisions, a file of another kind, or a bucket
            that does not answer.
    """
    text = str(source)
    if found := _on_hub(text):
        if revision and found["revision"]:
            raise ValueError(f"{text} names a revision already: leave out revision={revision!r}")
        inside = found["file"] or found["inside"] or ""
        alone = re.search(r"\.[A-Za-z]\w*$", inside)
        wanted = [inside] if alone else [f"{inside}/{n}".lstrip("/") for n in (*files, *optional)]
        path = _fetch(found["id"], wanted, revision or found["revision"]) / inside
        if files and not path.exists():
            raise FileNotFoundError(f"{text}: the repository holds no {' and no '.join(wanted)}")
    else:
        path = DEMO_FOLDER / DEMOS[text] if text in DEMOS else reached(as_path(source))
        if not path.exists():
            raise FileNotFoundError(
                f"{text}: no such file or folder. A model is a file, a folder, a workdir of "
                "training, a hub id (owner/name, owner/name@REVISION, owner/name/FILE or owner/name"
                f"@REVISION/FOLDER) or one of the demos {', '.join(DEMOS)}"
            )
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for a hub id, and {text} is local")
        # Not resolved: a hub cache links to files under other names.
        path = path if is_remote(path) else path.absolute()
    if (fault := _fault(path, files)) and not peers.find(path):
        raise fault
    return path


def _on_hub(text: str) -> re.Match | None:
    """The parts of a hub id; None of what is local, or looks like it."""
    if text in DEMOS or reached(as_path(text)).exists() or pathlib.Path(text).parent.is_dir():
        return None
    return _HUB.fullmatch(text)


def is_public(source) -> bool:
    """Whether others have it too: a demo, or a hub id."""
    return str(source) in DEMOS or bool(_on_hub(str(source)))


def name_of(source, path) -> str | None:
    """A name for where a model came from; None: nothing names it better than its path.

    Args:
        source: as a person gave it.
        path: where `find` found it.

    Returns:
        A demo's name, or a hub id with the commit, owner/name@COMMIT: a source of these very files.
    """
    text = str(source)
    if text in DEMOS:
        return text
    if not (found := _on_hub(text)):
        return None
    commit = re.search(r"/snapshots/([0-9a-f]{40})", path.as_posix())
    parts = [f"{found['id']}@{commit[1]}" if commit else found["id"]]
    parts += [found["file"] or found["inside"]]
    return "/".join(filter(None, parts))


def pinned(source) -> str:
    """A source for records: a hub id with its commit, a path of this machine from any folder."""
    text = str(source)
    if _on_hub(text):
        return name_of(text, find(text, (), ("config.json",)))
    path = as_path(text)
    return str(resolved(path)) if path.exists() and text not in DEMOS else text


def _fault(path, files) -> Exception | None:
    """Why a path is no source of these files, but for tokenizers of other projects."""
    if path.is_file() and path.suffix != ".safetensors":
        return ValueError(f"{path} is no safetensors file; convert a PyTorch file with PyTorch")
    if path.is_dir() and not is_workdir(path):
        there = sorted(p.name for p in path.iterdir())
        if missing := [name for name in files if name not in there]:
            return FileNotFoundError(f"{path} holds no {' and no '.join(missing)}: {_what(there)}")
    return None


def _what(there: list[str]) -> str:
    for pattern, what in _OTHERS.items():
        if found := [name for name in there if re.fullmatch(pattern, name)]:
            return f"its {found[0]} is of {what}"
    return f"it has {', '.join(there[:5])}" if there else "it is empty"


def _fetch(hub_id: str, files: list[str], revision: str | None) -> pathlib.Path:
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=files)
        )
    except Exception as error:  # Network, rights, absence: of many types.
        raise FileNotFoundError(
            f"{hub_id} is no local path, and cannot be fetched from the Hugging Face hub "
            f"({hub.reason(error)}). Check the name, or download {' and '.join(files)} by hand and "
            "pass their folder"
        ) from error


def weights_file(path):
    """`model.safetensors` of a folder, or the file itself."""
    return path / WEIGHTS if path.is_dir() else path


def is_local(source) -> bool:
    """Whether a source is a demo or a path that exists: no hub id."""
    return str(source) in DEMOS or reached(as_path(source)).exists()


def is_workdir(path) -> bool:
    """Whether a folder is a workdir of training."""
    return (path / "checkpoints").is_dir()


def kind_of(source) -> str | None:
    """What a source holds: "tokenizer", "ar", "vae", another `model_type`, or None: unknown."""
    path = find(source, (), (WEIGHTS, "config.json", "config.yaml", VAE_WEIGHTS, *peers.FILES))
    file = path / "config.json"
    config = storage.read_json(file) if file.is_file() else {}
    if is_workdir(path):
        kind = (config.get("model") or {}).get("kind")
        return "tokenizer" if kind == "flextok" else kind
    if (path / VAE_WEIGHTS).is_file() or config.get("_class_name") == "AutoencoderKL":
        return "vae"
    if peers.find(path):
        return "tokenizer"
    path = weights_file(path)
    if path.is_file():
        tensors, metadata = storage.read_header(path)
        if any(name.startswith(AR_PREFIX) for name in tensors):
            return "ar"
        own = metadata.get("_target_") == OWN_TARGET
        if own or any("module_dict." in name for name in tensors):
            return "tokenizer"
    return config.get("model_type")  # As transformers names its models.


def check_kind(path, kind: str) -> None:
    """Raises ValueError where a local source holds another kind of model, saying which."""
    found = kind_of(path)
    if found not in (kind, None):
        raise ValueError(f"{path} is {KINDS.get(found, f'a model of the type {found!r}')}")
