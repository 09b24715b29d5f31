"""Tables of hospitals, as HTML."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from fedmed_flower.reports import frame
from fedmed_flower.reports.frame import COUNT, DASH, escaped, format_value
from fedmed_flower.reports.summary import Total, mean, quartiles, worst


class Column(NamedTuple):
    """A column of a table of hospitals: a number of each, and of all records together.

    `lower` says whether lower is better. Without a `total` the last row has no cell of it. Of the
    `ranked` columns the best figure of each row is marked.
    """

    title: str
    values: dict[str, float]
    total: Total | None = None
    spec: str = ",.3f"
    lower: bool = False
    ranked: bool = False


def total_cell(total: Total, spec: str = ",.3f") -> str:
    """Return the cell of a metric on all records together, with its bounds or its remark."""
    cell = format_value(total.value, spec)
    if total.bounds is not None:
        low, high = total.bounds
        return f"{cell}<small>{format_value(low, spec)} to {format_value(high, spec)}</small>"
    return f"{cell}<small>{total.remark}</small>" if total.remark else cell


def worst_cell(values: Mapping[str, float], spec: str, lower: bool) -> str:
    """Return the cell of the worst value, with the hospital that has it."""
    if not values:
        return DASH
    site = worst(values, lower)
    return f"{format_value(values[site], spec)}<small>{escaped(site)}</small>"


def site_table(
    names: Mapping[str, str],
    caption: str,
    columns: list[Column],
    summarised: Collection[str],
    marked: Collection[str] = (),
) -> str:
    """Return a table with a row for each hospital, and rows for all of them.

    Parameters
    ----------
    names
        How each hospital is named. For more than `frame.MANY` the table shows the quartiles, and
        the rows of single hospitals are folded away.
    summarised
        The hospitals over which mean, worst and quartiles are taken.
    marked
        The hospitals whose missing values have a footnote.
    """
    rows = []
    for site, named in names.items():
        mark = "<sup>†</sup>" if site in marked else ""
        cells = _cells(columns, site)
        rows.append([named, *(cell + mark * (cell == DASH) for cell in cells)])
    head = ["Hospital", *(column.title for column in columns)]
    means, worsts, totals = _foot(columns, summarised)
    last = [totals] if any(totals[1:]) else []
    if not any(means[1:]):
        # Numbers of records alone.
        return frame.folded(frame.table(caption, head, rows, last, sites=[*names]), len(names))
    if len(names) <= frame.MANY:
        return frame.table(caption, head, rows, [means, worsts, *last], sites=[*names])
    spread = _quartiles(columns, summarised)
    each = frame.table(f"Each hospital: {caption}", head, rows, sites=[*names])
    folded = frame.folded(each, len(names))
    return frame.table(caption, head, (), [means, *spread, worsts, *last]) + folded


def _cells(columns: list[Column], site: str) -> list[str]:
    """Return a hospital's cells, with a mark at the best of the ranked columns."""
    cells = [format_value(column.values.get(site), column.spec) for column in columns]
    ranked = {
        index: column.values[site]
        for index, column in enumerate(columns)
        if column.ranked and site in column.values
    }
    if len(ranked) > 1:
        lower = any(column.ranked and column.lower for column in columns)
        best = format_value((min if lower else max)(ranked.values()))
        for index, value in ranked.items():
            # What looks alike is alike.
            if format_value(value) == best:
                cells[index] = f'<b>{cells[index]}</b><small class="hidden">best</small>'
    return cells


def _foot(columns: list[Column], sites: Collection[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the rows of the mean, the worst and all records together."""
    means = ["Mean over hospitals"]
    worsts = ["Worst hospital"]
    totals = ["All records together"]
    for column in columns:
        values = _of(column, sites)
        if column.spec == COUNT:
            means.append("")
            worsts.append("")
        else:
            means.append(format_value(mean(values), column.spec))
            worsts.append(worst_cell(values, column.spec, column.lower))
        in_all = "" if column.total is None else f"<b>{total_cell(column.total, column.spec)}</b>"
        totals.append(in_all)
    return means, worsts, totals


def _quartiles(columns: list[Column], sites: Collection[str]) -> list[list[str]]:
    rows = [["Lower quartile"], ["Median"], ["Upper quartile"]]
    for column in columns:
        cuts = quartiles(_of(column, sites).values())
        for row, value in zip(rows, cuts, strict=True):
            row.append(format_value(value, column.spec))
    return rows


def _of(column: Column, sites: Collection[str]) -> dict[str, float]:
    return {site: column.values[site] for site in sites if site in column.values}
