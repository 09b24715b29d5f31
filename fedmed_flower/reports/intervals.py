"""What the counts of a test say beyond the metrics of a summary. No HTML is made here.

Intervals are at a level of 95% over samples of records, which are taken to be independent; a
patient with several records makes them too narrow. From counts with noise there are none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.counts import Counts
from fedmed_flower.metrics.curves import (
    Calibration,
    Histograms,
    Interval,
    Recalibration,
    auc_interval,
    calibration,
    denoised,
    histograms_of,
    recalibration,
    together,
    wilson,
)
from fedmed_flower.metrics.names import NOISED
from fedmed_flower.metrics.outcomes import calibration_error


def scores(counts: Counts, site: str | None = None) -> list[Histograms]:
    """Return the histograms of the scores: one for two classes, else one for each class.

    Counts with noise come without it as far as `denoised` can.

    Parameters
    ----------
    counts : Counts
    site : str, optional
        By default those of all sites together.

    Raises
    ------
    InputError
        If a site reports coarsely, only some sites count with noise, or noise is larger than the
        counts.
    """
    if counts.noised and not all(NOISED in record for record in counts.sites.values()):
        raise InputError("some sites count with noise and some without: their counts do not add up")
    sites = counts.sites if site is None else (site,)
    records = [histograms_of(counts.sites[name]) for name in sites]
    joined = [together(parts) for parts in zip(*records, strict=True)]
    if not counts.noised:
        return joined
    return [Histograms(e, denoised(with_), denoised(without)) for e, with_, without in joined]


def intervals(counts: Counts, site: str | None = None) -> dict[str, Interval]:
    """Return metrics with their intervals: of two classes four, of more the accuracy.

    A metric is missing if the counts do not give it: an AUC of a site that reports coarsely, or
    of one class; a share of no record; all if the counts carry noise.
    """
    if counts.noised:
        return {}
    found: dict[str, Interval] = {}
    confusion = counts.confusion(site)
    if confusion is not None:
        matrix = np.asarray(confusion)
        shares = {"accuracy": (np.trace(matrix), matrix.sum())}
        if len(matrix) == 2:
            shares["sensitivity"] = (matrix[1, 1], matrix[1].sum())
            shares["specificity"] = (matrix[0, 0], matrix[0].sum())
        found = {name: wilson(*share) for name, share in shares.items() if share[1]}
    if len(counts.classes) == 2:
        (histograms,) = _scores_or_none(counts, site)
        auc = _auc(histograms)
        if auc is not None:
            found["auc"] = auc
    return found


class ClassFigures(NamedTuple):
    """One of more than two classes, against the rest."""

    name: str
    records: float
    sensitivity: Interval | None
    auc: Interval | None
    calibration_error: float | None


def by_class(counts: Counts) -> list[ClassFigures]:
    """Return the figures of each class on all sites' records.

    Empty for two classes, or if the counts carry noise or a site withholds its confusion matrix.
    """
    confusion = counts.confusion()
    if counts.noised or confusion is None or len(counts.classes) == 2:
        return []
    listed = []
    parts = zip(counts.classes, confusion, _scores_or_none(counts), strict=True)
    for index, (name, row, histograms) in enumerate(parts):
        total = float(sum(row))
        listed.append(
            ClassFigures(
                name=name,
                records=total,
                sensitivity=wilson(row[index], total) if total else None,
                auc=_auc(histograms),
                calibration_error=_error(histograms),
            )
        )
    return listed


def calibrated(counts: Counts) -> Calibration:
    """Return the calibration of two classes on all sites' records.

    It is exact if the sites sent their calibration's sums, else from the histograms of the scores.

    Raises
    ------
    InputError
        If neither gives it.
    """
    sums = counts.calibration()
    if sums is None:
        (histograms,) = scores(counts)
        return calibration(*histograms)
    filled = np.asarray([entry for entry in sums if entry[0] > 0], dtype=np.float64)
    if not filled.size:
        raise InputError("the sites measured no record")
    rows = filled[:, 0]
    return Calibration(rows, filled[:, 1] / rows, filled[:, 2] / rows, calibration_error(filled))


def recalibrated(counts: Counts) -> Recalibration | None:
    """Return intercept and slope of two classes on all sites' records; None if there are none."""
    try:
        (histograms,) = scores(counts)
        return recalibration(*histograms)
    except InputError:
        return None


def _scores_or_none(counts: Counts, site: str | None = None) -> list[Histograms | None]:
    """Return `scores`, or None for each if the counts do not give them."""
    try:
        return [*scores(counts, site)]
    except InputError:
        return [None] * (1 if len(counts.classes) == 2 else len(counts.classes))


def _auc(histograms: Histograms | None) -> Interval | None:
    if histograms is None:
        return None
    _, with_class, without = histograms
    return auc_interval(with_class, without) if with_class.any() and without.any() else None


def _error(histograms: Histograms | None) -> float | None:
    return None if histograms is None else calibration(*histograms).error
