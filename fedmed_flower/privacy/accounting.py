"""The privacy loss of several releases with Gaussian noise together.

dp-accounting computes it from privacy loss distributions (Doroshenko, Ghazi, Kamath, Kumar,
Manurangsi: Connect the Dots, PETS 2022, https://arxiv.org/abs/2207.04380). The result is an upper
bound, the tightest that is known. The proof assumes noise and sampling rates that are fixed
beforehand; in practice those of a later run are chosen after earlier results were seen. Neighbours
are two sets that differ by one member; samples are Poisson samples.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fedmed_flower.errors import InputError

# The search for a noise multiplier rounds losses this many times more coarsely.
_COARSE = 3.0
# Factor by which the result of that search is then moved, with fine rounding.
_STEP = 1.0005
# With less noise epsilon is above 500,000: no protection that is worth a number.
_LEAST_NOISE = 1e-3
_MOST_NOISE = 1e9
# With wider intervals epsilon would be too large to mean anything, and floats soon overflow.
_MOST_INTERVAL = 100.0


class Release(NamedTuple):
    """One sum of clipped contributions, with Gaussian noise.

    Attributes
    ----------
    sampling_rate : float
        Probability with which each member takes part; above 0, at most 1.
    noise_multiplier : float
        Standard deviation of the noise in units of the clipping norm; from 0 (no noise) to 1e9.
    """

    sampling_rate: float
    noise_multiplier: float


def epsilon_of(releases: Iterable[Release] | Mapping[Release, int], delta: float) -> float:
    """Return the epsilon of all releases together.

    Parameters
    ----------
    releases : iterable of Release, or mapping of Release to int
        A mapping gives how many releases there are of each kind; at least 0.
    delta : float
        Above 0, below 1.

    Returns
    -------
    float
        0 without releases. Infinite if a noise multiplier is below 0.001, or if all releases
        together cost as much as such a release.

    Raises
    ------
    InputError
        If a value is out of its range.

    Examples
    --------
    A hundred steps, each on a tenth of the patients, with noise as large as the clipping norm.

    >>> round(epsilon_of({Release(sampling_rate=0.1, noise_multiplier=1.0): 100}, delta=1e-5), 2)
    7.05
    """
    if not 0 < delta < 1:
        raise InputError(f"delta must be above 0 and below 1, got {delta}")
    counts = Counter(releases)
    for release, count in counts.items():
        require_release(*release)
        if count < 0:
            raise InputError(f"the number of releases must be at least 0, got {count}")
    counts = +counts
    if any(release.noise_multiplier < _LEAST_NOISE for release in counts):
        return math.inf
    if not counts:
        return 0.0
    return _epsilon(tuple(sorted(counts.items())), float(delta))


def noise_for(epsilon: float, delta: float, sampling_rate: float, count: int) -> float:
    """Return the least noise multiplier that keeps `count` releases within a budget.

    Parameters
    ----------
    epsilon : float
        Above 0.
    delta : float
        Above 0, below 1.
    sampling_rate : float
        Sampling rate of each release; above 0, at most 1.
    count : int
        Number of releases; at least 1.

    Returns
    -------
    float
        The least noise multiplier to within a thousandth, rounded up: `epsilon_of` of `count`
        releases with it is at most `epsilon`.

    Raises
    ------
    InputError
        If a value is out of its range, or if no noise multiplier up to 1e9 is enough.

    Examples
    --------
    >>> round(noise_for(epsilon=8.0, delta=1e-5, sampling_rate=0.1, count=100), 2)
    0.94
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon must be above 0 and finite, got {epsilon}")
    if not 0 < delta < 1:
        raise InputError(f"delta must be above 0 and below 1, got {delta}")
    if count < 1:
        raise InputError(f"the number of releases must be at least 1, got {count}")
    require_release(sampling_rate, 1.0)
    return _noise_for(float(epsilon), float(delta), float(sampling_rate), count)


@functools.lru_cache(maxsize=1024)
def _noise_for(epsilon: float, delta: float, sampling_rate: float, count: int) -> float:
    # Imported late, as dp_accounting below.
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        release = Release(sampling_rate, math.exp(log_noise))
        return _epsilon(((release, count),), delta, _COARSE) - epsilon

    # The search starts at a multiplier of 1: accounting for little noise takes long.
    high = 0.0
    while excess(high) > 0:
        high += 1.0
        if high > math.log(_MOST_NOISE):
            raise InputError(
                f"no noise multiplier up to {_MOST_NOISE:g} keeps {count} releases within epsilon "
                f"{epsilon} at delta {delta}: plan fewer releases, or raise epsilon or delta"
            )
    low = high - 1.0
    while excess(low) <= 0:
        high = low
        low -= 0.5
        if low < math.log(_LEAST_NOISE):
            return math.exp(high)
    noise = math.exp(brentq(excess, low, high, xtol=5e-4))

    def within_budget(noise: float) -> bool:
        return _epsilon(((Release(sampling_rate, noise), count),), delta) <= epsilon

    while not within_budget(noise):
        noise *= _STEP
    while within_budget(noise / _STEP):
        noise /= _STEP
    return noise


def require_release(sampling_rate: float, noise_multiplier: float) -> None:
    """Raise `InputError` if a value of a release is out of its range."""
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate must be above 0 and at most 1, got {sampling_rate}")
    if not 0 <= noise_multiplier <= _MOST_NOISE:
        raise InputError(
            f"noise_multiplier must be at least 0 and at most {_MOST_NOISE:g}, "
            f"got {noise_multiplier}"
        )


@functools.lru_cache(maxsize=1024)
def _epsilon(counts: tuple[tuple[Release, int], ...], delta: float, coarse: float = 1.0) -> float:
    merged = _merged(counts)
    interval = _interval(merged)
    if interval > _MOST_INTERVAL:
        return math.inf
    # The import takes a second, for which a process without privacy need not wait.
    from dp_accounting import dp_event, pld

    accountant = pld.PLDAccountant(value_discretization_interval=coarse * interval)
    for (rate, noise), count in merged.items():
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(noise)
        if rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def _merged(counts: Iterable[tuple[Release, int]]) -> dict[Release, int]:
    """Replace all releases without sampling by one that costs the same as they do together."""
    merged: dict[Release, int] = {}
    precision = 0.0
    for release, count in counts:
        if release.sampling_rate == 1:
            precision += count / release.noise_multiplier**2
        else:
            merged[release] = count
    if precision:
        merged[Release(1.0, precision**-0.5)] = 1
    return merged


def _interval(counts: Mapping[Release, int]) -> float:
    """Return the width of the grid on which privacy losses are rounded up.

    The width is small beside the loss of one release and beside the loss of all. If it were larger
    than the loss of one release, the rounding errors of many would add up to far too much. A
    smaller width takes minutes and changes nothing.
    """
    single = max(0.5 / release.noise_multiplier**2 for release in counts)
    spread = sum(n * (r.sampling_rate / r.noise_multiplier) ** 2 for r, n in counts.items())
    least = min(release.sampling_rate / release.noise_multiplier for release in counts)
    return max(1e-2 * least, 1e-4 * single, 1e-4 * math.sqrt(spread))
