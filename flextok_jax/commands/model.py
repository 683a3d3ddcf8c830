"""`flextok info`, `convert` and `push`: what a model is, and its file in the released format."""

import dataclasses
import json
from collections.abc import Callable

import jax
import numpy as np

from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.commands import common, options
from flextok_jax.io import models, sources, storage
from flextok_jax.io.formats import flexar, t5, vae_files
from flextok_jax.io.paths import as_path

WRITTEN = (sources.WEIGHTS, sources.VAE_WEIGHTS, "config.json", flexar.CONFIG)  # By `convert`.


def convert(args: options.Convert) -> None:
    """Writes the released format from any source, of a workdir its averaged weights."""
    out = common.out_folder(args.out, new=WRITTEN)
    model, save = _load(args.model, args.scaling_factor, args.half)
    print(f"{model['origin']}\n-> {save(out)}\nsha256 {model['sha256']}")


def push(args: options.Push) -> None:
    """Publishes a tokenizer or an AR model on the hub; prints the source of what is there now."""
    kind = sources.kind_of(args.model)
    if kind not in ("tokenizer", "ar"):
        raise ValueError(
            f"{args.model} is no tokenizer or AR model: write it by `flextok convert --out DIR`, "
            "and publish that by `hf upload OWNER/NAME DIR`"
        )
    if args.tokenizer and kind != "ar":
        raise ValueError(f"--tokenizer is for an AR model; {args.model} is a tokenizer")
    model = (ImageGenerator if kind == "ar" else FlexTok).from_pretrained(args.model)
    numbers = _numbers(args.evaluation, model) if args.evaluation else None
    more = {"tokenizer_source": args.tokenizer} if kind == "ar" else {}
    print(model.push_to_hub(args.repo, args.license, args.picture, numbers, args.private, **more))


def _numbers(folder: str, model) -> list[list[str]]:
    """The table of a folder of `flextok evaluate`, which must be of this model."""
    from flextok_jax.commands import evaluate
    from flextok_jax.evaluation import sweep

    results = sweep.results(as_path(folder))[0]
    if not results:
        raise ValueError(f"--evaluation {folder} holds no result of flextok evaluate")
    found = results[0]["metadata"]["model"]
    if found["fingerprint"] != model.fingerprint:
        raise ValueError(
            f"--evaluation {folder} is of {found['origin']}, sha256 {found['fingerprint']}, not of "
            f"{model.origin}, sha256 {model.fingerprint}: evaluate the model that you publish"
        )
    titles, rows = evaluate.table(results)
    return [titles, *rows]


def info(args: options.Info) -> None:
    """Prints what a model is."""
    try:
        model = describe(args.source, args.scaling_factor)
    except ValueError:
        if sources.kind_of(args.source) == "ar":  # What is not understood, for whoever mends it.
            _print(flexar.raw(args.source))
        raise
    if args.json:
        print(json.dumps(model, indent=2))
        return
    _print(model)


def _print(facts: dict) -> None:
    lines = storage.dotted(facts)
    for key, value in lines.items():
        words = f"{value:,}" if type(value) is int else value
        print(f"{key:{max(map(len, lines))}}  {words}")


def describe(source, scaling_factor: float | None = None) -> dict:
    """What a model is, in JSON terms.

    Returns:
        "kind": "tokenizer", "vae", "ar" or "t5"; "origin"; "step" of a workdir; "config";
        "parameters", their number in each part and in "total"; "sha256" over all of them. Of a
        tokenizer also "image_size" [H, W] and "vocab_size"; of an AR model what else its file
        knows, and "config.yaml", all of it; of this and of T5 "assumed": what no file says.
    """
    return _load(source, scaling_factor)[0]


def _load(source, scaling_factor: float | None = None, half=False) -> tuple[dict, Callable]:
    """(see `describe`, the function that writes the model into a folder and returns the path).

    Args:
        half: whether float16 is written; the description is of what a reader of that finds.
    """
    kind = sources.kind_of(source)
    if scaling_factor is not None and kind != "vae":
        raise ValueError(f"--scaling-factor is for a VAE on its own; {source} is none")
    if kind == "vae":
        cfg, params = models.load_vae(str(source), scaling_factor)
        facts = {"origin": sources.pinned(source)}

        def save(out):
            return vae_files.save_folder(out, cfg, params)

    elif kind == "t5":
        found = t5.load(source)
        cfg, params = found.config, {"encoder": found.params}
        facts = {"origin": found.origin, "assumed": list(found.assumed) or "nothing"}

        def save(out):
            raise ValueError(f"{source} is a text encoder, in the format of transformers already")
    else:
        module = flexar if kind == "ar" else models
        model = module.load(source)
        cfg, params = model.config, model.params

        def save(out):
            return module.save(out, dataclasses.replace(model, params=params))

        facts = {"origin": model.origin, "step": model.step}
        if kind == "ar":
            facts |= model.info | {"assumed": model.assumed or "nothing"}
            if "tokenizer" in facts.get("text_encoder", {}):  # Long, and no fact.
                facts["text_encoder"] = facts["text_encoder"] | {"tokenizer": "inside"}
            facts |= {"config.yaml": flexar.yaml_of(model.config_yaml)} if model.config_yaml else {}
        else:
            facts |= {"image_size": list(cfg.image_size), "vocab_size": cfg.vocab_size}
    read = params
    if half:
        params = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), params)
        read = jax.tree.map(lambda x: x.astype(np.float32), params)
    sizes = {k: sum(leaf.size for leaf in jax.tree.leaves(part)) for k, part in params.items()}
    return {
        "kind": kind if kind in ("ar", "vae", "t5") else "tokenizer",
        **{key: value for key, value in facts.items() if value is not None},
        "config": dataclasses.asdict(cfg),
        "parameters": sizes | {"total": sum(sizes.values())},
        "sha256": storage.fingerprint(read),
    }, save
