import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedmed_flower.privacy.accounting import Release, noise_for

PATH = list(sys.path)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
privacy_audit = importlib.import_module("privacy_audit")
sys.path[:] = PATH
lower_bound, p_value = privacy_audit.lower_bound, privacy_audit.p_value


@pytest.mark.parametrize("guesses", [10, 100, 1000])
def test_only_right_guesses_refute_what_would_guess_them_less_than_once_in_twenty(guesses):
    chance = 0.05 ** (1 / guesses)
    bound = lower_bound(guesses, guesses, guesses, delta=0.0)
    assert bound == pytest.approx(math.log(chance / (1 - chance)), abs=2e-4)


def test_the_p_value_is_the_sum_of_the_paper():
    right, guesses, canaries, epsilon, delta = 8, 10, 20, 0.5, 0.01
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [
        math.comb(guesses, n) * chance**n * (1 - chance) ** (guesses - n)
        for n in range(guesses + 1)
    ]
    slack = max(sum(mass[right - i : right]) / i for i in range(1, right + 1))
    expected = sum(mass[right:]) + 2 * canaries * delta * slack
    got = p_value(right, guesses, canaries, epsilon, delta)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("right", "guesses", "delta"), [(0, 0, 0.0), (0, 100, 0.0), (58, 100, 0.0), (100, 100, 0.1)]
)
def test_what_chance_or_delta_alone_explain_refutes_nothing(right, guesses, delta):
    assert lower_bound(right, guesses, 100, delta) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_passes_its_bound_in_one_run_of_twenty_and_comes_near(epsilon):
    count = 1000
    chance = 1 / (1 + math.exp(-epsilon))
    right = np.arange(count + 1)
    mass = stats.binom.pmf(right, count, chance)
    likely = right[mass > 1e-9]
    bounds = np.array([lower_bound(int(n), count, count, delta=0.0) for n in likely])
    over = mass[likely][bounds > epsilon].sum()
    assert 0.03 < over <= 0.05
    assert (mass[likely] * bounds).sum() > 0.75 * epsilon


def test_an_unlikely_leak_of_all_coins_stays_within_the_bound_that_knows_delta():
    count, epsilon, delta = 200, 1.0, 0.04
    chance = 1 / (1 + math.exp(-epsilon))
    right = np.arange(count + 1)
    mass = (1 - delta) * stats.binom.pmf(right, count, chance)
    mass[count] += delta
    over = {}
    for told in (0.0, delta):
        refuted = [n for n in right if p_value(int(n), count, count, epsilon, told) < 0.05]
        over[told] = mass[refuted].sum()
    assert over[0.0] > 0.05
    assert over[delta] <= 0.05


def test_scores_without_error_refute_about_as_much_as_all_guesses_can():
    taken = np.random.default_rng(0).random(1000) < 0.5
    bound = privacy_audit.bound_of_scores(taken + 0.0, taken, delta=0.0)
    assert 3.0 < bound < lower_bound(1000, 1000, 1000, delta=0.0)
    assert privacy_audit.bound_of_scores(~taken + 0.0, taken, delta=0.0) == 0.0


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 4), (0.5, 12)])
def test_a_small_audit_is_under_the_claim_with_noise_and_over_it_without(rate, steps):
    epsilon, delta = 2.0, 1e-6
    noise = noise_for(epsilon, delta, rate, steps)
    bounds = [
        privacy_audit.audit(200, Release(rate, used), steps, delta, seed=0) for used in (noise, 0.0)
    ]
    assert bounds[0] < epsilon < bounds[1]
