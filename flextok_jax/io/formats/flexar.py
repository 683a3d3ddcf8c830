"""FlexAR files: tensors under the released names <-> our parameters, and models from any source.

A released folder has `model.safetensors` and `config.yaml`. What the tensors do not say (head size,
epsilon, guidance) is in `config.yaml`; where that is missing, REFERENCE section 9 has the values.
Files of this project hold the whole configuration in the header of `model.safetensors`.
"""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np

from flextok_jax.io import models, storage
from flextok_jax.io.formats import flexar_config, names
from flextok_jax.nn import ar
from flextok_jax.nn.config import ARConfig

CONFIG = "config.yaml"
METADATA = "flextok_jax.ar"  # The key of our entry in the file's header.
SKIPPED = ("models.image_tokenizer.", "models.text_encoder.t5_embedder.")
MODEL = "models.ar_image_model."
BLOCK = MODEL + "trunk.blocks.{i}."
# Guidance of released models whose configuration does not name it.
GUIDANCE_TEXT, GUIDANCE_CLASS = 3.0, 1.5

# (our path, released name); {i} is the index of a block. Kernels of the self-attention's wq, wk, wv
# are the thirds of one tensor; "/q" and so on stand for them.
NAMES = (
    ("ar/embed", MODEL + "preprocessor.embedding.weight"),
    ("ar/pos", MODEL + "preprocessor.positional_embedding"),
    ("ar/sos", MODEL + "preprocessor.sos_token_embed"),
    ("ar/classes", MODEL + "preprocessor.cls_embedding.weight"),
    ("ar/blocks/attn/w([qkv])/kernel", BLOCK + r"ATTN.qkv.weight/\1"),
    ("ar/blocks/attn/proj/kernel", BLOCK + "ATTN.proj.weight"),
    ("ar/blocks/attn/([qk]_norm)/scale", BLOCK + r"ATTN.\1.weight"),
    ("ar/blocks/cross/w([qkv])/kernel", BLOCK + r"cross_attn.W\1.weight"),
    ("ar/blocks/cross/proj/kernel", BLOCK + "cross_attn.proj.weight"),
    ("ar/blocks/cross/([qk]_norm)/scale", BLOCK + r"cross_attn.\1.weight"),
    ("ar/blocks/mlp/(fc[123])/kernel", BLOCK + r"mlp.\1.weight"),
    ("ar/blocks/(norm_[123])/scale", BLOCK + r"\1.weight"),
    ("ar/norm/scale", MODEL + "trunk.post_trunk_norm.weight"),
    ("ar/head/kernel", MODEL + "head.linear.weight"),
    ("ar/text_(fc[12])/kernel", r"models.text_encoder.mlp.\1.weight"),
)


@dataclasses.dataclass(frozen=True)
class LoadedAR:
    """An AR model and all that its file must get back when it is saved again.

    Attributes:
        config: the model.
        params: {"ar": …}, nested float32 NumPy arrays.
        about: further facts of our own files in JSON terms ("tokenizer": what made the tokens).
        config_yaml: the text of the released `config.yaml`, or None.
        origin: where it came from, in words.
        step: of training, None but for a workdir.
    """

    config: ARConfig
    params: dict[str, Any]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_yaml: str | None = None
    origin: str = "memory"
    step: int | None = None


def load(source) -> LoadedAR:
    """Reads an AR model from any source (see `ImageGenerator.from_pretrained`).

    Raises:
        FileNotFoundError: nothing is there; the message says how to get it.
        ValueError: what is there is not understood; one error lists every reason.
    """
    path = models.resolve(source, optional=(CONFIG,))
    if (path / "checkpoints").is_dir():
        return _load_workdir(path)
    found = _load_file(path / models.WEIGHTS if path.is_dir() else path)
    return dataclasses.replace(found, origin=source) if source in models.DEMOS else found


def is_ar(source) -> bool:
    """Whether a source is an AR model (see `load`).

    Raises:
        FileNotFoundError, ValueError: nothing readable is there.
    """
    path = models.resolve(source, optional=(CONFIG,))
    if (path / "checkpoints").is_dir():
        about = path / "config.json"
        kind = storage.read_json(about).get("model", {}).get("kind") if about.is_file() else ""
        return kind == "ar"
    path = path / models.WEIGHTS if path.is_dir() else path
    names_there = storage.read_header(path)[0] if path.is_file() else ()
    return any(name.startswith(MODEL) for name in names_there)


def save(folder, model: LoadedAR) -> pathlib.Path:
    """Writes `model.safetensors` under the released names, and the `config.yaml` it came with."""
    path = pathlib.Path(folder) / models.WEIGHTS
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{folder} is a file: pass a folder")
    tensors = _join(names.to_tensors(_entries(model.config), model.params))
    about = model.about | {"config": dataclasses.asdict(model.config)}
    storage.write(path, tensors, {METADATA: json.dumps(about)})
    if model.config_yaml is not None:
        with storage.atomic(path.parent / CONFIG) as temporary:
            temporary.write_text(model.config_yaml, encoding="utf-8")
    return path


