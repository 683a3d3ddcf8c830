"""The configuration inside a released FlexTok file <-> FlexTokConfig.

One template (released_template.py) serves both directions. Nothing that a file names is imported or
evaluated: its values are parsed as Python literals, and a value that does not parse stays a string.
"""

import ast
import dataclasses
import re
import reprlib

from flextok_jax.io.formats.flextok_template import (
    IDENTITY_VAE,
    MISSING,
    OWN,
    OWN_KEY,
    OWN_VAE,
    RELEASED_VAE,
    TEMPLATE,
    VAES,
    Field,
    Free,
)
from flextok_jax.nn.config import SAMPLING_MODES, FlexTokConfig, VAEConfig

# Arguments without effect on results, accepted with any value and anywhere.
_NO_EFFECT = re.compile(
    r".*_keys?|_partial_|use_act_checkpoint|drop_path_rate|drop_quant_p|compile_block_mask"
    r"|pad_to_multiple|max_seq_len|dtype_override|hf_hub_path|force_vae_encode|frozen"
    r"|weight_init_style"
)
# Arguments that may appear beside those of the template, with the values that are implemented.
_ALSO = {
    "qkv_bias": (False,),
    "proj_bias": (False,),
    "mlp_bias": (False,),
    "adaLN_bias": (True,),
    "temb_as_tokens": (False,),
    "use_mup_readout": (False,),
    "replace_with_single_token": (False,),
    "noise_read_key": (None,),
    "stratified": (False,),
    "intermediate_layers": ([1], [], None),
    "n_eval": (None,),
}
# Fixed arguments whose absence means the value in the template.
_MAY_BE_ABSENT = {"flatten_patches", "use_mup_readout", "intermediate_layers", "posemb_scaling"}

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def parse_metadata(metadata: dict[str, str]) -> dict:
    """The header of a file, {key: str(python object)}, with its literals parsed."""

    def value(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text

    return {key: value(text) for key, text in metadata.items()}


def read_config(released: dict) -> tuple[FlexTokConfig | None, list[str]]:
    """A released configuration -> ours.

    Returns:
        (the configuration, []), or (None, every problem found, one line each). The VAE's layout
        is not in the configuration: its block_out and layers stay at their defaults and are to be
        inferred from the tensors.
    """
    problems, found = [], {}
    vae = released.get("vae")
    target = vae.get("_target_") if isinstance(vae, dict) else None
    template = dict(TEMPLATE)
    if target in VAES:
        template["vae"] = {"_target_": target, **VAES[target]}
    else:
        problems.append(f"vae._target_ is {_show(target)}; known: {sorted(VAES)}")
    if OWN_KEY in released:
        template[OWN_KEY] = OWN
    for key, expected in template.items():
        _match(released.get(key, MISSING), expected, key, found, problems)

    fields = {}
    for name, places in found.items():
        # The length of the levels is checked against the levels themselves below.
        values = {value for field, _, value in places if field.form != "len"}
        if len(values) > 1:
            held = ", ".join(f"{place}={value}" for _, place, value in places)
            problems.append(f"these must be equal: {held}")
        fields[name] = next(iter(values), None)
    for field, place, value in found.get("levels", []):
        if field.form == "len" and fields["levels"] and value != len(fields["levels"]):
            problems.append(f"{place} is {value}; the quantiser has {len(fields['levels'])} levels")
    if fields.get("keep_mode") not in (*SAMPLING_MODES, None):
        problems.append(f"size_sampling_mode {fields['keep_mode']!r}; known: {SAMPLING_MODES}")
    if problems:
        return None, problems
    ours = {k.removeprefix("vae."): v for k, v in fields.items() if k.startswith("vae.")}
    if target == IDENTITY_VAE:
        channels = ours["latent_channels"]
        ours |= dict(kind="identity", in_channels=channels, block_out=(), layers_per_block=0)
    fields = {k: v for k, v in fields.items() if not k.startswith("vae.")}
    try:
        return FlexTokConfig(vae=VAEConfig(**ours), **fields), []
    except ValueError as error:
        return None, [str(error)]


def write_config(cfg: FlexTokConfig) -> dict:
    """Our configuration as a released one (the inverse of `read_config`)."""
    if cfg.vae.kind == "identity":
        target = IDENTITY_VAE
    else:
        standard = dataclasses.replace(
            VAEConfig(),
            latent_channels=cfg.vae.latent_channels,
            scaling_factor=cfg.vae.scaling_factor,
            sample_posterior=cfg.vae.sample_posterior,
        )
        target = RELEASED_VAE if cfg.vae == standard else OWN_VAE
    template = TEMPLATE | {"vae": {"_target_": target, **VAES[target]}}
    if cfg.guidance_scale != FlexTokConfig.guidance_scale:
        template[OWN_KEY] = OWN
    return _fill(template, cfg)


def _fill(template, cfg):
    if isinstance(template, Field):
        return template.encode(cfg)
    if isinstance(template, Free):
        return template.value
    if isinstance(template, dict):
        return {key: _fill(value, cfg) for key, value in template.items()}
    return template


def _match(value, expected, place, found, problems):
    """Compares one value of a file with its template; fills `found` and `problems`."""
    name = place.rpartition(".")[2]
    if isinstance(expected, Field):
        if value is MISSING and expected.default is not MISSING:
            value = expected.default
        try:
            decoded = expected.decode(value)
        except ValueError:
            what = "is missing" if value is MISSING else f"is {_show(value)}, not a value we know"
            problems.append(f"{place} {what}")
        else:
            found.setdefault(expected.name, []).append((expected, place, decoded))
    elif isinstance(expected, Free):
        pass
    elif isinstance(expected, dict):
        if not isinstance(value, dict):
            what = "is missing" if value is MISSING else f"is {_show(value)}, expected a module"
            problems.append(f"{place} {what}")
            return
        for key, inner in expected.items():
            _match(value.get(key, MISSING), inner, f"{place}.{key}", found, problems)
        for key in sorted(value.keys() - expected.keys(), key=str):
            allowed = _ALSO.get(key)
            if allowed is not None and value[key] not in allowed:
                problems.append(f"{place}.{key} is {_show(value[key])}; implemented: {allowed}")
            elif allowed is None and not _NO_EFFECT.fullmatch(str(key)):
                problems.append(f"{place}.{key}={_show(value[key])} is an unknown argument")
    elif name in _ALSO:
        absent = value is MISSING and (name in _MAY_BE_ABSENT or expected is None)
        if not absent and value not in _ALSO[name]:
            what = "is missing" if value is MISSING else f"is {_show(value)}"
            problems.append(f"{place} {what}; implemented: {_ALSO[name]}")
    elif not _NO_EFFECT.fullmatch(name) and value != expected:
        if value is not MISSING or name not in _MAY_BE_ABSENT:
            what = "is missing" if value is MISSING else f"is {_show(value)}"
            problems.append(f"{place} {what}; implemented: {expected!r}")


def _show(value) -> str:
    """A value of the file in an error message, short whatever it is."""
    return _REPR.repr(value)
