"""The configuration inside a released FlexTok file <-> ours.

One template, flextok.json, serves both directions: it is the released configuration, with "$FIELD"
where a field of ours stands. Nothing that a file names is imported or evaluated: its values are
parsed as Python literals, and a value that does not parse stays a string.
"""

import ast
import dataclasses
import json
import pathlib
import re

from flax.traverse_util import unflatten_dict

from flextok_jax.flow.sampler import Sampler
from flextok_jax.io import storage
from flextok_jax.nn.config import Blocks, from_dict
from flextok_jax.nn.tokenizer_config import KEEP_MODES, TokenizerConfig
from flextok_jax.nn.vae_config import identity_vae

_TEMPLATE = json.loads(pathlib.Path(__file__).with_name("flextok.json").read_text())
_RELEASED_VAE = "flextok.vae_wrapper.StableDiffusionVAE"
# Ours only: the reference does not read these.
_OWN_VAE, _IDENTITY_VAE = "flextok_jax.AutoencoderKL", "flextok_jax.IdentityVAE"
_VAES = {
    _RELEASED_VAE: _TEMPLATE["vae"],
    _OWN_VAE: _TEMPLATE["vae"] | {"_target_": _OWN_VAE, "norm_groups": "$vae.norm_groups"},
    _IDENTITY_VAE: {"_target_": _IDENTITY_VAE, "latent_channels": "$vae.latent_channels"},
}
SAMPLER = tuple(field.name for field in dataclasses.fields(Sampler))
# Our own top-level entry, written only where the sampler is not the default one.
_OWN = {"flextok_jax": {name: f"$target.flow.sampler.{name}" for name in SAMPLER}}
_INTERVAL = "target.flow.sampler.guidance_interval"
_COUNT = "levels"  # The template's name for the number of the quantiser's levels.
# Fields that a file may leave out: then they have our default.
_OPTIONAL = re.compile(
    r"(encoder|decoder)\.(head_dim|mlp_ratio)|vae\.sample_posterior"
    r"|target\.flow\.(time_frequencies|log_normal_time|mode_scale)"
    r"|target\.flow\.sampler\.(?!guidance_scale)\w+"
)
# Arguments without effect on results, accepted with any value and anywhere.
_NO_EFFECT = re.compile(
    r".*_keys?|_partial_|use_act_checkpoint|drop_path_rate|drop_quant_p|compile_block_mask"
    r"|pad_to_multiple|max_seq_len|dtype_override|hf_hub_path|force_vae_encode|frozen"
    r"|weight_init_style|size_sampling_mode"
)
# Arguments that may appear beside those of the template, with the values that are implemented.
_ALSO = {
    "qkv_bias": (False,), "proj_bias": (False,), "mlp_bias": (False,), "adaLN_bias": (True,),
    "temb_as_tokens": (False,), "use_mup_readout": (False,), "replace_with_single_token": (False,),
    "noise_read_key": (None,), "stratified": (False,), "n_eval": (None,),
    "intermediate_layers": ([1], [], None),
}  # fmt: skip
# Fixed arguments whose absence means the value in the template.
_MAY_BE_ABSENT = {"flatten_patches", "posemb_scaling", *_ALSO}
_MISSING = object()


