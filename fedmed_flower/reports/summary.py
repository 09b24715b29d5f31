"""Read a run's summary, whatever else it may hold. No HTML is made here."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fedmed_flower.metrics.names import FINDING, in_groups, main_metric
from fedmed_flower.reports import frame
from fedmed_flower.wire import ALL_SITES

MOST_COLUMNS = 8


class Total(NamedTuple):
    """A metric on all hospitals' records together.

    `bounds` say between which values it lies if a hospital reports coarsely; `remark` says
    what the value is if it is not that of one model.
    """

    value: float | None = None
    bounds: tuple[float, float] | None = None
    remark: str = ""


def nested(node: Any, *keys: str) -> dict[str, Any]:
    """Return the object that lies under the keys; an empty one if there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def entries(node: Any, key: str) -> list[dict[str, Any]]:
    """Return the objects of the list under a key that are not empty."""
    listed = nested(node).get(key)
    return [entry for entry in listed if nested(entry)] if isinstance(listed, list) else []


def number(node: Any, key: str) -> float | None:
    """Return the number under a key; None if there is none that can be shown."""
    value = nested(node).get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else None


def total(node: Any, key: str) -> Total:
    """Return a metric of all hospitals together, with its bounds if it has some."""
    low = number(node, f"{key}-low")
    high = number(node, f"{key}-high")
    return Total(number(node, key), None if low is None or high is None else (low, high))


def by_site(node: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the number under a key of each hospital that has one."""
    values = {site: number(part, key) for site, part in node.items()}
    return {site: value for site, value in values.items() if value is not None}


def measured(summary: dict[str, Any]) -> list[str]:
    """Return the names of the test's metrics, without those of groups of patients.

    They are those of all hospitals together: a single hospital cannot add one.
    """
    test = nested(summary, "test")
    parts = [nested(test, "federated"), *map(nested, nested(test, "sites").values())]
    named = [[key for key in part if number(part, key) is not None] for part in parts]
    keys = named[0] if len(named[0]) > 1 else [key for names in named for key in names]
    names = in_groups(dict.fromkeys(keys)).get("", {})
    return [key for key in names if key != "num-examples"]


def counted_at(summary: dict[str, Any]) -> list[str]:
    """Return whose counts are behind the test's metrics: hospitals, or all as one in a secure sum.

    These are the names under which ``counts.json`` lists them.
    """
    test = nested(summary, "test")
    return [*nested(test, "sites")] or [ALL_SITES] * bool(nested(test, "federated"))


def judged_by(summary: dict[str, Any], validated: Collection[str]) -> str:
    """Return the metric that the run is judged by; `validated` are those over the rounds."""
    return main_metric(measured(summary) or validated)


def classes(summary: dict[str, Any]) -> list[str]:
    """Return the names of a segmentation's classes."""
    keys = [key for key in measured(summary) if key.startswith("dice-")]
    return [key.removeprefix("dice-") for key in keys if key != frame.WORST_PATIENT]


def findings(summary: dict[str, Any]) -> list[str]:
    """Return what a model of several findings looks for, as far as hospitals have read it."""
    groups = in_groups(nested(summary, "test", "federated"))
    start = f"@{FINDING}="
    return [group.removeprefix(start) for group in groups if group.startswith(start)]


def metrics_by_site(summary: dict[str, Any], main: str) -> list[str]:
    """Return the metrics in the table of hospitals, without classes if they are too many."""
    names = measured(summary)
    if main != "dice":
        known = (main, *frame.CLASSIFIED, *frame.PREDICTED)
        return [key for key in dict.fromkeys(known) if key in names][:MOST_COLUMNS]
    first = [key for key in ("dice", frame.WORST_PATIENT) if key in names]
    last = [key for key in ("hd95", "surface-dice") if key in names]
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
    """Return the hospital with the worst value; an empty text if there is no value."""
    return (max if lower else min)(values, key=lambda site: values[site], default="")


def quartiles(values: Collection[float]) -> list[float | None]:
    """Return lower quartile, median and upper quartile; three None if there is no value."""
    if len(values) < 2:
        return [next(iter(values), None)] * 3
    return [*statistics.quantiles(values, method="inclusive")]
