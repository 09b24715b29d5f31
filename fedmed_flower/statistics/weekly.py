"""In which weeks there were more cases than there had been.

Take `farrington` where cases have a season and three years or more are known: it compares a week
with the same weeks of earlier years. Without a season, `ears_c2` finds single weeks and `cusum` a
lasting rise; where cases come each winter, both give alerts each winter.

- `ears_c2`: L. Hutwagner, W. Thompson, G. M. Seeman, T. Treadwell, "The bioterrorism preparedness
  and response Early Aberration Reporting System (EARS)", Journal of Urban Health 80, 2003,
  https://doi.org/10.1007/PL00022319.
- `cusum`: E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954,
  https://doi.org/10.1093/biomet/41.1-2.100.
- `farrington`: C. P. Farrington, N. J. Andrews, A. D. Beale, M. A. Catchpole, "A statistical
  algorithm for the early detection of outbreaks of infectious disease", Journal of the Royal
  Statistical Society A 159, 1996, https://doi.org/10.2307/2983331; with the weights of A. Noufaily,
  D. G. Enki, P. Farrington, P. Garthwaite, N. Andrews, A. Charlett, "An improved algorithm for
  outbreak detection in multiple surveillance systems", Statistics in Medicine 32, 2013,
  https://doi.org/10.1002/sim.5595.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.drift import read_counts
from fedmed_flower.statistics.types import Floats

# The fewest known weeks of which a mean and a standard deviation are taken.
_FEWEST_KNOWN = 3
# The least standard deviation in `cusum`: that of a baseline without cases would be 0.
_LEAST_SD = 0.5
# `farrington`: the years of a baseline, the fewest and the most.
_FEWEST_YEARS = 3
_MOST_YEARS = 5
_WEEKS_OF_YEAR = 365.25 / 7
# `farrington`: with fewer cases in so many weeks there is no alert.
_FEWEST_CASES = 5
_RECENT = 4
# `farrington`: Anscombe residuals above this get a smaller weight. With 1, as in 1996, dispersion
# comes out so small that quiet weeks give alerts up to three times as often as `level` says.
_GREATEST_RESIDUAL = 2.58
# `farrington`: a trend stays in the model if its p-value is below this.
_TREND_LEVEL = 0.05
_MOST_STEPS = 50


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
    an alert, after which S starts at 0 again, as in Page's inspection scheme. So a rise that lasts
    gives an alert each time S has reached `h` again, and one that is over gives none. L. M. Hall,
    J. P. French, "A modified CUSUM test to control postoutbreak false alarms", Statistics in
    Medicine 38, 2019, https://doi.org/10.1002/sim.8088, compare this with a sum that goes on.

    Mean and standard deviation are those of the first `baseline` weeks; the latter is at least the
    root of the mean, by which a Poisson count varies, and at least 0.5.

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
            if total >= h:
                total = 0.0
    return Alerts(statistic, statistic >= h)


def farrington(counts: ArrayLike, window: int = 3, level: float = 0.005) -> Alerts:
    """Find weeks with more cases than the same weeks of earlier years, by Farrington's algorithm.

    The baseline of a week are the weeks around the same day of up to five years before, `window`
    weeks on either side. A quasi-Poisson regression (logarithmic link, dispersion 1 or greater)
    predicts the week from them; it has a linear trend if that is significant at 5% and predicts no
    more than the highest week of the baseline. Weeks far above the fit get smaller weights and the
    fit is repeated, so that an earlier outbreak does not hide one that is like it. The threshold is

        U = mean * (1 + 2/3 * z * sqrt((dispersion + var(mean) / mean) / mean)) ** (3/2),

    z the normal quantile of 1 - `level`. The statistic is (count - mean) / (U - mean), and above 1
    it is an alert if the last four weeks together have five cases or more. If no week of the
    baseline has a case, any case is above the threshold, with an infinite statistic.

    Parameters
    ----------
    counts : array_like
        (weeks,) 0 or greater; NaN for an unknown week, which baselines leave out.
    window : int
        Weeks, 0 to 26.
    level : float
        The probability of an alert in a week like those of the years before, above 0 and below
        0.5. It is approximate.

    Returns
    -------
    Alerts
        A week has no statistic if three years before it are not there, or if less than half of its
        baseline is known.

    Raises
    ------
    InputError
        If an argument is out of its range, or no week has three years before it.
    """
    from scipy.special import ndtri

    if not 0 <= window <= 26:
        raise InputError(f"window must be from 0 to 26 weeks, got {window}")
    if not 0 < level < 0.5:
        raise InputError(f"level must be above 0 and below 0.5, got {level}")
    weeks = read_counts("counts", counts, unknown=True)
    first = _years_before(_FEWEST_YEARS) + window
    if weeks.size <= first:
        raise InputError(
            f"counts must have more than {first} weeks, since a week is compared with those of "
            f"{_FEWEST_YEARS} years before; got {weeks.size}: give more weeks, or choose c2 or "
            "cusum, which know no season"
        )
    z = float(ndtri(1 - level))
    statistic = np.full(weeks.size, np.nan)
    alert = np.zeros(weeks.size, bool)
    for week in range(first, weeks.size):
        statistic[week] = _exceedance(weeks, week, window, z)
        recent = np.nansum(weeks[week - _RECENT + 1 : week + 1])
        alert[week] = statistic[week] > 1 and recent >= _FEWEST_CASES
    return Alerts(statistic, alert)


class _Prediction(NamedTuple):
    """What a baseline predicts of a week: mean, variance of the mean's logarithm, dispersion."""

    mean: float
    variance: float
    dispersion: float


