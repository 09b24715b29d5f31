"""Whether counts differ between two groups of patients, such as two hospitals or two years."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError


def psi(expected: ArrayLike, actual: ArrayLike) -> float:
    """Return the population stability index: the sum of (a - e) * ln(a / e) over the bins' shares.

    By custom 0.1 and less is no change, and above 0.25 a large one.

    Parameters
    ----------
    expected, actual : array_like
        (bins,) counts in the same bins, 0 or greater. A bin that is empty on one side counts half
        a patient there; one that is empty on both is left out.

    Returns
    -------
    float
        0 or greater; the same if the two arguments are swapped.

    Raises
    ------
    InputError
        If lengths differ, a count is negative or not finite, or all are 0.

    Examples
    --------
    >>> round(psi([50, 30, 20], [40, 35, 25]), 3)
    0.041
    """
    first, second = _two_counts(expected, actual)
    seen = (first > 0) | (second > 0)
    shares = []
    for counts in (first[seen], second[seen]):
        filled = np.where(counts == 0, 0.5, counts)
        shares.append(filled / filled.sum())
    return float(np.sum((shares[1] - shares[0]) * np.log(shares[1] / shares[0])))


def ks(expected: ArrayLike, actual: ArrayLike) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov test of two binned counts.

    Binning makes it conservative: inside a bin the two may differ by more than at its ends, so that
    the statistic is at most that of the values themselves, and the p-value at least theirs.

    Parameters
    ----------
    expected, actual : array_like
        (bins,) counts in the same bins in ascending order, 0 or greater.

    Returns
    -------
    statistic : float
        The largest difference of the cumulated shares, 0 to 1.
    p : float
        By Kolmogorov's distribution, the limit for large counts.

    Raises
    ------
    InputError
        As `psi`.
    """
    from scipy.stats import kstwobign

    first, second = _two_counts(expected, actual)
    below = [np.cumsum(counts) / counts.sum() for counts in (first, second)]
    statistic = min(1.0, float(np.abs(below[0] - below[1]).max()))
    size = 1 / (1 / first.sum() + 1 / second.sum())
    return statistic, float(kstwobign.sf(math.sqrt(size) * statistic))


def _two_counts(
    expected: ArrayLike, actual: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = read_counts("expected", expected), read_counts("actual", actual)
    if first.size != second.size:
        raise InputError(
            "expected and actual must be counts in the same bins, "
            f"got {first.size} and {second.size} bins"
        )
    for name, counts in (("expected", first), ("actual", second)):
        if not counts.any():
            raise InputError(f"{name} must count one patient or more, all its bins are 0")
    return first, second


def read_counts(name: str, values: ArrayLike, unknown: bool = False) -> NDArray[np.float64]:
    """Return counts as an array; with `unknown`, NaN stands for an unknown one.

    Raises
    ------
    InputError
        If they have not one dimension, or one is negative, infinite or no number.
    """
    try:
        counts = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from error
    if counts.ndim != 1:
        raise InputError(f"{name} must have one dimension, got the shape {counts.shape}")
    valid = (counts >= 0) & (counts < math.inf)
    if unknown:
        valid |= np.isnan(counts)
    if not valid.all():
        index = int(np.argmin(valid))
        raise InputError(
            f"{name} must be finite, 0 or greater; at index {index} it is {counts[index]:g}"
        )
    return counts
