"""`flextok info` and `flextok convert`: what a model is, and its file in the released format."""

import dataclasses
import json

import jax

from flextok_jax.io import models, storage
from flextok_jax.io.formats import flexar, vae_files


def convert(args) -> None:
    """Writes the released format from any source, of a workdir its averaged weights.

    A VAE on its own is written in the layout of diffusers, an AR model under the released names.
    """
    if models.is_vae(args.model):
        cfg, params = models.load_vae(args.model)
        origin, path = args.model, vae_files.save_folder(args.out, cfg, params)
    elif flexar.is_ar(args.model):
        model = flexar.load(args.model)
        origin, params, path = model.origin, model.params, flexar.save(args.out, model)
    else:
        model = models.load(args.model)
        origin, params, path = model.origin, model.params, models.save(args.out, model)
    print(f"{origin}\n-> {path}\nsha256 {storage.fingerprint(params)}")


def info(args) -> None:
    """Prints what a model is."""
    about = describe(args.source)
    print(json.dumps(about, indent=2) if args.json else _lines(about))


def describe(source) -> dict:
    """What a model is, in JSON terms.

    Returns:
        "origin"; "step" of training, None but for a workdir; "config": the fields of
        `FlexTokConfig`; "image_size" [H, W]; "vocab_size"; "parameters": the number of them in
        "vae", "encoder", "decoder" and in "total"; "sha256" over all of them. Of a VAE on its own
        "kind": "vae", "origin", "config": the fields of `VAEConfig`, "parameters", "sha256". Of an
        AR model the same with "kind": "ar", `ARConfig`, "step" and "tokenizer", whose tokens it
        makes.
    """
    if models.is_vae(source):
        cfg, params = models.load_vae(str(source))
        return {
            "kind": "vae",
            "origin": str(source),
            "config": dataclasses.asdict(cfg),
            "parameters": {"total": sum(leaf.size for leaf in jax.tree.leaves(params))},
            "sha256": storage.fingerprint(params),
        }
    if flexar.is_ar(source):
        model = flexar.load(source)
        return {
            "kind": "ar",
            "origin": model.origin,
            "step": model.step,
            "config": dataclasses.asdict(model.config),
            "tokenizer": model.about.get("tokenizer"),
            "parameters": {"total": sum(leaf.size for leaf in jax.tree.leaves(model.params))},
            "sha256": storage.fingerprint(model.params),
        }
    model = models.load(source)
    sizes = {
        part: sum(leaf.size for leaf in jax.tree.leaves(model.params.get(part, {})))
        for part in ("vae", "encoder", "decoder")
    }
    return {
        "origin": model.origin,
        "step": model.step,
        "config": dataclasses.asdict(model.config),
        "image_size": list(model.config.image_size),
        "vocab_size": model.config.vocab_size,
        "parameters": sizes | {"total": sum(sizes.values())},
        "sha256": storage.fingerprint(model.params),
    }


def _lines(about: dict) -> str:
    lines = {"vae": _vae_lines, "ar": _ar_lines}.get(about.get("kind"), _tokenizer_lines)(about)
    return "\n".join(f"{key:10}{value}" for key, value in lines.items() if value is not None)


def _ar_lines(about: dict) -> dict:
    c, tokenizer = about["config"], about["tokenizer"] or {}
    condition = f"{c['num_classes']} classes" if c["num_classes"] else "no classes"
    condition = "text" if c["text_dim"] else condition
    return {
        "origin": about["origin"],
        "step": about["step"],
        "AR model": f"{c['num_tokens']} tokens of {c['vocab_size']:,} ids; {condition}",
        "blocks": f"{c['depth']} of width {c['width']}, heads of {c['head_dim']}",
        "guidance": f"{c['guidance_scale']:g}",
        "tokenizer": tokenizer.get("source") or tokenizer.get("fingerprint"),
        "total": f"{about['parameters']['total']:,} parameters",
        "sha256": about["sha256"],
    }


def _vae_lines(about: dict) -> dict:
    c = about["config"]
    reduction = 2 ** (len(c["block_out"]) - 1)
    return {
        "origin": about["origin"],
        "VAE": f"{c['latent_channels']} channels, 1/{reduction} of the resolution",
        "widths": f"{', '.join(map(str, c['block_out']))}; {c['layers_per_block']} blocks each",
        "scaling": f"{c['scaling_factor']:g}",
        "total": f"{about['parameters']['total']:,} parameters",
        "sha256": about["sha256"],
    }


def _tokenizer_lines(about: dict) -> dict:
    c = about["config"]
    vae, sizes = c["vae"], about["parameters"]
    height, width = about["image_size"]
    rows, columns = c["grid"]
    reduction = height // (rows * c["patch_size"])
    kind = "none (the model works on pixels)"
    if vae["kind"] != "identity":
        kind = f"{vae['latent_channels']} channels, 1/{reduction} of the resolution"
    levels = " x ".join(str(level) for level in c["levels"])
    lines = {
        "origin": about["origin"],
        "step": about["step"],
        "images": f"{height} x {width} pixels, {rows} x {columns} patches",
        "tokens": f"{c['num_tokens']} per image, {about['vocab_size']:,} ids ({levels})",
        "VAE": f"{kind}; {sizes['vae']:,} parameters",
    }
    for part, name in (("encoder", "enc"), ("decoder", "dec")):
        depth, size = c[f"{name}_depth"], c[f"{name}_width"]
        lines[part] = f"depth {depth}, width {size}; {sizes[part]:,} parameters"
    lines["total"] = f"{sizes['total']:,} parameters"
    lines["guidance"] = f"{c['guidance_scale']:g} by default"
    lines["sha256"] = about["sha256"]
    return lines
