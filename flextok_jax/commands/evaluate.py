"""`flextok evaluate`: metrics of reconstructions, of generated images, of registers; a report."""

import hashlib
import sys

import numpy as np

from flextok_jax import conditions
from flextok_jax.commands import common, options
from flextok_jax.commands.images import load_generator, token_filters
from flextok_jax.evaluation import networks, probe, statistics, sweep, sweep_report
from flextok_jax.evaluation.environment import environment, product_precision
from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.evaluation.reconstruction import (
    check_counts,
    default_sampler,
    identity,
    metadata,
    side,
)
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path

CROP = (
    "centre: halved by 2x2 averages while the short side is at least twice the size, then bicubic "
    "to the size, then the middle (as ADM)"
)
CLASSIFIER = (
    "logistic regression on standardised registers before quantisation, its strength by "
    f"{probe.FOLDS}-fold cross-validation of the training images"
)


def evaluate(args: options.Evaluate) -> None:
    """Writes results, each with its metadata, and report.html into --out."""
    out = common.out_results(args.out, args.data)
    if args.export:
        common.out_file(args.export)
    task = {"reconstruction": _reconstruction, "generation": _generation, "probe": _probe}
    task[args.task](args, out)


def _reconstruction(args, out) -> None:
    tok = common.load_model(args)
    _sweep(args, out, tok, check_counts(tok, args.num_tokens), {"model": identity(tok)})


def _generation(args, out) -> None:
    gen = load_generator(args)
    classes = gen.config.num_classes
    counts = check_counts(gen.tokenizer, args.num_tokens or [gen.num_tokens], gen.num_tokens)
    if not classes:
        raise ValueError(f"{gen.origin} has no classes: evaluate a class-conditional model")
    labels, filters = np.tile(np.arange(classes), args.per_label), token_filters(args)
    samples = sweep.Samples(gen, conditions.of_labels(labels, gen.class_names), labels, filters)
    info = {
        "model": identity(gen),
        "tokenizer": identity(gen.tokenizer),
        "samples": {"per_label": args.per_label, "labels": classes, **filters},
    }
    scales = _scales(args.token_guidance, gen.config.guidance_scale)
    _sweep(args, out, gen.tokenizer, counts, info, samples, scales, gen.decoding)


def _sweep(
    args, out, tok, counts, info: dict, samples=None, token_scales=(None,), decoding=None
) -> None:
    """What reconstruction and generation share."""
    given = {"steps": args.steps, "guidance_scale": args.guidance}
    given = {name: value[0] for name, value in given.items() if value}  # The settings vary them.
    sampler = default_sampler(tok, **((decoding or {}) | given | common.sampling(args)))
    steps = _scales(args.steps, sampler and sampler.steps)
    guidances = _scales(args.guidance, sampler and sampler.guidance_scale)
    settings = sweep.grid(counts, guidances, steps, token_scales)
    if args.export and len(settings) > 1:
        raise ValueError(f"--export is for one setting; this is a sweep of {len(settings)}")
    pictures = Pictures(args.data, args.limit, args.split)
    found = _networks(args)
    reference, reference_metadata = _reference(args, found)
    batch_size = min(args.batch_size, len(samples.labels if samples else pictures))
    sampling = metadata(tok, sampler, args.seed) | {"seed": args.seed}
    for name in ("model", "dtype", "steps", "guidance"):  # Said elsewhere, or varied.
        sampling.pop(name, None)
    if sampler:  # As asked for, also where the first scale is 1 and needs none.
        sampling["norm_guidance"] = sampler.norm_guidance
    shared = {
        **_setup(args, tok),
        "data": _data_metadata(pictures),
        "rounding": "8 bits",
        "reference": reference_metadata,
        "networks": found.metadata,
        **info,
        "sampling": sampling,
        "attention": tok.compute.attention,
        "batch_size": batch_size,
    }
    run = sweep.Sweep(
        out, shared, tok, pictures, found, sampler, args.seed, batch_size, samples, reference,
        args.export and as_path(args.export),
    )  # fmt: skip
    with common.results_folder(out, shared):
        results = run.run(settings)
    common.left_out(pictures.skipped, pictures.unreadable, len(pictures))
    sweep_report.write(out / "report.html", *sweep.results(out))
    _print(results)
    print(f"Results are in {out / sweep.POINTS}, the report in {out / 'report.html'}")


