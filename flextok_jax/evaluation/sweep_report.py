"""The report of a sweep: what more tokens, guidance and steps bring, and what they cost."""

import itertools
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from flextok_jax.evaluation import metrics as image_metrics
from flextok_jax.evaluation import report

# Title, unit or remark, whether a share of 1; drawn in this order where they are there.
CURVES = {
    "psnr": ("PSNR", "dB, mean over images; higher is closer to the original", False),
    "mae": ("MAE", "of a range of 2, 0 is equal", False),
    "ssim": ("SSIM", "1 is equal", False),
    "lpips": ("LPIPS", "perceptual distance, 0 is equal", False),
    "fid": ("FID", "distance of the sets in a network's features; lower is better", False),
    "inception_score": ("Inception score", "higher is better", False),
    "precision": ("Precision", "drawn images among the real ones", True),
    "recall": ("Recall", "real images among the drawn ones", True),
    "accuracy": ("Class read", "taken by the network for the class they are of", True),
    "codebook_usage": ("Ids used", "share of all ids that occur", True),
    "seconds_per_image": (
        "Cost",
        "seconds per image drawn from its tokens, compilation not included",
        False,
    ),
}
AXES = {"num_tokens": "tokens", "guidance": "guidance scale", "steps": "Euler steps",
        "token_guidance": "guidance scale of the tokens"}  # fmt: skip
# Reported for ImageNet 256x256 (arXiv 2502.13967, of TiTok 2406.07550): tokens, rFID, gFID.
PUBLISHED = (
    ("d12-d12", "32", "4.20", "not given", "rFID 3.18; PSNR 18.47, LPIPS .22, SSIM .47"),
    ("d18-d18", "32", "1.61", "2.02", "rFID 1.18; PSNR 18.54, LPIPS .21, SSIM .47"),
    ("d18-d28", "32", "1.45", "1.86", "rFID 1.05; PSNR 18.41, LPIPS .21, SSIM .47"),
    ("d18-d28", "8 to 128", "", "below 2", ""),
    ("TiTok", "32", "2.21", "2.77", ""),
    ("TiTok", "64", "1.70", "2.48", ""),
    ("TiTok", "128", "1.71", "1.97", ""),
)
_LINES = len(report.COLORS)


def write(path: pathlib.Path, results: Sequence[dict], pictures: Sequence[dict], probe=None):
    """Writes the page.

    Args:
        path: the HTML file.
        results: of `sweep.everything`: all of one task and model.
        pictures: for each, {"images", "originals" if there are}: uint8 [n, S, S, 3].
        probe: the result of `flextok evaluate --task probe`, if there is one.
    """
    stamp = results[0]["stamp"]
    generated = stamp["task"] == "generation"
    what = "Generated images" if generated else "Reconstructions"
    title = f"{what} by number of tokens: {pathlib.PurePath(stamp['model']['origin']).name}"
    varied = [axis for axis in AXES if len({_at(r, axis) for r in results} - {None}) > 1]
    sections = [
        ("", _opening(results, generated)),
        ("Coarse to fine", [_pictures(results, pictures)]),
    ]
    for axis in varied or ["num_tokens"]:
        sections.append((f"Quality by {AXES[axis]}", _curves(results, axis, varied)))
    sections.append(("What it costs", _costs(results)))
    if "bands" in results[0]["metrics"]:
        sections.append(("What is still wrong, by spatial frequency", [_bands(results)]))
    if probe:
        sections.append(("What the registers hold, linearly", [_probe(probe)]))
    sections.append(("All numbers", [_numbers(results)]))
    sections.append(("Published numbers", _published(results)))
    sections.append(("Protocol", [report.fact_table(_facts(stamp))]))
    report.write_report(path, title, sections)


