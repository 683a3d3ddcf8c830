"""FlexAR files: tensors under the released names <-> our parameters, and models from any source.

In a released folder tensors tell the sizes and the kinds of norm and MLP, `config.yaml` the head
size, epsilon and guidance. Files of this project hold the whole configuration in their header.
"""

import dataclasses
import json
import re
from typing import Any

from flextok_jax.io import sources, storage, workdirs
from flextok_jax.io.formats import flexar_config, names, t5
from flextok_jax.io.paths import as_path
from flextok_jax.nn import ar, layout
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import from_dict
from flextok_jax.nn.t5 import T5Config

CONFIG = "config.yaml"
METADATA = "flextok_jax.ar"  # The key of our entry in the file's header.
SKIPPED = ("models.image_tokenizer.", "models.text_encoder.t5_embedder.")
T5_PREFIX = "models.text_encoder.t5_embedder.model."  # Of a text encoder trained with the model.
MODEL = sources.AR_PREFIX
BLOCK = MODEL + "trunk.blocks.{i}."
TEXT_FC1 = "models.text_encoder.mlp.fc1.weight"
# Guidance of released models whose configuration does not name it.
GUIDANCE_TEXT, GUIDANCE_CLASS = 3.0, 1.5

# See names.py. The self-attention's wq, wk, wv are the thirds of one tensor.
NAMES = (
    ("ar/embed", MODEL + "preprocessor.embedding.weight"),
    ("ar/pos", MODEL + "preprocessor.positional_embedding"),
    ("ar/sos", MODEL + "preprocessor.sos_token_embed"),
    ("ar/classes", MODEL + "preprocessor.cls_embedding.weight"),
    ("ar/blocks/attn/wq/kernel", BLOCK + "attn.qkv.weight#0"),
    ("ar/blocks/attn/wk/kernel", BLOCK + "attn.qkv.weight#1"),
    ("ar/blocks/attn/wv/kernel", BLOCK + "attn.qkv.weight#2"),
    ("ar/blocks/attn/(proj|[qk]_norm)", BLOCK + r"attn.\1"),
    ("ar/blocks/cross/w([qkv])", BLOCK + r"cross_attn.W\1"),
    ("ar/blocks/cross/(proj|[qk]_norm)", BLOCK + r"cross_attn.\1"),
    ("ar/blocks/mlp/(fc[123])", BLOCK + r"mlp.\1"),
    ("ar/blocks/(norm_[123])", BLOCK + r"\1"),
    ("ar/((?:un)?fold)/(proj|norm)", MODEL + r"\1.\2"),
    ("ar/((?:un)?fold)/mlp/(fc[123])", MODEL + r"\1.mlp.\2"),
    ("ar/norm", MODEL + "trunk.post_trunk_norm"),
    ("ar/head", MODEL + "head.linear"),
    ("ar/text_(fc[12])", r"models.text_encoder.mlp.\1"),
)
# Of our own files: the network of a flow, and a second Transformer with the same names below its.
NAMES += (
    ("ar/blocks/adaln", BLOCK + "adaLN_modulation.1"),
    ("ar/(token_proj|time_mlp_[01]|head_adaln)", MODEL + r"flow.\1"),
)
SECOND = tuple(
    (ours.replace("ar/", f"ar/{part}/"), re.sub(r"^models\.\w+\.", f"{MODEL}{part}.", theirs))
    for part in ("refiner", "source")
    for ours, theirs in NAMES
)


