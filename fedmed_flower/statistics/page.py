"""The page of a survey: Table 1, distributions, curves, correlations, drift, alerts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fedmed_flower.data.pictures import PALETTE
from fedmed_flower.files import as_input_error, read_object, write_atomic
from fedmed_flower.reports import frame, plots
from fedmed_flower.reports.frame import INK, count_of, escaped
from fedmed_flower.reports.plots import Styles
from fedmed_flower.server.run_folder import read_summary
from fedmed_flower.statistics.pooling import below_edges
from fedmed_flower.statistics.table import (
    AGAIN,
    APART,
    CURVE,
    OVERALL,
    STANDS_OUT,
    hospitals_of,
    label,
    tables,
)

STATISTICS_FILE = "statistics.json"
_MOST_ROWS = 400
_MOST_PLOTS = 24
_MOST_NAMES = 100
_MOST_WEEKS = 2000
_MOST_TICKS = 4
_ALERT = "#d55e00"
# How opaque the bands of curves are: of all hospitals, of each, and of each group.
_BAND = 0.2
_FAINT_BAND = 0.08
_GROUP_BAND = 0.12
_BANNER = '<p class="banner" role="note">generated rows, not patients</p>'
_LEFT = """<h2>What left each hospital</h2><p>The numbers behind these tables, but no row: counts,
sums, sums of squares and of products, and the edges of merged cells. Each is of {} patients or
more of that hospital, or of none, alone and combined with earlier answers. Each hospital also
disclosed what it withholds, and which condition it refused.</p>"""
_SUMMED = """<h2>What left each hospital</h2><p>Numbers under masks that cancel in the sum alone:
the server knows the sums behind these tables, and of each figure how many hospitals tell it. Each
of them left out what is of fewer patients than its minimum. The sums are over {}.</p>"""
_NOISED = """<h2>What left each hospital</h2><p>The numbers behind these tables, each with Gaussian
noise: what they disclose about one patient is bounded by epsilon <b>{}</b> at delta {}, charged to
each hospital’s ledger before it was computed. Counts are estimates: none of them is exact.</p>"""
_NOTES = """<p class="note">SD: standard deviation. Medians and quartiles: {}
“few”: the hospital has no patient with the value, or fewer than its minimum, or just enough to hide
such a number in another cell; ≥: a sum without these. A dash: withheld or missing.</p>"""
_BOUNDS = """the bounds between which they certainly lie, because cells of neighbouring values are
merged. “1.00 to &lt;2.00” is 1 or more and less than 2; in a column of whole numbers “1 to 2” is 1,
2 or between them. One number: both bounds are printed alike."""
_ESTIMATES = "estimates, interpolated in cells with noise."
_SHARES = """<p class="note">All hospitals together: a dark point is known; where they have merged
different cells, the shade lies between the bounds.</p>"""
_DRIFT = """<p class="note">PSI, the population stability index: by custom above 0.1 a change, above
0.25 a large one. KS, Kolmogorov and Smirnov: the greatest distance of two distributions that is
certain. Missing: by how much more of the column is missing. p: the probability of a difference as
large by chance; corrected, among all these comparisons.</p>"""
_STANDS_OUT = """<p class="note">Named is who differs by more than chance (p, corrected for all
comparisons, below 0.01) and by much: a PSI above 0.25 to more than half of the other hospitals, or
20 percentage points of missing values. Also who has a mean or a spread far from all others’, or two
categories that seem to be swapped. None of it says who is right.</p>"""
_CURVES = """<p class="note">The survival is for certain at least and at most what the last two
columns say: hospitals withhold when exactly some of the events and losses were. Between them stands
the survival itself, by times rounded up to the steps that were asked for, as far as the counts of
each hospital are exact to these steps; a dash: they are not. In the drawing the shade reaches from
one bound to the other, and the line goes as far as the survival is known.</p>"""
_APART = """<p class="note">Groups are compared over the same hospitals: those that reported a curve
of each.</p>"""
_AGAIN = """<p class="note">What a hospital has disclosed decides what it may disclose later. A new
simulation remembers no answer. A real hospital does: each of these questions helps only where
nothing else was asked of its columns before, and may be withheld there too.</p>"""
_WEEKS = """<p class="note">A week is named by its first day. A week that a hospital withholds is of
few patients, not of none: it is not judged, and left out of what other weeks are compared with. A
week is not judged either while too few weeks before it are known.</p>"""
_NOTE_OF = {
    STANDS_OUT: _STANDS_OUT,
    "Drift": _DRIFT,
    "Weekly counts": _WEEKS,
    AGAIN: _AGAIN,
    APART: _APART,
}


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a survey: one file that loads nothing.

    Raises
    ------
    InputError
        If ``summary.json`` or ``statistics.json`` is missing or damaged.
    """
    hint = "give the folder of a survey"
    summary = read_summary(folder, hint)
    survey = read_object(folder, STATISTICS_FILE, hint)
    with as_input_error(f"the survey in {folder / STATISTICS_FILE}", "run it again"):
        body = _body(summary, survey)
    banner = _BANNER if summary.get("generated") is True else ""
    text = frame.page(escaped(summary.get("app") or "Survey"), body, banner)
    target = folder / "report.html"
    write_atomic(target, text.encode())
    return target


