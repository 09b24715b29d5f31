"""The statistics of one hospital or of several, how they differ, and when there were more cases."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.curve import pool_noised_survival, pool_survival
from fedmed_flower.statistics.drift import cusum, ears_c2, ks, psi
from fedmed_flower.statistics.pooling import (
    divides_cells,
    only_whole,
    pool_correlation,
    pool_counts,
    pool_moments,
    pool_quantile,
    same_bins,
)
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.types import Reported

SHARES = (0.25, 0.5, 0.75)
ALARMS = {"c2": ears_c2, "cusum": cusum}
# For each kind of column, what a hospital's answer has if it counts values.
_CELLS = {"numeric": "histogram", "categorical": "names"}


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


def differences(
    one: Sequence[Reported], others: Sequence[Reported], name: str, against: str
) -> list[dict[str, Any]]:
    """Compare each column between two groups of hospitals, or of windows.

    Parameters
    ----------
    one, others : sequence of dict
        The answers about one group, and about the group that it is compared with.
    name, against : str
        The names of the two.

    Returns
    -------
    list of dict
        ``column``, ``of``, ``against``, ``psi`` (population stability index) and, of numeric
        columns, ``ks`` and ``p`` (Kolmogorov-Smirnov), and ``divided``, whether they are estimates
        because a hospital's cells had to be divided; ``note`` if there is nothing to compare.
    """
    rows = []
    for kind in ("numeric", "categorical"):
        first = _columns(one, kind)
        second = _columns(others, kind)
        for column in first:
            row: dict[str, Any] = {"column": column, "of": name, "against": against}
            parts = first[column], second.get(column, [])
            both = (_binned if kind == "numeric" else _named)(*parts)
            if both is None or not all(counts.any() for counts in both):
                row["note"] = "fewer than two cells that both have sent"
            else:
                row["psi"] = psi(*both)
                if kind == "numeric":
                    row["ks"], row["p"] = ks(*both)
                    row["divided"] = divides_cells([*_histograms(parts[0]), *_histograms(parts[1])])
            rows.append(row)
    return rows


def drift_between_sites(sites: Mapping[str, Reported]) -> list[dict[str, Any]]:
    """Compare each hospital with all others together."""
    return [
        row
        for site in sites
        for row in differences(
            [sites[site]],
            [reported for name, reported in sites.items() if name != site],
            site,
            "all others",
        )
    ]


def drift_between_groups(groups: Mapping[str, Mapping[str, Reported]]) -> list[dict[str, Any]]:
    """Compare each group, such as a window of time, with the first.

    A column is compared over the hospitals that have sent its cells of both groups: other hospitals
    in the one than in the other would be a difference too.

    Parameters
    ----------
    groups : mapping of str to mapping of str to dict
        By group and by hospital.

    Returns
    -------
    list of dict
        As `differences`, and ``sites``: the hospitals over which a column is compared.
    """
    first, *rest = list(groups)
    rows = []
    for name in rest:
        one = _of_both(groups[name], groups[first])
        other = _of_both(groups[first], groups[name])
        for row in differences(list(one.values()), list(other.values()), name, first):
            sites = [
                site
                for site, reported in one.items()
                if any(reported[kind].get(row["column"]) for kind in _CELLS)
            ]
            rows.append(row | {"sites": sites})
    return rows


def _of_both(one: Mapping[str, Reported], other: Mapping[str, Reported]) -> dict[str, Reported]:
    """Return by hospital the columns of one group, empty if it sent no cells of them of both."""
    return {
        site: {
            kind: {
                column: part if cells in part and cells in _part(other, site, kind, column) else {}
                for column, part in reported[kind].items()
            }
            for kind, cells in _CELLS.items()
        }
        for site, reported in one.items()
    }


def _part(group: Mapping[str, Reported], site: str, kind: str, column: str) -> Reported:
    part: Reported = group[site][kind].get(column, {}) if site in group else {}
    return part


def alarms(sites: Mapping[str, Reported], method: str) -> list[dict[str, Any]]:
    """Find the weeks in which a hospital had more cases than before.

    A week that a hospital withholds is unknown, and left out of baselines.

    Parameters
    ----------
    sites : mapping of str to dict
    method : {"c2", "cusum"}

    Returns
    -------
    list of dict
        ``site``, ``start`` of the first week, ``counts``, ``statistic`` and ``alert`` by week; or
        a ``note`` if the weeks cannot be judged.
    """
    if method not in ALARMS:
        raise InputError(f"alert must be one of {', '.join(ALARMS)}, got {method!r}")
    rows = []
    for site, reported in sites.items():
        if "weeks" not in reported:
            continue
        weeks = reported["weeks"]
        row = {"site": site, "start": weeks["start"], "counts": weeks["counts"]}
        counts = [math.nan if count is None else float(count) for count in weeks["counts"]]
        try:
            result = ALARMS[method](np.array(counts))
        except InputError as error:
            rows.append(row | {"note": str(error)})
        else:
            weekly = {"statistic": result.statistic.tolist(), "alert": result.alert.tolist()}
            rows.append(row | weekly)
    return rows


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
    return {**total, "hospitals": len(parts)}


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


def _binned(one: Sequence[Reported], others: Sequence[Reported]) -> list[NDArray[Any]] | None:
    first = _histograms(one)
    second = _histograms(others)
    counts = same_bins([*first, *second])
    if counts is None or not first or not second:
        return None
    if np.count_nonzero(np.sum(counts, axis=0)) < 2:
        return None
    return [np.sum(counts[: len(first)], axis=0), np.sum(counts[len(first) :], axis=0)]


def _histograms(parts: Sequence[Reported]) -> list[Reported]:
    # A histogram whose rows are all in one cell would agree with any other.
    histograms = [part["histogram"] for part in parts if "histogram" in part]
    return [histogram for histogram in histograms if np.count_nonzero(histogram["counts"]) > 1]


def _named(one: Sequence[Reported], others: Sequence[Reported]) -> list[NDArray[Any]] | None:
    """Return for both sides the counts of the categories that `one` knows, and of all other rows.

    A category that a hospital does not name may be among its few. So of `others` only those
    hospitals count that know all these categories.
    """
    first = [part for part in one if "names" in part]
    names = {name for part in first for name in part["names"]}
    for part in first:
        if part["few"]:
            names &= set(part["names"])
    second = [part for part in others if "names" in part and _knows(part, names)]
    if not (names and second):
        return None
    sides = []
    for parts in (first, second):
        counts, few = pool_counts(parts)
        named = [counts.get(name, 0.0) for name in sorted(names)]
        rest = max(0.0, sum(counts.values()) + few - sum(named))
        sides.append(np.array([*named, rest]))
    return sides


def _knows(part: Reported, names: set[str]) -> bool:
    return not part["few"] or names <= set(part["names"])