@dataclasses.dataclass(frozen=True)
class LoadedAR:
    """An AR model and all that its file must get back when it is saved again.

    Attributes:
        config: the model.
        params: {"ar": …}, and {"text_encoder": …} where one was trained with it; nested float32
            NumPy arrays.
        info: further facts in JSON terms: "tokenizer" (its "source" and "fingerprint"),
            "text_encoder" (the "source", and "max_length" of prompts; of one inside the file its
            "config" and the text of its tokenizer.json, "tokenizer"), "decoding" (of images: some
            of "steps", "guidance_scale" and "norm_guidance").
        config_yaml: the text of the released `config.yaml`, or None.
        origin: where it came from, in words.
        step: of training, None but for a workdir.
        workdir: the path of that, else None.
        assumed: fields of the configuration that no file says.
    """

    config: ARConfig
    params: dict[str, Any]
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_yaml: str | None = None
    origin: str = "memory"
    step: int | None = None
    workdir: Any = None
    assumed: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(source, revision: str | None = None) -> LoadedAR:
    """Reads an AR model from any source (see `ImageGenerator.from_pretrained`).

    Raises:
        FileNotFoundError: as `sources.find`.
        ValueError: it is another kind of model, or not understood; one error lists every reason.
    """
    path = sources.find(source, optional=(CONFIG,), revision=revision)
    sources.check_kind(path, "ar")
    if sources.is_workdir(path):
        info, found = workdirs.load(path)
        cfg, origin = from_dict(ARConfig, info["config"]), f"{path}, step {found.step}"
        info = {name: x for name, x in info.items() if name not in ("kind", "config")}
        return LoadedAR(cfg, found.params, info, None, origin, found.step, path)
    found, name = _load_file(sources.weights_file(path)), sources.name_of(source, path)
    return dataclasses.replace(found, origin=name) if name else found


def save(folder, model: LoadedAR):
    """Writes `model.safetensors` under the released names, and the `config.yaml` it came with."""
    path = as_path(folder) / sources.WEIGHTS
    tensors = names.to_tensors(_entries(model.config), model.params)
    if (inside := text_encoder_config(model.info)) is not None:
        text = names.to_tensors(t5.entries(inside), model.params["text_encoder"])
        tensors |= {T5_PREFIX + name: tensor for name, tensor in text.items()}
    info = model.info | {"config": dataclasses.asdict(model.config)}
    storage.write(path, tensors, {METADATA: json.dumps(info)})
    if model.config_yaml is not None:
        storage.write_text(path.parent / CONFIG, model.config_yaml)
    return path


def _load_file(path) -> LoadedAR:
    everything, metadata = storage.read(path)
    tensors = {n: t for n, t in everything.items() if not n.startswith(SKIPPED)}
    beside, facts, info, problems, assumed = path.parent / CONFIG, {}, {}, [], {}
    text = beside.read_text(encoding="utf-8") if beside.is_file() else None
    if METADATA in metadata:
        info = json.loads(metadata[METADATA])
        cfg = from_dict(ARConfig, info.pop("config"))
    else:
        if text is not None:
            facts, info, problems = flexar_config.read(text, beside)
        cfg, assumed, more = _infer(tensors, facts)
        problems += more
    if cfg is None:
        raise ValueError(f"{path} is not understood:\n  " + "\n  ".join(problems))
    params = names.to_params(_entries(cfg), tensors, path, problems)
    if (inside := text_encoder_config(info)) is not None:
        own = {n.removeprefix(T5_PREFIX): t for n, t in everything.items() if T5_PREFIX in n}
        params["text_encoder"] = names.to_params(t5.entries(inside), own, path)
    return LoadedAR(cfg, params, info, text, str(path), assumed=assumed)


def text_encoder_config(info: dict) -> T5Config | None:
    """The configuration of the text encoder inside a file; None: there is none."""
    found = (info.get("text_encoder") or {}).get("config")
    return None if found is None else from_dict(T5Config, found)


def about(source) -> dict:
    """What a source says beside its tensors, without reading them; see `LoadedAR.info`.

    Also "text": whether it is a text model.
    """
    path = sources.find(source, optional=(CONFIG,))
    sources.check_kind(path, "ar")
    if sources.is_workdir(path):
        model = storage.read_json(path / "config.json").get("model") or {}
        return model | {"text": bool((model.get("config") or {}).get("text_dim"))}
    file = sources.weights_file(path)
    tensors, metadata = storage.read_header(file)
    beside, info = file.parent / CONFIG, {}
    if METADATA in metadata:
        info = json.loads(metadata[METADATA])
        return info | {"text": bool(info["config"].get("text_dim"))}
    if beside.is_file():
        info = flexar_config.read(beside.read_text(encoding="utf-8"), beside)[1]
    return info | {"text": TEXT_FC1 in tensors}


