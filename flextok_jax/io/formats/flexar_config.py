"""`config.yaml` of FlexAR files: what it says about the mathematics, read as data.

Nothing that the file names is imported or made. Classes and arguments are looked up in a table;
what the table does not know, or knows as another mathematics, is reported.
"""

import re
from typing import Any

# Classes of the released code by their last name: what their arguments mean.
#   a text     the fact that the argument gives: a field of ARConfig, "num_heads" or "qk_scale"
#   a tuple    the values that are implemented
#   None       without effect on results, or said by the tensors
_KEYS = {"read_key": None, "write_key": None}
_MODULES = dict.fromkeys(
    ("attn_target", "self_attn_target", "cross_attn_target", "ffn_target", "act_layer", "block",
     "norm_layer", "drop_path_rate", "drop_path_type", "ffn_dropout_rate", "mlp_ratio",
     "mlp_hidden_dim", "weight_init_style", "gpt_proj_rescale", "self_attn_mask_read_key",
     "encoder_output_key", "drop_path")
)  # fmt: skip
_TRUNK = _KEYS | _MODULES | {
    "embed_dim": "width", "num_blocks": "depth", "use_bias": (False,), "post_trunk_norm": (True,)
}  # fmt: skip
_ATTENTION = {
    "dim": "width", "num_heads": "num_heads", "qkv_bias": (False,), "use_bias": (False,),
    "relative_pos_embed": (None,), "rope_pos_embed": (None,), "attn_drop": None, "proj_drop": None,
    "qk_norm": None, "is_causal": (True,), "qk_scale": "qk_scale",
}  # fmt: skip
_CROSS = _ATTENTION | {"encoder_dim": "width", "is_causal": (False,), "qk_scale": None}
_NORM = {"eps": "norm_eps", "dim": None, "normalized_shape": None, "bias": (True,),
         "elementwise_affine": (True,)}  # fmt: skip
_TEXT_MLP = {
    "text_dim": "text_dim", "in_features": "text_dim", "hidden_features": "text_hidden",
    "embed_dim": "width", "out_features": "width", "use_bias": (False,), "act_layer": None,
    "drop": None, "norm_layer": (None,),
}  # fmt: skip
_CLASSES = {
    "InSeriesMetaModels": {"models": None, "order": None},
    "MetaModel": dict.fromkeys(("preprocessor", "trunk", "postprocessor", "head")),
    "ModuleDict": {"modules": None},
    "Identity": {},
    "ARImageEmbedPreprocessor": _KEYS | {
        "token_grid_size": None, "codebook_size": "vocab_size", "embed_dim": "width",
        "pos_embed_type": ("absolute", "sincos1d", "sincos2d"), "num_classes": "num_classes",
        "init_style": None, "cond_dropout_prob": None, "class_target_key": None,
        "inference_read_key": None,
    },
    "Transformer": _TRUNK,
    "TransformerDecoder": _TRUNK,
    "Block": _MODULES | {"use_bias": (False,)},
    "DecoderBlock": _MODULES | {"use_bias": (False,)},
    "EfficientAttention": _ATTENTION,
    "GeneralizedAttention": _CROSS,
    "GeneralizedAttentionWithMask": _CROSS,
    "SwiGLUFFN": {"multiple_of": None, "use_bias": (False,), "act_layer": None},
    "RMSNorm": _NORM,
    "LayerNorm": _NORM,
    "LayerNormFP32": _NORM,
    "LPLayerNorm": _NORM,
    "GELU": {"approximate": ("none", "tanh")},
    "SiLU": {"inplace": None},
    "T5EmbedderWithMLP": {"t5_embedder": None, "mlp": None},
    "TextToEmbedMLP": _TEXT_MLP,
    "MLP": _TEXT_MLP,
    "LinearClassifier": _KEYS | {
        "in_features": "width", "out_features": "vocab_size", "use_layernorm": (False,),
        "use_batchnorm": (False,), "use_bias": (False,), "weight_init_style": None,
        "encoder_num_blocks": None, "init_std": None,
    },
}  # fmt: skip
_WORDS = ("norm", "mlp")  # Facts that are no numbers.
_ORIGINS = ("l3m.", "flextok_ar.", "torch.nn.")
_HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_")
# Networks from files of their own: {where: (the key that names the file, our name)}.
_OTHER_NETWORKS = {
    "image_tokenizer": ("model_id", "tokenizer"), "t5_embedder": ("hf_hub_path", "text_encoder")
}  # fmt: skip


