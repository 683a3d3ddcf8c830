"""The configuration inside a released FlexTok file <-> ours.

One template (flextok_template.py) serves both directions. Nothing that a file names is imported or
evaluated: its values are parsed as Python literals, and a value that does not parse stays a string.
"""

import ast
import dataclasses
import re

from flextok_jax.io import storage
from flextok_jax.io.formats import flextok_template as released
from flextok_jax.nn import config
from flextok_jax.nn.config import TokenizerConfig

# Arguments without effect on results, accepted with any value and anywhere.
_NO_EFFECT = re.compile(
    r".*_keys?|_partial_|use_act_checkpoint|drop_path_rate|drop_quant_p|compile_block_mask"
    r"|pad_to_multiple|max_seq_len|dtype_override|hf_hub_path|force_vae_encode|frozen"
    r"|weight_init_style"
)
# Arguments that may appear beside those of the template, with the values that are implemented.
_ALSO = {
    "qkv_bias": (False,), "proj_bias": (False,), "mlp_bias": (False,), "adaLN_bias": (True,),
    "temb_as_tokens": (False,), "use_mup_readout": (False,), "replace_with_single_token": (False,),
    "noise_read_key": (None,), "stratified": (False,), "n_eval": (None,),
    "intermediate_layers": ([1], [], None),
}  # fmt: skip
# Fixed arguments whose absence means the value in the template.
_MAY_BE_ABSENT = {"flatten_patches", "use_mup_readout", "intermediate_layers", "posemb_scaling"}


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
    return config.from_dict(TokenizerConfig, config.nested(fields))


def config_from_dict(fields: dict) -> TokenizerConfig:
    """The configuration in a workdir's `config.json`, also a flat one of an earlier version."""
    if "levels" not in fields:
        return config.from_dict(TokenizerConfig, fields)
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
    return flextok and kinds == {config.Blocks(**sizes)}


_KINDS = {name: type(value) for name, value in to_fields(TokenizerConfig()).items()}


def read_config(given: dict) -> tuple[TokenizerConfig | None, list[str]]:
    """A released configuration -> ours.

    Returns:
        (the configuration, []), or (None, every problem found, one line each). The VAE's layout
        is not in the configuration: its block_out and layers stay at their defaults and are to be
        inferred from the tensors.
    """
    problems, found = [], {}  # found: {our field: {its value: where}}
    vae = given.get("vae")
    target = vae.get("_target_") if isinstance(vae, dict) else None
    template = dict(released.TEMPLATE)
    if target in released.VAES:
        template["vae"] = {"_target_": target, **released.VAES[target]}
    else:
        problems.append(f"vae._target_ is {target!r:.100}; known: {sorted(released.VAES)}")
    if released.OWN_KEY in given:
        template[released.OWN_KEY] = released.OWN
    for key, expected in template.items():
        _match(given.get(key, released.MISSING), expected, key, found, problems)
    for values in found.values():
        if len(values) > 1:
            held = ", ".join(f"{place}={value}" for value, place in values.items())
            problems.append(f"these must be equal: {held}")
    fields = {name: next(iter(values)) for name, values in found.items()}
    count, levels = fields.pop(released.COUNT, None), fields.get("bottleneck.levels")
    if levels and count not in (None, len(levels)):
        problems.append(
            f"{found[released.COUNT][count]} is {count}; the quantiser has {len(levels)} levels"
        )
    if fields.get("tokens.keep") not in (*config.KEEP_MODES, None):
        problems.append(f"size_sampling_mode {fields['tokens.keep']!r}; known: {config.KEEP_MODES}")
    if problems:
        return None, problems
    if target == released.IDENTITY_VAE:
        identity = dataclasses.asdict(config.identity_vae(fields["vae.latent_channels"]))
        fields |= {f"vae.{name}": value for name, value in identity.items()}
    try:
        return from_fields(fields), []
    except ValueError as error:
        return None, [str(error)]


def write_config(cfg: TokenizerConfig) -> dict:
    """Our configuration as a released one (the inverse of `read_config`)."""
    fields, plain = to_fields(cfg), to_fields(TokenizerConfig())
    fields[released.COUNT] = len(cfg.bottleneck.levels)
    said = ("vae.latent_channels", "vae.scaling_factor", "vae.sample_posterior")  # By all VAEs.
    standard = all(fields[k] == plain[k] for k in plain if k.startswith("vae.") and k not in said)
    target = released.RELEASED_VAE if standard else released.OWN_VAE
    target = released.IDENTITY_VAE if cfg.vae.kind == "identity" else target
    template = released.TEMPLATE | {"vae": {"_target_": target, **released.VAES[target]}}
    if cfg.sampler != TokenizerConfig().sampler:
        template[released.OWN_KEY] = released.OWN
    return _fill(template, fields)


def _fill(template, fields: dict):
    if isinstance(template, released.Field):
        return template.encode(fields[template.name])
    if isinstance(template, released.Free):
        return template.value
    if isinstance(template, dict):
        return {key: _fill(value, fields) for key, value in template.items()}
    return template


def _match(value, expected, place, found, problems):
    """Compares one value of a file with its template; fills `found` and `problems`."""
    name = place.rpartition(".")[2]

    def wrong(wanted):
        what = "is missing" if value is released.MISSING else f"is {value!r:.100}"
        problems.append(f"{place} {what}; {wanted}")

    if isinstance(expected, released.Field):
        value = expected.default if value is released.MISSING else value
        try:
            decoded = expected.decode(value, _KINDS.get(expected.name, int))
            found.setdefault(expected.name, {}).setdefault(decoded, place)
        except ValueError:
            wrong(f"needed is the {expected.name.rpartition('.')[2]}")
    elif isinstance(expected, dict) and not isinstance(value, dict):
        wrong("needed is a module")
    elif isinstance(expected, dict):
        for key, inner in expected.items():
            _match(value.get(key, released.MISSING), inner, f"{place}.{key}", found, problems)
        for key in value.keys() - expected.keys():
            if key in _ALSO:
                _match(value[key], None, f"{place}.{key}", found, problems)
            elif not _NO_EFFECT.fullmatch(str(key)):
                problems.append(f"{place}.{key}={value[key]!r:.100} is an unknown argument")
    elif name in _ALSO or not (isinstance(expected, released.Free) or _NO_EFFECT.fullmatch(name)):
        may_be_absent = name in _MAY_BE_ABSENT or (name in _ALSO and expected is None)
        allowed = _ALSO.get(name, (expected,))
        if value not in allowed and not (value is released.MISSING and may_be_absent):
            wrong("implemented: " + " or ".join(map(repr, allowed)))