def raw(source) -> dict:
    """What a file holds, understood or not.

    "tensors": type and shape of those outside of blocks and of the first block; "blocks": how many;
    "config.yaml".
    """
    file = sources.weights_file(sources.find(source, optional=(CONFIG,)))
    shapes = storage.read_shapes(file)
    blocks = {name.split(".")[4] for name in shapes if name.startswith(MODEL + "trunk.blocks.")}
    kept = {
        name: shape
        for name, shape in sorted(shapes.items())
        if not re.match(r".*\.blocks?\.(?!0\.)\d+\.", name)
    }
    beside = file.parent / CONFIG
    text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
    return {"tensors": kept, "blocks": len(blocks), CONFIG: yaml_of(text)}


def yaml_of(text: str):
    """The content of a config.yaml; its text where it is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _infer(tensors, facts: dict) -> tuple[ARConfig | None, dict, list[str]]:
    """(the configuration that shapes and the `facts` of `config.yaml` say; what neither says of it;
    what is wrong)."""

    def shape(name, rank=2):
        tensor = tensors.get(name)
        return tensor.shape if tensor is not None and tensor.ndim == rank else (0,) * rank

    first = BLOCK.format(i=0)
    sizes = {
        "vocab_size, width": MODEL + "preprocessor.embedding.weight",
        "num_tokens": MODEL + "preprocessor.positional_embedding",
        "mlp_hidden": first + "mlp.fc1.weight",
    }
    missing = [f"missing tensor {n} ({what})" for what, n in sizes.items() if not any(shape(n))]
    if missing:
        return None, {}, missing
    (vocab, width), (length, _), (hidden, _) = map(shape, sizes.values())
    text_hidden, text_dim = shape(TEXT_FC1)
    (head_dim,) = shape(f"{first}{'self_attn' if text_dim else 'attn'}.q_norm.weight", 1)
    blocks = {name.split(".")[4] for name in tensors if name.startswith(MODEL + "trunk.blocks.")}
    fields = {
        "vocab_size": vocab, "num_tokens": length, "width": width, "depth": len(blocks),
        "mlp_hidden": hidden, "text_dim": text_dim, "text_hidden": text_hidden,
        "num_classes": shape(MODEL + "preprocessor.cls_embedding.weight")[0],
        "qk_norm": head_dim > 0,
        "norm": "affine" if first + "norm_1.bias" in tensors else "rms",
        "mlp": "swiglu" if first + "mlp.fc3.weight" in tensors else "gelu",
    }  # fmt: skip
    if head_dim:
        fields["head_dim"] = head_dim
    told = {*fields, *facts} | ({"head_dim"} if "num_heads" in facts else set())
    silent = {"head_dim", "norm_eps", "guidance_scale", *(["text_gelu_tanh"] if text_dim else [])}
    silent -= told
    if fields["mlp"] == "gelu" and "mlp" not in facts:
        silent.add("mlp")
    facts = {"guidance_scale": GUIDANCE_TEXT if text_dim else GUIDANCE_CLASS} | facts
    if "num_heads" in facts:
        facts["head_dim"] = width // max(1, facts.pop("num_heads"))
    if (fields["mlp"], facts.get("mlp")) == ("gelu", "gelu_tanh"):  # Tensors do not tell these.
        fields["mlp"] = "gelu_tanh"
    problems = [
        f"{CONFIG} says {name}={value!r}, the tensors say {fields[name]!r}"
        for name, value in facts.items()
        if fields.setdefault(name, value) != value
    ]
    try:
        cfg = ARConfig(**fields)
    except ValueError as error:
        return None, {}, [*problems, str(error)]
    return cfg, {name: getattr(cfg, name) for name in sorted(silent)}, problems


def shapes(cfg: ARConfig):
    """The shapes of a model's parameters, without making them."""
    return layout.unbox(ar.shapes(cfg))


def _entries(cfg: ARConfig) -> list[names.Entry]:
    """The table of a model's tensors; with text the self-attention has another name."""
    table = NAMES + SECOND
    if cfg.text_dim:
        table = [(ours, theirs.replace("}.attn.", "}.self_attn.")) for ours, theirs in table]
    return names.entries(shapes(cfg), names.by_table(table))
