import math

import dp_accounting
import pytest
from dp_accounting import dp_event, pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.accounting import Release, epsilon_of, noise_for, require_release


def analytic_epsilon(noise_multiplier, delta):
    """Balle and Wang, ICML 2018, theorem 8: the Gaussian mechanism to the last digit."""

    def excess(epsilon):
        half, apart = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        return (
            math.exp(log_ndtr(half - apart)) - math.exp(epsilon + log_ndtr(-half - apart)) - delta
        )

    return brentq(excess, 0, 1e6) if excess(0) > 0 else 0.0


def rdp_epsilon(releases, delta):
    accountant = rdp.RdpAccountant()
    for (rate, noise), count in releases.items():
        gaussian = dp_event.GaussianDpEvent(noise)
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, gaussian), count)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_without_sampling_epsilon_is_that_of_one_gaussian_with_less_noise(noise, count, delta):
    got = epsilon_of({Release(1.0, noise): count}, delta)
    wanted = analytic_epsilon(noise / math.sqrt(count), delta)
    assert wanted * (1 - 1e-9) - 1e-9 <= got <= wanted * 1.001 + 1e-4


def test_releases_with_different_noise_add_up_by_their_squares():
    got = epsilon_of([Release(1.0, 3.0), Release(1.0, 4.0)], 1e-5)
    assert got == pytest.approx(analytic_epsilon(2.4, 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("rate", "noise", "count", "wanted"), [(0.01, 1.1, 10_000, 5.19), (0.1, 1.0, 5, 2.35)]
)
def test_known_values(rate, noise, count, wanted):
    got = epsilon_of({Release(rate, noise): count}, 1e-5)
    assert got == pytest.approx(wanted, abs=0.005)
    assert got < rdp_epsilon({Release(rate, noise): count}, 1e-5) < 1.3 * got
    theirs = RDPAccountant()
    theirs.history = [(noise, rate, count)]
    assert got < theirs.get_epsilon(1e-5) < 1.3 * got


@pytest.mark.parametrize(
    ("rate", "noise", "count"), [(0.02, 0.8, 500), (0.5, 5.0, 100), (0.01, 0.5, 1000)]
)
def test_epsilon_is_within_what_an_accountant_with_proven_errors_allows(rate, noise, count):
    prv = PRVAccountant()
    prv.history = [(noise, rate, count)]
    wanted = prv.get_epsilon(1e-5, eps_error=0.01, delta_error=1e-8)
    assert epsilon_of({Release(rate, noise): count}, 1e-5) == pytest.approx(wanted, rel=0.01)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 0.9), st.floats(0.8, 20.0), st.integers(1, 100)
        ), min_size=1, max_size=2,
    )
)  # fmt: skip
def test_epsilon_is_never_above_that_by_renyi_divergences(rows):
    releases = {Release(rate, noise): count for rate, noise, count in rows}
    got = epsilon_of(releases, 1e-5)
    assert 0 <= got <= rdp_epsilon(releases, 1e-5) + 1e-3


def test_equal_releases_are_merged_and_the_order_makes_no_difference():
    a, b = Release(1.0, 3.0), Release(0.5, 8.0)
    wanted = epsilon_of({a: 2, b: 1}, 1e-5)
    assert epsilon_of([a, b, a], 1e-5) == wanted
    assert epsilon_of([b, Release(1, 3), Release(1.0, 3.0)], 1e-5) == wanted


def test_more_releases_cost_more_and_sampling_makes_them_cheaper():
    costs = [epsilon_of({Release(0.5, 5.0): count}, 1e-5) for count in range(5)]
    assert costs[0] == 0
    assert costs == sorted(set(costs))
    assert costs[1] < epsilon_of([Release(1.0, 5.0)], 1e-5)