def parse_metadata(metadata: dict[str, str]) -> dict:
    """The header of a file, {key: str(python object)}, with its literals parsed."""

    def value(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text

    return {key: value(text) for key, text in metadata.items()}


PARTS = ("encoder", "decoder")
# Where the fields of earlier, flat configurations are now.
_FLAT = {
    "vae": "vae", "grid": "sites.grid", "patch_size": "sites.patch_size",
    "num_tokens": "tokens.count", "keep_mode": "tokens.keep", "levels": "bottleneck.levels",
    "enc_width": "encoder.width", "enc_depth": "encoder.depth",
    "dec_width": "decoder.width", "dec_depth": "decoder.depth",
    "max_timestep": "target.flow.max_timestep", "null_prob": "target.flow.null_prob",
    "time_frequencies": "target.flow.time_frequencies", "mode_scale": "target.flow.mode_scale",
    "log_normal_time": "target.flow.log_normal_time",
    "guidance_scale": "target.flow.sampler.guidance_scale",
}  # fmt: skip


def to_fields(cfg: TokenizerConfig) -> dict:
    """Our configuration as the template names its fields: {"sites.grid": ...}.

    "encoder.mlp_ratio" and "decoder.mlp_ratio" stand for the hidden widths,
    int(2 / 3 mlp_ratio width).
    """
    fields = storage.dotted(dataclasses.asdict(cfg))
    for part in PARTS:
        hidden, width = fields.pop(f"{part}.mlp_hidden"), fields[f"{part}.width"]
        fields[f"{part}.mlp_ratio"] = 1.5 * (hidden + 0.5) / width if hidden else 4.0
    return fields


def from_fields(fields: dict) -> TokenizerConfig:
    """The inverse of `to_fields`; what is absent has its default."""
    fields = dict(fields)
    for part in PARTS:
        ratio, width = fields.pop(f"{part}.mlp_ratio"), fields[f"{part}.width"]
        fields[f"{part}.mlp_hidden"] = 0 if ratio == 4 else int(2 * ratio * width / 3)
    return from_dict(TokenizerConfig, unflatten_dict(fields, sep="."))


def config_from_dict(fields: dict) -> TokenizerConfig:
    """The configuration in a workdir's `config.json`, also a flat one of an earlier version."""
    if "levels" not in fields:
        return from_dict(TokenizerConfig, fields)
    found = {_FLAT[name]: value for name, value in fields.items() if name in _FLAT}
    found |= {
        f"{part}.{name}": fields[name] for part in PARTS for name in ("head_dim", "mlp_ratio")
    }
    return from_fields(found)


def is_released(cfg: TokenizerConfig) -> bool:
    """Whether the released format can hold a model of this configuration."""
    sizes = dict(width=64, depth=1, head_dim=64, mlp_hidden=0)
    kinds = {dataclasses.replace(blocks, **sizes) for blocks in (cfg.encoder, cfg.decoder)}
    flextok = cfg.bottleneck.kind == "fsq" and cfg.tokens.order == "causal" and cfg.is_flow
    flextok = flextok and cfg.sites.positions == "sincos" and not cfg.sites.strides
    flow = cfg.target.flow
    flextok = flextok and flow.predicts == "velocity" and not flow.jumps
    return flextok and kinds == {Blocks(**sizes)}


_DEFAULTS = to_fields(TokenizerConfig()) | {_COUNT: 0}


def read_config(released: dict) -> tuple[TokenizerConfig | None, list[str]]:
    """A released configuration -> ours.

    Returns:
        (the configuration, []), or (None, every problem found, one line each). The VAE's layout
        is not in the configuration: its block_out and layers stay at their defaults and are to be
        inferred from the tensors.
    """
    problems, found, template = [], {}, dict(_TEMPLATE)  # found: {our field: {its value: where}}
    vae = released.get("vae")
    target = vae.get("_target_") if isinstance(vae, dict) else None
    if target not in _VAES:
        problems.append(f"vae._target_ is {target!r:.100}; known: {sorted(_VAES)}")
    template["vae"] = _VAES.get(target, "")
    if released.keys() & _OWN:
        template |= _OWN
    for key, expected in template.items():
        if expected:
            _match(released.get(key, _MISSING), expected, key, found, problems)
    for values in found.values():
        if len(values) > 1:
            held = ", ".join(f"{place}={value}" for value, place in values.items())
            problems.append(f"these must be equal: {held}")
    fields = {name: next(iter(values)) for name, values in found.items()}
    count, levels = fields.pop(_COUNT, None), fields.get("bottleneck.levels")
    if levels and count not in (None, len(levels)):
        problems.append(f"{found[_COUNT][count]} is {count}; there are {len(levels)} levels")
    if fields.get("tokens.keep") not in (*KEEP_MODES, None):
        problems.append(f"size_sampling_mode {fields['tokens.keep']!r}; known: {KEEP_MODES}")
    if problems:
        return None, problems
    if target == _IDENTITY_VAE:
        identity = dataclasses.asdict(identity_vae(fields["vae.latent_channels"]))
        fields |= {f"vae.{name}": value for name, value in identity.items()}
    try:
        return from_fields(fields), []
    except ValueError as error:
        return None, [str(error)]


def write_config(cfg: TokenizerConfig) -> dict:
    """Our configuration as a released one (the inverse of `read_config`)."""
    fields = to_fields(cfg) | {_COUNT: len(cfg.bottleneck.levels)}
    said = ("vae.latent_channels", "vae.scaling_factor", "vae.sample_posterior")  # By all VAEs.
    network = [name for name in fields if name.startswith("vae.") and name not in said]
    target = _RELEASED_VAE if all(fields[n] == _DEFAULTS[n] for n in network) else _OWN_VAE
    target = _IDENTITY_VAE if cfg.vae.kind == "identity" else target
    own = _OWN if cfg.sampler != TokenizerConfig().sampler else {}
    return _fill(_TEMPLATE | {"vae": _VAES[target]} | own, fields)


def _is_field(expected) -> bool:
    return isinstance(expected, str) and expected.startswith("$")


def _fill(template, fields: dict):
    if isinstance(template, dict):
        return {key: _fill(value, fields) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, fields) for value in template]
    value = fields[template[1:]] if _is_field(template) else template
    return list(value) if isinstance(value, tuple) else value


