"""What a model card says of a test's scores, from the counts of a run folder. No Markdown here.

From counts with noise there are no intervals; what follows from them is as good as `denoised` makes
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.counts import Counts
from fedmed_flower.metrics.curves import (
    DecisionCurve,
    Histograms,
    Interval,
    Recalibration,
    auc_interval,
    calibration,
    decision_curve,
    denoised,
    histograms_of,
    recalibration,
    together,
    wilson,
)
from fedmed_flower.metrics.names import NOISED
from fedmed_flower.reports.summary import counted_at


def of_test(counts: Counts | None, summary: dict[str, Any]) -> Counts | None:
    """Return the counts of the hospitals that the summary's test has metrics of; None if none.

    Counts of others are of an earlier test of a run that went on.
    """
    if counts is None:
        return None
    kept = counts.of(counted_at(summary))
    return kept if kept.sites else None


def joined(counts: Counts) -> list[Histograms]:
    """Return the scores of all hospitals together: one entry for two classes, else one a class.

    Raises
    ------
    InputError
        If a hospital reports coarsely, only some count with noise, or noise is larger than the
        counts.
    """
    if counts.noised and not all(NOISED in record for record in counts.sites.values()):
        raise InputError("some sites count with noise and some without: their counts do not add up")
    records = [histograms_of(record) for record in counts.sites.values()]
    parts = [together(of_class) for of_class in zip(*records, strict=True)]
    if not counts.noised:
        return parts
    return [Histograms(e, denoised(with_), denoised(without)) for e, with_, without in parts]


def benefit(counts: Counts, thresholds: Sequence[float]) -> DecisionCurve:
    """Return the net benefit for two classes on all hospitals' records.

    Raises
    ------
    InputError
        As `joined` does.
    """
    (histograms,) = joined(counts)
    return decision_curve(*histograms, thresholds)


def recalibrated(counts: Counts) -> Recalibration | None:
    """Return intercept and slope for two classes on all hospitals' records; None if undefined."""
    try:
        (histograms,) = joined(counts)
        return recalibration(*histograms)
    except InputError:
        return None


class ClassFigures(NamedTuple):
    """One of more than two classes, against the rest; None is what the counts do not give."""

    name: str
    records: float
    sensitivity: Interval | None
    auc: Interval | None
    calibration_error: float | None


def by_class(counts: Counts) -> list[ClassFigures]:
    """Return the figures of each class on all hospitals' records.

    Empty for two classes, or if the counts carry noise or a hospital withholds its confusion
    matrix.
    """
    confusion = counts.confusion()
    if counts.noised or confusion is None or len(counts.classes) == 2:
        return []
    histograms: list[Histograms | None]
    try:
        histograms = [*joined(counts)]
    except InputError:
        histograms = [None] * len(counts.classes)
    listed = []
    for index, (name, row) in enumerate(zip(counts.classes, confusion, strict=True)):
        total = float(np.sum(row))
        part = histograms[index]
        listed.append(
            ClassFigures(
                name=name,
                records=total,
                sensitivity=wilson(row[index], total) if total else None,
                auc=_auc(part),
                calibration_error=None if part is None else calibration(*part).error,
            )
        )
    return listed


def _auc(histograms: Histograms | None) -> Interval | None:
    if histograms is None:
        return None
    _, with_class, without = histograms
    return auc_interval(with_class, without) if with_class.any() and without.any() else None
