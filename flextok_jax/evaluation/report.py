"""Self-contained HTML reports: inline CSS, SVG curves and embedded pictures; no script, no network.

Text that is passed in is escaped; the functions below return pieces of HTML for `write_report`.
"""

import base64
import html
import io
import math
from collections.abc import Collection, Sequence

import numpy as np

from flextok_jax.io import storage

COLORS = ("#1f5fd0", "#e07a1f", "#2f9e6e", "#8a4fc8", "#c23b5a", "#7a6a4f")
_WIDTH, _HEIGHT = 440, 280  # Of a chart, in SVG units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 14, 44  # Its margins.
_STYLE = """
:root { --ink: #1d1f24; --soft: #646b78; --line: #e3e6eb; --paper: #ffffff; --card: #f7f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.02em; }
h2 { font-size: 21px; margin: 44px 0 10px; letter-spacing: -0.01em; }
p { margin: 0 0 12px; max-width: 72ch; }
.note { color: var(--soft); font-size: 14px; }
.warning { background: #fff4e0; border-left: 4px solid #e07a1f; padding: 8px 14px; }
.row { display: grid; gap: 20px; margin-bottom: 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px; }
figcaption { font-weight: 600; margin-bottom: 8px; }
figcaption span { display: block; font-weight: 400; font-size: 14px; color: var(--soft); }
.pictures { width: 100%; table-layout: fixed; border-spacing: 4px; }
.pictures th { font-weight: 500; font-size: 13px; color: var(--soft); }
.pictures td { padding: 0; line-height: 0; }
.pictures img { width: 100%; image-rendering: pixelated; border-radius: 3px; }
.pictures th:first-child { color: var(--ink); }
svg { width: 100%; height: auto; display: block; font-size: 12px; }
.key { font-size: 14px; margin-right: 16px; white-space: nowrap; }
.key i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.scroll { overflow-x: auto; }
.numbers { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { padding: 6px 18px 6px 0; text-align: right;
  border-bottom: 1px solid var(--line); }
.numbers th { font-weight: 600; vertical-align: bottom; }
.numbers th:first-child, .numbers td:first-child { text-align: left; }
.facts td:nth-child(2), .facts th:nth-child(2) { text-align: left; word-break: break-word; }
.facts td:first-child { color: var(--soft); white-space: nowrap; vertical-align: top; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px; white-space: pre-wrap; font-size: 14px; }
"""


def write_report(path, title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Writes one HTML file, whole or not at all.

    Args:
        path: where to.
        title: the heading of the page.
        sections: (heading, or "" for none; pieces of HTML) each.
    """
    parts = [f"<h1>{_text(title)}</h1>"]
    for heading, pieces in sections:
        if heading:
            parts.append(f"<h2>{_text(heading)}</h2>")
        parts.extend(pieces)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    with storage.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph; a note is small and grey."""
    return f'<p class="note">{_text(text)}</p>' if note else f"<p>{_text(text)}</p>"


def warning(text: str) -> str:
    """A remark that must not be overlooked."""
    return f'<p class="warning">{_text(text)}</p>'


def code(text: str) -> str:
    """Lines to be typed."""
    return f"<pre>{_text(text)}</pre>"


def row(*pieces: str) -> str:
    """Pieces side by side where there is room."""
    return f'<div class="row">{"".join(pieces)}</div>'


def picture_table(
    caption: str, about: str, titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]
) -> str:
    """Rows of small pictures below their columns' titles.

    Args:
        caption, about: what it shows, and a line below that.
        titles: one per column.
        rows: uint8 [H, W, 3] each; shown enlarged, every pixel a square.
    """
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td><img alt="{_text(title)}" src="{_embedded(picture)}"></td>'
            for title, picture in zip(titles, pictures, strict=True)
        )
        + "</tr>\n"
        for pictures in rows
    )
    table = f'<table class="pictures"><tr>{head}</tr>\n{body}</table>'
    return _figure(caption, about, table)


