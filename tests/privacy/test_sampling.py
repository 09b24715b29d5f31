import random

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.sampling import PatientSampler

# One test in a million fails by chance.
CHANCE = 1e-6


def likely(found, trials, rate):
    low, high = stats.binom.ppf([CHANCE / 2, 1 - CHANCE / 2], trials, rate)
    return low <= found <= high


def drawn(sampler, draws, patients):
    """Return who was drawn: a table of draws x patients."""
    table = np.zeros((draws, patients), bool)
    for row in table:
        row[[group[0] for group in sampler.draw()]] = True
    return table


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.9])
def test_each_patient_is_drawn_with_the_sampling_rate(rate):
    table = drawn(PatientSampler(range(20), rate), 2_000, 20)
    assert all(likely(found, 2_000, rate) for found in table.sum(axis=0))
    assert likely(table.sum(), 40_000, rate)


def test_the_rate_does_not_depend_on_how_many_records_a_patient_has():
    patients = ["many"] * 50 + ["one"]
    counts = [0, 0]
    sampler = PatientSampler(patients, 0.3)
    for _ in range(2_000):
        for (place,) in sampler.draw():
            counts[place == 50] += 1
    assert all(likely(count, 2_000, 0.3) for count in counts)


def test_patients_and_draws_are_independent():
    table = drawn(PatientSampler(range(30), 0.4), 3_000, 30).astype(float)
    between_patients = np.corrcoef(table.T) - np.eye(30)
    assert abs(between_patients).max() < 5.5 / np.sqrt(3_000)
    following = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(following) < 5 / np.sqrt(90_000)


def test_the_size_of_a_draw_is_binomial():
    sizes = drawn(PatientSampler(range(12), 0.25), 4_000, 12).sum(axis=1)
    found = np.bincount(np.minimum(sizes, 7), minlength=8)
    chances = stats.binom.pmf(np.arange(7), 12, 0.25)
    expected = 4_000 * np.append(chances, 1 - chances.sum())
    assert stats.chisquare(found, expected).pvalue > CHANCE


def test_a_drawn_patient_gives_one_record_chosen_evenly():
    patients = ["a", "b", "a", "a", "a"]
    counts = np.zeros(5, int)
    sampler = PatientSampler(patients, 1.0)
    for _ in range(4_000):
        groups = sampler.draw()
        assert [len(group) for group in groups] == [1, 1]
        assert [patients[group[0]] for group in groups] == ["a", "b"]
        for (place,) in groups:
            counts[place] += 1
    assert counts[1] == 4_000
    assert stats.chisquare(counts[[0, 2, 3, 4]]).pvalue > CHANCE


def test_a_drawn_patient_gives_all_records_where_their_mean_counts():
    sampler = PatientSampler([7, "x", 7, None, "x", 7], 0.5, "mean")
    groups = {tuple(group) for _ in range(200) for group in sampler.draw()}
    assert groups == {(0, 2, 5), (1, 4), (3,)}


def test_a_draw_may_be_empty():
    sampler = PatientSampler(["a", "a", "b"], 0.2)
    empty = sum(not sampler.draw() for _ in range(1_000))
    assert likely(empty, 1_000, 0.8**2)


def test_everybody_is_drawn_at_rate_one():
    sampler = PatientSampler(range(50), 1.0)
    assert all(sampler.draw() == [[place] for place in range(50)] for _ in range(20))


def test_what_is_expected_counts_patients():
    sampler = PatientSampler(["a", "a", "a", "b"], 0.25)
    assert sampler.num_patients == 2
    assert sampler.expected == 0.5


def test_patients_without_a_record_are_expected_and_never_drawn():
    sampler = PatientSampler(["a", "a", "b"], 0.25, num_patients=8)
    assert (sampler.num_patients, sampler.expected) == (8, 2.0)
    counts = np.zeros(3, int)
    for _ in range(4_000):
        for (place,) in sampler.draw():
            counts[place] += 1
    # Each of the two with the rate that is accounted for, whoever else there is.
    assert likely(counts[:2].sum(), 4_000, 0.25)
    assert likely(counts[2], 4_000, 0.25)
    nobody = PatientSampler([], 1.0, num_patients=3)
    assert (nobody.draw(), nobody.expected) == ([], 3.0)


def test_no_seed_repeats_a_draw():
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        seen.append(PatientSampler([0] * 40 + list(range(1, 101)), 0.5).draw())
    assert seen[0] != seen[1]


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    text = f"sampling_rate must be above 0 and at most 1, got {rate}"
    with pytest.raises(InputError, match=says(text)):
        PatientSampler(["a"], rate)


def test_other_wrong_values_are_refused():
    with pytest.raises(InputError, match=says("records must be one of one, mean, got 'all'")):
        PatientSampler(["a"], 0.5, "all")
    with pytest.raises(InputError, match=says("there is no patient to draw")):
        PatientSampler([], 0.5)
    with pytest.raises(InputError, match=says("there is no patient to draw")):
        PatientSampler([], 0.5, num_patients=0)
    with pytest.raises(InputError, match=says("num_patients must be at least 2, got 1")):
        PatientSampler(["a", "b", "a"], 0.5, num_patients=1)