def read(text: str, path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The facts in the text of a `config.yaml`.

    Returns:
        ({field of ARConfig, "num_heads" or "qk_scale": value}; {"tokenizer", "text_encoder":
        {"source"}}, where they are named; everything that is not understood).

    Raises:
        ValueError: the text is no YAML mapping with a model.
    """
    import yaml

    try:
        root = yaml.safe_load(text)
        model = root["model"]["meta_model"]
    except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no configuration of a FlexAR model: {error}") from error
    facts, others, problems, act_of_trunk = {}, {}, [], []

    def note(fact, value, where):
        if fact not in _WORDS and not isinstance(value, int | float):
            problems.append(f"{path.name}: {where}={value!r}: must be a number")
        elif facts.setdefault(fact, value) != value:
            problems.append(f"{path.name}: {where} says {fact}={value!r} beside {facts[fact]!r}")

    def visit(node, where):
        node = _resolve(node, root)
        children = enumerate(node) if isinstance(node, list) else ()
        if isinstance(node, dict):
            children = node.items()
            if "_target_" in node:
                look_up(node, where)
        for key, child in children:
            if key not in _OTHER_NETWORKS:
                visit(child, f"{where}.{key}")
            elif isinstance(child, dict):
                named_by, ours = _OTHER_NETWORKS[key]
                if isinstance(source := _resolve(child.get(named_by), root), str):
                    others[ours] = {"source": source}

    def look_up(node, where):
        target, part = str(node["_target_"]), where.rpartition(".")[2]
        name = target.rpartition(".")[2]
        if name not in _CLASSES or not target.startswith(_ORIGINS):
            problems.append(f"{path.name}: {where} is a {target!r}, which is not implemented")
            return
        given = {key: _resolve(value, root) for key, value in node.items() if key not in _HYDRA}
        for key, value in given.items():
            meaning = _CLASSES[name].get(key, KeyError)
            if meaning is KeyError:
                problems.append(f"{path.name}: {where}.{key}={value!r}: unknown to a {name}")
            elif isinstance(meaning, tuple) and value not in meaning:
                allowed = " or ".join(map(repr, meaning))
                problems.append(f"{path.name}: {where}.{key}={value!r}: implemented is {allowed}")
            elif isinstance(meaning, str) and (value is not None or meaning == "num_classes"):
                note(meaning, 0 if value is None else value, f"{where}.{key}")
        if _CLASSES[name] is _NORM:
            kind = "rms" if name == "RMSNorm" else "affine"
            if part == "norm_layer":
                note("norm", kind, where)
            elif kind == "affine":
                problems.append(f"{path.name}: {where} is a {name}; implemented is RMSNorm")
            if "eps" not in given:
                note("norm_eps", 1e-6 if kind == "rms" else 1e-5, where)
        if name == "Transformer":  # Its act_layer goes to an MLP; TransformerDecoder's does not.
            act_of_trunk.append(given.get("act_layer"))
        elif name == "SwiGLUFFN":
            note("mlp", "swiglu", where)
        elif name == "MLP" and part == "ffn_target":
            act = given.get("act_layer") or (act_of_trunk or [None])[-1]
            note("mlp", "gelu_tanh" if is_tanh(act, where) else "gelu", where)
        elif name in ("MLP", "TextToEmbedMLP"):
            act = given.get("act_layer")
            note("text_gelu_tanh", is_tanh(act, where, name == "TextToEmbedMLP"), where)

    def is_tanh(act, where, default=False):
        if not isinstance(act, dict):
            return default
        if not str(act.get("_target_")).endswith(".GELU"):
            problems.append(f"{path.name}: {where}.act_layer={act}: implemented is GELU")
        return _resolve(act.get("approximate"), root) == "tanh"

    visit(model, "model.meta_model")
    generation = root.get("generation") or {}
    if generation.get("cfg_factor") is not None:
        note("guidance_scale", generation["cfg_factor"], "generation.cfg_factor")
    return facts, others, problems


def _resolve(value, root, depth: int = 8):
    """A whole-value reference "${a.b}" followed to what it names; anything else as it is."""
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if match is None or depth == 0:
        return value
    found = root
    for key in match[1].split("."):
        if not isinstance(found, dict) or key not in found:
            return value
        found = found[key]
    return _resolve(found, root, depth - 1)
