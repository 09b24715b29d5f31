"""The statistics of one hospital or of several, and when there were more cases."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.curve import pool_noised_survival, pool_survival
from fedmed_flower.statistics.pooling import (
    only_whole,
    pool_correlation,
    pool_counts,
    pool_moments,
    pool_quantile,
)
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.types import Reported
from fedmed_flower.statistics.values import week_text
from fedmed_flower.statistics.weekly import METHODS

SHARES = (0.25, 0.5, 0.75)


def summarise(
    groups: Sequence[Reported],
    request: Request | None = None,
    curves: Sequence[Reported] | None = None,
) -> dict[str, Any]:
    """Return the statistics of several hospitals' rows together, or of one hospital's.

    Parameters
    ----------
    groups : sequence of dict
        One a hospital, as `replies.read_reply` has checked them.
    request : Request, optional
        What was asked; by default a question without noise and without a survival curve.
    curves : sequence of dict, optional
        The survival curves to pool; by default those of all `groups`.

    Returns
    -------
    dict
        ``rows``, ``patients``, ``numeric`` (by column: ``n``, ``missing``, ``hospitals``, ``mean``,
        ``variance``, ``sd``, ``whole``, ``quantiles`` by share, each with ``estimate``, ``low`` and
        ``high`` as in `pooling.Quantile`), ``categorical`` (``n``, ``missing``, ``hospitals``,
        ``counts`` by name, ``few``), ``correlations``, ``pairs`` and ``survival`` (the fields of
        `curve.Curve`, and ``hospitals``). A number is left out if no hospital has sent its part.
    """
    request = request or Request()
    numbers: dict[str, Any] = {
        "rows": math.fsum(group["rows"] for group in groups),
        "patients": math.fsum(group["patients"] for group in groups),
        "numeric": {name: _numeric(parts) for name, parts in _columns(groups, "numeric").items()},
        "categorical": {
            name: _categorical(parts) for name, parts in _columns(groups, "categorical").items()
        },
        "correlations": [],
        "pairs": [],
    }
    for columns, parts in _by_columns(groups, "correlations").items():
        count = math.fsum(part["of"][0]["n"] for part in parts)
        r = pool_correlation(parts)
        numbers["correlations"].append(
            {"columns": list(columns), "n": count, "r": r, "hospitals": len(parts)}
        )
    for columns, parts in _by_columns(groups, "pairs").items():
        numbers["pairs"].append({"columns": list(columns), **_crossed(parts)})
    reported = [group["survival"] for group in groups if "survival" in group]
    asked = request.survival
    if reported and asked is not None:
        pooled = reported if curves is None else curves
        if request.epsilon:
            curve = pool_noised_survival(pooled)
        else:
            curve = pool_survival(pooled, asked.horizon, asked.width)
        numbers["survival"] = curve._asdict() | {"hospitals": len(pooled)}
    return numbers


def compared(reporting: Mapping[str, Collection[str]]) -> tuple[list[str], list[str]]:
    """Choose the groups that can be compared, and the hospitals by which.

    Groups that are pooled over different hospitals may differ because the hospitals do. So each is
    pooled over those that have reported every one of them. Groups that most hospitals have reported
    come first; one that would leave no hospital is left out.

    Parameters
    ----------
    reporting : mapping of str to collection of str
        By group, the hospitals that have reported it. A group that comes later in it does not
        displace one before it that as many hospitals have reported.

    Returns
    -------
    groups, hospitals : list of str
        Both in the order of `reporting`.

    Examples
    --------
    >>> compared({"f": ["north", "south"], "m": ["north"], "unknown": ["west"]})
    (['f', 'm'], ['north'])
    """
    chosen: list[str] = []
    common: list[str] = []
    for group in sorted(reporting, key=lambda group: -len(reporting[group])):
        hospitals = list(reporting[group])
        if chosen:
            hospitals = [name for name in common if name in hospitals]
        if hospitals:
            chosen.append(group)
            common = hospitals
    return [group for group in reporting if group in chosen], common


def alarms(sites: Mapping[str, Reported], method: str) -> list[dict[str, Any]]:
    """Find the weeks in which a hospital had more cases than before.

    A week that a hospital withholds is unknown, and left out of baselines.

    Parameters
    ----------
    sites : mapping of str to dict
    method : {"c2", "cusum", "farrington"}

    Returns
    -------
    list of dict
        ``site``, ``weeks`` by name (the date of a Monday, or "day 14"), ``counts``, ``statistic``
        and ``alert`` by week (None for a week that is not judged: it is withheld, or too little
        is known of its baseline); or a ``note`` if the weeks cannot be judged. A hospital that has
        withheld all its weeks has none, and a note.
    """
    if method not in METHODS:
        raise InputError(f"alert must be one of {', '.join(METHODS)}, got {method!r}")
    rows = []
    for site, reported in sites.items():
        if "weeks" not in reported:
            withheld = {"weeks": [], "counts": [], "note": "all its weeks are withheld"}
            rows.append({"site": site, **withheld})
            continue
        weeks = reported["weeks"]
        dated = not weeks["start"].startswith("day")
        last = int(weeks["first"]) + len(weeks["counts"])
        names = [week_text(week, dated) for week in range(int(weeks["first"]), last)]
        row = {"site": site, "weeks": names, "counts": weeks["counts"]}
        counts = [math.nan if count is None else float(count) for count in weeks["counts"]]
        try:
            result = METHODS[method](np.array(counts))
        except InputError as error:
            rows.append(row | {"note": str(error)})
        else:
            statistic = result.statistic.tolist()
            alert = [
                None if math.isnan(value) else flag
                for value, flag in zip(statistic, result.alert.tolist(), strict=True)
            ]
            rows.append(row | {"statistic": statistic, "alert": alert})
    return rows


def alert_weeks(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the weeks with an alert, of an entry that `alarms` has made."""
    return [week for week, alert in zip(row["weeks"], row.get("alert", ()), strict=False) if alert]


