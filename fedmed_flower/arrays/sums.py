"""Exact sums of arrays: the float that is nearest to the sum of all numbers, in whatever order.

After S. M. Rump, T. Ogita and S. Oishi, "Accurate Floating-Point Summation Part I: Faithful
Rounding", SIAM Journal on Scientific Computing 31, 2008, https://doi.org/10.1137/050645671. Of all
numbers the multiples of one power of two are split off, so large that their sum needs no rounding;
then those of a smaller power, until nothing is left. `math.fsum` adds the few sums.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers that are split together; they fit into a processor's cache.
_PART = 1 << 13
# Powers of two between which no splitting overflows or loses bits.
_GREATEST = 900
_LEAST = -900


def exact_sum(values: NDArray[Any]) -> float:
    """Return the sum of floats, rounded once; the same bits as `math.fsum`.

    Parameters
    ----------
    values : ndarray
        (n,) float64.

    Raises
    ------
    OverflowError, ValueError
        As `math.fsum`.

    Examples
    --------
    >>> exact_sum(np.array([1e16, 1.0, -1e16]))
    1.0
    """
    sums: list[float] = []
    for start in range(0, len(values), _PART):
        sums += _sums(np.array(values[start : start + _PART], np.float64))
    return math.fsum(sums)


def _sums(values: NDArray[np.float64]) -> list[float]:
    """Return a few floats whose sum is exactly that of the values, which are overwritten."""
    most = float(np.abs(values).max())
    # 2**spare is at least the number of values + 2.
    spare = (len(values) + 1).bit_length()
    sums: list[float] = []
    while most:
        exponent = math.frexp(most)[1] if math.isfinite(most) else _GREATEST
        if not _LEAST < exponent < _GREATEST:
            return sums + [float(value) for value in values]
        high = 2.0 ** (exponent + spare)
        multiples = values + high
        multiples -= high
        sums.append(float(multiples.sum()))
        values -= multiples
        most = float(np.abs(values).max())
    return sums
