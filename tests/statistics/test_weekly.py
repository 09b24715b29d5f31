import math
from datetime import date, timedelta

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.weekly import cusum, ears_c2, farrington

LEVEL = 0.005


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
    # 1.5 - 0.5; -0.5 - 0.5; 2.5 - 0.5; 2.5 - 0.5, an alert; -2 - 0.5.
    assert got.statistic[3:].tolist() == [1, 0, 2, 4, 0]
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


def sums_since_the_last_alert(standardised, h):
    """Page's form of the sum: how far the walk is above its lowest point since the last alert."""
    alerts, start = [], 0
    for week in range(len(standardised)):
        walk = np.concatenate([[0.0], np.cumsum(standardised[start : week + 1])])
        if walk[-1] - walk.min() >= h:
            alerts.append(week)
            start = week + 1
    return alerts


@pytest.mark.parametrize("seed", range(20))
def test_cusum_starts_again_after_an_alert_as_page_counts(seed):
    rng = np.random.default_rng(seed)
    counts = np.concatenate([rng.poisson(9, 13), rng.poisson(9, 20), rng.poisson(14, 20)])
    got = cusum(counts)
    mean = counts[:13].mean()
    sd = max(counts[:13].std(ddof=1), math.sqrt(mean))
    expected = sums_since_the_last_alert((counts[13:] - mean) / sd - 0.5, 4.0)
    assert (np.flatnonzero(got.alert) - 13).tolist() == expected
    assert len(expected) > 1


def test_cusum_is_quiet_once_a_rise_is_over():
    """Without a new start the sum of 96 would last for 190 weeks."""
    got = cusum([9] * 13 + [39] * 10 + [9] * 100)
    assert np.flatnonzero(got.alert).tolist() == list(range(13, 23))


def winters(rng, weeks, mean=20.0, dispersion=1.0, start="2015-06-01"):
    """Counts that are five times as high in January as in July."""
    days = [date.fromisoformat(start) + timedelta(weeks=week) for week in range(weeks)]
    season = np.array([math.cos(2 * math.pi * day.timetuple().tm_yday / 365.25) for day in days])
    means = mean * np.exp(0.8 * season)
    if dispersion == 1:
        return rng.poisson(means)
    return rng.negative_binomial(means / (dispersion - 1), 1 / dispersion)


def threshold_by_statsmodels(counts, week, years=5, window=3):
    """The threshold as the paper goes, by another GLM: two fits, and a trend or none."""
    indices = [
        index
        for year in range(years, 0, -1)
        for index in range(
            week - round(year * 365.25 / 7) - window, week - round(year * 365.25 / 7) + window + 1
        )
        if index >= 0 and not math.isnan(counts[index])
    ]
    y = np.array(counts)[indices]
    time = np.array(indices, float) - week

    def fit(design, weights=None):
        family = sm.families.Poisson()
        result = sm.GLM(y, design, family=family, var_weights=weights).fit(tol=1e-12)
        return result, max(1.0, result.pearson_chi2 / result.df_resid)

    def both(design):
        first, phi = fit(design)
        mu = first.fittedvalues
        hat = first.get_hat_matrix_diag()
        residuals = (
            1.5 * (y ** (2 / 3) - mu ** (2 / 3)) / (mu ** (1 / 6) * np.sqrt(phi * (1 - hat)))
        )
        weights = np.where(residuals > 2.58, residuals**-2.0, 1.0)
        return fit(design, weights * len(y) / weights.sum())

    flat, trend = np.ones((len(y), 1)), np.column_stack([np.ones(len(y)), time])
    result, phi = both(trend)
    error = math.sqrt(phi * result.normalized_cov_params[1, 1])
    p = 2 * stats.t.sf(abs(result.params[1]) / error, len(y) - 2)
    trended = p < 0.05 and math.exp(result.params[0]) <= y.max()
    if not trended:
        result, phi = both(flat)
    mu = math.exp(result.params[0])
    variance = phi * result.normalized_cov_params[0, 0] * mu**2
    tau = phi + variance / mu
    upper = mu * (1 + 2 / 3 * stats.norm.isf(LEVEL) * math.sqrt(tau / mu)) ** 1.5
    return mu, upper, trended


@pytest.mark.parametrize(("dispersion", "growth"), [(1, 0), (3, 0), (1, 0.003), (2, -0.002)])
def test_farrington_has_the_threshold_of_statsmodels(dispersion, growth):
    rng = np.random.default_rng(4)
    counts = winters(rng, 300, 30, dispersion) * np.exp(growth * np.arange(300))
    counts = np.round(counts)
    # Past outbreaks get a smaller weight, and unknown weeks none.
    counts[[60, 61, 112]] *= 6
    counts[[70, 130, 131, 225]] = math.nan
    got = farrington(counts)
    trends = set()
    for week in [*range(160, 300, 7), 270, 271, 272]:
        mean, upper, trended = threshold_by_statsmodels(counts.tolist(), week)
        trends.add(trended)
        expected = (counts[week] - mean) / (upper - mean)
        assert got.statistic[week] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert growth == 0 or True in trends


