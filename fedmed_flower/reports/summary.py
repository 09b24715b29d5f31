"""What a run's summary says, whatever else it may hold, and tables of it by hospital."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fedmed_flower.metrics.names import in_groups, main_metric
from fedmed_flower.reports import frame
from fedmed_flower.reports.frame import DASH, escaped, format_value

COUNT, MOST_COLUMNS = ",.0f", 8


class Column(NamedTuple):
    """A column of a table of hospitals."""

    title: str
    values: dict[str, float]
    together: str = ""
    spec: str = ",.3f"
    lower: bool = False  # is better


def nested(node: Any, *keys: str) -> dict[str, Any]:
    """Return the object that lies under the keys; an empty one where there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def number(node: Any, key: str) -> float | None:
    """Return the number under a key; None if there is none that can be shown."""
    value = nested(node).get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else None


def bounds(node: Any, key: str) -> tuple[float, float] | None:
    """Return between what a figure of all hospitals lies if one tells coarsely; None if none."""
    low, high = number(node, f"{key}-low"), number(node, f"{key}-high")
    return None if low is None or high is None else (low, high)


def of_all(node: Any, key: str, spec: str = ",.3f") -> str:
    """Return a cell with a figure of all hospitals, and with its bounds where it has some."""
    cell, found = format_value(number(node, key), spec), bounds(node, key)
    return cell + (
        f"<small>{format_value(found[0], spec)} to {format_value(found[1], spec)}</small>"
        if found
        else ""
    )


def by_site(node: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the number under a key of each hospital that has one."""
    values = {site: number(own, key) for site, own in node.items()}
    return {site: value for site, value in values.items() if value is not None}


def measured(summary: dict[str, Any]) -> list[str]:
    """Return the names of the test's figures, those of groups of patients left out.

    A site adds none to those of all together.
    """
    test = nested(summary, "test")
    parts = [nested(test, "federated"), *map(nested, nested(test, "sites").values())]
    found = [[key for key in own if number(own, key) is not None] for own in parts]
    keys = found[0] if len(found[0]) > 1 else [key for names in found for key in names]
    names = in_groups(dict.fromkeys(keys)).get("", {})
    return [key for key in names if key != "num-examples"]


def main_figure(summary: dict[str, Any], validated: Collection[str]) -> str:
    """Return the figure that the run is judged by; `validated` are those over the rounds."""
    return main_metric(measured(summary) or validated)


def classes(summary: dict[str, Any]) -> list[str]:
    """Return the names of a segmentation's classes."""
    keys = [key for key in measured(summary) if key.startswith("dice-")]
    return [key.removeprefix("dice-") for key in keys if key != frame.WORST_PATIENT]


def figures(summary: dict[str, Any], main: str) -> list[str]:
    """Return the figures in the table of hospitals, without classes where they are too many."""
    found = measured(summary)
    if main != "dice":
        known = (main, *frame.CLASSIFIED, *frame.PREDICTED)
        return [key for key in dict.fromkeys(known) if key in found][:MOST_COLUMNS]
    first = [key for key in ("dice", frame.WORST_PATIENT) if key in found]
    last = [key for key in ("hd95", "surface-dice") if key in found]
    outlined = classes(summary)
    few = 1 < len(outlined) <= MOST_COLUMNS - len(first + last)
    return [*first, *(f"dice-{name}" for name in outlined if few), *last]


def tested_only(summary: dict[str, Any]) -> set[str]:
    """Return the hospitals without training records."""
    counts = by_site(nested(summary, "sites"), "train")
    return {site for site, count in counts.items() if count == 0}


def mean(values: Mapping[str, float]) -> float | None:
    """Return the mean over hospitals."""
    return statistics.fmean(values.values()) if values else None


def worst(values: Mapping[str, float], lower: bool) -> str:
    """Return the hospital with the worst value; an empty text where there is none."""
    return (max if lower else min)(values, key=lambda site: values[site], default="")


def at_worst(values: Mapping[str, float], spec: str, lower: bool) -> str:
    """Return a cell with the worst value and whose it is."""
    site = worst(values, lower)
    return format_value(values.get(site), spec) + (
        f"<small>{escaped(site)}</small>" if values else ""
    )


def quartiles(values: Collection[float]) -> list[float | None]:
    """Return lower quartile, median and upper quartile; three None if there is no value."""
    if len(values) < 2:
        return [next(iter(values), None)] * 3
    return [*statistics.quantiles(values, method="inclusive")]


def site_table(
    names: Mapping[str, str],
    caption: str,
    columns: list[Column],
    sites: Collection[str],
    marked: Collection[str] = (),
) -> str:
    """Return a table with a row a hospital, and what they make up to.

    Parameters
    ----------
    names
        How each hospital is named. Of more than `frame.MANY` the table tells the quartiles, and
        the rows are folded away.
    sites
        Those that mean, worst and quartiles are over.
    marked
        Those whose missing values have a footnote.
    """
    rows, crowd = [], len(names) > frame.MANY
    for site, named in names.items():
        mark = "<sup>†</sup>" if site in marked else ""
        cells = [format_value(column.values.get(site), column.spec) for column in columns]
        rows.append([named, *(cell + mark * (cell == DASH) for cell in cells)])
    foot = [["Mean over hospitals"], ["Worst hospital"], ["All records together"]]
    spread = [["Lower quartile"], ["Median"], ["Upper quartile"]]
    for column in columns:
        values = {site: column.values[site] for site in sites if site in column.values}
        counted = column.spec == COUNT
        foot[0].append("" if counted else format_value(mean(values), column.spec))
        foot[1].append("" if counted else at_worst(values, column.spec, column.lower))
        foot[2].append(f"<b>{column.together}</b>" if column.together else "")
        for row, value in zip(spread, quartiles(values.values()), strict=True):
            row.append(format_value(value, column.spec))
    if not any(foot[2][1:]):
        del foot[2]
    head = ["Hospital", *(column.title for column in columns)]
    if not crowd:
        return frame.table(caption, head, rows, foot)
    whole = frame.folded(frame.table(f"Each hospital: {caption}", head, rows), len(names))
    return frame.table(caption, head, (), [foot[0], *spread, *foot[1:]]) + whole
