import itertools
import os

import numpy as np
import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.secure.shamir import join, split, values_at


def slow_product(a, b):
    """Multiply bit by bit, and reduce by x^8 + x^4 + x^3 + x + 1."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11B << (bit - 8)
    return product


def slow_inverse(a):
    return next(b for b in range(1, 256) if slow_product(a, b) == 1)


def slow_value(coefficients, x):
    value = 0
    power = 1
    for coefficient in coefficients:
        value ^= slow_product(int(coefficient), power)
        power = slow_product(power, x)
    return value


def slow_secret(points):
    """Interpolate at 0 by Lagrange's formula, from pairs of a coordinate and a value."""
    secret = 0
    for x, value in points:
        term = int(value)
        for other, _ in points:
            if other != x:
                term = slow_product(term, slow_product(other, slow_inverse(other ^ x)))
        secret ^= term
    return secret


def test_all_products_of_two_bytes():
    factors = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    # The polynomial 0 + c x.
    lines = np.concatenate([np.zeros_like(factors), factors])
    values = values_at(lines, range(1, 256))[:, :, 0]
    expected = [[slow_product(x, c) for c in range(256)] for x in range(1, 256)]
    assert values.tolist() == expected


def test_the_worked_example_of_fips_197():
    # FIPS 197, section 4.2: {57} * {83} = {c1}.
    assert slow_product(0x57, 0x83) == 0xC1
    assert values_at(np.array([[[0]], [[0x83]]], np.uint8), [0x57]).tolist() == [[[0xC1]]]


def test_values_are_those_of_the_polynomials():
    coefficients = np.random.default_rng(2).integers(256, size=(4, 3, 5), dtype=np.uint8)
    coordinates = [1, 2, 77, 255, 3]
    values = values_at(coefficients, coordinates)
    assert values.shape == (5, 3, 5)
    for place, x in enumerate(coordinates):
        for m, byte in np.ndindex(3, 5):
            assert values[place, m, byte] == slow_value(coefficients[:, m, byte], x)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_each_subset_of_the_threshold_gives_the_secrets_back(count):
    secrets = np.random.default_rng(count).integers(256, size=(3, 16), dtype=np.uint8)
    for threshold in range(2, count + 1):
        shares = split(secrets, threshold, count)
        assert shares.shape == (count, 3, 16)
        assert shares.dtype == np.uint8
        for size in range(threshold, count + 1):
            for chosen in itertools.permutations(range(count), size):
                coordinates = [place + 1 for place in chosen]
                assert np.array_equal(join(shares[list(chosen)], coordinates), secrets)
        fewer = join(shares[: threshold - 1], range(1, threshold))
        assert not np.array_equal(fewer, secrets)


def test_joining_is_lagranges_formula():
    shares = np.random.default_rng(3).integers(256, size=(5, 2, 3), dtype=np.uint8)
    coordinates = [9, 200, 1, 255, 30]
    joined = join(shares, coordinates)
    for m, byte in np.ndindex(2, 3):
        points = list(zip(coordinates, shares[:, m, byte], strict=True))
        assert joined[m, byte] == slow_secret(points)


def test_many_hospitals():
    secrets = np.random.default_rng(4).integers(256, size=(2, 16), dtype=np.uint8)
    shares = split(secrets, 128, 255)
    chosen = np.arange(254, -1, -2)
    assert np.array_equal(join(shares[chosen], (chosen + 1).tolist()), secrets)


@pytest.mark.parametrize("x", [1, 3])
def test_one_share_of_two_tells_nothing(x):
    """Over all polynomials, each secret goes with each value of a share once."""
    secret, slope = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    lines = np.stack([secret, slope]).astype(np.uint8)
    value = values_at(lines, [x])[0]
    pairs = np.bincount((secret * 256 + value).reshape(-1), minlength=2**16)
    assert (pairs == 1).all()


def test_two_shares_of_three_tell_nothing():
    """Over all polynomials of a secret, each pair of shares comes once."""
    first, second = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    for secret in (0, 1, 0x53, 255):
        constant = np.full_like(first, secret)
        curves = np.stack([constant, first, second]).astype(np.uint8)
        values = values_at(curves, [2, 5]).astype(int)
        pairs = np.bincount((values[0] * 256 + values[1]).reshape(-1), minlength=2**16)
        assert (pairs == 1).all()


def test_coefficients_are_fresh_bytes_of_the_operating_system(monkeypatch):
    asked = []

    def drawn(length):
        asked.append(length)
        return bytes(place % 251 for place in range(length))

    secrets = np.zeros((2, 16), np.uint8)
    assert not np.array_equal(split(secrets, 3, 4), split(secrets, 3, 4))
    monkeypatch.setattr(os, "urandom", drawn)
    shares = split(secrets, 3, 4)
    assert asked == [2 * 2 * 16]
    coefficients = np.frombuffer(drawn(64), np.uint8).reshape(2, 2, 16)
    expected = values_at(np.concatenate([secrets[None], coefficients]), range(1, 5))
    assert np.array_equal(shares, expected)


@pytest.mark.parametrize(("threshold", "count"), [(1, 3), (0, 3), (4, 3), (2, 256), (256, 256)])
def test_thresholds_out_of_range_are_refused(threshold, count):
    with pytest.raises(InputError, match=f"at most 255; got {threshold} and {count}"):
        split(np.zeros((1, 16), np.uint8), threshold, count)


@pytest.mark.parametrize(
    ("coordinates", "text"),
    [
        ([1, 2], "3 shares need as many coordinates, got 2"),
        ([1, 2, 1], "must be unequal"),
        ([0, 1, 2], "from 1 to 255"),
        ([1, 2, 256], "from 1 to 255"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused(coordinates, text):
    with pytest.raises(InputError, match=text):
        join(np.zeros((3, 1, 16), np.uint8), coordinates)


@pytest.mark.parametrize("coordinates", [[0, 1], [1, -1], [256], [2, 2]])
def test_values_at_such_coordinates_are_refused(coordinates):
    with pytest.raises(InputError, match="coordinates of shares must be"):
        values_at(np.zeros((2, 1, 16), np.uint8), coordinates)


def test_other_arrays_are_refused():
    with pytest.raises(InputError, match="secrets must be an array of uint8 with 2 axes, got int"):
        split(np.zeros((1, 16), np.int64), 2, 3)
    with pytest.raises(InputError, match=r"shares must be .* 3 axes, got uint8 of shape \(2, 16\)"):
        join(np.zeros((2, 16), np.uint8), [1, 2])
    with pytest.raises(InputError, match="0 shares"):
        join(np.zeros((0, 1, 16), np.uint8), [])


def test_no_secrets_have_empty_shares():
    shares = split(np.zeros((0, 16), np.uint8), 2, 3)
    assert shares.shape == (3, 0, 16)
    assert join(shares[:2], [1, 2]).shape == (0, 16)
