"""Sums of squares of any size in a secure sum, and the units that follow from them.

A real number of a sum is below 2^40 and exact to 2^-62 then. Columns are in any unit, so hospitals
first add up how large they are, and then send them in units in which each is about 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.secure.ring import REAL, Part
from fedmed_flower.secure.wide import digits_of, value_of, wide_part

# The largest real number that a part may hold.
LARGEST = 2.0**40
_DIGIT = wide_part("")


def part_of(name: str, count: int) -> Part:
    """Return the part of a sum for so many numbers."""
    return Part(name, _DIGIT.size * count, REAL, _DIGIT.bound)


def in_sizes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the digits of numbers, one number after the other.

    Raises
    ------
    InputError
        If one is not finite, or larger than `wide.MOST`.

    Examples
    --------
    >>> total(in_sizes(np.array([1.5, 5e20])) + in_sizes(np.array([2.25, 1e20]))).tolist()
    [3.75, 6e+20]
    """
    return np.array([digit for value in values.tolist() for digit in digits_of(value)], np.float64)


def total(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of numbers that were sent by `in_sizes`."""
    return np.array([value_of(digits) for digits in sums.reshape(-1, _DIGIT.size)], np.float64)


def units(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return powers of two, by which columns are divided so that their squares add up to at most 1.

    Parameters
    ----------
    squares : (n,) float array
        Sums of squares over all hospitals. A column of zeros has the unit 1.
    """
    exponents = np.frexp(np.sqrt(np.where(squares > 0, squares, 0.25)))[1]
    return np.asarray(np.ldexp(1.0, exponents), np.float64)
