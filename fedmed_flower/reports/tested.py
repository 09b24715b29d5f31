"""What the counts of a test show beyond its metrics: intervals, curves, calibration. No HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.auc import MERGED
from fedmed_flower.metrics.counts import Counts
from fedmed_flower.metrics.curves import (
    Histograms,
    auc_interval,
    calibration,
    decision_curve,
    histograms_of,
    precision_recall,
    roc,
    together,
    wilson,
)
from fedmed_flower.metrics.names import COUNTS, NOISED
from fedmed_flower.reports.scores import joined
from fedmed_flower.reports.summary import by_site, counted_at, nested, number
from fedmed_flower.wire import ALL_SITES

_THRESHOLDS = tuple(percent / 100 for percent in range(2, 100, 2))
_LEAST_BENEFIT = -0.05
# The most points of a curve.
_MOST_POINTS = 80
# The most hospitals with a curve of their own, and the most whose counts are put on one axis: the
# time that takes grows with the square of their number.
MOST_CURVES = 60
_MOST_TOGETHER = 200


class Estimate(NamedTuple):
    """A metric, its 95% interval if one follows from counts, and the number of rows behind it."""

    value: float
    interval: tuple[float, float] | None = None
    rows: float | None = None


class Curve(NamedTuple):
    """One curve: of a hospital (`site`), of all together or of a class (`name`)."""

    name: str
    site: str | None
    points: tuple[tuple[float, float], ...]


class Bin(NamedTuple):
    """Rows of similar probability: how many, their mean probability, and what came true."""

    rows: float
    predicted: float
    observed: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Tested:
    """What the counts of a test show.

    Attributes
    ----------
    classes
        Names of the classes.
    noised
        Whether the counts carry noise. Nothing has an interval then.
    confusion
        Rows are the true classes. None if a hospital withholds its counts, or they are noised.
    roc, precision_recall
        Points (false positive rate, sensitivity), and (recall, precision); of two classes a curve
        for each hospital and one of all together, which is the last; of more, one for each class.
    calibration
        Of all hospitals together; empty if it is not known.
    net_benefit
        Points (threshold, net benefit a record) of acting by the model and of acting on everybody;
        empty for more than two classes and for counts with noise.
    prevalence
        Share of rows of class 1 among all; None for more than two classes.
    coarse
        The hospitals whose counts give no curve, because they report coarsely.
    missing
        Why there is no curve of all together; empty if there is one.
    """

    classes: tuple[str, ...]
    noised: bool
    confusion: list[list[float]] | None
    roc: tuple[Curve, ...]
    precision_recall: tuple[Curve, ...]
    calibration: tuple[Bin, ...]
    net_benefit: tuple[Curve, ...]
    prevalence: float | None
    coarse: tuple[str, ...]
    missing: str


def evidence_of(counts: Counts | None) -> Tested | None:
    """Return what the counts of a test, as `of_test` returns them, show; None without counts."""
    if counts is None:
        return None
    coarse = tuple(site for site, record in counts.sites.items() if _is_coarse(record))
    fine = {s: histograms_of(r) for s, r in counts.sites.items() if s not in coarse}
    missing = ""
    merged: list[Histograms] = []
    if coarse:
        missing = "some hospitals report coarsely"
    elif len(fine) > _MOST_TOGETHER:
        missing = f"there are more than {_MOST_TOGETHER} hospitals"
    else:
        try:
            merged = joined(counts)
        except InputError as error:
            missing = str(error)
    is_binary = len(counts.classes) == 2
    parts: dict[str | None, Histograms] = {}
    if is_binary and not counts.noised and len(fine) <= MOST_CURVES:
        # A secure sum has counts of all together alone.
        parts |= {site: part for site, (part,) in fine.items() if site != ALL_SITES}
    named: list[tuple[str, str | None, Histograms]]
    if is_binary:
        named = [(str(site), site, part) for site, part in parts.items()]
        named += [("all together", None, part) for part in merged]
    else:
        titles = [f"class {n}" if n.isdecimal() else n for n in counts.classes]
        named = [(name, None, part) for name, part in zip(titles, merged, strict=False)]
    named = [(n, s, p) for n, s, p in named if p.with_class.any() and p.without.any()]
    return Tested(
        classes=counts.classes,
        noised=counts.noised,
        confusion=None if counts.noised else counts.confusion(),
        roc=tuple(Curve(n, s, _roc(part)) for n, s, part in named),
        precision_recall=tuple(Curve(n, s, _precision(part)) for n, s, part in named),
        calibration=_calibration(counts, merged),
        net_benefit=_net_benefit(merged[0]) if is_binary and merged and not counts.noised else (),
        prevalence=_prevalence(merged[0]) if is_binary and merged else None,
        coarse=coarse,
        missing=missing,
    )


def _is_coarse(record: Mapping[str, Any]) -> bool:
    return NOISED not in record and MERGED in record[COUNTS]


def _roc(part: Histograms) -> tuple[tuple[float, float], ...]:
    curve = roc(part.with_class, part.without, _MOST_POINTS)
    return tuple(zip(*(side.tolist() for side in curve), strict=True))


def _precision(part: Histograms) -> tuple[tuple[float, float], ...]:
    curve = precision_recall(part.with_class, part.without, _MOST_POINTS)
    return tuple(zip(*(side.tolist() for side in curve), strict=True))


def _net_benefit(part: Histograms) -> tuple[Curve, ...]:
    found = decision_curve(part.edges, part.with_class, part.without, _THRESHOLDS)
    by_model = zip(_THRESHOLDS, found.model.tolist(), strict=True)
    by_all = zip(_THRESHOLDS, found.treat_all.tolist(), strict=True)
    return (
        Curve("by the model", None, tuple(by_model)),
        # Far below 0 it hides what matters.
        Curve("everybody", None, tuple(point for point in by_all if point[1] >= _LEAST_BENEFIT)),
    )


def _prevalence(part: Histograms) -> float:
    positives = float(part.with_class.sum())
    return positives / (positives + float(part.without.sum()))


def _calibration(counts: Counts, merged: list[Histograms]) -> tuple[Bin, ...]:
    sums = counts.calibration()
    if sums is not None:
        bins = [(rows, expected / rows, events / rows) for rows, expected, events in sums if rows]
    elif len(counts.classes) == 2 and merged:
        (part,) = merged
        found = calibration(part.edges, part.with_class, part.without)
        sides = (found.rows, found.predicted, found.observed)
        bins = [*zip(*(side.tolist() for side in sides), strict=True)]
    else:
        return ()
    return tuple(
        Bin(rows, predicted, observed, None if counts.noised else _wilson(observed * rows, rows))
        for rows, predicted, observed in bins
    )


def _wilson(successes: float, total: float) -> tuple[float, float]:
    # Fractions of rows may round to a hair above all of them.
    return wilson(min(max(successes, 0.0), total), total)[1:]


class Estimates(NamedTuple):
    """A metric of each hospital, and of all records together."""

    metric: str
    sites: dict[str, Estimate]
    total: Estimate | None


def estimates(summary: dict[str, Any], counts: Counts | None, metric: str) -> Estimates:
    """Return a metric of each hospital and of all records, with intervals.

    An interval follows from counts: for ``auc`` of two classes, ``sensitivity``, ``specificity``
    and ``accuracy``. Other metrics, and counts with noise, have none.
    """
    values = by_site(nested(summary, "test", "sites"), metric)
    in_all = number(nested(summary, "test", "federated"), metric)
    known = Counts((), {}) if counts is None or counts.noised else counts
    sites = {
        site: _estimate(known, [site], metric, value) if site in known.sites else Estimate(value)
        for site, value in values.items()
    }
    total = None
    if in_all is not None:
        measured = counted_at(summary)
        is_complete = bool(measured) and all(site in known.sites for site in measured)
        total = _estimate(known, measured, metric, in_all) if is_complete else Estimate(in_all)
    return Estimates(metric, sites, total)


def _estimate(counts: Counts, sites: list[str], metric: str, value: float) -> Estimate:
    some = Counts(counts.classes, {site: counts.sites[site] for site in sites})
    if metric == "auc" and len(counts.classes) == 2:
        if any(map(_is_coarse, some.sites.values())) or len(sites) > _MOST_TOGETHER:
            return Estimate(value)
        part = together([histograms_of(record)[0] for record in some.sites.values()])
        rows = float(part.with_class.sum() + part.without.sum())
        if not (part.with_class.any() and part.without.any()):
            return Estimate(value, None, rows)
        _, low, high = auc_interval(part.with_class, part.without)
        # The metric is exact; the histograms that give the interval round it a little.
        return Estimate(value, (min(low, value), max(high, value)), rows)
    share = share_of(some.confusion(), metric)
    return Estimate(value) if share is None else Estimate(value, _wilson(*share), share[1])


def share_of(confusion: list[list[float]] | None, metric: str) -> tuple[float, float] | None:
    """Return of how many rows a metric is a share, and how many of them count; None if it is none.

    ``accuracy``; and of two classes ``sensitivity`` and ``specificity``.
    """
    if confusion is None:
        return None
    matrix = np.asarray(confusion, dtype=np.float64)
    if metric == "accuracy":
        share = (float(np.trace(matrix)), float(matrix.sum()))
    elif metric in ("sensitivity", "specificity") and len(matrix) == 2:
        row = 1 if metric == "sensitivity" else 0
        share = (float(matrix[row, row]), float(matrix[row].sum()))
    else:
        return None
    return share if share[1] > 0 else None
