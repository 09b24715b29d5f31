import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.drift import holm, ks, ks_of_histograms, psi, same_shares


def test_psi_worked_by_hand():
    # Shares 1/2, 1/2 against 1/4, 3/4: (-1/4) ln(1/2) + (1/4) ln(3/2) = (1/4) ln 3.
    assert psi([10, 10], [5, 15]) == pytest.approx(math.log(3) / 4, abs=1e-12)
    assert psi([5, 15], [10, 10]) == pytest.approx(math.log(3) / 4, abs=1e-12)
    assert psi([3, 4, 5], [6, 8, 10]) == 0


def test_psi_counts_half_a_patient_in_a_bin_that_is_empty_on_one_side():
    # 0, 9.5 against 9.5, 0 become shares 1/20, 19/20 and 19/20, 1/20: 2 * 18/20 * ln 19.
    assert psi([0, 9.5], [9.5, 0]) == pytest.approx(1.8 * math.log(19), abs=1e-12)


def test_psi_leaves_out_bins_that_are_empty_on_both_sides():
    assert psi([0, 10, 0, 10], [0, 5, 0, 15]) == psi([10, 10], [5, 15])


def test_ks_statistic_worked_by_hand():
    # Cumulated shares 1/4, 2/4, 1 against 0, 3/4, 1.
    statistic, p = ks([1, 1, 2], [0, 3, 1])
    assert statistic == 0.25
    assert p == pytest.approx(stats.kstwobign.sf(0.25 * math.sqrt(2)), abs=1e-15)


def test_ks_statistic_equals_scipy_where_each_bin_holds_one_value():
    rng = np.random.default_rng(1)
    for _ in range(50):
        first = rng.integers(0, 12, rng.integers(1, 60))
        second = rng.integers(0, 12, rng.integers(1, 60)) // rng.integers(1, 3)
        counts = [np.bincount(values, minlength=12) for values in (first, second)]
        reference = stats.ks_2samp(first, second, method="exact")
        assert ks(*counts)[0] == pytest.approx(reference.statistic, abs=1e-12)


def test_ks_p_value_comes_near_that_of_scipy():
    rng = np.random.default_rng(2)
    first, second = rng.permutation(400)[:150], np.arange(400)
    second = np.setdiff1d(second, first)
    for shift in (0, 20, 40, 60):
        moved = second + shift + 0.5
        both = np.unique(np.concatenate([first, moved]))
        counts = [np.isin(both, values).astype(int) for values in (first, moved)]
        reference = stats.ks_2samp(first, moved, method="exact")
        assert ks(*counts)[1] == pytest.approx(reference.pvalue, rel=0.2)


def test_ks_of_the_same_counts_finds_nothing_and_of_bins_apart_all():
    assert ks([7, 3], [70, 30]) == (0, 1)
    statistic, p = ks([50, 0], [0, 50])
    assert statistic == 1
    assert p < 1e-12
    # A single patient on each side shows nothing.
    assert ks([1, 0], [0, 1])[1] > 0.5


def test_binning_makes_ks_conservative():
    rng = np.random.default_rng(3)
    for _ in range(20):
        first, second = rng.normal(size=80), rng.normal(rng.random(), size=60)
        edges = [-np.inf, -0.8, 0.1, 1.3, np.inf]
        statistic, _ = ks(np.histogram(first, edges)[0], np.histogram(second, edges)[0])
        assert statistic <= stats.ks_2samp(first, second).statistic + 1e-12


@pytest.mark.parametrize("compare", [psi, ks])
def test_counts_that_cannot_be_compared_are_refused(compare):
    cases = {
        "expected and actual must be counts in the same bins, got 2 and 3 bins": (
            [1, 2],
            [1, 2, 3],
        ),
        "expected must be finite, 0 or greater; at index 1 it is -2": ([1, -2], [1, 2]),
        "actual must be finite, 0 or greater; at index 0 it is nan": ([1, 2], [math.nan, 2]),
        "actual must be finite, 0 or greater; at index 1 it is inf": ([1, 2], [1, math.inf]),
        "expected must count one patient or more, all its bins are 0": ([0, 0], [1, 2]),
        "actual must count one patient or more, all its bins are 0": ([1, 2], [0, 0]),
        "expected must have one dimension, got the shape (1, 2)": ([[1, 2]], [1, 2]),
    }
    for text, counts in cases.items():
        with pytest.raises(InputError, match=says(text)):
            compare(*counts)
    with pytest.raises(
        InputError, match=says("expected must count one patient or more, all its bins are 0")
    ):
        compare([], [])
    with pytest.raises(InputError, match=r"^expected must be numbers: could not convert"):
        compare(["a few"], [1])