def test_farrington_of_a_level_baseline_worked_by_hand():
    """Mean and dispersion 1: U = 9 (1 + 2/3 z sqrt((1 + 1/35) / 9))^(3/2), var(mean) = 9 / 35."""
    counts = [9.0] * 300
    z = stats.norm.isf(LEVEL)
    upper = 9 * (1 + 2 / 3 * z * math.sqrt((1 + 1 / 35) / 9)) ** 1.5
    assert 17 < upper < 18
    counts[280] = 17
    counts[290] = 18
    got = farrington(counts)
    assert got.statistic[[280, 290]] == pytest.approx([8 / (upper - 9), 9 / (upper - 9)])
    assert np.flatnonzero(got.alert).tolist() == [290]


def test_a_season_without_outbreak_gives_no_more_farrington_alerts_than_its_level():
    """While C2 and CUSUM give alerts in every winter."""
    judged = 0
    alerts = {name: np.zeros(0, int) for name in ("farrington", "c2", "cusum")}
    for seed in range(12):
        counts = winters(np.random.default_rng(seed), 312, dispersion=1 + seed % 2)
        judged += 312 - 160
        for name, find in (("farrington", farrington), ("c2", ears_c2), ("cusum", cusum)):
            found = np.flatnonzero(find(counts).alert[160:])
            alerts[name] = np.concatenate([alerts[name], found])
    most = LEVEL * judged + 3 * math.sqrt(LEVEL * judged)
    assert alerts["farrington"].size <= most
    assert alerts["c2"].size > 5 * most
    assert alerts["cusum"].size > 5 * most


def test_farrington_finds_an_outbreak_in_any_season():
    found = []
    for seed in range(10):
        counts = winters(np.random.default_rng(seed), 312)
        for week in (270, 290):
            counts[week] = round(3 * counts[week - 2 : week].mean()) + 10
        found += farrington(counts).alert[[270, 290]].tolist()
    assert all(found)


def test_an_earlier_outbreak_hides_none_from_farrington():
    counts = winters(np.random.default_rng(1), 312)
    once = counts.copy()
    once[300] += 60
    twice = once.copy()
    twice[300 - 104 : 300 - 101] += 60
    assert farrington(once).alert[300]
    assert farrington(twice).alert[300]


def test_farrington_leaves_unknown_weeks_out_and_judges_no_week_of_which_too_little_is_known():
    counts = [9.0] * 300
    known = counts.copy()
    for year in (1, 2):
        for index in range(280 - round(year * 365.25 / 7) - 3, 280 - round(year * 365.25 / 7) + 4):
            known[index] = math.nan
    assert farrington(known).statistic[280] == pytest.approx(0, abs=1e-12)
    known[280 - 157 - 3 : 280 - 157 + 1] = [math.nan] * 4
    assert math.isnan(farrington(known).statistic[280])
    counts[290] = math.nan
    got = farrington(counts)
    assert math.isnan(got.statistic[290])
    assert np.isnan(got.statistic[:160]).all()
    assert not np.isnan(got.statistic[160:290]).any()


def test_farrington_without_any_case_before():
    counts = [0.0] * 200
    assert farrington(counts).statistic[199] == 0
    counts[199] = 4
    got = farrington(counts)
    assert got.statistic[199] == math.inf
    assert not got.alert.any()
    counts[199] = 5
    assert farrington(counts).alert.tolist() == [False] * 199 + [True]


def test_farrington_of_a_disease_that_came_late_fits_without_a_trend():
    """A trend through years without a case and one with some would rise without bound."""
    counts = [0.0] * 248 + [3.0] * 52
    got = farrington(counts)
    assert np.isfinite(got.statistic[160:]).sum() > 80
    assert not got.alert[270:].all()


def test_farrington_needs_three_years():
    text = (
        "counts must have more than 160 weeks, since a week is compared with those of 3 years "
        "before; got 160: give more weeks, or choose c2 or cusum, which know no season"
    )
    with pytest.raises(InputError, match=says(text)):
        farrington([3] * 160)
    with pytest.raises(InputError, match=says("window must be from 0 to 26 weeks, got -1")):
        farrington([3] * 200, window=-1)
    with pytest.raises(InputError, match=says("level must be above 0 and below 0.5, got 0.5")):
        farrington([3] * 200, level=0.5)
