"""The report of the laboratory."""

import numpy as np

from configs import lab
from examples.lab.claims import CLAIMS, Results, verdict

REPORT = """Written by `python -m examples.lab`, which trains and measures every variant of
`configs/lab.py`. Mean and standard deviation over seeds. PSNR in dB; Frechet distances are between
features of the digits' classifier; steps are those of the training."""
MARGINS = """A margin above 0 is as claimed: "shown" where the mean is more than two standard
errors above 0, "contrary" where it is as far below, else "not shown"."""


def report(found: dict[int, Results]) -> str:
    """Markdown of the results of each seed."""
    lines = ["# The laboratory", "", REPORT, ""]
    for title, variants, names in (
        ("Tokenizers", lab.TOKENIZERS, ("psnr", "frechet")),
        ("Image to image", lab.IMAGE_TO_IMAGE, ("f", "sauvola")),
        ("Canvases", lab.CANVAS, ("correlation",)),
        ("Canvases with captions", lab.TEXT, ("psnr", "psnr of others")),
        ("Generators", lab.GENERATORS, ("accuracy", "loss", "frechet")),
    ):
        same = ("steps", "tokens", "passes", "parameters")
        columns = ("variant", "seeds", *names, *same, "CPU ms per image")
        table = []
        for variant in variants:
            runs = [results[variant] for results in found.values() if variant in results]
            if runs:
                fixed = [f"{runs[0][name]:,}" for name in same]
                values = [
                    _spread([run[name] for run in runs]) if name in runs[0] else ""
                    for name in names
                ]
                seconds = _spread([1000 * run["seconds"] for run in runs])
                table.append(_row([variant, len(runs), *values, *fixed, seconds]))
        if table:
            header = [f"## {title}", "", _row(columns), _row(["---"] * len(columns))]
            lines += [*header, *table, ""]
    lines += ["## Claims", "", MARGINS, ""]
    lines += [_row(("variant", "claim", "seeds", "margin", "")), _row(["---"] * 5)]
    for claim in CLAIMS:
        margins = []
        for results in found.values():
            try:
                margins.append(claim.margin(results))
            except KeyError:  # A variant that it compares with has not run with this seed.
                continue
        said = [_spread(margins), verdict(margins)] if margins else ["", "not run"]
        lines.append(_row([claim.variant, claim.sentence, len(margins), *said]))
    return "\n".join(lines) + "\n"


def _row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(values: list[float]) -> str:
    """ "1.23 ± 0.04" """
    deviation = f" ± {np.std(values, ddof=1):.3g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{deviation}"
