"""Metrics in the form in which a hospital that reports coarsely sends them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from fedmed_flower.metrics.auc import MERGED
from fedmed_flower.metrics.names import (
    CALIBRATION,
    CALIBRATION_BINS,
    COUNTS,
    NOISED,
    NOISED_DICE,
    NOISED_ERRORS,
    PAIRS,
    SUMMABLE,
    SUMS,
    TARGET,
    in_groups,
)
from fedmed_flower.wire import EPSILON, HOSPITAL_EPSILON

# Metrics that `coarsened` does not change.
_EXACT = ("num-examples", EPSILON, HOSPITAL_EPSILON, NOISED, NOISED_DICE)
# Parts of the names of single patients' metrics, which `coarsened` leaves out.
_SINGLE = {"worst", "lowest", "highest", "min", "max"}


def coarsened(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a client's metrics as a hospital that reports coarsely may send them.

    Parameters
    ----------
    metrics : dict
        Numbers and lists of numbers by name, of all rows or of a group of patients.

    Returns
    -------
    dict
        Numbers that are not integers by their type have three significant digits, in lists too. So
        have the sums that `pool` adds up, except for numbers of rows. Left out are metrics of
        single patients (with worst, lowest, highest, min or max in the name) and counts of a
        classifier that are not coarse. ``num-examples``, the privacy cost of the run and counts
        with noise stay as they are.
    """
    return {
        name + group: value
        for group, part in in_groups(metrics).items()
        for name, value in _coarsened(part).items()
    }


def is_of_one_patient(name: str) -> bool:
    """Return whether a metric of this name is that of a single patient, such as the worst."""
    return not _SINGLE.isdisjoint(name.split("-"))


def _coarsened(part: Mapping[str, Any]) -> dict[str, Any]:
    reported = {name: value for name, value in part.items() if not is_of_one_patient(name)}
    if MERGED not in part.get(COUNTS, ()):
        reported = {
            name: reported[name] for name in reported if name not in (*SUMMABLE, CALIBRATION)
        }
    for name, value in reported.items():
        if name in SUMS:
            reported[name] = coarse_sums(name, value)
        elif name not in _EXACT:
            reported[name] = [*map(_rounded, value)] if isinstance(value, list) else _rounded(value)
    return reported


def _rounded(value: Any) -> Any:
    is_fraction = isinstance(value, Real) and not isinstance(value, Integral)
    return three_digits(float(value)) if is_fraction else value


def three_digits(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")


def coarse_sums(key: str, sums: Sequence[float]) -> list[float]:
    """Return sums with three significant digits; the number of rows stays exact.

    The mean of numbers is rounded to a hundredth of their standard deviation. Of pairs, the share
    in order, with half of the tied ones, is rounded to three digits.
    """
    rounded = [three_digits(value) for value in sums]
    if key == NOISED_ERRORS:
        return list(sums)
    if key == PAIRS:
        pairs = rounded[2]
        share = three_digits((sums[0] + sums[1] / 2) / sums[2]) if pairs else 0.0
        return [share * pairs, 0.0, pairs]
    if key == CALIBRATION:
        bins = np.asarray(sums, dtype=np.float64).reshape(CALIBRATION_BINS, 3)
        bins[:, 1] = np.minimum(rounded[1::3], bins[:, 0])
        return [float(value) for value in bins.ravel()]
    step = 0.01 * math.sqrt(rounded[2] / sums[0]) if key == TARGET else 0.0
    mean = step * round(sums[1] / step) if 0 < step < math.inf else rounded[1]
    return [sums[0], mean, *rounded[2:]]