def histogram(values, edges):
    return {"edges": list(edges), "counts": np.histogram(values, [-np.inf, *edges, np.inf])[0]}


@pytest.mark.parametrize("seed", range(30))
def test_ks_of_histograms_is_at_most_that_of_the_values_whatever_their_cells(seed):
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=size).round(1) for size in (40, 90, 60, 200)]
    values[0] += seed % 4 / 2
    cells = [sorted(rng.choice(np.arange(-20, 20) / 10, 6, replace=False)) for _ in values]
    parts = [histogram(*pair) for pair in zip(values, cells, strict=True)]
    first, second = np.concatenate(values[:2]), np.concatenate(values[2:])
    statistic, p = ks_of_histograms(parts[:2], parts[2:], (first.size, second.size))
    reference = stats.ks_2samp(first, second, method="asymp")
    assert 0 <= statistic <= reference.statistic + 1e-12
    size = math.sqrt(first.size * second.size / (first.size + second.size))
    assert p == pytest.approx(stats.kstwobign.sf(size * statistic))


def test_ks_of_histograms_with_the_same_cells_is_that_of_the_counts():
    edges = [0.0, 1.0, 2.0]
    first, second = ([1, 4, 2, 9], [3, 3, 8, 1])
    parts = [{"edges": edges, "counts": counts} for counts in (first, second)]
    found = ks_of_histograms([parts[0]], [parts[1]], (16, 15))
    assert found == pytest.approx(ks(first, second))


def test_ks_of_histograms_worked_by_hand():
    """Below 1 are 6 of 10; of the other side at least 2 and at most 5 of 10."""
    one = {"edges": [1.0], "counts": [6, 4]}
    other = {"edges": [0.0, 2.0], "counts": [2, 3, 5]}
    statistic, p = ks_of_histograms([one], [other], (10, 10))
    assert statistic == pytest.approx(0.1)
    assert ks_of_histograms([other], [one], (10, 10)) == (statistic, p)
    # Fewer patients than values make it less certain.
    assert ks_of_histograms([one], [other], (5, 5))[1] > p


def test_same_shares_is_fisher_s_test():
    # The lady tasting tea: three of four cups right, 17 of 70 ways to do as well.
    assert same_shares([3, 1], [1, 3]) == pytest.approx(34 / 70)
    rng = np.random.default_rng(0)
    for _ in range(30):
        table = rng.integers(0, 40, (2, 2))
        sides = [stats.fisher_exact(table, side).pvalue for side in ("less", "greater")]
        assert same_shares(*table) == pytest.approx(min(1, 2 * min(sides)), rel=1e-6)


def test_same_shares_of_several_categories_tests_each_against_all_others():
    first, second = [10, 20, 30], [30, 20, 10]
    tails = [
        stats.fisher_exact([[a, 60 - a], [b, 60 - b]], side).pvalue
        for a, b in zip(first, second, strict=True)
        for side in ("less", "greater")
    ]
    assert same_shares(first, second) == pytest.approx(3 * 2 * min(tails))
    assert same_shares([*first, 0], [*second, 0]) == same_shares(first, second)
    assert same_shares([10, 0], [90, 0]) == 1
    assert same_shares([0.4, 0.5], [90, 10]) == 1


def test_same_shares_of_very_many_patients():
    p = same_shares([500_000_000, 500_000_000], [490_000_000, 510_000_000])
    assert 0 < p < 1e-10
    assert same_shares([1e12, 1], [1e12, 1]) == 1


def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(0)
    for size in (1, 2, 30):
        p = rng.random(size) ** 3
        expected = multipletests(p, method="holm")[1]
        assert holm(p) == pytest.approx(expected, abs=1e-12)
    assert holm([]).size == 0