def _opening(results, generated) -> list[str]:
    counts = {r["metrics"]["count"] for r in results}
    count = max(counts)
    what = "samples, compared with the images of" if generated else "images of"
    text = f"{count:,} {what} {results[0]['stamp']['data']['title']}"
    by_k = sorted(_line(results), key=lambda r: _at(r, "num_tokens"))
    first, last = by_k[0]["metrics"], by_k[-1]["metrics"]
    few, many = (_at(by_k[i], "num_tokens") for i in (0, -1))
    told = [f"{text}, at {len(results)} settings."]
    if few != many:
        words = {
            "psnr": "PSNR {} to {} dB",
            "fid": "FID {} to {}",
            "accuracy": "class read {} to {}",
            "seconds_per_image": "cost {} to {} seconds per image",
        }
        changes = [
            text.format(_number(key, first[key]), _number(key, last[key]))
            for key, text in words.items()
            if key in first
        ]
        told.append(f"From {few} to {many} tokens: {'; '.join(changes)}.")
    warnings = dict.fromkeys(w for r in results for w in r["warnings"])
    return [report.paragraph(" ".join(told)), *(report.warning(w) for w in warnings)]


def _line(results) -> list[dict]:
    """The results along the number of tokens at the other settings that do best with most tokens.

    Best is the lowest FID, or else the highest PSNR.
    """
    groups: dict = {}
    for result in results:
        key = tuple(_at(result, axis) for axis in AXES if axis != "num_tokens")
        groups.setdefault(key, []).append(result)
    most = max(map(len, groups.values()))

    def rank(group):
        numbers = max(group, key=lambda r: _at(r, "num_tokens"))["metrics"]
        return numbers.get("fid", -numbers.get("psnr", 0.0))

    return min((group for group in groups.values() if len(group) == most), key=rank)


def _pictures(results, pictures) -> str:
    by_name = {id(r): p for r, p in zip(results, pictures)}
    line = sorted(_line(results), key=lambda r: _at(r, "num_tokens"))
    columns = [(f"{_at(r, 'num_tokens')}", by_name[id(r)]["images"]) for r in line]
    originals = by_name[id(line[0])].get("originals")
    if originals is not None and results[0]["stamp"]["task"] == "reconstruction":
        columns.insert(0, ("original", originals))
    count = min(len(images) for _, images in columns)
    rows = [[images[i] for _, images in columns] for i in range(count)]
    point = line[0]["stamp"]["point"]
    how = f"guidance {point['guidance']:g}, {point['steps']} steps"
    ranked = {"fid", "psnr"} & set(line[0]["metrics"])
    about = f"by number of tokens; {how}{', which did best' if ranked else ''}"
    return report.picture_table("The first images", about, [t for t, _ in columns], rows)


def _curves(results, axis: str, varied) -> list[str]:
    others = [a for a in varied if a != axis]
    # Not every combination: those that differ from the best in one other setting at most.
    best = max(_line(results), key=lambda r: _at(r, "num_tokens"))
    shown = [r for r in results if sum(_at(r, a) != _at(best, a) for a in others) <= 1]
    charts = []
    for key, (title, about, percent) in CURVES.items():
        if key not in results[0]["metrics"] or key == "seconds_per_image":
            continue
        groups: dict = {}
        for result in shown:
            values = [f"{AXES[a]} {_at(result, a):g}" for a in others]
            point = (_at(result, axis), result["metrics"][key])
            groups.setdefault(", ".join(values) or title, []).append(point)
        series = {name: sorted(points) for name, points in _spread(groups).items()}
        options = {"log2": axis in ("num_tokens", "steps"), "dots": True, "percent": percent}
        charts.append(report.chart(title, about, series, AXES[axis], **options))
    return [report.row(*charts)]


def _costs(results) -> list[str]:
    line = _line(results)
    seconds = [(_at(r, "num_tokens"), r["metrics"]["seconds_per_image"]) for r in line]
    title, about, _ = CURVES["seconds_per_image"]
    charts = [
        report.chart(title, about, {title: sorted(seconds)}, "tokens", log2=True, from_zero=True)
    ]
    for key, sign in (("fid", 1), ("psnr", -1)):
        if key in results[0]["metrics"]:
            points = sorted(
                (r["metrics"]["seconds_per_image"], r["metrics"][key], _words(r)) for r in results
            )
            best = list(itertools.accumulate((sign * y for _, y, _ in points), min))
            front = [p for p, now, before in zip(points, best, [math.inf, *best]) if now < before]
            name = CURVES[key][0]
            about = "a dot for every setting; the line: no other is both cheaper and better"
            series = {"settings": points, "front": front}
            options = {"dots": True, "scattered": ("settings",)}
            charts.append(
                report.chart(f"{name} against cost", about, series, "seconds per image", **options)
            )
    machines = " and ".join(sorted({r["stamp"]["machine"] for r in results}))
    note = (
        f"Medians over batches of {results[0]['stamp']['batch_size']} images on {machines}; the "
        "machine may have had other work."
    )
    return [report.row(*charts), report.paragraph(note, note=True)]