def _body(summary: Mapping[str, Any], survey: Mapping[str, Any]) -> str:
    styles = plots.styles(sorted(survey["sites"], key=frame.natural))
    for group in survey["groups"].values():
        counted = group["overall"]["categorical"].values()
        row_count = sum(len(reported.get("counts", ())) + 1 for reported in counted)
        frame.require_small(row_count + len(group["overall"]["numeric"]), len(group["sites"]))
    all_tables = tables(survey)
    first = [table for table in all_tables if table["title"].startswith("Table 1")]
    curves = [table for table in all_tables if table["title"].startswith(CURVE)]
    rest = [table for table in all_tables if not table["title"].startswith(("Table 1", CURVE))]
    noised = bool(survey["request"]["epsilon"])
    notes = _NOTES.format(_ESTIMATES if noised else _BOUNDS)
    parts = [
        _head(summary, survey.get("members") or survey["sites"]),
        *(_table(table) for table in first),
        notes if first else "",
    ]
    with matplotlib.rc_context(plots.SETTINGS):
        for name, group in islice(survey["groups"].items(), _MOST_PLOTS):
            reported = {
                site: entry
                for site, answer in survey["sites"].items()
                for entry in answer["groups"]
                if entry["name"] == name
            }
            parts.append(_drawings(label(survey, name), group, reported, styles))
        left = len(survey["groups"]) - _MOST_PLOTS
        if left > 0:
            parts.append(f'<p class="note">{count_of(left, "more group")} not drawn.</p>')
        parts.append(_side_by_side(survey))
        watched = [entry for entry in survey["alerts"] if "note" not in entry]
        drawn = "".join(_weeks(entry) for entry in watched[:_MOST_PLOTS])
        parts.append(f"<h2>Week by week</h2>{drawn}" if drawn else "")
    if curves:
        parts += [*map(_table, curves), "" if noised else _CURVES]
    for table in rest:
        kind = table["title"].partition(" (")[0]
        parts.append(_table(table) + _NOTE_OF.get(kind, ""))
    request = survey["request"]
    minima = [reported["minimum"] for reported in survey["sites"].values()]
    if request["epsilon"]:
        parts.append(_NOISED.format(escaped(request["epsilon"]), escaped(request["delta"])))
    elif members := survey.get("members"):
        parts.append(_SUMMED.format(escaped(", ".join(members))))
    else:
        parts.append(_LEFT.format(escaped(min(minima, default=None))))
    # Without noise delta says nothing.
    unused = () if request["epsilon"] else ("delta",)
    asked = {name: value for name, value in request.items() if value and name not in unused}
    rows = [[escaped(name), escaped(_listed(value))] for name, value in asked.items()]
    rows.append(["data", escaped(summary.get("data"))])
    title = "What was asked"
    asked_table = frame.table(frame.unseen(title), ("Name", "Value"), rows, kind="wordy")
    parts.append(f"<h2>{title}</h2>{asked_table}")
    return "\n".join(parts)


def _listed(value: Any) -> Any:
    """Return a list of texts as one text; anything else as it is."""
    texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return ", ".join(value) if texts else value


def _head(summary: Mapping[str, Any], sites: Collection[str]) -> str:
    date = escaped(summary.get("started")).replace("T", " ")[:16]
    failed = summary.get("status") != "finished"
    alert = (
        f'<div class="status failed" role="status"><b>{escaped(summary.get("message"))}</b></div>'
    )
    return (
        f'<h1>{escaped(summary.get("app"))}</h1><p class="soft">Federated statistics · {date} · '
        f"{count_of(len(sites), 'hospital')}</p>{alert if failed else ''}"
        "<nav></nav>"
    )


def _table(table: Mapping[str, Any]) -> str:
    rows = [[escaped(c) if c else "" for c in row] for row in table["rows"][:_MOST_ROWS]]
    left = len(table["rows"]) - len(rows)
    caption = f"{count_of(left, 'more row')} in summary.json" if left > 0 else ""
    kind = "" if table["title"].startswith(("Table 1", "Correlations")) else "wordy"
    if table["title"].startswith("Table 1"):
        # Its rows are not of one kind, so that sorting them says nothing.
        kind = "fixed"
    head = [escaped(cell) if cell else "" for cell in table["head"]]
    title = escaped(table["title"])
    shown = frame.table(frame.unseen(title) + caption, head, rows, kind=kind)
    return f"<h2>{title}</h2>{shown}"


