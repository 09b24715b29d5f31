"""How coarsely noised sums are rounded, and what the computer's arithmetic can cost in delta.

Noise from a computer is not exactly normal. If a noised sum is rounded to a grid that is coarse
beside the errors of the arithmetic, the distribution of what leaves differs from that of exact
normal numbers by a part in 10^14. Here stands how that adds up over the numbers of a run, and how
much it adds to delta. The proof is in docs/explanation/noise.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# The root of the divergence of one number is at most this, divided by the step in units of the
# noise's standard deviation. For steps of a quarter of it and less.
_DEVIATION = 6 * 2.0**-52
_COARSEST = 0.25
# Finer steps would save nothing: this one adds a part in 10^13 to the variance.
_FINEST = 2.0**-20
# The share of delta that the arithmetic of a run may add.
_SHARE = 0.01
# Beyond it e^epsilon leaves the range of floats, and no delta means anything.
_MOST_EPSILON = 500.0
# The least step of `step_once` for one number.
_ONCE = 2.0**-17


class Grid(NamedTuple):
    """The multiples of one step, on which all noised sums of a run lie.

    Attributes
    ----------
    step : float
        A power of two.
    deviation : float
        The root of the divergence of one number, which `divergence_of` adds up; at least 0.
    """

    step: float
    deviation: float


def grid_for(std: float, numbers: int, epsilon: float, delta: float) -> Grid | None:
    """Return the finest grid on which the arithmetic adds at most a hundredth to delta.

    Parameters
    ----------
    std : float
        Standard deviation of the noise; at least 0.
    numbers : int
        How many noised numbers leave in the whole run: weights times steps. At least 1.
    epsilon, delta : float
        What the run may release.

    Returns
    -------
    Grid or None
        The step is at most a quarter of `std`, and about a millionth of it at least. None if no
        such step is coarse enough, and for noise that is 0.

    Examples
    --------
    Ten million weights, ten thousand steps.

    >>> grid = grid_for(std=1.0, numbers=10**11, epsilon=8.0, delta=1e-5)
    >>> grid.step
    0.25
    >>> f"{excess_delta(divergence_of(grid.deviation, 10**11), epsilon=8.0):.2g}"
    '9.4e-08'
    """
    if not std > 0:
        return None
    step = 2.0 ** math.ceil(math.log2(std * _FINEST))
    while step <= std * _COARSEST:
        grid = Grid(step, _DEVIATION * std / step)
        added = excess_delta(divergence_of(grid.deviation, numbers), epsilon)
        if added <= _SHARE * delta:
            return grid
        step *= 2
    return None


def step_once(std: float, numbers: int) -> float:
    """Return the step of the grid for one release whose number in a run is not known beforehand.

    Parameters
    ----------
    std : float
        Standard deviation of the noise; at least 0.
    numbers : int
        How many numbers leave; at least 0.

    Returns
    -------
    float
        A power of two: from 1 to 2 times ``std * sqrt(numbers) / 2^17``, at most ``std / 4``. 0 if
        `std` is 0.
    """
    return 2.0 ** math.ceil(math.log2(std * _ratio_once(numbers))) if std > 0 else 0.0


def divergence_once(numbers: int = 1) -> float:
    """Return the divergence of one release on the grid of `step_once`, whatever its noise.

    Up to 2^28 numbers it is the same, 3.1e-20, since more numbers have a coarser grid.
    """
    return divergence_of(_DEVIATION / _ratio_once(numbers), max(1, numbers))


def _ratio_once(numbers: int) -> float:
    """Return the least step of `step_once`, in units of the standard deviation."""
    return min(_COARSEST / 2, _ONCE * math.sqrt(max(1, numbers)))


def divergence_of(deviation: float, numbers: int) -> float:
    """Return how far numbers with noise from a computer are from those with exact noise.

    Parameters
    ----------
    deviation : float
        Of one number; at least 0.
    numbers : int
        At least 0.

    Returns
    -------
    float
        A bound of the chi-square divergence of all numbers together, whatever the data. Divergences
        of several releases add up.
    """
    return math.expm1(numbers * math.log1p(deviation**2))


def excess_delta(divergence: float, epsilon: float) -> float:
    """Return what a divergence adds to delta.

    Parameters
    ----------
    divergence : float
        At least 0.
    epsilon : float
        What exact noise would have cost; at least 0.

    Returns
    -------
    float
        With exact noise the releases are (epsilon, delta)-private; with that of the computer they
        are (epsilon, delta + this)-private. At most 1.
    """
    if divergence == 0:
        return 0.0
    if epsilon > _MOST_EPSILON:
        return 1.0
    root = math.sqrt(divergence)
    grown = root * math.exp(epsilon / 2)
    return min(1.0, root + grown + grown**2)