def _probe(args, out) -> None:
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    if args.split in ("train", "all"):
        raise ValueError(f"--split {args.split}: the probe is trained on train; name another one")
    train, test = (Pictures(args.data, args.limit, s) for s in ("train", args.split or "test"))
    settings = {
        **_setup(args, tok),
        "data": {"train": _data_metadata(train), "test": _data_metadata(test)},
        "num_tokens": counts,
        "model": identity(tok),
        "classifier": CLASSIFIER,
    }
    with common.results_folder(out, settings, common.PROBE_SETTINGS):
        both = [probe.registers(tok, part, counts[-1], args.batch_size) for part in (train, test)]
        found = dict(probe.probe(*both, counts))
        result = {"metadata": settings | environment(), "metrics": found, "warnings": []}
        storage.write_json(out / "probe.json", result)
    for part in (train, test):
        common.left_out(part.skipped, part.unreadable, len(part))
    print(f"Accuracy of a linear probe of the first k registers, {found['count']} images:")
    for k, accuracy in found["accuracy"].items():
        print(f"{k:8} {accuracy:8.1%}")
    print(f"The most frequent class alone: {found['chance']:.1%}. Result: {out / 'probe.json'}")


def _setup(args, tok) -> dict:
    """Settings of every task."""
    return {
        "format": 2,
        "task": args.task,
        "crop": CROP,
        "image_size": side(tok),
        "dtype": tok.compute.dtype,
        "product_precision": product_precision(),
    }


def _networks(args) -> networks.Networks:
    """The networks of the files that are named; says which metrics are left out."""
    mesh = common.all_devices()
    features, perceptual = None, (None, None)
    if args.inception:
        features = networks.inception_network(args.inception, mesh)
    else:
        print("note: without --inception no FID, precision, recall", file=sys.stderr)
    if bool(args.lpips_vgg) != bool(args.lpips_heads):
        raise ValueError("LPIPS needs both files: --lpips-vgg and --lpips-heads")
    if args.lpips_vgg:
        perceptual = networks.perceptual_network(args.lpips_vgg, args.lpips_heads, mesh)
    elif args.task == "reconstruction":
        print("note: without --lpips-vgg and --lpips-heads no LPIPS", file=sys.stderr)
    return networks.Networks(features, *perceptual)


def _reference(args, found: networks.Networks) -> tuple[statistics.Gaussian | None, dict]:
    """--reference instead of statistics of --data."""
    if not args.reference:
        return None, {"source": "data"}
    gaussian, digest = statistics.read_gaussian(args.reference)
    size, wanted = len(gaussian.mean), found.features and found.features.size
    if size != wanted:
        raise ValueError(f"--reference {args.reference} has {size} features, --inception {wanted}")
    return gaussian, {"source": "file", "sha256": digest}


def _data_metadata(pictures: Pictures) -> dict:
    names = hashlib.sha256("\n".join(pictures.names).encode(errors="surrogateescape")).hexdigest()
    return {"title": pictures.title, "images": len(pictures), "names_sha256": names}


def _scales(given, default) -> list:
    return sorted(set(given)) if given else [default]


def table(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The titles and the rows of a table of all settings, as text."""
    settings = [result["metadata"]["setting"] for result in results]
    varied = [a for a in sweep.AXES if a == "num_tokens" or len({s[a] for s in settings}) > 1]
    return sweep_report.table(results, varied)


def _print(results: list[dict]) -> None:
    """A table of all settings, and the warnings."""
    titles, rows = table(results)
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for row in (titles, *rows):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))
    for text in dict.fromkeys(text for result in results for text in result["warnings"]):
        print(f"warning: {text}", file=sys.stderr)


def compare(args: options.Compare) -> None:
    """Prints the metrics that both have, then the differences of their metadata."""
    a, b = storage.read_json(args.first), storage.read_json(args.second)
    for path, found in ((args.first, a), (args.second, b)):
        if "metrics" not in found:
            raise ValueError(f"{path} is no result of flextok evaluate: it has no metrics")
    first, second = storage.dotted(a["metrics"]), storage.dotted(b["metrics"])
    print(f"{'':<26}{'first':>14}{'second':>14}{'difference':>14}")
    for name, x in first.items():
        y = second.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float):
            print(f"{name:<26}{x:>14.6g}{y:>14.6g}{y - x:>14.4g}")
    found = storage.differences(a["metadata"], b["metadata"], words=("first", "second"))
    print("Their setups differ:" if found else "Their setups are the same.")
    print("".join(f"  {line}\n" for line in found), end="")