def _drawings(
    name: str, group: Mapping[str, Any], reported: Mapping[str, Any], styles: Styles
) -> str:
    suffix = f", {escaped(name)}" if name else ""
    drawn = [
        _histogram(column, {s: t["numeric"].get(column, {}) for s, t in reported.items()}, styles)
        for column in group["overall"]["numeric"]
    ]
    shown = "".join([drawing for drawing in drawn if drawing][:_MOST_PLOTS])
    text = f'<h2>Distributions{suffix}</h2>{_keys(styles)}<div class="plots">{shown}</div>{_SHARES}'
    parts = [text if shown else ""]
    if "survival" in group["overall"]:
        parts.append(f"<h2>Survival{suffix}</h2>{_keys(styles)}{_survival(group, styles)}")
    if len(group["overall"]["correlations"]) > 1:
        parts.append(_matrix(group["overall"]["correlations"], suffix))
    return "".join(parts)


def _keys(styles: Styles) -> str:
    """Return the legend; if there are more hospitals than colours, it names none of them."""
    site_keys = [style.key for style in styles.values()] if len(styles) <= len(PALETTE) else []
    keys = [*site_keys, plots.line("all") + OVERALL.lower()]
    return plots.legend(keys)


def _histogram(column: str, reported: Mapping[str, Any], styles: Styles) -> str:
    """Draw the percentage below each value, which compares hospitals whose cells differ.

    Of all hospitals together it is a band, and a line between neighbouring values at which it is
    known.
    """
    parts = {
        site: t["histogram"] for site, t in reported.items() if t.get("histogram", {}).get("edges")
    }
    if not parts:
        return ""
    axes: Any = Figure((3.4, 2.4), layout="constrained").subplots()
    for site, part in parts.items():
        reached = np.cumsum(part["counts"])
        shares = 100 * reached[:-1] / max(reached[-1], 1e-9)
        axes.plot(part["edges"], shares, styles[site][1], color=styles[site][0], lw=1.4, marker=".")
    frame.require_small(len(parts), sum(len(part["edges"]) for part in parts.values()))
    edges, least, most = below_edges([*parts.values()])
    total = max(sum(sum(part["counts"]) for part in parts.values()), 1e-9)
    least = 100 * least / total
    most = 100 * most / total
    axes.fill_between(edges, least, most, color=INK, alpha=_BAND, linewidth=0)
    known = np.isclose(least, most, rtol=0, atol=1e-9)
    axes.plot(edges, np.where(known, least, np.nan), color=INK, lw=1.4, marker=".")
    axes.set_ylim(0, 100)
    drawing = plots.svg(axes, f"% below, {escaped(column)}", _plain(column), grid="y")
    return f"<figure><figcaption><b>{escaped(column)}</b> · % below</figcaption>{drawing}</figure>"


def _survival(group: Mapping[str, Any], styles: Styles) -> str:
    axes: Any = Figure((5.0, 2.8), layout="constrained").subplots()
    for site, part in group["sites"].items():
        if "survival" in part:
            style = styles[site]
            _step(axes, part["survival"], style.colour, style.dashes, 1.2, _FAINT_BAND)
    curve = group["overall"]["survival"]
    _step(axes, curve, INK, "-", 1.8, _BAND)
    axes.set_ylim(0, 1.02)
    drawing = plots.svg(axes, "Kaplan-Meier curves", "time", grid="y")
    caption = "Kaplan-Meier, not pooled"
    if curve["sites"]:
        hospitals = escaped(hospitals_of(curve["sites"], list(styles)))
        caption = f"Kaplan-Meier · {curve['patients']:,.0f} patients of {hospitals}"
    return _figure(drawing, caption)


def _side_by_side(survey: Mapping[str, Any]) -> str:
    """Draw the pooled curves of the groups that are compared, if there are colours for them."""
    curves = {}
    for name, group in survey["groups"].items():
        curve = group["overall"].get("survival")
        if curve is not None and curve["sites"]:
            curves[label(survey, name)] = curve
    if not 1 < len(curves) <= len(PALETTE):
        return ""
    axes: Any = Figure((5.0, 2.8), layout="constrained").subplots()
    styles = plots.styles(list(curves))
    for name, curve in curves.items():
        _step(axes, curve, styles[name].colour, styles[name].dashes, 1.6, _GROUP_BAND)
    axes.set_ylim(0, 1.02)
    drawing = plots.svg(axes, "Kaplan-Meier curves of groups", "time", grid="y")
    keys = plots.legend([style.key for style in styles.values()])
    sites = next(iter(curves.values()))["sites"]
    hospitals = escaped(hospitals_of(sites, list(survey["sites"])))
    caption = f"Kaplan-Meier · each group of the same {hospitals}"
    drawn = _figure(drawing, caption)
    return f"<h2>Survival by {escaped(survey['request']['by'])}</h2>{keys}{drawn}"


