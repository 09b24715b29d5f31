import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error, roc_auc_score

from fedmed_flower.metrics.classification import noised_counts, noised_metrics, ordered_rates
from fedmed_flower.metrics.coarse import coarsened
from fedmed_flower.metrics.grades import grade_metrics, grade_shares, guessed_grades
from fedmed_flower.metrics.names import CONFUSION, KAPPA, MAIN, NOISED, lower_is_better
from fedmed_flower.metrics.pooling import pool
from fedmed_flower.metrics.summing import record_of_sums, sums_of_record

NAMES = ("none", "mild", "moderate", "severe")


def hospital(seed, count=300):
    """Return grades and log-odds to be above each."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(0, 2, count)
    truth = np.digitize(latent + rng.normal(0, 1, count), [-2, 0, 2])
    return truth, latent[:, None] - np.array([-2.0, 0.0, 2.0])


def measured(seed, coarse=False):
    truth, above = hospital(seed)
    return grade_metrics(NAMES, truth, above, range(len(truth)), coarse)


def test_shares_are_differences_of_what_is_passed():
    above = np.array([[2.0, 0.0, -1.0], [50.0, 40.0, 39.0], [-40.0, -50.0, -800.0]])
    found = grade_shares(above)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    passed = expit(above[0])
    np.testing.assert_allclose(found[0], -np.diff([1, *passed, 0]))
    # In the tails a plain difference of numbers next to 1 would be 0.
    assert found[1, 2] == pytest.approx(np.exp(-39) - np.exp(-40), rel=0.2, abs=1e-12)
    assert (found > 0).all()
    np.testing.assert_array_equal(guessed_grades(above), [1, 3, 0])


def test_figures_are_those_of_scikit_learn():
    truth, above = hospital(1)
    guess = (above > 0).sum(axis=1)
    found = measured(1)
    expected = {
        "accuracy": accuracy_score(truth, guess),
        "mae": mean_absolute_error(truth, guess),
        KAPPA: cohen_kappa_score(truth, guess, weights="quadratic"),
        "auc@grade=moderate or above": roc_auc_score(truth >= 2, above[:, 1]),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert MAIN[0] == KAPPA
    assert not lower_is_better(KAPPA)


def test_kappa_is_pooled_exactly_which_no_mean_of_hospitals_is():
    truth, above = (np.concatenate(part) for part in zip(hospital(1), hospital(2), strict=True))
    records = [measured(1), measured(2)]
    guess = (above > 0).sum(axis=1)
    expected = cohen_kappa_score(truth, guess, weights="quadratic")
    pooled = pool(records)
    assert pooled[KAPPA] == pytest.approx(expected)
    assert pooled["mae"] == pytest.approx(mean_absolute_error(truth, guess))
    parts = [sums_of_record(record) for record in records]
    assert f"sum/{KAPPA}" not in parts[0]
    summed = pool([record_of_sums({name: sum(p[name] for p in parts) for name in parts[0]})])
    assert summed[KAPPA] == pytest.approx(expected)
    assert summed["mae"] == pytest.approx(pooled["mae"])


def test_kappa_of_one_grade_is_left_out():
    assert ordered_rates([[4, 0, 0], [0, 0, 0], [0, 0, 0]]) == {"mae": 0.0}


def test_classes_without_an_order_have_no_kappa():
    record = measured(1)
    plain = {name: value for name, value in record.items() if name not in ("mae", KAPPA)}
    assert KAPPA not in pool([plain, plain])


def test_coarse_figures_withhold_what_follows_from_few_patients():
    truth, above = hospital(3, 40)
    found = grade_metrics(NAMES, truth, above, range(40), coarse=True)
    assert CONFUSION not in found
    assert not {"mae", KAPPA} & {*found}
    assert not any("@" in name for name in found)
    assert not {"mae", KAPPA} & {*pool([coarsened(found), coarsened(found)])}


def test_noised_counts_of_grades_give_kappa():
    truth, above = hospital(4)
    guess = guessed_grades(above)
    counts = noised_counts(truth, np.log(grade_shares(above)), range(300), 0.0, guess)
    expected = cohen_kappa_score(truth, guess, weights="quadratic")
    record = noised_metrics(counts, ordered=True) | {NOISED: counts}
    assert record[KAPPA] == pytest.approx(expected)
    assert pool([record, record])[KAPPA] == pytest.approx(expected)
    assert KAPPA not in noised_metrics(counts)
