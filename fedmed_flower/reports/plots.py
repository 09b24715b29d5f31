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
from typing import Any

from matplotlib.figure import Figure

from fedmed_flower.data.pictures import MOST_BYTES, PALETTE, sound
from fedmed_flower.files import read_file
from fedmed_flower.reports.frame import FAINT, INK, PAPER, SCHEME, count_of, escaped, format_value

Series = dict[str, dict[int, float]]  # site -> round -> value
Pens = dict[str, tuple[str, str, str]]  # site -> colour, line style, name with its key

CROWD, WORST = "#5b7f9c", "#d55e00"
# What is compared, in this order, and how it is marked.
MODELS = {
    "own model alone": "○",
    "federated": "●",
    "fine-tuned": "◆",
    "trained on pooled data": "|",
}
_FILE = re.compile(r"pictures/[0-9]+\.png")
SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "0", "text.parse_math": False}


def styles(sites: list[str]) -> Pens:
    """Return how each site is drawn: in a colour of its own while there are enough of them."""
    if len(sites) > len(PALETTE):
        return {site: (CROWD, "-", escaped(site)) for site in sites}
    looks = {site: (PALETTE[i], "--" if i > 5 else "-") for i, site in enumerate(sites)}
    return {site: (*look, line(*look) + escaped(site)) for site, look in looks.items()}


def line(colour: str, style: str = "-") -> str:
    """Return the key of a line."""
    path = f'<path d="M0 5H20" stroke="{colour}" stroke-width="3" stroke-dasharray="'
    path += '4 2.5"/>' if style == "--" else 'none"/>'
    return f'<svg class="key" viewBox="0 0 20 10" aria-hidden="true">{path}</svg>'


def keys(styles: Pens, together: bool) -> str:
    """Return the legend of `panel`, with a line for all together where there is one."""
    found = [key for _, _, key in styles.values()]
    if len(styles) > len(PALETTE):
        found = ["shaded: all hospitals", f"{line(CROWD)}median", f"{line(WORST)}worst at the end"]
    if together:
        found.append(f"{line('var(--soft)')}all together")
    return f"<ul><li>{'</li><li>'.join(found)}</li></ul>"


def dots(styles: Pens, models: list[dict[str, float]], name: str) -> str:
    """Draw what the models of `MODELS` reach at each site."""
    sites = [site for site in styles if any(site in values for values in models)]
    axes: Any = Figure((6.2, 0.5 + 0.24 * len(sites)), layout="constrained").subplots()
    for row, site in enumerate(sites):
        own, shared, tuned, best = (values.get(site, math.nan) for values in models)
        style: dict[str, Any] = {"color": styles[site][0], "lw": 1.6, "mew": 1.5}
        axes.plot([own, shared, tuned], [row] * 3, "-", **style)
        axes.plot([own], [row], "o", mfc=PAPER, **style)
        axes.plot([shared], [row], "o", **style)
        axes.plot([tuned], [row], "D", ms=4, **style)
        axes.plot([best], [row], "|", ms=9, **style)
    axes.set_yticks(range(len(sites)), [html.unescape(escaped(site))[:24] for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    drawn = zip(models, MODELS.items(), strict=True)
    key = " &emsp;".join(f"<b>{mark}</b> {model}" for values, (model, mark) in drawn if values)
    return _compared(axes, key, name)


def spreads(models: list[dict[str, float]], name: str, lower: bool) -> str:
    """Draw how the models of `MODELS` do over so many sites that each has no place of its own."""
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
    key = f"{line(CROWD)}nine tenths of the hospitals, half of them thick &emsp;<b>|</b> median "
    return _compared(axes, f'{key}&emsp;<b style="color:{WORST}">●</b> worst', name)


def _compared(axes: Any, key: str, name: str) -> str:
    drawing = svg(axes, f"{name} of the models", f"{name} on the hospital’s own test records")
    return f'<figure class="dots"><figcaption>{key}</figcaption>{drawing}</figure>'


def panel(styles: Pens, series: Series, total: dict[int, float], title: str, lower: bool) -> str:
    """Draw one figure over the rounds; of many sites their range, median and worst.

    Parameters
    ----------
    pens
        Of all sites, in their order.
    series, total
        The sites' values and those of all together; either may be empty. Without any value
        nothing is drawn.
    title
        What is shown.
    lower
        Whether lower is better.
    """
    series = {site: values for site in styles if (values := series.get(site))}
    rounds = sorted({turn for values in (*series.values(), total) for turn in values})
    if not rounds:
        return ""
    axes: Any = Figure((3.4, 2.4), layout="constrained").subplots()
    lines, caption = [(values, *styles[site][:2]) for site, values in series.items()], ""
    if len(styles) > len(PALETTE) and series:
        reported: dict[int, list[float]] = {turn: [] for turn in rounds}
        for own in series.values():
            for turn, value in own.items():
                reported[turn].append(value)
        spread = {turn: values for turn, values in reported.items() if values}
        bottom, top = [*map(min, spread.values())], [*map(max, spread.values())]
        axes.fill_between([*spread], bottom, top, color=CROWD, alpha=0.25, lw=0)
        ends = {site: [*values.values()][-1] for site, values in series.items()}
        worst = (max if lower else min)(ends, key=lambda site: ends[site])
        middle = {turn: statistics.median(values) for turn, values in spread.items()}
        lines = [(middle, CROWD, "-"), (series[worst], WORST, "-")]
        caption = f" · worst: {escaped(worst)}, {format_value(ends[worst])}"
    style: dict[str, Any] = {"lw": 1.4, "marker": "o" if len(rounds) <= 15 else "", "ms": 2.6}
    for values, colour, dashes in (*lines, (total, INK, "-")):
        axes.plot([*values], [*values.values()], dashes, color=colour, **style)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.locator_params(axis="y", nbins=6)
    drawing = svg(axes, f"{title} over {count_of(len(rounds), 'round')}", "round", grid="y")
    return f"<figure><figcaption><b>{title}</b>{caption}</figcaption>{drawing}</figure>"


def case(entry: dict[str, Any], folder: Path) -> str:
    """Return a test case's picture from the run folder; where it is not sound, a line says why."""
    file, title = str(entry.get("file")), escaped(entry.get("title"))
    # No other file of this machine may get into the page.
    problem, png = None if _FILE.fullmatch(file) else "it is no picture of the run folder", b""
    try:
        if problem is None:
            png = read_file(folder, file, MOST_BYTES)
            problem = sound(png)
    except OSError as error:
        problem = f"it cannot be read ({error.strerror})"
    if problem is not None:
        return f'<p class="note">Not shown: {title} ({escaped(file)}): {escaped(problem)}</p>'
    alt, data = f"{escaped(entry.get('site'))}: {title}", base64.b64encode(png).decode()
    picture = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{title}</figcaption></figure>"


def svg(axes: Any, label: str, across: str, grid: str = "x") -> str:
    """Draw for use inside the page: no ids, no links, colours from the page's style."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_xlabel(across, color=INK)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        axes.figure.savefig(buffer, format="svg", transparent=True)
    drawing = re.sub(r"(?s)<(metadata|style).*?</\1>|(?<=<g) id=\"[^\"]*\"", "", buffer.getvalue())
    drawing = re.sub(r"(?<=: )#01020[345]", lambda found: SCHEME[found[0]], drawing)
    start, shapes = re.search(r"viewBox=\"[^\"]*\"", drawing), drawing.partition("<defs>")[2]
    return f'<svg role="img" aria-label="{label}" {start[0] if start else ""}><defs>{shapes}'
