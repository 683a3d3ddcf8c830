"""The report of the laboratory."""

import numpy as np

from configs import lab
from examples.lab.claims import CLAIMS, Results, verdict

REPORT = """Written by `python -m examples.lab`, which trains and measures every variant of
`configs/lab.py`; what each of them is: [systems.md](systems.md). Mean and standard deviation over
seeds.

- PSNR in dB; "of others": with the captions of other images. Frechet distances are between features
  of the digits' classifier. Accuracy: the share of samples that this classifier reads as the class
  asked for. Loss: nats per token. F: the F-measure of ink. Correlation: Spearman's, of the tokens
  that an image needs for one error with the number of its digits.
- Steps per image: of the decoder (tokenizers), or of the generator. With guidance, which flows and
  generators have, each of them is two passes.
- CPU ms per image: decoding all tokens (tokenizers), or drawing all tokens without decoding them
  (generators).
- Generators of ids draw those of `demo-digits`, which was trained for 25,000 steps; those of
  numbers draw the tokens of `continuous`. Guidance is 2 for numbers and 1.5 for ids, so accuracy
  is to be read beside the Frechet distance."""
MARGINS = """A margin above 0 is as claimed: "shown" where the mean is more than two standard
errors above 0, "contrary" where it is as far below, else "not shown"."""

SAME = {  # Columns that are equal for all seeds, and where the results have them.
    "training steps": "steps",
    "tokens": "tokens",
    "steps per image": "passes",
    "parameters": "parameters",
}


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
        columns = ("variant", "seeds", *names, *SAME, "CPU ms per image")
        table = []
        for variant in variants:
            runs = [results[variant] for results in found.values() if variant in results]
            if runs:
                fixed = [f"{runs[0][key]:,}" for key in SAME.values()]
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