def number_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers, already formatted."""
    return _table("numbers", titles, rows)


def fact_table(facts: dict[str, str]) -> str:
    """Names and what they are."""
    return _table("numbers facts", (), list(facts.items()))


def chart(
    caption: str,
    about: str,
    series: dict[str, Sequence[tuple]],
    x_title: str,
    *,
    log2: bool = False,
    dots: bool = False,
    scattered: Collection[str] = (),
    percent: bool = False,
    from_zero: bool = False,
    level: tuple[str, float] | None = None,
    colors: Sequence[str] = COLORS,
) -> str:
    """Curves as SVG.

    Args:
        caption, about: what it shows, and a line below that (the unit).
        series: {name: points (x, y), ascending in x, or (x, y, what it is in words)}; points that
            are not finite are left out.
        x_title: below the axis.
        log2: equal steps per doubling along x, with a tick and a dot at every point.
        dots: a dot at every point.
        scattered: names of series without a line between their points.
        percent: y is a share of 1.
        from_zero: the y axis begins at 0.
        level: (name, y) of a dashed line across.
        colors: one per series.
    """
    finite = {
        name: [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
        for name, points in series.items()
    }
    points = [point for part in finite.values() for point in part]
    if not points:
        return _figure(caption, about, paragraph("Nothing was recorded.", note=True))
    ys = [y for _, y, *_ in points] + ([level[1]] if level else []) + ([0.0] if from_zero else [])
    ticks = _ticks(min(ys), max(ys), most=1.0 if percent else math.inf)
    xs = sorted({x for x, *_ in points})
    x_ticks = xs
    if not log2:
        whole = all(float(x).is_integer() for x in xs)
        x_ticks = [x for x in _ticks(xs[0], xs[-1], whole=whole) if xs[0] <= x <= xs[-1]]
    place = math.log2 if log2 else float
    left, right = place(xs[0]), place(xs[-1])

    def across(x):
        share = (place(x) - left) / (right - left) if right > left else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(y):
        share = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def label(value):
        return f"{100 * value:g}\u00a0%" if percent else f"{value:g}"

    parts = []
    for y in ticks:
        parts.append(_line(_LEFT, down(y), _WIDTH - _RIGHT, down(y), "#e3e6eb"))
        parts.append(_label(_LEFT - 8, down(y) + 4, "end", label(y)))
    for x in x_ticks:
        parts.append(_label(across(x), _HEIGHT - _BOTTOM + 18, "middle", f"{x:g}"))
    parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "middle", x_title))
    if level:
        y = down(level[1])
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "#646b78", 'stroke-dasharray="5 4"'))
        parts.append(_label(_WIDTH - _RIGHT, y - 6, "end", level[0]))
    for (name, part), color in zip(finite.items(), colors):
        if name not in scattered:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, *_ in part)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5" '
                'stroke-linejoin="round" stroke-linecap="round"/>'
            )
        for x, y, *words in part if log2 or dots else ():
            value = f"{100 * y:.1f}\u00a0%" if percent else f"{y:.4g}"
            about_it = _text(", ".join([name, *words, f"{x:g}"]))
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4.5" fill="{color}" '
                f'stroke="#fff" stroke-width="1.5"><title>{about_it}: {value}</title></circle>'
            )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(caption)}">'
        + "".join(parts)
        + "</svg>"
    )
    keys = "".join(
        f'<span class="key"><i style="background:{color}"></i>{_text(name)}</span>'
        for name, color in zip(finite, colors)
    )
    return _figure(caption, about, svg + (keys if len(finite) > 1 else ""))


def _ticks(low: float, high: float, most: float = math.inf, whole: bool = False) -> list[float]:
    """Two to eight round numbers around low..high, none above `most`; `whole`: integers."""
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    steps = [unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 6]
    step = next((s for s in steps if not whole or s.is_integer()), 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    kept = [tick for tick in ticks if tick <= most]
    return kept if len(kept) > 1 else [kept[0] - step, kept[0]]


def _figure(caption: str, about: str, content: str) -> str:
    about = f"<span>{_text(about)}</span>" if about else ""
    return f"<figure><figcaption>{_text(caption)}{about}</figcaption>{content}</figure>\n"


def _table(style: str, titles, rows) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>\n" for cells in rows
    )
    head = f"<tr>{head}</tr>\n" if head else ""
    return f'<div class="scroll"><table class="{style}">{head}{body}</table></div>'


def _line(x1, y1, x2, y2, color: str, more: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {more}/>'
    )


def _label(x, y, anchor: str, text: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="#646b78">{_text(text)}</text>'


def _embedded(picture: np.ndarray) -> str:
    """A picture as a data URL."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _text(value) -> str:
    return html.escape(str(value))
