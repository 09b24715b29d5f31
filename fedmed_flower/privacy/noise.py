"""Gaussian noise that nobody can predict or remove.

The generator is AES-128 in counter mode under a key from the operating system; there is no seed.

In floating point a normal number takes few values only, and their pattern can reveal what the
number was added to (Mironov, On Significance of the Least Significant Bits for Differential
Privacy, CCS 2012). So `noised` rounds each noised number to a grid that is coarse beside the errors
of the arithmetic. What is left of them is bounded (`privacy.grid`, docs/explanation/noise.md).

Where there is no grid, each number is half the sum of four: then there are too many possible values
to search (Holohan and Braghin, Secure Random Sampling in Differential Privacy, ESORICS 2021,
https://arxiv.org/abs/2107.10138).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from randomgen import AESCounter

from fedmed_flower.privacy.grid import step_once

if TYPE_CHECKING:
    from torch import Tensor

_SUMMANDS = 4
# As many numbers as stay in a CPU's cache. Their signs are turned together.
_BLOCK = 2**15

Floats = NDArray[np.float64]
# An array of NumPy or torch.
Numbers = TypeVar("Numbers", Floats, "Tensor")


def secure_generator() -> np.random.Generator:
    """Return a new generator, keyed by the operating system."""
    return np.random.Generator(AESCounter(key=secrets.randbits(128)))


def noised(total: Floats, std: float, step: float, generator: np.random.Generator) -> Floats:
    """Return numbers with independent Gaussian noise, rounded to multiples of `step`.

    Parameters
    ----------
    total : ndarray
        Finite; below 2^52 steps.
    std : float
        Standard deviation of the noise; at least 0. At 0 the numbers stay as they are.
    step : float
        A power of two; 0 for no grid: the noise is then that of `gaussian`.
    generator : numpy.random.Generator
        Must be a `secure_generator()` if the noise protects patients.

    Returns
    -------
    ndarray of the shape of `total`

    Raises
    ------
    ValueError
        If `std` is below 0 or not finite, or `step` is no power of two.
    """
    _require(std, step)
    if std == 0:
        return total.copy()
    if step == 0:
        return total + gaussian(total.size, std, generator).reshape(total.shape)
    flat = total.reshape(-1)
    result = np.empty_like(flat)
    for block in _blocks(flat.size):
        part = flat[block]
        result[block] = on_grid(part, standard(part.size, generator), std, step)
    return result.reshape(total.shape)


def noised_once(total: Floats, std: float) -> Floats:
    """Return the numbers of one release with noise, rounded to the grid of `step_once`.

    Parameters and errors are those of `noised`.
    """
    _require(std, 0.0)
    return noised(total, std, step_once(std, total.size), secure_generator())


def on_grid(total: Numbers, normal: Numbers, std: float, step: float) -> Numbers:
    """Return ``total + std * normal``, rounded to multiples of `step`.

    Parameters
    ----------
    total, normal : float64 arrays of one shape, of NumPy or torch
        `normal` as `standard` returns it.
    std, step : float
        As in `noised`.
    """
    # Of a large total the noise is added to the part between two multiples alone: the error of
    # the addition is then the same at every total.
    steps = total / step
    whole = steps.round()
    steps -= whole
    steps += normal * (std / step)
    return (whole + steps.round()) * step


def standard(size: int, generator: np.random.Generator) -> Floats:
    """Return independent normal numbers with mean 0 and variance 1, for `on_grid`.

    NumPy takes the sign beyond 3.65 from a bit that is 0 and 1 almost equally often, to 5e-13. A
    fair sign for each block makes up for it.
    """
    drawn = np.empty(size)
    for block in _blocks(size):
        part = drawn[block]
        generator.standard_normal(out=part)
        if generator.integers(2):
            np.negative(part, out=part)
    return drawn


def gaussian(size: int, std: float, generator: np.random.Generator) -> Floats:
    """Return independent normal numbers with mean 0, for sums that are rounded to no grid.

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
    _require(std, 0.0)
    total = generator.standard_normal(size)
    for _ in range(_SUMMANDS - 1):
        total += generator.standard_normal(size)
    total *= std / np.sqrt(_SUMMANDS)
    return total


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, _BLOCK):
        yield slice(start, start + _BLOCK)


def _require(std: float, step: float) -> None:
    if not 0 <= std < np.inf:
        raise ValueError(f"std must be at least 0 and finite, got {std}")
    if step != 0 and np.frexp(step)[0] != 0.5:
        raise ValueError(f"step must be 0 or a power of two, got {step}")
