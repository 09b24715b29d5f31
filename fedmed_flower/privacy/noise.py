"""Gaussian noise that nobody can predict or remove.

The generator is AES-128 in counter mode under a key from the operating system; there is no seed.

In floating point a normal number takes few values only, and their pattern can reveal what the
number was added to (Mironov, On Significance of the Least Significant Bits for Differential
Privacy, CCS 2012). So each number is half the sum of four: then there are too many possible values
to search (Holohan and Braghin, Secure Random Sampling in Differential Privacy, ESORICS 2021,
https://arxiv.org/abs/2107.10138).
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray
from randomgen import AESCounter

_SUMMANDS = 4


def secure_generator() -> np.random.Generator:
    """Return a new generator, keyed by the operating system."""
    return np.random.Generator(AESCounter(key=secrets.randbits(128)))


def gaussian(size: int, std: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return independent normal numbers with mean 0.

    Parameters
    ----------
    size : int
        At least 0.
    std : float
        Standard deviation of the numbers; at least 0.
    generator : numpy.random.Generator
        Must be a `secure_generator()` if the noise protects patients.

    Returns
    -------
    ndarray of shape (size,)

    Raises
    ------
    ValueError
        If `std` is below 0 or not finite.
    """
    if not 0 <= std < np.inf:
        raise ValueError(f"std must be at least 0 and finite, got {std}")
    total = generator.standard_normal(size)
    for _ in range(_SUMMANDS - 1):
        total += generator.standard_normal(size)
    total *= std / np.sqrt(_SUMMANDS)
    return total