def _field(name: str, value):
    """The value of our field; raises ValueError where the file's has another type.

    Integers are sizes, positive; tuples hold sizes or floats.
    """
    if value is _MISSING and _OPTIONAL.fullmatch(name):
        return _DEFAULTS[name]
    kind = type(_DEFAULTS[name])
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is tuple and isinstance(value, list | tuple):
        same = "target.flow.sampler.time_shift" if name == _INTERVAL else _COUNT
        return tuple(_field(same, x) for x in value)
    if kind is type(value) and (kind is not int or value > 0):
        return value
    raise ValueError(value)


def _match(value, expected, place, found, problems):
    """Compares one value of a file with its template; fills `found` and `problems`."""
    name = place.rpartition(".")[2]

    def wrong(wanted):
        what = "is missing" if value is _MISSING else f"is {value!r:.100}"
        problems.append(f"{place} {what}; {wanted}")

    if _is_field(expected):
        try:
            field = _field(expected[1:], value)
            found.setdefault(expected[1:], {}).setdefault(field, place)
        except ValueError:
            wrong(f"needed is the {expected.rpartition('.')[2]}")
    elif isinstance(expected, list) and any(map(_is_field, expected)):
        if not isinstance(value, list | tuple) or len(value) != len(expected):
            return wrong(f"needed are {len(expected)} numbers")
        for x, inner in zip(value, expected):
            _match(x, inner, place, found, problems)
    elif isinstance(expected, dict) and not isinstance(value, dict):
        wrong("needed is a module")
    elif isinstance(expected, dict):
        for key, inner in expected.items():
            _match(value.get(key, _MISSING), inner, f"{place}.{key}", found, problems)
        for key in value.keys() - expected.keys():
            if key in _ALSO:
                _match(value[key], None, f"{place}.{key}", found, problems)
            elif not _NO_EFFECT.fullmatch(str(key)):
                problems.append(f"{place}.{key}={value[key]!r:.100} is an unknown argument")
    elif name in _ALSO or not _NO_EFFECT.fullmatch(name):
        allowed = _ALSO.get(name, (expected,))
        if value not in allowed and not (value is _MISSING and name in _MAY_BE_ABSENT):
            wrong("implemented: " + " or ".join(map(repr, allowed)))