class _Fit(NamedTuple):
    """A regression: coefficients, their covariance, each week's mean and leverage, dispersion."""

    coefficients: Floats
    covariance: Floats
    means: Floats
    leverages: Floats
    dispersion: float


def _years_before(years: int) -> int:
    return round(years * _WEEKS_OF_YEAR)


def _exceedance(weeks: Floats, week: int, window: int, z: float) -> float:
    """Return (count - mean) / (U - mean) of a week; NaN if it cannot be judged."""
    centres = [week - _years_before(number) for number in range(1, _MOST_YEARS + 1)]
    indices = np.array([c + d for c in centres for d in range(-window, window + 1)])
    indices = indices[indices >= 0]
    known = indices[~np.isnan(weeks[indices])]
    if math.isnan(weeks[week]) or 2 * known.size < indices.size or known.size < _FEWEST_KNOWN:
        return math.nan
    count = float(weeks[week])
    if not weeks[known].any():
        return math.inf if count > 0 else 0.0
    mean, variance, dispersion = _predict(weeks[known], (known - week) / _WEEKS_OF_YEAR)
    spread = math.sqrt((dispersion + variance * mean) / mean)
    threshold = mean * (1 + 2 / 3 * z * spread) ** 1.5
    return float((count - mean) / (threshold - mean))


def _predict(counts: Floats, years: Floats) -> _Prediction:
    """Return what the counts of a baseline, `years` from the week on, predict of the week."""
    from scipy.special import stdtr

    flat = np.ones((counts.size, 1))
    fit = _reweighted(np.column_stack((flat, years)), counts)
    if fit is not None:
        error = math.sqrt(fit.covariance[1, 1])
        p = 2 * float(stdtr(counts.size - 2, -abs(fit.coefficients[1]) / error))
        rises_too_far = math.exp(fit.coefficients[0]) > counts.max()
    if fit is None or p >= _TREND_LEVEL or rises_too_far:
        fit = _reweighted(flat, counts)
    if fit is None:
        raise ArithmeticError("the mean of a baseline could not be fitted")
    mean = math.exp(fit.coefficients[0])
    return _Prediction(mean, float(fit.covariance[0, 0]), fit.dispersion)


def _reweighted(design: Floats, counts: Floats) -> _Fit | None:
    """Return the second of two fits, in which weeks far above the first have less weight."""
    first = _fit(design, counts, np.ones(counts.size))
    if first is None:
        return None
    means = first.means
    anscombe = 1.5 * (counts ** (2 / 3) * means ** (-1 / 6) - np.sqrt(means))
    residuals = anscombe / np.sqrt(first.dispersion * np.maximum(1 - first.leverages, 1e-12))
    weights = np.where(
        residuals > _GREATEST_RESIDUAL, np.maximum(residuals, _GREATEST_RESIDUAL) ** -2, 1.0
    )
    return _fit(design, counts, weights * counts.size / weights.sum())


def _fit(design: Floats, counts: Floats, weights: Floats) -> _Fit | None:
    """Fit a quasi-Poisson regression by iterated least squares; None if it does not converge."""
    means = np.maximum(counts, 0.1)
    coefficients = np.full(design.shape[1], np.inf)
    for _ in range(_MOST_STEPS):
        work = weights * means
        response = np.log(means) + (counts - means) / means
        try:
            inverse = np.linalg.inv(design.T @ (work[:, None] * design))
        except np.linalg.LinAlgError:
            return None
        before = coefficients
        coefficients = inverse @ (design.T @ (work * response))
        # Where all early weeks are 0, a trend may grow without bound.
        means = np.exp(np.clip(design @ coefficients, -30, 60))
        if np.allclose(coefficients, before, rtol=1e-10, atol=1e-10):
            break
    else:
        return None
    work = weights * means
    inverse = np.linalg.inv(design.T @ (work[:, None] * design))
    leverages = work * np.einsum("ij,jk,ik->i", design, inverse, design)
    free = counts.size - design.shape[1]
    dispersion = max(1.0, float((weights * (counts - means) ** 2 / means).sum()) / free)
    return _Fit(coefficients, dispersion * inverse, means, leverages, dispersion)


def _mean_and_sd(weeks: NDArray[np.float64]) -> tuple[float, float]:
    known = weeks[~np.isnan(weeks)]
    if known.size < _FEWEST_KNOWN:
        return math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1))


def _weekly(counts: ArrayLike, baseline: int, lag: int) -> NDArray[np.float64]:
    if baseline < _FEWEST_KNOWN:
        raise InputError(f"baseline must be {_FEWEST_KNOWN} weeks or more, got {baseline}")
    weeks = read_counts("counts", counts, unknown=True)
    if weeks.size <= baseline + lag:
        raise InputError(
            f"counts must have more than {baseline + lag} weeks, of which a baseline takes up "
            f"{baseline}; got {weeks.size}: give more weeks, or a shorter baseline"
        )
    return weeks


# What `alert` may be.
METHODS: Mapping[str, Callable[[NDArray[np.float64]], Alerts]] = {
    "c2": ears_c2,
    "cusum": cusum,
    "farrington": farrington,
}
