"""Secrets cut into shares, of which a threshold gives the secret back and fewer tell nothing.

Adi Shamir: How to Share a Secret, Communications of the ACM 22 (1979),
https://doi.org/10.1145/359168.359176. Each byte is shared alone, over the field of 256 elements
with the polynomial of AES, x^8 + x^4 + x^3 + x + 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError

_POLYNOMIAL = 0x11B
# The order of the group of elements other than 0; also the largest coordinate.
_ORDER = 255
# With a threshold of 1 every share is the secret.
_LEAST_THRESHOLD = 2


def _logarithms() -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Return the powers of 3, which generates the group, and the logarithm of each element."""
    powers = np.empty(_ORDER, np.uint8)
    logarithms = np.zeros(_ORDER + 1, np.intp)
    value = 1
    for exponent in range(_ORDER):
        powers[exponent] = value
        logarithms[value] = exponent
        doubled = value << 1
        value ^= doubled ^ _POLYNOMIAL if doubled > _ORDER else doubled
    return powers, logarithms


_POWERS, _LOGARITHMS = _logarithms()


def _products(factor: int) -> bytes:
    """Return the products of a factor with 0, 1, ..., 255."""
    row = _POWERS[(_LOGARITHMS + _LOGARITHMS[factor]) % _ORDER]
    row[0] = 0
    return row.tobytes() if factor else bytes(_ORDER + 1)


_PRODUCTS = [_products(factor) for factor in range(_ORDER + 1)]


def _times(values: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    # Three times as fast as an index into an array.
    products = values.tobytes().translate(_PRODUCTS[factor])
    return np.frombuffer(products, np.uint8).reshape(values.shape)


def split(secrets: NDArray[np.uint8], threshold: int, count: int) -> NDArray[np.uint8]:
    """Return shares of secrets, with coefficients from the operating system's randomness.

    Parameters
    ----------
    secrets : ndarray of uint8, shape (m, length)
    threshold : int
        How many shares give the secrets back; from 2 to `count`.
    count : int
        How many shares; at most 255.

    Returns
    -------
    ndarray of uint8, shape (count, m, length)
        Share k is the value at the coordinate k + 1.

    Raises
    ------
    InputError
        If a number is out of its range, or the array of another type or shape.

    Examples
    --------
    >>> shares = split(np.array([[1, 2, 3]], np.uint8), threshold=2, count=3)
    >>> join(shares[[0, 2]], [1, 3])
    array([[1, 2, 3]], dtype=uint8)
    """
    _check_bytes("secrets", secrets, 2)
    if not _LEAST_THRESHOLD <= threshold <= count <= _ORDER:
        raise InputError(
            f"the threshold of shares must be from {_LEAST_THRESHOLD} to their number, and their "
            f"number at most {_ORDER}; got {threshold} and {count}"
        )
    shape = (threshold - 1, *secrets.shape)
    drawn = np.frombuffer(os.urandom(int(np.prod(shape))), np.uint8).reshape(shape)
    return values_at(np.concatenate([secrets[None], drawn]), range(1, count + 1))


def values_at(coefficients: NDArray[np.uint8], coordinates: Sequence[int]) -> NDArray[np.uint8]:
    """Return the values of polynomials, by Horner's rule.

    Parameters
    ----------
    coefficients : ndarray of uint8, shape (threshold, m, length)
        The constant terms first.
    coordinates : sequence of int
        From 1 to 255; no two are equal.

    Returns
    -------
    ndarray of uint8, shape (len(coordinates), m, length)

    Raises
    ------
    InputError
        If a coordinate is out of range or comes twice.
    """
    _check_coordinates(coordinates)
    values = np.empty((len(coordinates), *coefficients.shape[1:]), np.uint8)
    for row, coordinate in zip(values, coordinates, strict=True):
        row[...] = coefficients[-1]
        for coefficient in coefficients[-2::-1]:
            np.bitwise_xor(_times(row, coordinate), coefficient, out=row)
    return values


def join(shares: NDArray[np.uint8], coordinates: Sequence[int]) -> NDArray[np.uint8]:
    """Return the secrets that shares were cut from, by Lagrange's interpolation at 0.

    Parameters
    ----------
    shares : ndarray of uint8, shape (t, m, length)
        As many as the threshold, or more. Fewer give other bytes, and nothing shows that they are
        wrong: compare with a commitment.
    coordinates : sequence of int
        Those of the shares, from 1 to 255, in the same order; no two are equal.

    Returns
    -------
    ndarray of uint8, shape (m, length)

    Raises
    ------
    InputError
        If a coordinate is out of range or comes twice, or the array is of another type or shape.
    """
    _check_bytes("shares", shares, 3)
    if len(coordinates) != len(shares) or not len(shares):
        raise InputError(f"{len(shares)} shares need as many coordinates, got {len(coordinates)}")
    _check_coordinates(coordinates)
    secrets = np.zeros(shares.shape[1:], np.uint8)
    for share, coordinate in zip(shares, coordinates, strict=True):
        secrets ^= _times(share, _weight(coordinate, coordinates))
    return secrets


def _weight(coordinate: int, coordinates: Sequence[int]) -> int:
    """Return Lagrange's weight of a coordinate at 0: the product of x / (x - coordinate)."""
    logarithm = 0
    for other in coordinates:
        if other != coordinate:
            logarithm += int(_LOGARITHMS[other] - _LOGARITHMS[other ^ coordinate])
    return int(_POWERS[logarithm % _ORDER])


def _check_bytes(name: str, array: NDArray[np.uint8], dimensions: int) -> None:
    if array.dtype != np.uint8 or array.ndim != dimensions:
        raise InputError(
            f"{name} must be an array of uint8 with {dimensions} axes, got {array.dtype} of shape "
            f"{array.shape}"
        )


def _check_coordinates(coordinates: Sequence[int]) -> None:
    if len(set(coordinates)) != len(coordinates):
        raise InputError(f"the coordinates of shares must be unequal, got {list(coordinates)}")
    if not all(1 <= coordinate <= _ORDER for coordinate in coordinates):
        raise InputError(
            f"the coordinates of shares must be from 1 to {_ORDER}, got {list(coordinates)}"
        )
