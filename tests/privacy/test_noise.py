import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedmed_flower.privacy.grid import step_once
from fedmed_flower.privacy.noise import (
    gaussian,
    noised,
    noised_once,
    on_grid,
    secure_generator,
    standard,
)

# One test in a million fails by chance.
CHANCE = 1e-6


@pytest.mark.parametrize("std", [1e-3, 1.0, 250.0])
def test_noise_has_the_variance_and_the_distribution_that_are_claimed(std):
    drawn = gaussian(100_000, std, secure_generator())
    assert drawn.shape == (100_000,)
    assert drawn.dtype == np.float64
    chi_square = (drawn**2).sum() / std**2
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], drawn.size)
    assert low < chi_square < high
    assert stats.kstest(drawn / std, "norm").pvalue > CHANCE
    assert abs(drawn.mean()) / std < 5 / np.sqrt(drawn.size)


def test_the_tails_are_those_of_a_normal_number():
    drawn = abs(gaussian(1_000_000, 1.0, secure_generator()))
    for limit in (3.0, 4.0):
        expected = 2 * stats.norm.sf(limit) * drawn.size
        found = (drawn > limit).sum()
        assert stats.poisson.cdf(found, expected) > CHANCE
        assert stats.poisson.sf(found - 1, expected) > CHANCE


def test_numbers_of_one_generator_and_of_two_are_independent():
    generator = secure_generator()
    rows = [gaussian(50_000, 1.0, generator), gaussian(50_000, 1.0, generator),
            gaussian(50_000, 1.0, secure_generator())]  # fmt: skip
    rows.append(np.roll(rows[0], 1))
    correlation = np.corrcoef(rows) - np.eye(4)
    assert abs(correlation).max() < 5 / np.sqrt(50_000)


def test_nothing_that_can_be_seeded_decides_the_noise():
    drawn = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        torch.manual_seed(0)
        drawn.append(gaussian(10, 1.0, secure_generator()))
    assert not np.isin(drawn[0], drawn[1]).any()


def test_the_stream_is_aes_in_counter_mode_under_a_key_of_the_operating_system(monkeypatch):
    asked = []

    def randbits(bits):
        asked.append(bits)
        return 2**127 + 12345

    monkeypatch.setattr("fedmed_flower.privacy.noise.secrets.randbits", randbits)
    raw = secure_generator().bit_generator.random_raw(512)
    assert asked == [128]
    key = (2**127 + 12345).to_bytes(16, "little")
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(encryptor.update(count.to_bytes(16, "little")) for count in range(256))
    assert np.asarray(raw, "<u8").tobytes() == stream


def test_each_number_is_half_the_sum_of_four():
    generator = secure_generator()
    state = generator.bit_generator.state
    drawn = gaussian(5, 3.0, generator)
    generator.bit_generator.state = state
    parts = generator.standard_normal((4, 5))
    np.testing.assert_allclose(drawn, 3.0 * parts.sum(axis=0) / 2, rtol=1e-12)


def test_no_numbers_and_no_noise():
    assert gaussian(0, 1.0, secure_generator()).shape == (0,)
    assert gaussian(3, 0.0, secure_generator()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("std", [-1.0, np.nan, np.inf])
def test_a_standard_deviation_out_of_range_is_refused(std):
    with pytest.raises(ValueError, match=f"^std must be at least 0 and finite, got {std}$"):
        gaussian(1, std, secure_generator())


# Noise that is rounded to a grid.


def fixed(seed=0):
    """A generator that draws the same numbers in each test run."""
    return np.random.default_rng(seed)


@pytest.mark.parametrize("std", [1e-3, 1.0, 250.0])
def test_noise_on_a_fine_grid_has_the_distribution_that_is_claimed(std):
    step = 2.0 ** np.floor(np.log2(std / 1000))
    drawn = noised(np.zeros(100_000), std, step, fixed()) / std
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], drawn.size)
    assert low < (drawn**2).sum() < high
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert abs(stats.skew(drawn)) < 5 * np.sqrt(6 / drawn.size)
    assert abs(stats.kurtosis(drawn)) < 5 * np.sqrt(24 / drawn.size)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


@pytest.mark.parametrize("total", [0.0, 0.3, -7.77, 1e9 + 0.11])
def test_on_a_coarse_grid_each_cell_has_the_share_of_a_normal_number(total):
    drawn = noised(np.full(200_000, total), 1.0, 0.25, fixed(2))
    cells, found = np.unique(drawn, return_counts=True)
    expected = drawn.size * np.diff(
        stats.norm.cdf([cells - total - 0.125, cells - total + 0.125], scale=1.0), axis=0
    )[0]  # fmt: skip
    often = expected > 10
    chi_square = (np.square(found - expected)[often] / expected[often]).sum()
    assert stats.chi2.sf(chi_square, often.sum() - 1) > 1e-3
    # Rounding adds the square of the step over 12 to the variance.
    wanted = 1 + 0.25**2 / 12
    assert drawn.var() == pytest.approx(wanted, abs=5 * wanted * np.sqrt(2 / drawn.size))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("step", [2.0**-20, 2.0**-6, 0.25])