def test_nothing_released_costs_nothing_and_no_noise_everything():
    assert epsilon_of([], 1e-5) == 0.0
    assert epsilon_of({Release(1.0, 0.0): 0, Release(0.5, 2.0): 0}, 1e-5) == 0.0
    assert epsilon_of([Release(1.0, 5.0), Release(0.01, 0.0)], 1e-5) == math.inf
    assert epsilon_of([Release(0.01, 1e-300)], 1e-5) == math.inf
    assert epsilon_of({Release(1.0, 1e-3): 10**6}, 1e-5) == math.inf
    assert epsilon_of({Release(0.5, 1e-3): 10**9}, 1e-5) == math.inf
    assert epsilon_of([Release(1.0, 1e9)], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("releases", "delta", "text"),
    [
        ([Release(0.0, 1.0)], 1e-5, "sampling_rate must be above 0 and at most 1, got 0.0"),
        ([Release(1.5, 1.0)], 1e-5, "sampling_rate must be above 0 and at most 1, got 1.5"),
        ([Release(math.nan, 1.0)], 1e-5, "sampling_rate must be above 0 and at most 1, got nan"),
        ([Release(1.0, -1.0)], 1e-5,
         "noise_multiplier must be at least 0 and at most 1e+09, got -1.0"),
        ([Release(1.0, math.inf)], 1e-5,
         "noise_multiplier must be at least 0 and at most 1e+09, got inf"),
        ([Release(1.0, math.nan)], 1e-5,
         "noise_multiplier must be at least 0 and at most 1e+09, got nan"),
        # What cannot be accounted for is an error also where another release costs all there is.
        ([Release(0.5, 0.0), Release(1.0, -1.0)], 1e-5,
         "noise_multiplier must be at least 0 and at most 1e+09, got -1.0"),
        ({Release(1.0, 1.0): -1}, 1e-5, "the number of releases must be at least 0, got -1"),
        ([], 0.0, "delta must be above 0 and below 1, got 0.0"),
        ([], 1.0, "delta must be above 0 and below 1, got 1.0"),
        ([], math.nan, "delta must be above 0 and below 1, got nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_accounted_for_is_refused(releases, delta, text):
    with pytest.raises(InputError) as error:
        epsilon_of(releases, delta)
    assert str(error.value) == text


@pytest.mark.parametrize(("rate", "noise"), [(1, 0), (1e-9, 1e9), (1.0, 1e-300)])
def test_a_release_at_the_edge_of_its_range_has_a_cost(rate, noise):
    require_release(rate, noise)
    cost = epsilon_of([Release(rate, noise)], 1e-5)
    assert cost == math.inf if noise < 1 else 0 <= cost < 1e-3


def calibrated(epsilon, delta, rate, count, about):
    """What dp-accounting finds by its own search."""
    return dp_accounting.calibrate_dp_mechanism(
        pld.PLDAccountant,
        lambda noise: dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), count
        ),
        epsilon,
        delta,
        dp_accounting.ExplicitBracketInterval(about * 0.99, about * 1.01),
        tol=about * 5e-4,
    )


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "count"),
    [
        (8.0, 1e-5, 0.25, 40),
        (3.0, 1e-5, 0.05, 200),
        (8.0, 1e-9, 1.0, 3),
        (0.5, 1e-3, 0.5, 10),
    ],
)
def test_noise_for_a_budget_is_what_dp_accounting_finds(epsilon, delta, rate, count):
    got = noise_for(epsilon, delta, rate, count)
    assert got == pytest.approx(calibrated(epsilon, delta, rate, count, got), rel=3e-3)


@pytest.mark.parametrize(
    ("epsilon", "rate", "count"),
    [
        (8.0, 0.1, 30),
        (0.01, 1.0, 1),
        (0.01, 1.0, 100_000),
        (0.01, 1e-4, 100_000),
        (0.01, 0.3, 1),
        (1.0, 0.01, 10_000),
        (1000.0, 1.0, 1),
        (1000.0, 1.0, 100_000),
        (1000.0, 1e-4, 1),
        (1000.0, 0.5, 100),
    ],
)
def test_noise_for_a_budget_keeps_it_and_a_hundredth_less_would_not(epsilon, rate, count):
    noise = noise_for(epsilon, 1e-5, rate, count)
    kept, passed = (epsilon_of({Release(rate, n): count}, 1e-5) for n in (noise, 0.99 * noise))
    assert kept <= epsilon < passed
    assert kept > 0.99 * epsilon


def test_noise_for_a_budget_is_that_of_the_gaussian_mechanism():
    for epsilon, delta, count in [(0.01, 1e-5, 1), (1.0, 1e-10, 4), (1000.0, 1e-5, 100)]:
        single = noise_for(epsilon, delta, 1.0, count) / math.sqrt(count)
        wanted = brentq(lambda noise: analytic_epsilon(noise, delta) - epsilon, 1e-3, 1e4)  # noqa: B023
        assert wanted * (1 - 1e-6) <= single <= wanted * 1.001


