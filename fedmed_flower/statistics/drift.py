"""Whether counts differ between two groups of patients, such as two hospitals or two years."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.pooling import values_below
from fedmed_flower.statistics.types import Floats, Reported

# `same_shares`: for more, the tails of the hypergeometric distribution may take much memory.
_MOST_COUNTS = 1e6


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


def ks_of_histograms(
    one: Sequence[Reported], others: Sequence[Reported], patients: tuple[float, float]
) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov test of histograms whose cells may differ.

    Between its edges a histogram says only that so many values are below, at least and at most. The
    statistic is the largest distance that there is for certain, at the edges of all histograms. So
    it is at most that of the values themselves, and the p-value at least theirs.

    Parameters
    ----------
    one, others : sequence of dict
        Histograms whose values belong together, with ``edges``, ascending, and ``counts``, one more
        than the edges; together they count one value or more.
    patients : tuple of float
        The patients behind `one` and behind `others`, above 0; of several values of one patient
        only one counts as independent.

    Returns
    -------
    statistic : float
        The largest difference of the cumulated shares that is certain, 0 to 1.
    p : float
        By Kolmogorov's distribution, the limit for large counts.
    """
    from scipy.stats import kstwobign

    edges = np.unique([edge for part in (*one, *others) for edge in part["edges"]])
    (least, most), (least_others, most_others) = (
        np.array(values_below(parts, edges)) / math.fsum(sum(part["counts"]) for part in parts)
        for parts in (one, others)
    )
    gaps = (least - most_others, least_others - most)
    statistic = min(1.0, float(np.max(gaps, initial=0.0)))
    size = 1 / (1 / patients[0] + 1 / patients[1])
    return statistic, float(kstwobign.sf(math.sqrt(size) * statistic))


def same_shares(expected: ArrayLike, actual: ArrayLike) -> float:
    """Return the p-value of the hypothesis that two groups have the same shares of categories.

    By Fisher's exact test of each category against all others: twice the smaller tail of the
    hypergeometric distribution, and of several categories the least of these times their number.
    The chi-square test is of the same question, and wrong by factors where it is needed most: with
    seven expected and fifteen seen, its p-value is a fourth of the exact one.

    Parameters
    ----------
    expected, actual : array_like
        (categories,) counts, 0 or greater; fractions are rounded down. More than a million counts
        together are scaled down to a million, which makes the p-value greater.

    Raises
    ------
    InputError
        As `psi`.

    Examples
    --------
    >>> round(same_shares([30, 70], [50, 50]), 4)
    0.0059
    """
    from scipy.stats import hypergeom

    table = np.array(_two_counts(expected, actual))
    table = np.floor(table * min(1.0, _MOST_COUNTS / table.sum()))
    together = table.sum(axis=0)
    table = table[:, together > 0]
    if table.shape[1] < 2 or not table.sum(axis=1).all():
        return 1.0
    of = (table.sum(), together[together > 0], table[0].sum())
    tails = hypergeom.cdf(table[0], *of), hypergeom.sf(table[0] - 1, *of)
    # Of two categories, the one is all that is not the other.
    tests = table.shape[1] if table.shape[1] > 2 else 1
    return min(1.0, tests * 2 * float(np.min(tails)))


def holm(p_values: ArrayLike) -> Floats:
    """Return p-values corrected for their number, by Holm's step-down method.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 1979.

    Parameters
    ----------
    p_values : array_like
        (tests,) 0 to 1.

    Returns
    -------
    ndarray of shape (tests,)
        The least level at which each test is significant beside all others; at most 1.

    Examples
    --------
    >>> holm([0.01, 0.5, 0.03]).round(3).tolist()
    [0.03, 0.5, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    corrected = np.empty(p.size)
    corrected[order] = np.minimum(1.0, steps)
    return corrected


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