def _load_file(path: pathlib.Path) -> LoadedAR:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. An AR model is a folder with {models.WEIGHTS}, such a file, "
            "or a workdir of training with a folder `checkpoints`"
        )
    tensors, metadata = storage.read(path)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(SKIPPED)}
    beside = path.parent / CONFIG
    text = beside.read_text(encoding="utf-8") if beside.is_file() else None
    about, problems = {}, []
    if METADATA in metadata:
        try:
            about = json.loads(metadata[METADATA])
            cfg = ARConfig(**about.pop("config"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: its header's {METADATA!r} is damaged: {error}") from error
    else:
        facts = {}
        if text is not None:
            facts, problems = flexar_config.read(text, beside)
        cfg, more = _infer(tensors, facts)
        problems += more
    if cfg is not None:
        entries = _entries(cfg)
        problems += names.compare(_file_entries(entries), tensors)
    if problems:
        raise ValueError(f"{path} is not understood:\n  " + "\n  ".join(problems))
    params = names.to_params(entries, _split(tensors))
    return LoadedAR(cfg, params, about, text, str(path))


def _load_workdir(path: pathlib.Path) -> LoadedAR:
    from flextok_jax.io import checkpoint

    params, _, step = checkpoint.restore_ema(path)
    about_file = path / "config.json"
    try:
        about = dict(storage.read_json(about_file)["model"])
        if about["kind"] != "ar":
            raise ValueError(f"{path} holds a model of kind {about['kind']!r}, not an AR model")
        cfg = ARConfig(**about.pop("config"))
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"{about_file} does not describe a model of this project: {error}"
        ) from error
    del about["kind"]
    params = jax.tree.map(np.asarray, params)
    return LoadedAR(cfg, params, about, origin=f"{path}, step {step}", step=step)


def _infer(tensors, facts: dict) -> tuple[ARConfig | None, list[str]]:
    """The configuration that names and shapes say, with the `facts` of a configuration file.

    Returns:
        (the configuration or None, what stands in its way)
    """

    def shape(name, rank):
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != rank:
            found = "is missing" if tensor is None else f"has shape {tensor.shape}"
            problems.append(f"tensor {name} {found}: it tells the model's sizes")
            return (0,) * rank
        return tensor.shape

    problems = []
    vocab, width = shape(MODEL + "preprocessor.embedding.weight", 2)
    length, _ = shape(MODEL + "preprocessor.positional_embedding", 2)
    hidden, _ = shape(BLOCK.format(i=0) + "mlp.fc1.weight", 2)
    pattern = re.escape(BLOCK).replace(re.escape("{i}"), r"(\d+)") + ".*"
    blocks = {int(m[1]) for m in (re.fullmatch(pattern, name) for name in tensors) if m}
    optional = {
        name: tensors[full].shape
        for name, full in (
            ("classes", MODEL + "preprocessor.cls_embedding.weight"),
            ("text", "models.text_encoder.mlp.fc1.weight"),
            ("q_norm", BLOCK.format(i=0) + "attn.q_norm.weight"),
            ("q_norm", BLOCK.format(i=0) + "self_attn.q_norm.weight"),
        )
        if full in tensors and tensors[full].ndim == (1 if name == "q_norm" else 2)
    }
    if problems:
        return None, problems
    text_hidden, text_dim = optional.get("text", (0, 0))
    fields = {
        "vocab_size": vocab,
        "num_tokens": length,
        "width": width,
        "depth": max(blocks) + 1,
        "mlp_hidden": hidden,
        "num_classes": optional.get("classes", (0,))[0],
        "text_dim": text_dim,
        "text_hidden": text_hidden,
        "qk_norm": "q_norm" in optional,
        "guidance_scale": GUIDANCE_TEXT if text_dim else GUIDANCE_CLASS,
    }
    if "q_norm" in optional:
        fields["head_dim"] = optional["q_norm"][0]
    facts = dict(facts)
    if "num_heads" in facts:
        facts["head_dim"] = width // max(1, facts.pop("num_heads"))
    fields["guidance_scale"] = facts.pop("guidance_scale", fields["guidance_scale"])
    for name, value in facts.items():
        if fields.setdefault(name, value) != value:
            problems.append(f"{CONFIG} says {name}={value!r}, the tensors say {fields[name]!r}")
    try:
        return ARConfig(**fields), problems
    except ValueError as error:
        return None, [*problems, str(error)]


@functools.lru_cache(maxsize=8)
def shapes(cfg: ARConfig):
    """The shapes of a model's parameters, without making them."""
    return jax.eval_shape(lambda key: ar.init(cfg, key), jax.random.key(0))


def _entries(cfg: ARConfig) -> list[names.Entry]:
    """The table of a model's tensors, the thirds of a fused one apart."""
    attn = "self_attn" if cfg.text_dim else "attn"

    def name(path):
        ours, theirs = next((o, t) for o, t in NAMES if re.fullmatch(o, path))
        return re.sub(ours, theirs, path).replace("ATTN", attn)

    return list(names.entries(shapes(cfg), name))


def _file_entries(entries: list[names.Entry]) -> list[names.Entry]:
    """The table of the tensors as they lie in the file: thirds are one tensor."""
    whole = [e for e in entries if "/" not in e.name]
    for e in entries:
        if e.name.endswith("/q"):
            shape = (3 * e.shape[0], *e.shape[1:])
            whole.append(dataclasses.replace(e, name=e.name.removesuffix("/q"), shape=shape))
    return whole


def _split(tensors: dict) -> dict:
    """Fused tensors [q | k | v] as three, "NAME/q" and so on."""
    parts = {n: t for n, t in tensors.items() if not n.endswith(".qkv.weight")}
    for name in tensors.keys() - parts.keys():
        for part, tensor in zip("qkv", np.split(tensors[name], 3)):
            parts[f"{name}/{part}"] = tensor
    return parts


def _join(parts: dict) -> dict:
    """The inverse of `_split`."""
    tensors = {n: t for n, t in parts.items() if "/" not in n}
    for name in parts:
        if name.endswith("/q"):
            name = name.removesuffix("/q")
            tensors[name] = np.concatenate([parts[f"{name}/{part}"] for part in "qkv"])
    return tensors
