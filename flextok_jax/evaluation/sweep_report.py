"""The report of a sweep: how quality and cost change with tokens, guidance and steps."""

import json
import math
import pathlib
from collections.abc import Sequence

from flextok_jax.evaluation import metrics as image_metrics
from flextok_jax.evaluation import report

# Title, remark, whether a share of 1; shown in this order where they are there.
CURVES = {
    "psnr": ("PSNR", "dB, mean over images; higher is better", False),
    "mae": ("MAE", "mean absolute error, of a range of 2; lower is better", False),
    "ssim": ("SSIM", "1 is equal", False),
    "lpips": ("LPIPS", "perceptual distance; lower is better", False),
    "fid": ("FID", "lower is better", False),
    "inception_score": ("Inception score", "higher is better", False),
    "precision": ("Precision", "share of made images among the real ones", True),
    "recall": ("Recall", "share of real images among the made ones", True),
    "accuracy": ("Accuracy", "of the feature network's classes, on made images", True),
    "codebook_usage": ("Codebook usage", "share of all ids that occur", True),
    "seconds_per_image": (
        "Seconds per image",
        "median over batches, without compilation",
        False,
    ),
}
AXES = {"num_tokens": "tokens", "guidance": "guidance scale", "steps": "steps",
        "token_guidance": "token guidance scale"}  # fmt: skip


