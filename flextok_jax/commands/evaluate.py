"""`flextok evaluate`: numbers of reconstructions, of generated images, of registers; a report."""

import dataclasses
import hashlib
import pathlib
import sys

import numpy as np

from flextok_jax.commands import common
from flextok_jax.commands.generate import load_generator, read_labels
from flextok_jax.evaluation import (
    networks,
    probe,
    protocol,
    statistics,
    sweep,
    sweep_report,
)
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.measure import Instruments, Reference
from flextok_jax.evaluation.reconstruction import Sampling, check_counts, identity, side
from flextok_jax.evaluation.subjects import Reconstructions, Samples
from flextok_jax.io import storage

CROP = (
    "centre: halved by 2x2 averages while the short side is at least twice the size, then bicubic "
    "to the size, then the middle (as ADM)"
)
PROBE = "probe.json"
COLUMNS = {  # Of the printed table: title, format.
    "psnr": ("PSNR", ".2f"),
    "mae": ("MAE", ".4f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "fid": ("FID", ".3f"),
    "inception_score": ("IS", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "accuracy": ("class read", ".1%"),
    "codebook_usage": ("ids used", ".1%"),
    "seconds_per_image": ("s/image", ".4f"),
}


def evaluate(args) -> None:
    """Writes results, each with its stamp, and report.html into --out."""
    task = {"reconstruction": _reconstruction, "generation": _generation, "probe": _probe}
    task[args.task](args)


def _reconstruction(args) -> None:
    tok = common.load_model(args)
    pictures = common.pictures(args)
    counts = check_counts(tok, args.num_tokens)
    batch_size = min(args.batch_size, len(pictures))
    subject = Reconstructions(tok, pictures, counts[-1], batch_size)
    guidances = _scales(args.guidance, tok.config.guidance_scale)
    points = sweep.grid(counts, guidances, sorted(set(args.steps or [20])))
    _sweep(args, {"model": identity(tok)}, subject, pictures, points)


def _generation(args) -> None:
    gen = load_generator(args)
    tok = gen.tokenizer
    pictures = common.pictures(args)
    counts = check_counts(tok, args.num_tokens or [gen.num_tokens], gen.num_tokens)
    labels = np.tile(read_labels("all", gen.config.num_classes), args.per_label)
    hows = tuple(
        dataclasses.replace(common.token_sampling(args), guidance=scale)
        for scale in _scales(args.token_guidance, gen.config.guidance_scale)
    )
    batch_size = min(args.batch_size, len(labels))
    subject = Samples(gen, labels, counts[-1], hows, args.seed, batch_size)
    guidances = _scales(args.guidance, tok.config.guidance_scale)
    points = sweep.grid(
        counts, guidances, sorted(set(args.steps or [20])), [how.guidance for how in hows]
    )
    about = {
        "model": {"origin": gen.origin, "fingerprint": gen.fingerprint},
        "tokenizer": identity(tok),
        "samples": {
            "per_label": args.per_label,
            "labels": gen.config.num_classes,
            "num_tokens_drawn": counts[-1],
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
        },
    }
    _sweep(args, about, subject, pictures, points)


def _sweep(args, about: dict, subject, pictures, points) -> None:
    """What both kinds of drawing share."""
    if args.export and len(points) > 1:
        raise ValueError(f"--export is for one setting; this is a sweep of {len(points)}")
    common.check_apart(args.data, args.out)
    instruments = _instruments(args, side(subject.tok))
    reference, about_reference = _reference(args, pictures, instruments)
    stamp = {
        "format": 1,
        "task": args.task,
        "data": _about(pictures),
        "crop": CROP,
        "image_size": side(subject.tok),
        "rounding": "8 bits",
        "reference": about_reference,
        "networks": instruments.about(),
        **about,
        "sampling": {"seed": args.seed, "norm_guidance": args.norm_guidance},
        "dtype": args.dtype,
        "attention": args.attention,
        "batch_size": subject.batch_size,
    }
    out = pathlib.Path(args.out).expanduser()
    run = sweep.Sweep(
        out,
        stamp,
        subject,
        reference,
        instruments,
        Sampling(norm_guidance=args.norm_guidance, seed=args.seed),
        args.process,
        args.export and pathlib.Path(args.export).expanduser(),
    )
    results = run.run(points)
    for result in results[:1]:
        pictures.unreadable |= result["unreadable"]  # Also those that another process met.
    common.report_unreadable(pictures)
    if len(results) < len(points):
        print(
            f"{len(results)} of {len(points)} settings are finished; the others wait for chunks of "
            "other processes. When those have ended, the same command without --process finishes."
        )
        return
    beside = out / PROBE
    known = storage.read_json(beside) if beside.exists() else None
    if known and known["stamp"]["model"] != stamp["model"]:
        known = None  # Of another model.
    sweep_report.write(out / "report.html", *sweep.everything(out), known)
    _print(results)
    print(f"Results with their stamps are in {out / sweep.POINTS}; the report is {out}/report.html")


def _probe(args) -> None:
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    splits = "train", args.split or "test"
    if splits[1] in ("train", "all"):
        raise ValueError(
            f"--split {splits[1]}: the probe learns from the split train; name another one, which "
            "is read to see what it learned"
        )
    train, test = (common.pictures(args, split) for split in splits)
    stamp = {
        "format": 1,
        "task": args.task,
        "data": {"train": _about(train), "test": _about(test)},
        "crop": CROP,
        "image_size": side(tok),
        "model": identity(tok),
        "classifier": "logistic regression on standardised registers before quantisation, its "
        f"strength by {probe.FOLDS}-fold cross-validation of the training images",
        "dtype": args.dtype,
        **protocol.circumstances(),
    }
    out = pathlib.Path(args.out).expanduser()
    if (out / PROBE).exists():  # Asked before the work, not after it.
        known = storage.read_json(out / PROBE)["stamp"]
        different = [
            line
            for key in ("data", "model")
            for line in protocol.differences(known[key], stamp[key], key)
        ]
        if different:
            lines = "".join(f"\n  {line}" for line in different)
            raise ValueError(
                f"{out / PROBE} is of another probe (there | now); pass another --out, or delete "
                f"it:{lines}"
            )
    both = [probe.registers(tok, part, counts[-1], args.batch_size) for part in (train, test)]
    metrics = probe.probe(*both, counts)
    for part in (train, test):
        common.report_unreadable(part)
    common.write_json(out / PROBE, {"stamp": stamp, "metrics": metrics, "warnings": []})
    print(f"Classes read linearly from the first k registers, of {metrics['count']} images:")
    for k, accuracy in metrics["accuracy"].items():
        print(f"{k:8} {accuracy:8.1%}")
    print(f"The commonest class alone is {metrics['chance']:.1%}. Everything is in {out / PROBE}")


def _instruments(args, size: int) -> Instruments:
    """The networks of the files that are named; says which are not there."""
    features, perceptual, mesh = None, None, common.all_devices()
    if args.inception:
        features = networks.inception_network(args.inception, mesh)
    else:
        print(f"note: {networks.NO_FEATURES}", file=sys.stderr)
    if args.lpips_vgg and args.lpips_heads:
        perceptual = networks.perceptual_network(args.lpips_vgg, args.lpips_heads, mesh)
    elif args.lpips_vgg or args.lpips_heads:
        raise ValueError("LPIPS needs both files: --lpips-vgg and --lpips-heads")
    elif args.task == "reconstruction":
        print(f"note: {networks.NO_LPIPS}", file=sys.stderr)
    return Instruments(features, perceptual)


def _reference(args, pictures, instruments: Instruments) -> tuple[Reference, dict]:
    """--reference in place of statistics of --data."""
    if not args.reference:
        return Reference(pictures), {"from": "the pictures of data"}
    gaussian, digest = statistics.read_gaussian(args.reference)
    network = instruments.features
    if network is None or network.size != len(gaussian.mean):
        there = f"{network.about['name']} has {network.size}" if network else "none is named"
        raise ValueError(
            f"--reference {args.reference} has statistics of {len(gaussian.mean)} features; of the "
            f"feature networks {there}"
        )
    return Reference(pictures, gaussian), {"from": "a file", "sha256": digest}


def _about(pictures: pics.Pictures) -> dict:
    """For the stamp."""
    names = hashlib.sha256("\n".join(pictures.names).encode(errors="surrogateescape")).hexdigest()
    return {"title": pictures.title, "images": len(pictures), "names_sha256": names}


def _scales(given: list[float] | None, default: float) -> list[float]:
    return sorted(set(given)) if given else [default]


def _print(results: list[dict]) -> None:
    """A table of all settings, and what is to be known of the numbers."""
    first = results[0]["metrics"]
    columns = {key: about for key, about in COLUMNS.items() if key in first}
    varied = [
        key
        for key in ("num_tokens", "steps", "guidance", "token_guidance")
        if len({r["stamp"]["point"][key] for r in results}) > 1 or key == "num_tokens"
    ]
    titles = [key.replace("_", " ").replace("num ", "") for key in varied]
    print("".join(f"{t:>16}" for t in titles) + "".join(f"{t:>12}" for t, _ in columns.values()))
    for result in results:
        point, numbers = result["stamp"]["point"], result["metrics"]
        print(
            "".join(f"{point[key]:>16g}" for key in varied)
            + "".join(f"{format(numbers[key], form):>12}" for key, (_, form) in columns.items())
        )
    for text in dict.fromkeys(text for result in results for text in result["warnings"]):
        print(f"warning: {text}", file=sys.stderr)