def _words(result) -> str:
    axes = [axis for axis in AXES if _at(result, axis) is not None]
    return ", ".join(f"{AXES[axis]} {_at(result, axis):g}" for axis in axes)


def _bands(results) -> str:
    size = results[0]["stamp"]["image_size"]
    starts = [*image_metrics.frequency_bands(size, size), math.inf]
    line = sorted(_line(results), key=lambda r: _at(r, "num_tokens"))
    series = {}
    for i, (low, high) in enumerate(zip(starts, starts[1:])):
        name = "mean colour" if i == 0 else f"{low} to {high:g}" if high < math.inf else f"{low} up"
        points = [(_at(r, "num_tokens"), r["metrics"]["bands"][i]) for r in line]
        # In decibels below the range, as PSNR is, so that small bands can be seen.
        series[name] = [(k, 10 * math.log10(4 / max(e, 1e-10))) for k, e in points]
    about = "PSNR if only the error of one band were there, dB; bands in cycles per image"
    return report.chart("By band", about, _spread(series), "tokens", log2=True)


def _probe(probe: dict) -> str:
    metrics = probe["metrics"]
    points = [(int(k), accuracy) for k, accuracy in metrics["accuracy"].items()]
    about = (
        f"logistic regression on the first k registers before quantisation; {metrics['count']} "
        "held-out images"
    )
    level = ("the commonest class", metrics["chance"])
    options = {"log2": True, "percent": True, "level": level}
    return report.chart("Linear probe", about, {"accuracy": points}, "registers", **options)


def _numbers(results) -> str:
    keys = [key for key in CURVES if key in results[0]["metrics"]]
    axes = [axis for axis in AXES if _at(results[0], axis) is not None]
    rows = [
        [*(f"{_at(r, axis):g}" for axis in axes), *(_number(k, r["metrics"][k]) for k in keys)]
        for r in results
    ]
    return report.number_table([*(AXES[a] for a in axes), *(CURVES[k][0] for k in keys)], rows)


def _published(results) -> list[str]:
    stamp, rows = results[0]["stamp"], [list(row) for row in PUBLISHED]
    for r in _line(results):
        numbers = {key: _number(key, value) for key, value in r["metrics"].items() if key in CURVES}
        fid = [numbers.get("fid", ""), ""]
        about = [f"{CURVES[k][0]} {numbers[k]}" for k in ("psnr", "lpips", "ssim") if k in numbers]
        both = fid[::-1] if stamp["task"] == "generation" else fid
        rows.append(["this report", str(_at(r, "num_tokens")), *both, ", ".join(about)])
    note = (
        "The first rows are the authors', for ImageNet at 256x256 and the Inception network, on "
        f"50 000 images. The numbers of this report are of {stamp['data']['title']}: they compare "
        "only where the protocol below is the same."
    )
    titles = ["model", "tokens", "rFID", "gFID", "at 256 tokens, or measured here"]
    return [report.number_table(titles, rows), report.paragraph(note, note=True)]


def _facts(stamp: dict, path: str = "") -> dict[str, str]:
    """The stamp, flat."""
    facts = {}
    for key, value in stamp.items():
        if key == "point":
            continue
        name = f"{path}{key}".replace("_", " ")
        if isinstance(value, dict):
            facts |= _facts(value, f"{name}: ")
        else:
            facts[name] = json.dumps(value) if not isinstance(value, str) else value
    return facts


def _spread(groups: dict) -> dict:
    """At most as many as there are colours, evenly chosen, the first and the last among them."""
    names = list(groups)
    if len(names) > _LINES:
        names = [names[i] for i in np.linspace(0, len(names) - 1, _LINES).round().astype(int)]
    return {name: groups[name] for name in names}


def _at(result: dict, axis: str):
    return result["stamp"]["point"][axis]


def _number(key: str, value: float) -> str:
    if CURVES[key][2]:
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:.2f}" if key == "psnr" else f"{value:.3g}"
