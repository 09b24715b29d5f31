import math

import numpy as np
import pytest
from scipy import stats
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.drift import cusum, ears_c2, ks, psi


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


def test_c2_worked_by_hand():
    # Weeks 0 to 6 have the mean 4 and the variance (9 + 4 + 1 + 0 + 1 + 4 + 9) / 6.
    counts = [1, 2, 3, 4, 5, 6, 7, 100, 100, 11]
    got = ears_c2(counts)
    assert np.isnan(got.statistic[:9]).all()
    assert got.statistic[9] == pytest.approx(7 / math.sqrt(28 / 6), abs=1e-12)
    assert got.alert.tolist() == [False] * 9 + [True]
    assert not ears_c2([*counts[:9], 10]).alert.any()
    assert ears_c2([*counts[:9], 10], threshold=2.7).alert[9]


def test_c2_without_a_lag_looks_at_the_weeks_just_before():
    got = ears_c2([1, 2, 3, 6], baseline=3, lag=0)
    assert got.statistic[3] == 4
    assert got.alert.tolist() == [False, False, False, True]
    # The threshold itself is no alert.
    assert not ears_c2([1, 2, 3, 6], baseline=3, lag=0, threshold=4).alert.any()


def test_c2_of_a_constant_baseline_alerts_at_any_count_above_it():
    got = ears_c2([2, 2, 2, 2, 3, 1], baseline=3, lag=0)
    assert got.statistic[3:5].tolist() == [0, math.inf]
    assert got.alert.tolist() == [False] * 4 + [True, False]
    assert ears_c2([2, 2, 2, 1], baseline=3, lag=0).statistic[3] == -math.inf


def test_c2_of_no_cases_at_all_is_quiet():
    got = ears_c2([0] * 12)
    assert (got.statistic[9:] == 0).all()
    assert not got.alert.any()


def test_c2_leaves_unknown_weeks_out_of_the_baseline():
    nan = math.nan
    known = ears_c2([1, nan, 2, 3, 6], baseline=4, lag=0)
    assert known.statistic[4] == 4
    assert known.alert[4]
    for counts in ([1, nan, nan, 3, 6], [1, 2, 2, 3, nan]):
        got = ears_c2(counts, baseline=4, lag=0)
        assert np.isnan(got.statistic).all()
        assert not got.alert.any()


def test_cusum_worked_by_hand():
    # The baseline 2, 4, 6 has the mean 4 and the sd 2, which is the root of the mean too.
    got = cusum([2, 4, 6, 7, 3, 9, 9, 0], k=0.5, h=3, baseline=3)
    assert np.isnan(got.statistic[:3]).all()
    # 1.5 - 0.5; -0.5 - 0.5; 2.5 - 0.5; 2.5 - 0.5; -2 - 0.5.
    assert got.statistic[3:].tolist() == [1, 0, 2, 4, 1.5]
    assert got.alert.tolist() == [False] * 6 + [True, False]
    assert cusum([2, 4, 6, 7, 3, 9, 9, 0], k=0.5, h=2, baseline=3).alert[5]


def test_cusum_takes_the_spread_of_a_poisson_count_at_least():
    got = cusum([9, 9, 9, 12.5], k=0.5, baseline=3)
    assert got.statistic[3] == pytest.approx(3.5 / 3 - 0.5, abs=1e-12)
    wide = cusum([1, 4, 7, 8], k=0.5, baseline=3)
    assert wide.statistic[3] == pytest.approx(4 / 3 - 0.5, abs=1e-12)
    none = cusum([0, 0, 0, 1, 2], k=0.5, baseline=3)
    assert none.statistic[3:].tolist() == [1.5, 5]
    assert none.alert.tolist() == [False] * 4 + [True]


def test_cusum_stays_as_it_was_over_unknown_weeks():
    nan = math.nan
    got = cusum([nan, 2, 4, 6, 7, nan, 7], k=0.5, h=2, baseline=4)
    assert got.statistic[[4, 6]].tolist() == [1, 2]
    assert math.isnan(got.statistic[5])
    assert got.alert.tolist() == [False] * 6 + [True]
    lost = cusum([nan, 2, nan, 6, 70], baseline=4)
    assert np.isnan(lost.statistic).all()
    assert not lost.alert.any()


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


def test_weeks_that_do_not_do_are_refused():
    with pytest.raises(
        InputError,
        match=says(
            "counts must have more than 9 weeks, of which a baseline takes up 7; got 9: "
            "give more weeks, or a shorter baseline"
        ),
    ):
        ears_c2([1] * 9)
    with pytest.raises(InputError, match=r"^counts must have more than 13 weeks"):
        cusum([1] * 13)
    for find in (ears_c2, cusum):
        with pytest.raises(
            InputError, match=says("counts must be finite, 0 or greater; at index 2 it is -1")
        ):
            find([1, 1, -1] + [1] * 20)
        with pytest.raises(InputError, match=says("baseline must be 3 weeks or more, got 2")):
            find([1] * 20, baseline=2)


def test_settings_out_of_range_are_refused():
    weeks = [1] * 20
    with pytest.raises(InputError, match=says("lag must be 0 or greater, got -1")):
        ears_c2(weeks, lag=-1)
    with pytest.raises(
        InputError, match=says("threshold must be a finite number above 0, got nan")
    ):
        ears_c2(weeks, threshold=math.nan)
    with pytest.raises(InputError, match=says("k must be a finite number, 0 or greater, got -0.5")):
        cusum(weeks, k=-0.5)
    with pytest.raises(InputError, match=says("h must be a finite number above 0, got 0")):
        cusum(weeks, h=0)
