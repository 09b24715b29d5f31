"""Numbers of any size in a secure sum, without telling how large each hospital's is.

A real number of a layout has one bound for all hospitals, and the precision follows from it. A sum
of which nobody knows the size beforehand is cut into digits of 80 bits in place of that. Each digit
is a real number of its own, and all hospitals send all of them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.secure.ring import REAL, Part

# The digit of place k counts multiples of 2^(80 k - 40), and is at most 2^39 * 2^(80 k).
_BITS = 80
_HALF = 40
# From 2^-280 to 2^279: larger than the squares of 1e12 numbers of 1e30.
_PLACES = tuple(range(3, -4, -1))
MOST = 2.0 ** (_BITS * _PLACES[0] + _HALF - 1)


def wide_part(name: str) -> Part:
    """Return the part of a layout that holds the digits of one number."""
    return Part(name, len(_PLACES), REAL, 2.0**_HALF)


def digits_of(value: float) -> list[float]:
    """Return a number's digits, whose sum `value_of` returns; exact down to 2^-280.

    Raises
    ------
    InputError
        If the number is not finite or larger than `MOST`.

    Examples
    --------
    >>> digits_of(3.0)
    [0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    >>> value_of(np.array(digits_of(1e-7)) + np.array(digits_of(1e30))) == 1e30 + 1e-7
    True
    """
    if not abs(value) <= MOST:
        # The error does not show the value: it is a hospital's own.
        raise InputError(f"a number of a sum must be finite and at most {MOST:.3g}")
    digits = []
    rest = value
    for place in _PLACES:
        # Scaled by powers of two, so nothing is rounded but by `rint`.
        digit = float(np.rint(math.ldexp(rest, _HALF - _BITS * place)))
        digits.append(math.ldexp(digit, -_HALF))
        rest -= math.ldexp(digit, _BITS * place - _HALF)
    return digits


def value_of(digits: NDArray[np.float64]) -> float:
    """Return the number of which these are the digits, or the sum of several numbers' digits."""
    return math.fsum(
        math.ldexp(float(digit), _BITS * place)
        for digit, place in zip(digits, _PLACES, strict=True)
    )
