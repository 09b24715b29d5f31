"""Sums of squares of any size in a secure sum, and the units that follow from them.

A real number of a sum is below 2^40 and exact to 2^-62 then. Columns are in any unit, so hospitals
first add up how large they are, and then send them in units in which each is about 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.secure.ring import REAL, Part

# The largest real number that a part may hold.
LARGEST = 2.0**40
# Each number is sent in four sizes, by which numbers from 2^-122 to 2^160 can be told.
_EXPONENTS = (60, 0, -60, -120)


def part_of(name: str, count: int) -> Part:
    """Return the part of a sum for so many numbers."""
    return Part(name, len(_EXPONENTS) * count, REAL, LARGEST)


def in_sizes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numbers that are not negative, in each size; what is too large is cut.

    Examples
    --------
    >>> total(in_sizes(np.array([3e-20, 5e20])) + in_sizes(np.array([1e-20, 1e20]))).tolist()
    [4e-20, 6e+20]
    """
    # The last size is not cut, so that what is beyond all of them is noticed.
    sizes = [np.minimum(np.ldexp(values, exponent), LARGEST) for exponent in _EXPONENTS[:-1]]
    return np.concatenate([*sizes, np.ldexp(values, _EXPONENTS[-1])])


def total(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of numbers that were sent by `in_sizes`, each from the finest that holds."""
    sizes = sums.reshape(len(_EXPONENTS), -1)
    # A hospital whose number was cut makes the sum as large as the bound.
    finest = np.argmax(sizes < LARGEST, axis=0)
    chosen = sizes[finest, np.arange(sizes.shape[1])]
    return np.asarray(np.ldexp(chosen, -np.array(_EXPONENTS)[finest]), np.float64)


def units(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return powers of two, by which columns are divided so that their squares add up to at most 1.

    Parameters
    ----------
    squares : (n,) float array
        Sums of squares over all hospitals. A column of zeros has the unit 1.
    """
    exponents = np.frexp(np.sqrt(np.where(squares > 0, squares, 0.25)))[1]
    return np.asarray(np.ldexp(1.0, exponents), np.float64)
