"""The drawings and pictures of a report: inside the page, so that it loads nothing."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import statistics
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fedmed_flower.data.pictures import MOST_BYTES, PALETTE, sound
from fedmed_flower.files import read_file
from fedmed_flower.reports.charts import Chart, axis
from fedmed_flower.reports.frame import (
    FAINT,
    INK,
    PAPER,
    SCHEME,
    count_of,
    escaped,
    format_value,
    wide,
)

Series = dict[str, dict[int, float]]  # site -> round -> value


class SiteStyle(NamedTuple):
    """How a site is drawn.

    Attributes
    ----------
    colour, dashes
        For Matplotlib.
    key
        The site's name as HTML, with its line before it if it has a colour of its own.
    css
        The class of the page's style that sets its colour.
    """

    colour: str
    dashes: str
    key: str
    css: str


Styles = dict[str, SiteStyle]

CROWD = "#5b7f9c"
WORST = "#c24f00"
# Colours of Matplotlib's drawings that become variables of the page's style.
_VARIABLES = {colour: f"var(--s{index})" for index, colour in enumerate(PALETTE)}
_VARIABLES |= {CROWD: "var(--crowd)", WORST: "var(--worst)", **SCHEME}
_COLOUR = re.compile("|".join(_VARIABLES))
# The models that are compared, in this order, and how each is marked.
MODELS = {
    "trained alone": "○",
    "federated": "●",
    "own model": "■",
    "fine-tuned": "◆",
    "trained on pooled data": "|",
}
_FILE = re.compile(r"pictures/[0-9]+\.png")
_STYLE = re.compile(r'style="([^"]*)"')
SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "0", "text.parse_math": False}


def styles(sites: list[str]) -> Styles:
    """Return how each site is drawn: in its own colour if there are enough colours."""
    if len(sites) > len(PALETTE):
        return {site: SiteStyle(CROWD, "-", escaped(site), "crowd") for site in sites}
    drawn = {}
    for colour, (index, site) in zip(PALETTE, enumerate(sites), strict=False):
        dashes = "--" if index > 5 else "-"
        css = f"s{index}"
        drawn[site] = SiteStyle(colour, dashes, line(css, dashes) + escaped(site), css)
    return drawn


def line(css: str, dashes: str = "-") -> str:
    """Return the key of a line; `css` is the class that sets its colour."""
    pattern = "4 2.5" if dashes == "--" else "none"
    path = (
        f'<path d="M0 5H20" stroke="currentColor" stroke-width="3" stroke-dasharray="{pattern}"/>'
    )
    return f'<svg class="key {css}" viewBox="0 0 20 10" aria-hidden="true">{path}</svg>'


def keys(styles: Styles, together: bool) -> str:
    """Return the legend of `panel`; `together` adds the line of all sites together."""
    listed = [style.key for style in styles.values()]
    if len(styles) > len(PALETTE):
        listed = [
            "shaded: all hospitals",
            f"{line('crowd')}median",
            f"{line('worst')}worst at the end",
        ]
    if together:
        listed.append(f"{line('all')}all together")
    return legend(listed)


def legend(listed: list[str]) -> str:
    """Return a list of keys."""
    return f'<ul class="keys"><li>{"</li><li>".join(listed)}</li></ul>'


def dots(styles: Styles, models: list[dict[str, float]], name: str) -> str:
    """Draw what the models of `MODELS` reach at each site."""
    sites = [site for site in styles if any(site in values for values in models)]
    axes: Any = Figure((6.2, 0.5 + 0.24 * len(sites)), layout="constrained").subplots()
    for row, site in enumerate(sites):
        alone, federated, own, tuned, pooled = (values.get(site, math.nan) for values in models)
        style: dict[str, Any] = {"color": styles[site].colour, "lw": 1.6, "mew": 1.5}
        axes.plot([alone, federated, own, tuned], [row] * 4, "-", **style)
        axes.plot([alone], [row], "o", mfc=PAPER, **style)
        axes.plot([federated], [row], "o", **style)
        axes.plot([own], [row], "s", ms=5, **style)
        axes.plot([tuned], [row], "D", ms=4, **style)
        axes.plot([pooled], [row], "|", ms=9, **style)
    axes.set_yticks(range(len(sites)), [html.unescape(escaped(site))[:24] for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    drawn = zip(models, MODELS.items(), strict=True)
    key = " &emsp;".join(f"<b>{mark}</b> {model}" for values, (model, mark) in drawn if values)
    return _compared(axes, key, name)


def spreads(models: list[dict[str, float]], name: str, lower: bool) -> str:
    """Draw the spread of what the models of `MODELS` reach, for many sites; `lower` is better."""
    shown = [(model, v) for model, v in zip(MODELS, models, strict=True) if len(v) > 1]
    axes: Any = Figure((6.2, 0.6 + 0.3 * len(shown)), layout="constrained").subplots()
    for row, (_, values) in enumerate(shown):
        cuts = statistics.quantiles(values.values(), n=20, method="inclusive")
        axes.plot([cuts[0], cuts[-1]], [row] * 2, color=CROWD, lw=1.4)
        axes.plot([cuts[4], cuts[14]], [row] * 2, color=CROWD, lw=6, solid_capstyle="butt")
        axes.plot([cuts[9]], [row], "|", color=INK, ms=12, mew=2)
        axes.plot([(max if lower else min)(values.values())], [row], "o", color=WORST, ms=5)
    axes.set_yticks(range(len(shown)), [model for model, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    key = f"{line('crowd')}nine tenths of the hospitals, half of them thick &emsp;<b>|</b> median "
    return _compared(axes, f'{key}&emsp;<b class="worst">●</b> worst', name)


def _compared(axes: Any, key: str, name: str) -> str:
    label = f"{name} of the models"
    drawing = svg(axes, label, f"{name} on the hospital’s own test records")
    shown = wide(drawing, f"Drawing: {label}")
    return f'<figure class="dots"><figcaption>{key}</figcaption>{shown}</figure>'


def panel(
    styles: Styles,
    series: Series,
    total: dict[int, float],
    title: str,
    lower: bool,
    limit: float | None = None,
) -> str:
    """Draw a metric over the rounds; of many sites the range, the median and the worst.

    Parameters
    ----------
    styles
        Of all sites, in their order.
    series, total
        The sites' values and those of all together; either may be empty. If both are, the drawing
        is empty too.
    title
        What is shown, as HTML.
    lower
        Whether lower is better.
    limit
        A value to which a dashed line is drawn.
    """
    series = {site: values for site in styles if (values := series.get(site))}
    every = [*series.values(), *([total] if total else [])]
    rounds = sorted({turn for values in every for turn in values})
    if not rounds:
        return ""
    x = axis("round", rounds, whole=True)
    known = [value for values in every for value in values.values()]
    y = axis(title, known if limit is None else [*known, 0.0, limit])
    chart = Chart(f"{title} over {count_of(len(rounds), 'round')}", x, y)
    if limit is not None:
        chart.rule((x.low, limit), (x.high, limit))
    caption = ""
    if len(styles) > len(PALETTE) and series:
        caption = _crowd(chart, series, lower)
    else:
        for site, values in series.items():
            style = styles[site]
            points = [*values.items()]
            chart.line(site, points, style.css, site=site, dashed=style.dashes == "--")
    if total:
        chart.line("all together", [*total.items()], "all")
    return f"<figure><figcaption><b>{title}</b>{caption}</figcaption>{chart.svg()}</figure>"


def _crowd(chart: Chart, series: Series, lower: bool) -> str:
    """Draw the range, median and worst of many sites; return what to add to the caption."""
    by_round: dict[int, list[float]] = {}
    for curve in series.values():
        for turn, value in curve.items():
            by_round.setdefault(turn, []).append(value)
    by_round = dict(sorted(by_round.items()))
    bottom = [(turn, min(values)) for turn, values in by_round.items()]
    top = [(turn, max(values)) for turn, values in by_round.items()]
    chart.band(bottom, top, "crowd")
    median = [(turn, statistics.median(values)) for turn, values in by_round.items()]
    chart.line("median of the hospitals", median, "crowd")
    last = {site: [*curve.values()][-1] for site, curve in series.items()}
    worst = (max if lower else min)(last, key=lambda site: last[site])
    chart.line(worst, [*series[worst].items()], "worst", site=worst)
    return f" · worst: {escaped(worst)}, {format_value(last[worst])}"


def case(entry: dict[str, Any], folder: Path) -> str:
    """Return a test case's picture from the run folder; or a line that says what is wrong."""
    file = str(entry.get("file"))
    title = escaped(entry.get("title"))
    png, problem = _picture(folder, file)
    if problem is not None:
        return f'<p class="note">Not shown: {title} ({escaped(file)}): {escaped(problem)}</p>'
    alt = f"{escaped(entry.get('site'))}: {title}"
    data = base64.b64encode(png).decode()
    picture = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    site = f'data-case data-site="{escaped(entry.get("site"))}"'
    # Opens at a click or a key without any script: the page's style makes it large.
    opened = f"<details><summary>{picture}</summary></details>"
    return f"<figure {site}>{opened}<figcaption>{title}</figcaption></figure>"


