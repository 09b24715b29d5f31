"""Whether counts have changed: between two groups of patients, or from week to week.

`psi` and `ks` compare two binned counts, those of two hospitals or of two years, say. `ears_c2` and
`cusum` go through weekly counts and say in which weeks there were more cases than there had been:
L. Hutwagner, W. Thompson, G. M. Seeman, T. Treadwell, "The bioterrorism preparedness and response
Early Aberration Reporting System (EARS)", Journal of Urban Health 80, 2003,
https://doi.org/10.1007/PL00022319, and E. S. Page, "Continuous inspection schemes", Biometrika 41,
1954, https://doi.org/10.1093/biomet/41.1-2.100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError

# The fewest known weeks of which a mean and a standard deviation are taken.
_FEWEST_KNOWN = 3
# The least standard deviation in `cusum`: that of a baseline without cases would be 0.
_LEAST_SD = 0.5


@dataclass(frozen=True)
class Alerts:
    """The statistic of each week, and whether it is an alert.

    Attributes
    ----------
    statistic : ndarray of shape (weeks,)
        NaN if the week is unknown, or too few weeks of its baseline are known.
    alert : ndarray of bool, shape (weeks,)
    """

    statistic: NDArray[np.float64]
    alert: NDArray[np.bool_]


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


def ears_c2(counts: ArrayLike, baseline: int = 7, lag: int = 2, threshold: float = 3.0) -> Alerts:
    """Find weeks with unusually many cases by method C2 of EARS.

    The statistic of week t is (count - mean) / sd. Mean and standard deviation (of a sample) are
    those of the `baseline` weeks that end `lag` weeks before week t - 1. A statistic above
    `threshold` is an alert. If the baseline weeks are all alike, any count above them is an alert
    with an infinite statistic, as in ``earsC`` of the R package surveillance.

    Parameters
    ----------
    counts : array_like
        (weeks,) 0 or greater; NaN for an unknown week, which baselines leave out.
    baseline : int
        Weeks, 3 or greater; at least 3 of them must be known.
    lag : int
        Weeks between the baseline and the week that is judged, 0 or greater.
    threshold : float
        In standard deviations, above 0.

    Returns
    -------
    Alerts
        The first ``baseline + lag`` weeks have no statistic.

    Raises
    ------
    InputError
        If an argument is out of its range, or there are no weeks after the first baseline.
    """
    if lag < 0:
        raise InputError(f"lag must be 0 or greater, got {lag}")
    if not 0 < threshold < math.inf:
        raise InputError(f"threshold must be a finite number above 0, got {threshold}")
    weeks = _weekly(counts, baseline, lag)
    statistic = np.full(weeks.size, np.nan)
    for week in range(baseline + lag, weeks.size):
        mean, sd = _mean_and_sd(weeks[week - lag - baseline : week - lag])
        excess = float(weeks[week]) - mean
        if excess == 0:
            statistic[week] = 0.0
        else:
            statistic[week] = excess * math.inf if sd == 0 else excess / sd
    return Alerts(statistic, statistic > threshold)


def cusum(counts: ArrayLike, k: float = 0.5, h: float = 4.0, baseline: int = 13) -> Alerts:
    """Find a lasting rise of weekly counts by Page's cumulated sum.

    S starts at 0 and becomes max(0, S + (count - mean) / sd - k) each week; at `h` and above it is
    an alert. Nothing sets S back to 0 after an alert, so that alerts last until the excess has been
    made up for. Mean and standard deviation are those of the first `baseline` weeks; the latter is
    at least the root of the mean, by which a Poisson count varies, and at least 0.5.

    Parameters
    ----------
    counts : array_like
        (weeks,) 0 or greater; NaN for an unknown week, which leaves S unchanged.
    k : float
        What S loses each week, in standard deviations, 0 or greater.
    h : float
        The least S that is an alert, above 0.
    baseline : int
        Weeks, 3 or greater. If fewer than 3 of them are known, no week has a statistic.

    Returns
    -------
    Alerts
        The first `baseline` weeks have no statistic.

    Raises
    ------
    InputError
        If an argument is out of its range, or there are no weeks after the baseline.
    """
    if not 0 <= k < math.inf:
        raise InputError(f"k must be a finite number, 0 or greater, got {k}")
    if not 0 < h < math.inf:
        raise InputError(f"h must be a finite number above 0, got {h}")
    weeks = _weekly(counts, baseline, 0)
    mean, sd = _mean_and_sd(weeks[:baseline])
    sd = max(sd, math.sqrt(mean), _LEAST_SD)
    statistic = np.full(weeks.size, np.nan)
    total = 0.0
    for week in range(baseline, weeks.size):
        if not (math.isnan(weeks[week]) or math.isnan(mean)):
            total = max(0.0, total + (weeks[week] - mean) / sd - k)
            statistic[week] = total
    return Alerts(statistic, statistic >= h)


def _mean_and_sd(weeks: NDArray[np.float64]) -> tuple[float, float]:
    known = weeks[~np.isnan(weeks)]
    if known.size < _FEWEST_KNOWN:
        return math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1))


def _weekly(counts: ArrayLike, baseline: int, lag: int) -> NDArray[np.float64]:
    if baseline < _FEWEST_KNOWN:
        raise InputError(f"baseline must be {_FEWEST_KNOWN} weeks or more, got {baseline}")
    weeks = _counts("counts", counts, unknown=True)
    if weeks.size <= baseline + lag:
        raise InputError(
            f"counts must have more than {baseline + lag} weeks, of which a baseline takes up "
            f"{baseline}; got {weeks.size}: give more weeks, or a shorter baseline"
        )
    return weeks


def _two_counts(
    expected: ArrayLike, actual: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _counts("expected", expected), _counts("actual", actual)
    if first.size != second.size:
        raise InputError(
            "expected and actual must be counts in the same bins, "
            f"got {first.size} and {second.size} bins"
        )
    for name, counts in (("expected", first), ("actual", second)):
        if not counts.any():
            raise InputError(f"{name} must count one patient or more, all its bins are 0")
    return first, second


def _counts(name: str, values: ArrayLike, unknown: bool = False) -> NDArray[np.float64]:
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
