"""Files of T5 encoders (v1.1 and Flan, small to XXL) as transformers writes them.

A folder has `config.json`, `tokenizer.json` and the weights: `model.safetensors`, or several
files with an index, or the same as PyTorch files. Of the weights only the encoder is read: of
several files those that hold some of it, and of each of them its tensors alone.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flextok_jax.io import sources, storage
from flextok_jax.io.formats import names, text_tokens, weights
from flextok_jax.nn import layout, t5
from flextok_jax.nn.t5 import T5Config

CONFIG = "config.json"
EMBED, ALIAS = "shared.weight", "encoder.embed_tokens.weight"
_BLOCK = "encoder.block.{i}."
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
NAMES = (
    ("embed", EMBED),
    ("bias", _BIAS),
    ("blocks/attn/w([qkv])", _BLOCK + r"layer.0.SelfAttention.\1"),
    ("blocks/attn/proj", _BLOCK + "layer.0.SelfAttention.o"),
    ("blocks/norm_1", _BLOCK + "layer.0.layer_norm"),
    ("blocks/mlp/fc1", _BLOCK + "layer.1.DenseReluDense.wi_0"),
    ("blocks/mlp/fc3", _BLOCK + "layer.1.DenseReluDense.wi_1"),
    ("blocks/mlp/fc2", _BLOCK + "layer.1.DenseReluDense.wo"),
    ("blocks/norm_2", _BLOCK + "layer.1.layer_norm"),
    ("norm", "encoder.final_layer_norm"),
)
# Keys of config.json and the fields that they must agree with.
_SIZES = {
    "d_model": "width", "d_kv": "head_dim", "d_ff": "mlp_hidden", "num_layers": "depth",
    "num_heads": "num_heads", "vocab_size": "vocab_size",
    "relative_attention_num_buckets": "num_buckets",
}  # fmt: skip
_GELU = ("gated-gelu", "gelu", "gelu_new")  # As config files spell it, also those that are gated.
ASSUMED_GELU = "MLP: gated GELU in its tanh form, with which T5 v1.1 and Flan were trained"


@dataclasses.dataclass(frozen=True)
class LoadedT5:
    """An encoder.

    Attributes:
        config: the network.
        params: nested NumPy arrays.
        tokenizer: the text of its tokenizer.json.
        origin: where it came from, in words.
        assumed: what no file says, one line each.
    """

    config: T5Config
    params: dict[str, Any]
    tokenizer: str
    origin: str
    assumed: tuple[str, ...] = ()


def load(source, dtype=np.float32, revision: str | None = None) -> LoadedT5:
    """Reads an encoder.

    Args:
        source: a folder, or a hub id such as "google/flan-t5-xl".
        dtype: that the parameters get.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: as `sources.find`, or there is no tokenizer.json.
        ValueError: it is not understood; one error lists every reason.
    """
    folder = sources.find(source, (CONFIG,), (text_tokens.FILE, *weights.INDICES), revision)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name the folder with {CONFIG} and its weights")
    found = storage.read_json(folder / CONFIG)
    kind = found.get("model_type")
    if kind != "t5":
        raise ValueError(f"{folder} is a model of the type {kind!r}, no T5 (v1.1 or Flan)")
    if not (folder / text_tokens.FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {text_tokens.FILE}: put that of google/flan-t5-small there; the "
            "vocabulary of all English T5 models is the same"
        )
    text = (folder / text_tokens.FILE).read_text(encoding="utf-8")
    with weights.opened(source, folder, _wanted, revision) as tensors:
        cfg, params = read(tensors, folder, found, dtype)
    assumed = [ASSUMED_GELU] if found.get("feed_forward_proj") != "gated-gelu" else []
    if "relative_attention_max_distance" not in found:
        assumed.append(f"largest distance of positions: {cfg.max_distance}")
    name = sources.name_of(source, folder) or str(folder)
    return LoadedT5(cfg, params, text, name, tuple(assumed))


def read(tensors: Mapping, where, found: dict, dtype=np.float32) -> tuple[T5Config, dict]:
    """(the configuration, the parameters) of an encoder.

    Args:
        tensors: of the encoder, arrays or `storage.Lazy`.
        where: in words.
        found: what `config.json` says; sizes come from the tensors, and must agree.
    """
    tensors = dict(tensors)
    if any(re.fullmatch(r"encoder\..*\.DenseReluDense\.wi\.weight", name) for name in tensors):
        raise ValueError(
            f"{where} is a T5 v1.0, with ReLU in place of a gated GELU, which is not implemented: "
            "use T5 v1.1 or Flan-T5"
        )
    problems = []
    if ALIAS in tensors:
        alias = tensors.pop(ALIAS)
        known = tensors.setdefault(EMBED, alias)
        if known is not alias and not np.array_equal(np.asarray(known), np.asarray(alias)):
            problems.append(f"{EMBED} and {ALIAS} differ")
    cfg = _config(tensors, found, problems)
    if cfg is None:
        raise ValueError(f"{where} is not understood:\n  " + "\n  ".join(problems))
    return cfg, names.to_params(entries(cfg), tensors, where, problems, dtype)


def entries(cfg: T5Config) -> list[names.Entry]:
    """The table of an encoder's tensors."""
    return names.entries(layout.unbox(t5.shapes(cfg)), names.by_table(NAMES))


def _config(tensors, found: dict, problems: list[str]) -> T5Config | None:
    first = _BLOCK.format(i=0)
    needed = {
        "vocab_size, width": EMBED,
        "num_buckets, num_heads": _BIAS,
        "head_dim": f"{first}layer.0.SelfAttention.q.weight",
        "mlp_hidden": f"{first}layer.1.DenseReluDense.wi_0.weight",
    }
    shapes = [tensors[name].shape if name in tensors else () for name in needed.values()]
    missing = [
        f"missing tensor {name} of two dimensions ({what})"
        for (what, name), shape in zip(needed.items(), shapes)
        if len(shape) != 2 or 0 in shape
    ]
    problems += missing
    if missing:
        return None
    (vocab, width), (num_buckets, heads), (inner, _), (hidden, _) = shapes
    fields = {
        "vocab_size": vocab, "width": width, "num_buckets": num_buckets, "num_heads": heads,
        "head_dim": inner // heads, "mlp_hidden": hidden,
        "depth": len({n.split(".")[2] for n in tensors if n.startswith("encoder.block.")}),
        "max_distance": found.get("relative_attention_max_distance", T5Config.max_distance),
        "norm_eps": found.get("layer_norm_epsilon", T5Config.norm_eps),
    }  # fmt: skip
    problems += [
        f"{CONFIG} says {key}={found[key]!r}, the tensors say {fields[field]}"
        for key, field in _SIZES.items()
        if found.get(key, fields[field]) != fields[field]
    ]
    if (act := found.get("feed_forward_proj", "gated-gelu")) not in _GELU:
        problems.append(f"feed_forward_proj={act!r}; implemented: 'gated-gelu'")
    return T5Config(**fields)


def _wanted(name: str) -> bool:
    return name.startswith(("shared.", "encoder."))