def _step(
    axes: Any, curve: Mapping[str, Any], colour: str, dashes: str, width: float, opacity: float
) -> None:
    """Draw the line of a curve as far as it is known, and a band between its bounds.

    Between two times the survival is at most the upper bound at the first, and at least the lower
    one at the second.
    """
    times = [0.0, *curve["times"]]
    low = curve["survival_low"]
    if low and low[0] is not None:
        corners = np.repeat(times, 2)[1:-1]
        high = [1.0, *curve["survival_high"][:-1]]
        least = np.repeat(low, 2)
        most = np.repeat(high, 2)
        axes.fill_between(corners, least, most, color=colour, alpha=opacity, linewidth=0)
        for edge in (least, most):
            axes.plot(corners, edge, color=colour, alpha=0.5, lw=width / 2)
    known = [1.0, *(value for value in curve["survival"] if value is not None)]
    axes.step(times[: len(known)], known, dashes, where="post", color=colour, lw=width)


def _matrix(correlations: Sequence[Mapping[str, Any]], suffix: str) -> str:
    names = list(dict.fromkeys(name for reported in correlations for name in reported["columns"]))
    if len(names) > _MOST_NAMES:
        return (
            f'<p class="note">Correlations of {count_of(len(names), "column")} are not drawn.</p>'
        )
    values = np.full((len(names), len(names)), np.nan)
    for reported in correlations:
        i, j = (names.index(name) for name in reported["columns"])
        values[i, j] = values[j, i] = math.nan if reported["r"] is None else reported["r"]
    axes: Any = Figure(
        (6.4, 1.2 + 4.6 * min(1.0, len(names) / 10)), layout="constrained"
    ).subplots()
    axes.pcolormesh(values, vmin=-1, vmax=1, cmap="RdBu_r", edgecolors="face", zorder=3)
    size = 8 if len(names) <= 12 else 5
    for i, j in np.argwhere(~np.isnan(values)):
        colour = "#ffffff" if abs(values[i, j]) > 0.6 else "#1b2229"
        style = {"ha": "center", "va": "center", "fontsize": size, "color": colour, "zorder": 4}
        axes.text(j + 0.5, i + 0.5, f"{round(values[i, j], 2) + 0.0:.2f}", **style)
    ticks = np.arange(len(names)) + 0.5
    axes.set_yticks(ticks, [_plain(name) for name in names], fontsize=size)
    axes.set_xticks(ticks, [_plain(name) for name in names], fontsize=size, rotation=90)
    axes.invert_yaxis()
    drawing = plots.svg(axes, "correlation matrix", "", grid="")
    shown = frame.wide(drawing, "Drawing: correlation matrix")
    return f'<h2>Correlation{suffix}</h2><figure class="dots">{shown}</figure>'


def _weeks(entry: Mapping[str, Any]) -> str:
    counts = [math.nan if value is None else value for value in entry["counts"]]
    if len(counts) > _MOST_WEEKS:
        return f'<p class="note">{count_of(len(counts), "week")} are not drawn.</p>'
    axes: Any = Figure((5.0, 2.2), layout="constrained").subplots()
    weeks = np.arange(len(counts))
    alerts = entry.get("alert") or [False] * len(counts)
    colours = [_ALERT if alert else plots.CROWD for alert in alerts]
    axes.bar(weeks, counts, color=colours, width=0.8, zorder=3)
    unknown = weeks[np.isnan(counts)]
    axes.plot(unknown, np.zeros(unknown.size), "x", color=INK, ms=4, clip_on=False)
    ticks = weeks[:: max(1, math.ceil(weeks.size / _MOST_TICKS))]
    names = [_plain(str(entry["weeks"][tick])) for tick in ticks]
    axes.set_xticks(ticks, names, ha="left")
    drawing = plots.svg(axes, "rows by week", "week", grid="y")
    site = escaped(entry["site"]) + (f", {escaped(entry['group'])}" if entry["group"] else "")
    found = sum(map(bool, alerts))
    text = f"<b>{site}</b> · rows by week · {count_of(found, 'alert')}"
    text += " (orange)" * (found > 0) + " · × withheld" * (unknown.size > 0)
    return _figure(drawing, text)


def _figure(drawing: str, caption: str) -> str:
    """Return a drawing so narrow that its letters can be read on a telephone.

    `caption` is markup.
    """
    return f'<figure class="dots slim"><figcaption>{caption}</figcaption>{drawing}</figure>'


def _plain(name: str) -> str:
    """Return a name for an axis: short, in one line, without control characters."""
    return "".join(c if c.isprintable() else "�" for c in name)[:24]