def write(path, results: Sequence[dict], pictures: Sequence[dict]) -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        results, pictures: of `sweep.results`: all of one task and model.
    """
    metadata = results[0]["metadata"]
    generated = metadata["task"] == "generation"
    what = "Generated images" if generated else "Reconstructions"
    title = f"{what} by number of tokens: {pathlib.PurePath(metadata['model']['origin']).name}"
    varied = [axis for axis in AXES if len({_at(r, axis) for r in results} - {None}) > 1]
    best = _best(results)
    sections = [
        ("", _opening(results, generated)),
        ("Images", [_pictures(results, pictures, best)]),
    ]
    for axis in varied or ["num_tokens"]:
        sections.append((f"Quality by {AXES[axis]}", [_curves(results, best, axis, varied)]))
    sections.append(("Cost", _costs(results, best)))
    if "bands" in results[0]["metrics"]:
        sections.append(("Error by spatial frequency", [_bands(best)]))
    sections.append(("All results", [report.number_table(*table(results, AXES))]))
    setup = {key: value for key, value in metadata.items() if key != "setting"}
    sections.append(("Evaluation setup", [report.code(json.dumps(setup, indent=2))]))
    report.write_report(path, title, sections)


def _at(result: dict, axis: str):
    return result["metadata"]["setting"][axis]


def _best(results) -> list[dict]:
    """The results by number of tokens at the other settings that do best with most tokens.

    Best is the lowest FID, or else the highest PSNR.
    """
    groups: dict = {}
    for result in results:
        key = tuple(_at(result, axis) for axis in AXES if axis != "num_tokens")
        groups.setdefault(key, []).append(result)

    def rank(group):
        last = group[-1]["metrics"]
        return -len(group), last.get("fid", -last.get("psnr", 0.0))

    return min(groups.values(), key=rank)


def _opening(results, generated) -> list[str]:
    count, data = results[0]["metrics"]["count"], results[0]["metadata"]["data"]["title"]
    what = "samples, compared with the images of" if generated else "images of"
    warnings = dict.fromkeys(w for r in results for w in r["warnings"])
    opening = report.paragraph(f"{count:,} {what} {data}, at {len(results)} settings.")
    return [opening, *map(report.warning, warnings)]


def _pictures(results, pictures, best) -> str:
    found = [pictures[results.index(result)] for result in best]
    columns = {str(_at(r, "num_tokens")): part["images"] for r, part in zip(best, found)}
    if "originals" in found[0]:
        columns = {"original": found[0]["originals"]} | columns
    others = {AXES[a]: _at(best[0], a) for a in AXES if a != "num_tokens"}
    others = [f"{name} {value:g}" for name, value in others.items() if value is not None]
    remark, labels = "; ".join(["by number of tokens", *others]), found[0]["titles"].tolist()
    rows = list(zip(*columns.values()))
    return report.picture_table("", remark, list(columns), rows, labels if any(labels) else ())


def _curves(results, best, axis: str, varied) -> str:
    others = [a for a in varied if a != axis]
    # Not every combination: those that differ from the best in one other setting at most.
    shown = [r for r in results if sum(_at(r, a) != _at(best[-1], a) for a in others) <= 1]
    charts = []
    for key, (title, remark, percent) in CURVES.items():
        if key not in results[0]["metrics"] or key == "seconds_per_image":
            continue
        series: dict = {}
        for result in shown:
            name = ", ".join(f"{AXES[a]} {_at(result, a):g}" for a in others) or title
            series.setdefault(name, []).append((_at(result, axis), result["metrics"][key]))
        series = {name: sorted(points) for name, points in series.items()}
        log2 = axis in ("num_tokens", "steps")
        charts.append(report.chart(title, remark, series, AXES[axis], log2=log2, percent=percent))
    return report.row(*charts)


def front(points: Sequence[tuple[float, float]], sign: int) -> list[tuple[float, float]]:
    """The points (cost, value) that no other beats in both; sign 1: less is better, -1: more."""
    found = []
    for x, y in sorted(points):
        if not found or sign * y < sign * found[-1][1]:
            found.append((x, y))
    return found


def _costs(results, best) -> list[str]:
    title, remark, _ = CURVES["seconds_per_image"]
    seconds = [(_at(r, "num_tokens"), r["metrics"]["seconds_per_image"]) for r in best]
    options = {"log2": True, "from_zero": True}
    charts = [report.chart(title, remark, {title: seconds}, "tokens", **options)]
    for key, sign in (("fid", 1), ("psnr", -1)):
        if key in results[0]["metrics"]:
            points = [(r["metrics"]["seconds_per_image"], r["metrics"][key]) for r in results]
            series = {"settings": points, "best": front(points, sign)}
            remark = "one dot per setting; line: no other setting is both cheaper and better"
            name, x_title = f"{CURVES[key][0]} against cost", "seconds per image"
            charts.append(report.chart(name, remark, series, x_title, scattered=("settings",)))
    return [report.row(*charts)]


def _bands(best) -> str:
    size = best[0]["metadata"]["image_size"]
    starts = [*image_metrics.frequency_bands(size, size), math.inf]
    series = {}
    for i, (low, high) in enumerate(zip(starts, starts[1:])):
        name = "mean colour" if i == 0 else f"{low} to {high:g}" if high < math.inf else f"{low} up"
        points = [(_at(r, "num_tokens"), r["metrics"]["bands"][i]) for r in best]
        # In decibels below the range, as PSNR is, so that small bands can be seen.
        series[name] = [(k, 10 * math.log10(4 / max(e, 1e-10))) for k, e in points]
    remark = "PSNR of the error in one band alone, dB; bands in cycles per image"
    return report.chart("By band", remark, series, "tokens", log2=True)


def table(results: Sequence[dict], axes: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The titles and the rows of a table of results by some axes, as text."""
    keys = [key for key in CURVES if key in results[0]["metrics"]]
    axes = [axis for axis in axes if _at(results[0], axis) is not None]
    rows = []
    for result in results:
        values = [formatted(key, result["metrics"][key]) for key in keys]
        rows.append([f"{_at(result, axis):g}" for axis in axes] + values)
    return [AXES[axis] for axis in axes] + [CURVES[key][0] for key in keys], rows


def formatted(key: str, value: float) -> str:
    """A metric of CURVES as text."""
    if CURVES[key][2]:
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:.2f}" if key == "psnr" else f"{value:.3g}"
