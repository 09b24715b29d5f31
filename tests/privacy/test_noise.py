import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedmed_flower.privacy.noise import gaussian, secure_generator

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
