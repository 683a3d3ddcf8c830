"""Self-contained HTML reports: inline CSS, charts by matplotlib, embedded pictures; no script.

The functions return pieces of HTML for `write_report`; texts are escaped.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from flextok_jax.io import storage

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1000px; padding: 24px 16px 64px; color: #1d1f24;
  overflow-wrap: anywhere; font: 16px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }}
h1 {{ font-size: clamp(24px, 6vw, 34px); line-height: 1.2; }}
h2 {{ margin-top: 40px; }}
.note, figcaption span, .pictures th, .facts td:first-child {{ color: #646b78; font-size: 14px; }}
.warning {{ background: #fff4e0; border-left: 4px solid #e07a1f; padding: 8px 14px; }}
.row {{ display: grid; gap: 16px; margin-bottom: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
.row > * {{ min-width: 0; }}
figure, pre {{ margin: 0; background: #f7f8fa; padding: 12px; }}
pre {{ white-space: pre-wrap; }}
figcaption {{ font-weight: 600; margin-bottom: 8px; }}
figcaption span {{ display: block; font-weight: 400; }}
.scroll {{ overflow-x: auto; }}
.chart, .pictures, .pictures img {{ width: 100%; }}
.pictures th {{ font-weight: 500; vertical-align: bottom; }}
.pictures tr + tr th {{ max-width: max(6em, 12vw); vertical-align: middle; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }}
.pictures img {{ min-width: 22px; image-rendering: pixelated; display: block; }}
.numbers {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
.numbers th, .numbers td {{ padding: 6px 12px 6px 0; text-align: right; vertical-align: bottom;
  overflow-wrap: normal; border-bottom: 1px solid #e3e6eb; }}
.numbers th:first-child, .numbers td:first-child, .facts td {{ text-align: left !important; }}
.facts td {{ overflow-wrap: anywhere !important; vertical-align: top !important; }}
.facts td:first-child {{ min-width: 9em; }}
</style></head><body>
{body}
</body></html>
"""


def write_report(path, title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Writes one HTML file, whole or not at all; a section without a heading has "" there."""
    parts = [f"<h1>{_text(title)}</h1>"]
    for heading, pieces in sections:
        parts += [f"<h2>{_text(heading)}</h2>"] if heading else []
        parts += pieces
    storage.write_text(path, _PAGE.format(title=_text(title), body="\n".join(parts)))


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph; a note is small and grey."""
    return f'<p class="{"note" if note else ""}">{_text(text)}</p>'


def warning(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="warning">{_text(text)}</p>'


def code(text: str) -> str:
    """Lines to be typed."""
    return f"<pre>{_text(text)}</pre>"


def row(*pieces: str) -> str:
    """Pieces side by side where the page is wide enough."""
    return f'<div class="row">{"".join(pieces)}</div>'


def picture_table(
    caption: str,
    remark: str,
    titles: Sequence[str],
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str] = (),
) -> str:
    """Rows of pictures, uint8 [H, W, 3], enlarged; a title per column and a label per row."""
    head = "".join(f"<th>{_text(title)}</th>" for title in ([""] if labels else []) + [*titles])
    lines = []
    for i, pictures in enumerate(rows):
        cells = [f"<th>{_text(labels[i])}</th>"] if labels else []
        for title, picture in zip(titles, pictures, strict=True):
            image = f'<img alt="{_text(title)}" src="{_embedded(picture)}">'
            cells.append(f'<td style="width:{90 / len(titles):.3g}%">{image}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    table = f'<table class="pictures"><tr>{head}</tr>\n{"".join(lines)}</table>'
    return _figure(caption, remark, f'<div class="scroll">{table}</div>')


def number_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers, already formatted."""
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    return _table("numbers", [f"<tr>{head}</tr>"], rows)


def fact_table(facts: dict[str, str]) -> str:
    """Names and what they are."""
    return _table("numbers facts", [], facts.items())


def chart(
    caption: str,
    remark: str,
    series: dict[str, Sequence[tuple[float, float]]],
    x_title: str,
    *,
    log2: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    level: tuple[str, float] | None = None,
    scattered: Sequence[str] = (),
) -> str:
    """Curves as an embedded SVG picture.

    Args:
        caption, remark: what it shows, and a line below that (the unit).
        series: {name: points (x, y)}; points that are not finite are left out.
        log2: equal steps per doubling along x, with a tick at every point.
        percent: y is a share of 1.
        level: (name, y) of a dashed line across.
        scattered: names of series without a line between their points.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    series = {name: [p for p in series[name] if np.isfinite(p).all()] for name in series}
    if not any(series.values()):
        return _figure(caption, remark, paragraph("Nothing was recorded.", note=True))
    figure = Figure(figsize=(3.7, 2.6), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        marker = "o" if log2 or name in scattered or len(points) < 20 else None
        line = "none" if name in scattered else "-"
        axes.plot(*zip(*points), marker=marker, ms=4, ls=line, label=name)
    if log2:
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=5)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_title)
    axes.grid(color="#e3e6eb")
    axes.spines[["top", "right"]].set_visible(False)
    if level:
        axes.axhline(level[1], color="#646b78", ls="--", lw=1, label=level[0])
    if len(series) > 1 or level:
        axes.legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # Text stays text.
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
    return _figure(caption, remark, f'<img class="chart" alt="{_text(caption)}" src="{source}">')


def _figure(caption: str, remark: str, content: str) -> str:
    remark = f"<span>{_text(remark)}</span>" if remark else ""
    return f"<figure><figcaption>{_text(caption)}{remark}</figcaption>{content}</figure>\n"


def _table(style: str, lines: list[str], rows) -> str:
    for cells in rows:
        lines.append("".join(["<tr>", *(f"<td>{_text(cell)}</td>" for cell in cells), "</tr>"]))
    return f'<div class="scroll"><table class="{style}">{"".join(lines)}</table></div>'


def _embedded(picture: np.ndarray) -> str:
    """A picture as a data URL."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _text(value) -> str:
    return html.escape(str(value))