def test_all_noised_numbers_are_multiples_of_the_step(size, step):
    total = size * fixed(2).standard_normal(50_000)
    found = noised(total, 1.0, step, fixed(3))
    assert (np.mod(found, step) == 0).all()
    # And no coarser grid is meant: odd multiples occur as often as even ones, if floats have them.
    if size / step < 2**52:
        assert abs((np.mod(found / step, 2) == 1).mean() - 0.5) < 5 / np.sqrt(4 * total.size)


def test_the_noise_is_exact_at_large_totals():
    """Where a float64 sum of total and noise would have lost its last places."""
    total = 2.0**40 + 0.4375
    found = on_grid(np.full(3, total), np.array([0.0, 0.0625, 0.07]), 1.0, 0.125)
    # The sums are .4375 (halfway: to the even multiple), .5 and .5075 above.
    assert (found - 2.0**40).tolist() == [0.5, 0.5, 0.5]
    found = on_grid(np.full(2, total), np.array([-0.0626, 0.1251]), 1.0, 0.125)
    assert (found - 2.0**40).tolist() == [0.375, 0.625]


def test_torch_rounds_as_numpy_does():
    total, drawn = fixed(4).standard_normal((2, 10_000)) * [[1e4], [1.0]]
    found = on_grid(torch.from_numpy(total), torch.from_numpy(drawn), 1.3, 2.0**-7)
    assert np.array_equal(found.numpy(), on_grid(total, drawn, 1.3, 2.0**-7))


def test_rounding_the_noised_sum_is_post_processing():
    """Two sums that differ: the same normal numbers give the exact noised sums, rounded alone.

    What is rounded depends on a sum and its noise together. Nothing of the sum is rounded before.
    """
    rng = fixed(5)
    first = rng.standard_normal(5_000)
    other = first + rng.standard_normal(5_000) / 100
    drawn = rng.standard_normal(5_000)
    for total in (first, other):
        exact = [
            round((Fraction(one) + Fraction(normal) * Fraction(1.3)) / Fraction(0.25)) * 0.25
            for one, normal in zip(total, drawn, strict=True)
        ]
        assert on_grid(total, drawn, 1.3, 0.25).tolist() == exact


def test_the_expected_value_moves_as_the_sum_does_however_coarse_the_grid():
    """A sum that was rounded by itself would move in jumps of a step, or not at all."""
    drawn = standard(400_000, fixed(6))
    moves = [on_grid(np.full(drawn.shape, t), drawn, 1.0, 0.25).mean() for t in (0.0, 0.01, 0.12)]
    assert moves[1] - moves[0] == pytest.approx(0.01, abs=2e-3)
    assert moves[2] - moves[0] == pytest.approx(0.12, abs=2e-3)


def test_the_sign_of_a_block_is_drawn_once_more():
    drawn = standard(70_000, fixed(7))
    again = fixed(7)
    signs = []
    for start in range(0, drawn.size, 2**15):
        part = drawn[start : start + 2**15]
        plain = again.standard_normal(part.size)
        sign = -1.0 if again.integers(2) else 1.0
        signs.append(sign)
        assert np.array_equal(part, sign * plain)
    assert len(signs) == 3


def test_a_release_alone_draws_from_the_operating_systems_generator(monkeypatch):
    made = []

    def generator():
        made.append(secure_generator())
        return made[-1]

    monkeypatch.setattr("fedmed_flower.privacy.noise.secure_generator", generator)
    total = np.arange(12.0).reshape(3, 4)
    found = noised_once(total, 5.0)
    assert [type(one.bit_generator).__name__ for one in made] == ["AESCounter"]
    assert found.shape == (3, 4)
    step = step_once(5.0, 12)
    assert (np.mod(found, step) == 0).all()
    assert (found != total).all()


def test_without_a_grid_the_noise_is_half_the_sum_of_four():
    total = np.arange(5.0)
    found = noised(total, 3.0, 0.0, fixed(8))
    assert np.array_equal(found, total + gaussian(5, 3.0, fixed(8)))


def test_no_noise_and_no_numbers_on_a_grid():
    total = np.array([0.1, 0.2])
    assert noised(total, 0.0, 0.25, fixed()).tolist() == total.tolist()
    assert noised_once(total, 0.0).tolist() == total.tolist()
    assert noised(np.zeros(0), 1.0, 0.25, fixed()).shape == (0,)


@pytest.mark.parametrize("std", [-1.0, np.nan, np.inf])
def test_noise_out_of_range_is_refused_on_a_grid_too(std):
    text = f"^std must be at least 0 and finite, got {std}$"
    with pytest.raises(ValueError, match=text):
        noised(np.zeros(2), std, 0.25, fixed())
    with pytest.raises(ValueError, match=text):
        noised_once(np.zeros(2), std)


@pytest.mark.parametrize("step", [0.3, -0.25, np.nan, np.inf])
def test_a_step_that_is_no_power_of_two_is_refused(step):
    with pytest.raises(ValueError, match=f"^step must be 0 or a power of two, got {step}$"):
        noised(np.zeros(2), 1.0, step, fixed())