def _picture(folder: Path, file: str) -> tuple[bytes, str | None]:
    """Return a picture's bytes, and what is wrong with it."""
    # No other file of this machine may get into the page.
    if not _FILE.fullmatch(file):
        return b"", "it is no picture of the run folder"
    try:
        png = read_file(folder, file, MOST_BYTES)
    except OSError as error:
        return b"", f"it cannot be read ({error.strerror})"
    return png, sound(png)


def svg(axes: Any, label: str, across: str, grid: str = "x") -> str:
    """Draw for use inside the page: no ids, no links, colours from the page's style.

    `grid` names the axis from which lines cross the drawing; an empty text draws none.
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, colors=INK)
    if grid:
        axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_xlabel(across, color=INK)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        axes.figure.savefig(buffer, format="svg", transparent=True)
    drawing = re.sub(r"(?s)<(metadata|style).*?</\1>|(?<=<g) id=\"[^\"]*\"", "", buffer.getvalue())
    drawing = _STYLE.sub(_as_attributes, drawing)
    drawing = _COLOUR.sub(lambda colour: _VARIABLES[colour[0]], drawing)
    box = re.search(r"viewBox=\"[^\"]*\"", drawing)
    shapes = drawing.partition("<defs>")[2]
    return f'<svg role="img" aria-label="{label}" {box[0] if box else ""}><defs>{shapes}'


def _as_attributes(found: re.Match[str]) -> str:
    """Return a style as attributes, which the page's policy allows: it forbids any other style."""
    attributes = []
    for entry in found[1].split(";"):
        name, _, value = (part.strip() for part in entry.partition(":"))
        if name == "font":
            size = re.search(r"[0-9.]+px", value)
            attributes.append(f'font-size="{size[0] if size else "10px"}"')
        elif name and name != "font-family":
            attributes.append(f'{name}="{value}"')
    return " ".join(attributes)