def _columns(groups: Sequence[Reported], kind: str) -> dict[str, list[Reported]]:
    by_name: dict[str, list[Reported]] = {}
    for group in groups:
        for name, reported in group[kind].items():
            by_name.setdefault(name, []).append(reported)
    return by_name


def _by_columns(groups: Sequence[Reported], kind: str) -> dict[tuple[str, ...], list[Reported]]:
    by_columns: dict[tuple[str, ...], list[Reported]] = {}
    for group in groups:
        for reported in group[kind]:
            by_columns.setdefault(tuple(reported["columns"]), []).append(reported)
    return by_columns


def _sizes(parts: Sequence[Reported]) -> dict[str, Any]:
    total = {name: math.fsum(part[name] for part in parts) for name in ("n", "missing")}
    # A part that is itself a sum says over how many hospitals.
    return {**total, "hospitals": sum(part.get("hospitals", 1) for part in parts)}


def _numeric(parts: Sequence[Reported]) -> dict[str, Any]:
    numbers = _sizes(parts)
    if known := [part for part in parts if "mean" in part]:
        moments = pool_moments(known)
        numbers |= {"mean": moments.mean, "variance": moments.variance, "sd": moments.sd}
    if binned := [part["histogram"] for part in parts if "histogram" in part]:
        numbers["whole"] = only_whole(binned)
        numbers["quantiles"] = {
            str(share): pool_quantile(binned, share)._asdict() for share in SHARES
        }
    return numbers


def _categorical(parts: Sequence[Reported]) -> dict[str, Any]:
    numbers = _sizes(parts)
    if tabulated := [part for part in parts if "names" in part]:
        numbers["counts"], numbers["few"] = pool_counts(tabulated)
    return numbers


def _crossed(parts: Sequence[Reported]) -> dict[str, Any]:
    totals: dict[tuple[str, str], float] = {}
    for part in parts:
        for row, counts in zip(part["rows"], part["counts"], strict=True):
            for across, count in zip(part["across"], counts, strict=True):
                totals[row, across] = totals.get((row, across), 0) + count
    rows = sorted({row for row, _ in totals})
    columns = sorted({name for _, name in totals})
    counts = [[totals.get((row, name), 0) for name in columns] for row in rows]
    return {"rows": rows, "across": columns, "counts": counts, "hospitals": len(parts)}
