"""`flextok evaluate`: metrics of reconstructions, of generated images, of registers; a report."""

import hashlib
import sys

import numpy as np

from flextok_jax import conditions
from flextok_jax.commands import common
from flextok_jax.commands.generate import load_generator
from flextok_jax.data.sources import parse
from flextok_jax.evaluation import networks, probe, statistics, sweep, sweep_report
from flextok_jax.evaluation.environment import environment, product_precision
from flextok_jax.evaluation.generation import TokenSampling
from flextok_jax.evaluation.networks import Networks
from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.evaluation.reconstruction import (
    check_counts,
    default_sampler,
    identity,
    side,
)
from flextok_jax.evaluation.results import check_folder, results_folder
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path

CROP = (
    "centre: halved by 2x2 averages while the short side is at least twice the size, then bicubic "
    "to the size, then the middle (as ADM)"
)
PROBE, PROBE_SETTINGS = "probe.json", "probe_settings.json"


def evaluate(args) -> None:
    """Writes results, each with its metadata, and report.html into --out."""
    check_folder(args.out, [parse(args.data).path])
    task = {"reconstruction": _reconstruction, "generation": _generation, "probe": _probe}
    task[args.task](args)


def _reconstruction(args) -> None:
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    _sweep(args, tok, counts, {"model": identity(tok)}, {})


def _generation(args) -> None:
    gen = load_generator(args)
    counts = check_counts(gen.tokenizer, args.num_tokens or [gen.num_tokens], gen.num_tokens)
    if not gen.config.num_classes:
        raise ValueError(f"{gen.origin} knows no classes: evaluate a class-conditional model")
    every = np.tile(np.arange(gen.config.num_classes), args.per_label)
    how = TokenSampling(None, args.temperature, args.top_k, args.top_p)
    wanted = conditions.of_labels(every, gen.class_names)
    samples = sweep.Samples(gen, wanted, how, every)
    info = {
        "model": identity(gen),
        "tokenizer": identity(gen.tokenizer),
        "samples": {
            "per_label": args.per_label,
            "labels": gen.config.num_classes,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
        },
    }
    scales = _scales(args.token_guidance, gen.config.guidance_scale)
    _sweep(args, gen.tokenizer, counts, info, {"samples": samples}, scales)


def _sweep(args, tok, counts, info: dict, fields: dict, token_scales=(None,)) -> None:
    """What reconstruction and generation share."""
    given = {"steps": args.steps, "guidance_scale": args.guidance}
    given = {name: value[0] for name, value in given.items() if value}  # The others as well.
    sampler = default_sampler(tok, norm_guidance=None if args.norm_guidance else False, **given)
    steps = sorted(set(args.steps or [sampler and sampler.steps]))
    guidances = _scales(args.guidance, sampler and sampler.guidance_scale)
    settings = sweep.grid(counts, guidances, steps, token_scales)
    if args.export and len(settings) > 1:
        raise ValueError(f"--export is for one setting; this is a sweep of {len(settings)}")
    pictures = Pictures(args.data, args.limit, args.split)
    found = _networks(args)
    reference, reference_metadata = _reference(args, found)
    count = len(fields["samples"].conditions) if "samples" in fields else len(pictures)
    batch_size = min(args.batch_size, count)
    sampling = {"seed": args.seed, "norm_guidance": None, "solver": "one pass"}
    if sampler:
        sampling |= {"norm_guidance": sampler.norm_guidance, "solver": sampler.solver}
    shared = {
        "format": 2,
        "task": args.task,
        "data": _data_metadata(pictures),
        "crop": CROP,
        "image_size": side(tok),
        "rounding": "8 bits",
        "reference": reference_metadata,
        "networks": found.metadata,
        **info,
        "sampling": sampling,
        "dtype": tok.compute.dtype,
        "product_precision": product_precision(),
        "attention": tok.compute.attention,
        "batch_size": batch_size,
    }
    fields |= {"reference": reference, "export": args.export and as_path(args.export)}
    with results_folder(args.out, shared, [pictures.path]) as out:
        options = (tok, pictures, found, sampler, args.seed, batch_size)
        results = sweep.Sweep(out, shared, *options, **fields).run(settings)
    common.report_unreadable(pictures)
    file = out / PROBE
    known = storage.read_json(file) if file.exists() else None
    if known and known["metadata"]["model"] != shared["model"]:
        known = None  # Of another model.
    sweep_report.write(out / "report.html", *sweep.results(out), known)
    _print(results)
    print(f"Results are in {out / sweep.POINTS}, the report in {out / 'report.html'}")


