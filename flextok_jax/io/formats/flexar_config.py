"""`config.yaml` of FlexAR files: what it says about the mathematics, read as data.

Nothing that the file names is imported or made. Classes and arguments are looked up in a table;
what the table does not know, or knows as another mathematics, is reported.
"""

import re
from typing import Any

_CLASSES = set(
    """InSeriesMetaModels MetaModel ModuleDict Identity ARImageEmbedPreprocessor Transformer
    TransformerDecoder Block DecoderBlock EfficientAttention GeneralizedAttention
    GeneralizedAttentionWithMask SwiGLUFFN RMSNorm LayerNorm LayerNormFP32 LPLayerNorm GELU SiLU
    T5EmbedderWithMLP TextToEmbedMLP MLP LinearClassifier""".split()
)
_ORIGINS = ("l3m.", "flextok_ar.", "torch.nn.")
# Arguments that are a field of ARConfig or "num_heads".
_FACTS = {
    "embed_dim": "width", "num_blocks": "depth", "codebook_size": "vocab_size",
    "num_classes": "num_classes", "num_heads": "num_heads", "eps": "norm_eps",
}  # fmt: skip
# Arguments with the values that are implemented.
_FIXED = {
    "use_bias": (False,), "qkv_bias": (False,), "qk_scale": (None,), "post_trunk_norm": (True,),
    "relative_pos_embed": (None,), "rope_pos_embed": (None,), "bias": (True,),
    "elementwise_affine": (True,), "pos_embed_type": ("absolute", "sincos1d", "sincos2d"),
    "approximate": ("none", "tanh"), "use_layernorm": (False,), "use_batchnorm": (False,),
}  # fmt: skip
# Arguments without effect on results, or told by the tensors.
_FREE = set(
    """_target_ _partial_ _convert_ _recursive_ read_key write_key class_target_key
    inference_read_key self_attn_mask_read_key encoder_output_key models order modules preprocessor
    trunk postprocessor head block attn_target self_attn_target cross_attn_target ffn_target
    norm_layer qk_norm act_layer t5_embedder mlp dim encoder_dim in_features out_features
    hidden_features text_dim normalized_shape mlp_ratio mlp_hidden_dim multiple_of
    token_grid_size attn_drop proj_drop drop drop_path drop_path_rate drop_path_type
    ffn_dropout_rate cond_dropout_prob inplace init_std init_style weight_init_style
    gpt_proj_rescale encoder_num_blocks""".split()
)
# Networks from files of their own, {where: (our name, {our fact: its key})}, and how samples are
# decoded by default.
_OTHER_NETWORKS = {
    "image_tokenizer": ("tokenizer", {"source": "model_id"}),
    "t5_embedder": ("text_encoder", {"source": "hf_hub_path", "max_length": "encoder_seqlen_max"}),
}
_DECODING = {
    "steps": "timesteps", "guidance_scale": "tokenizer_cfg_factor",
    "norm_guidance": "tokenizer_perform_norm_guidance",
}  # fmt: skip


def read(text: str, path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The facts in the text of a `config.yaml`.

    Returns:
        ({field of ARConfig or "num_heads": value}; what is named of {"tokenizer": {"source"},
        "text_encoder": {"source", "max_length"}, "decoding": {"steps", "guidance_scale",
        "norm_guidance"}}; everything that is not understood).

    Raises:
        ValueError: the text is no YAML mapping with a model.
    """
    import yaml

    try:
        root = yaml.safe_load(text)
        model = root["model"]["meta_model"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a FlexAR model: {error}") from error
    facts, others, problems = {}, {}, []

    def note(fact, value, where):
        if fact not in ("norm", "mlp") and not isinstance(value, int | float):
            problems.append(f"{path.name}: {where}={value!r}: must be a number")
        elif facts.setdefault(fact, value) != value:
            problems.append(f"{path.name}: {where} says {fact}={value!r} beside {facts[fact]!r}")

    def visit(node, where, act=None):
        node = _resolve(node, root)
        if isinstance(node, list):
            node = dict(enumerate(node))
        if not isinstance(node, dict):
            return
        if "_target_" in node:
            look_up(node, where, act)
            if str(node["_target_"]).endswith(".Transformer"):  # Its MLPs get this.
                act = node.get("act_layer")
        for key, child in node.items():
            if key not in _OTHER_NETWORKS:
                visit(child, f"{where}.{key}", act)
            elif isinstance(child, dict):
                ours, keys = _OTHER_NETWORKS[key]
                found = {name: _resolve(child.get(theirs), root) for name, theirs in keys.items()}
                others[ours] = {k: v for k, v in found.items() if v is not None}

    def look_up(node, where, act):
        target, part = str(node["_target_"]), where.rpartition(".")[2]
        name = target.rpartition(".")[2]
        if name not in _CLASSES or not target.startswith(_ORIGINS):
            problems.append(f"{path.name}: {where} is a {target!r}, which is not implemented")
            return
        fixed = _FIXED | {"is_causal": (name == "EfficientAttention",)}
        for key, value in node.items():
            value, place = _resolve(value, root), f"{where}.{key}"
            if key in fixed and value not in fixed[key]:
                allowed = " or ".join(map(repr, fixed[key]))
                problems.append(f"{path.name}: {place}={value!r}: implemented is {allowed}")
            elif key == "num_classes" or (key in _FACTS and value is not None):
                note(_FACTS[key], value or 0, place)
            elif key not in fixed | _FACTS and key not in _FREE:
                problems.append(f"{path.name}: {place}={value!r}: unknown to a {name}")
        if name.endswith(("Norm", "NormFP32")):
            kind = "rms" if name == "RMSNorm" else "affine"
            if part == "norm_layer":
                note("norm", kind, where)
            elif kind == "affine":
                problems.append(f"{path.name}: {where} is a {name}; implemented is RMSNorm")
            if "eps" not in node:
                note("norm_eps", 1e-6 if kind == "rms" else 1e-5, where)
        if name == "SwiGLUFFN":
            note("mlp", "swiglu", where)
        elif name == "MLP" and part == "ffn_target":
            tanh = is_tanh(node.get("act_layer") or act, where)
            note("mlp", "gelu_tanh" if tanh else "gelu", where)
        elif name in ("MLP", "TextToEmbedMLP"):
            tanh = is_tanh(node.get("act_layer"), where, name == "TextToEmbedMLP")
            note("text_gelu_tanh", tanh, where)

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
    found = {name: generation.get(theirs) for name, theirs in _DECODING.items()}
    if found := {name: value for name, value in found.items() if value is not None}:
        others["decoding"] = found
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