def test_where_sampling_alone_is_enough_hardly_any_noise_is_asked_for():
    noise = noise_for(8.0, 1e-5, 1e-6, 1)
    assert 1e-3 <= noise < 2e-3
    assert epsilon_of([Release(1e-6, noise)], 1e-5) <= 8.0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.0, 1e-5, 0.1, 1), "epsilon must be above 0 and finite, got 0.0"),
        ((-1.0, 1e-5, 0.1, 1), "epsilon must be above 0 and finite, got -1.0"),
        ((math.inf, 1e-5, 0.1, 1), "epsilon must be above 0 and finite, got inf"),
        ((math.nan, 1e-5, 0.1, 1), "epsilon must be above 0 and finite, got nan"),
        ((1.0, 0.0, 0.1, 1), "delta must be above 0 and below 1, got 0.0"),
        ((1.0, 1.0, 0.1, 1), "delta must be above 0 and below 1, got 1.0"),
        ((1.0, math.nan, 0.1, 1), "delta must be above 0 and below 1, got nan"),
        ((1.0, 1e-5, 0.0, 1), "sampling_rate must be above 0 and at most 1, got 0.0"),
        ((1.0, 1e-5, 1.1, 1), "sampling_rate must be above 0 and at most 1, got 1.1"),
        ((1.0, 1e-5, 0.1, 0), "the number of releases must be at least 1, got 0"),
        ((1e-12, 1e-15, 1.0, 10**9),
         "no noise multiplier up to 1e+09 keeps 1000000000 releases within epsilon 1e-12 at delta "
         "1e-15: plan fewer releases, or raise epsilon or delta"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_planned_for_is_refused(values, text):
    with pytest.raises(InputError) as error:
        noise_for(*values)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("rate", "noise", "count", "interval"),
    [(1e-4, 7.75, 100_000, 3e-7), (0.01, 30.0, 1000, 1e-6), (0.01, 4.0, 10_000, 1e-5)],
)
def test_many_small_releases_cost_what_a_finer_accountant_finds(rate, noise, count, interval):
    finer = pld.PLDAccountant(value_discretization_interval=interval)
    gaussian = dp_event.GaussianDpEvent(noise)
    finer.compose(dp_event.PoissonSampledDpEvent(rate, gaussian), count)
    wanted = finer.get_epsilon(1e-5)
    assert epsilon_of({Release(rate, noise): count}, 1e-5) == pytest.approx(wanted, rel=2e-3)


def test_releases_without_sampling_are_one_with_less_noise_in_any_company():
    sampled = Release(0.1, 2.0)
    apart = {sampled: 10, Release(1.0, 6.0): 3, Release(1.0, 8.0): 2}
    together = {sampled: 10, Release(1.0, (3 / 36 + 2 / 64) ** -0.5): 1}
    got = epsilon_of(apart, 1e-5)
    assert got == pytest.approx(epsilon_of(together, 1e-5), rel=1e-9)
    accountant = pld.PLDAccountant()
    for (rate, noise), count in apart.items():
        gaussian = dp_event.GaussianDpEvent(noise)
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, gaussian), count)
    assert got == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_small_releases_beside_a_large_one_cost_what_a_finer_accountant_finds():
    releases = {Release(1e-4, 7.75): 100_000, Release(1.0, 4.0): 1}
    finer = pld.PLDAccountant(value_discretization_interval=5e-6)
    for (rate, noise), count in releases.items():
        gaussian = dp_event.GaussianDpEvent(noise)
        finer.compose(dp_event.PoissonSampledDpEvent(rate, gaussian), count)
    assert epsilon_of(releases, 1e-5) == pytest.approx(finer.get_epsilon(1e-5), rel=2e-3)


def test_a_release_with_little_noise_is_accounted_for_as_coarsely_in_any_company(monkeypatch):
    """Told apart as finely as the other's, its losses would take minutes."""
    intervals = []

    class Noting(pld.PLDAccountant):
        def __init__(self, value_discretization_interval):
            intervals.append(value_discretization_interval)
            super().__init__(value_discretization_interval=max(5e-3, intervals[-1]))

    monkeypatch.setattr(pld, "PLDAccountant", Noting)
    little = Release(0.01, 0.1)
    # A delta of its own: what was computed before is remembered.
    for releases in ([little], [little, Release(0.01, 10.0)]):
        epsilon_of(releases, 1.1e-5)
    assert intervals[0] == intervals[1]
