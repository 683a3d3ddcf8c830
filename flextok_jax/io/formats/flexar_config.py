"""`config.yaml` of FlexAR files: what it says about the mathematics, read as data.

Nothing that the file names is imported or made. Classes and arguments are looked up in a table;
what the table does not know, or knows as another mathematics, is reported.
"""

import re
from typing import Any

# Classes of the released code by their last name: what their arguments mean.
#   a text     the field of ARConfig (or "num_heads") that the argument gives
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
    "qk_scale": (None,), "relative_pos_embed": (None,), "rope_pos_embed": (None,),
    "attn_drop": None, "proj_drop": None, "qk_norm": None,
}  # fmt: skip
_TEXT_MLP = {
    "text_dim": "text_dim", "in_features": "text_dim", "hidden_features": "text_hidden",
    "embed_dim": "width", "out_features": "width", "use_bias": (False,), "act_layer": None,
    "drop": None, "norm_layer": (None,),
}  # fmt: skip
CLASSES = {
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
    "EfficientAttention": _ATTENTION | {"is_causal": (True,)},
    "GeneralizedAttention": _ATTENTION | {"encoder_dim": "width", "is_causal": (False,)},
    "GeneralizedAttentionWithMask": _ATTENTION | {"encoder_dim": "width", "is_causal": (False,)},
    "SwiGLUFFN": {"multiple_of": None, "use_bias": (False,), "act_layer": None},
    "RMSNorm": {"eps": "norm_eps", "dim": None},
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
_ORIGINS = ("l3m.", "flextok_ar.", "torch.nn.")
_HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_")
_OTHER_NETWORKS = ("image_tokenizer", "t5_embedder")  # Loaded from files of their own, if at all.


def read(text: str, path) -> tuple[dict[str, Any], list[str]]:
    """The facts in the text of a `config.yaml`.

    Returns:
        ({field of ARConfig, or "num_heads": value}, everything that is not understood).

    Raises:
        ValueError: the text is no YAML mapping with a model.
    """
    import yaml

    try:
        root = yaml.safe_load(text)
        model = root["model"]["meta_model"]
    except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no configuration of a FlexAR model: {error}") from error
    facts, problems = {}, []

    def note(fact, value, where):
        if facts.setdefault(fact, value) != value:
            problems.append(f"{path.name}: {where} says {fact}={value!r} beside {facts[fact]!r}")

    def visit(node, where):
        node = _resolve(node, root)
        if isinstance(node, list):
            for i, child in enumerate(node):
                visit(child, f"{where}.{i}")
        if not isinstance(node, dict):
            return
        if "_target_" in node:
            look_up(node, where)
        for key, child in node.items():
            if key not in _OTHER_NETWORKS:
                visit(child, f"{where}.{key}")

    def look_up(node, where):
        target = str(node["_target_"])
        name = target.rpartition(".")[2]
        if name not in CLASSES or not target.startswith(_ORIGINS):
            problems.append(f"{path.name}: {where} is a {target!r}, which is not implemented")
            return
        for key, value in node.items():
            if key in _HYDRA:
                continue
            value, meaning = _resolve(value, root), CLASSES[name].get(key, KeyError)
            if meaning is KeyError:
                problems.append(f"{path.name}: {where}.{key}={value!r}: unknown to a {name}")
            elif isinstance(meaning, tuple) and value not in meaning:
                problems.append(
                    f"{path.name}: {where}.{key}={value!r}: implemented is "
                    + " or ".join(map(repr, meaning))
                )
            elif isinstance(meaning, str):
                note(meaning, 0 if value is None else value, f"{where}.{key}")
        if name in ("TextToEmbedMLP", "MLP"):
            act = _resolve(node.get("act_layer"), root)
            form = act.get("approximate", "none") if isinstance(act, dict) else None
            note("text_gelu_tanh", form == "tanh" if form else name == "TextToEmbedMLP", where)

    visit(model, "model.meta_model")
    generation = root.get("generation") or {}
    if generation.get("cfg_factor") is not None:
        facts["guidance_scale"] = generation["cfg_factor"]
    wrong = [fact for fact, value in facts.items() if not isinstance(value, (int, float))]
    problems += [f"{path.name}: {fact}={facts.pop(fact)!r}: must be a number" for fact in wrong]
    return facts, problems


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