def _probe(args) -> None:
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    splits = "train", args.split or "test"
    if splits[1] in ("train", "all"):
        raise ValueError(
            f"--split {splits[1]}: the probe is trained on the split train; name another one to "
            "evaluate it on"
        )
    train, test = (Pictures(args.data, args.limit, split) for split in splits)
    settings = {
        "format": 2,
        "task": args.task,
        "data": {"train": _data_metadata(train), "test": _data_metadata(test)},
        "num_tokens": counts,
        "crop": CROP,
        "image_size": side(tok),
        "model": identity(tok),
        "classifier": "logistic regression on standardised registers before quantisation, its "
        f"strength by {probe.FOLDS}-fold cross-validation of the training images",
        "dtype": tok.compute.dtype,
        "product_precision": product_precision(),
    }
    with results_folder(args.out, settings, [train.path], PROBE_SETTINGS) as out:
        both = [probe.registers(tok, part, counts[-1], args.batch_size) for part in (train, test)]
        found = dict(probe.probe(*both, counts))
        result = {"metadata": settings | environment(), "metrics": found, "warnings": []}
        storage.write_json(out / PROBE, result)
    for part in (train, test):
        common.report_unreadable(part)
    print(f"Accuracy of a linear probe of the first k registers, {found['count']} images:")
    for k, accuracy in found["accuracy"].items():
        print(f"{k:8} {accuracy:8.1%}")
    print(f"The most frequent class alone: {found['chance']:.1%}. Everything is in {out / PROBE}")


def _networks(args) -> Networks:
    """The networks of the files that are named; says which metrics are left out."""
    mesh = common.all_devices()
    features = perceptual = metadata = None
    if args.inception:
        features = networks.inception_network(args.inception, mesh)
    else:
        print(f"note: {networks.NO_FEATURES}", file=sys.stderr)
    if args.lpips_vgg and args.lpips_heads:
        files = args.lpips_vgg, args.lpips_heads
        perceptual, metadata = networks.perceptual_network(*files, mesh)
    elif args.lpips_vgg or args.lpips_heads:
        raise ValueError("LPIPS needs both files: --lpips-vgg and --lpips-heads")
    elif args.task == "reconstruction":
        print(f"note: {networks.NO_LPIPS}", file=sys.stderr)
    return Networks(features, perceptual, metadata)


def _reference(args, found: Networks) -> tuple[statistics.Gaussian | None, dict]:
    """--reference instead of statistics of --data."""
    if not args.reference:
        return None, {"source": "data"}
    gaussian, digest = statistics.read_gaussian(args.reference)
    network = found.features
    if network is None or network.size != len(gaussian.mean):
        there = f"{network.metadata['name']} has {network.size}" if network else "none is named"
        raise ValueError(
            f"--reference {args.reference} has statistics of {len(gaussian.mean)} features; of the "
            f"feature networks {there}"
        )
    return gaussian, {"source": "file", "sha256": digest}


def _data_metadata(pictures: Pictures) -> dict:
    names = hashlib.sha256("\n".join(pictures.names).encode(errors="surrogateescape")).hexdigest()
    return {"title": pictures.title, "images": len(pictures), "names_sha256": names}


def _scales(given: list[float] | None, default: float | None) -> list[float | None]:
    return sorted(set(given)) if given else [default]


def _print(results: list[dict]) -> None:
    """A table of all settings, and the warnings."""
    settings = [result["metadata"]["setting"] for result in results]
    varied = [a for a in sweep.AXES if a == "num_tokens" or len({s[a] for s in settings}) > 1]
    keys = [key for key in sweep_report.CURVES if key in results[0]["metrics"]]
    titles = [sweep_report.AXES[axis] for axis in varied]
    rows = [titles + [sweep_report.CURVES[key][0] for key in keys]]
    for setting, result in zip(settings, results):
        values = [sweep_report.formatted(key, result["metrics"][key]) for key in keys]
        rows.append([f"{setting[axis]:g}" for axis in varied] + values)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))
    for text in dict.fromkeys(text for result in results for text in result["warnings"]):
        print(f"warning: {text}", file=sys.stderr)
