"""Files of CLIP (OpenAI's, LAION's) and PickScore in the folders of transformers' CLIPModel.

A folder has `config.json`, `tokenizer.json` and the weights (see weights.py). config.json leaves
out what has its default; sizes are told by the tensors, and must agree.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flextok_jax.io import sources, storage
from flextok_jax.io.formats import names, text_tokens, weights
from flextok_jax.nn import clip, layout
from flextok_jax.nn.clip import CLIPConfig, Tower

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_LAYER = r"\1_model.encoder.layers.{i}."
_ANY = "(text|vision)/blocks/"
NAMES = (
    ("text/embed", "text_model.embeddings.token_embedding.weight"),
    ("(text|vision)/pos", r"\1_model.embeddings.position_embedding.weight"),
    ("vision/cls", "vision_model.embeddings.class_embedding"),
    ("vision/patch_emb", "vision_model.embeddings.patch_embedding"),
    ("vision/pre_norm", "vision_model.pre_layrnorm"),  # Their spelling.
    (_ANY + "norm_([12])", _LAYER + r"layer_norm\2"),
    (_ANY + "attn/w([qkv])", _LAYER + r"self_attn.\2_proj"),
    (_ANY + "attn/proj", _LAYER + "self_attn.out_proj"),
    (_ANY + "mlp/(fc[12])", _LAYER + r"mlp.\2"),
    ("text/norm", "text_model.final_layer_norm"),
    ("vision/norm", "vision_model.post_layernorm"),
    ("text/proj", "text_projection"),
    ("vision/proj", "visual_projection"),
    ("logit_scale", "logit_scale"),
)
_DEFAULT_HEADS = {"text": 8, "vision": 12}


@dataclasses.dataclass(frozen=True)
class LoadedCLIP:
    """A CLIP.

    Attributes:
        config: the network.
        params: of `clip.text_features` and `clip.image_features`, nested NumPy arrays.
        tokenizer: a `tokenizers.Tokenizer`.
        origin: where it came from, in words.
    """

    config: CLIPConfig
    params: dict[str, Any]
    tokenizer: Any
    origin: str

    def tokenize(self, prompts) -> np.ndarray:
        """int32 [B, T]: the ids of texts, as many as the model has positions.

        A longer text keeps its first ids and the end, with a warning.

        Raises:
            ValueError: `prompts` is no list of texts, or empty.
        """
        length = self.config.num_positions
        return text_tokens.padded(text_tokens.ids_of(self.tokenizer, prompts, length), length)[0]


def load(source) -> LoadedCLIP:
    """Reads a CLIP, its parameters as float32.

    Args:
        source: a folder, or a hub id such as "openai/clip-vit-base-patch16".

    Raises:
        FileNotFoundError: as `sources.find`, or there is no tokenizer.json.
        ValueError: it is not understood; one error lists every reason.
    """
    more = (text_tokens.FILE, PREPROCESSOR, *weights.INDICES)
    folder = sources.find(source, (CONFIG,), more)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name the folder with {CONFIG} and its weights")
    found = storage.read_json(folder / CONFIG)
    if (kind := found.get("model_type")) != "clip":
        raise ValueError(f"{folder} is a model of the type {kind!r}, no CLIP")
    if not (folder / text_tokens.FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {text_tokens.FILE}: put that of openai/clip-vit-base-patch32 "
            "there; the vocabulary of all these models is the same"
        )
    text = (folder / text_tokens.FILE).read_text(encoding="utf-8")
    tokenizer, problems = text_tokens.parse(text, folder), []
    with weights.opened(source, folder, _wanted) as tensors:
        cfg = _config(tensors, found, problems)
        if cfg is None:
            raise ValueError(f"{folder} is not understood:\n  " + "\n  ".join(problems))
        problems += _preprocessing(folder / PREPROCESSOR, cfg)
        if tokenizer.encode("").ids[-1] != cfg.vocab_size - 1:
            problems.append(f"{text_tokens.FILE} does not end texts with id {cfg.vocab_size - 1}")
        entries = names.entries(layout.unbox(clip.shapes(cfg)), names.by_table(NAMES))
        params = names.to_params(entries, tensors, folder, problems)
    name = sources.name_of(source, folder) or str(folder)
    return LoadedCLIP(cfg, params, tokenizer, name)


def _wanted(name: str) -> bool:
    return not name.endswith(".position_ids")


def _config(tensors: Mapping, found: dict, problems: list[str]) -> CLIPConfig | None:
    embeddings = "{}_model.embeddings.{}.weight"
    needed = {
        "vocab": (embeddings.format("text", "token_embedding"), 2),
        "text": (embeddings.format("text", "position_embedding"), 2),
        "vision": (embeddings.format("vision", "position_embedding"), 2),
        "patch": (embeddings.format("vision", "patch_embedding"), 4),
        "text_mlp": ("text_model.encoder.layers.0.mlp.fc1.weight", 2),
        "vision_mlp": ("vision_model.encoder.layers.0.mlp.fc1.weight", 2),
        "projection": ("text_projection.weight", 2),
    }
    shapes = {key: tensors[name].shape for key, (name, _) in needed.items() if name in tensors}
    missing = [
        f"missing tensor {name} of {rank} dimensions"
        for key, (name, rank) in needed.items()
        if len(shapes.get(key, ())) != rank
    ]
    problems += missing
    if missing:
        return None
    towers = {}
    for part in ("text", "vision"):
        # The second one, of old files, comes first (as in transformers).
        about = (found.get(f"{part}_config") or {}) | (found.get(f"{part}_config_dict") or {})
        width, heads = shapes[part][1], about.get("num_attention_heads", _DEFAULT_HEADS[part])
        mlp = about.get("hidden_act", "quick_gelu")
        layers = {
            int(m[1])
            for name in tensors
            if (m := re.match(rf"{part}_model\.encoder\.layers\.(\d+)\.", name))
        }
        told = {
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "intermediate_size": shapes[f"{part}_mlp"][0],
        }
        problems += [
            f"{CONFIG} says {part}_config.{key}={about[key]!r}, the tensors say {value}"
            for key, value in told.items()
            if about.get(key, value) != value
        ]
        if mlp not in ("quick_gelu", "gelu"):
            problems.append(f"{part}_config.hidden_act={mlp!r}; implemented: quick_gelu, gelu")
        if not isinstance(heads, int) or heads < 1 or width % heads:
            problems.append(f"{part}_config.num_attention_heads={heads!r} of {width} channels")
        eps = about.get("layer_norm_eps", 1e-5)
        towers[part] = width, len(layers), heads, shapes[f"{part}_mlp"][0], mlp, eps
        if part == "vision":
            size, patch = about.get("image_size", 224), shapes["patch"][2]
    if (size // patch) ** 2 + 1 != shapes["vision"][0]:
        problems.append(
            f"vision_config.image_size={size} in patches of {patch} pixels: the tensors have "
            f"{shapes['vision'][0] - 1} patches"
        )
    if problems:
        return None
    return CLIPConfig(
        text=Tower(*towers["text"]),
        vision=Tower(*towers["vision"]),
        projection=shapes["projection"][0],
        vocab_size=shapes["vocab"][0],
        num_positions=shapes["text"][0],
        image_size=size,
        patch_size=patch,
    )


def _preprocessing(path, cfg: CLIPConfig) -> list[str]:
    """What preprocessor_config.json says otherwise than `clip.preprocess` does."""
    if not path.is_file():
        return []
    found = storage.read_json(path)

    def side(value):
        return value.get("shortest_edge", value.get("height")) if isinstance(value, dict) else value

    wanted = {"image_mean": clip.MEAN, "image_std": clip.STD, "resample": 3}
    wrong = [
        f"{PREPROCESSOR}: {key}={found[key]!r}; implemented: {value}"
        for key, value in wanted.items()
        if not np.allclose(found.get(key, value), value)
    ]
    return wrong + [
        f"{PREPROCESSOR}: {key}={found[key]!r}, the model's images have {cfg.image_size} pixels"
        for key in ("size", "crop_size")
        if key in found and side(found[key]) != cfg.image_size
    ]
