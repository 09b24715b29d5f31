"""Intervals of differences, compared with statsmodels, with simulations and with a paper."""

import numpy as np
import pytest
from statsmodels.stats.proportion import confint_proportions_2indep

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.curves import wilson
from fedmed_flower.metrics.differences import auc_interval_by_size, difference_interval


def test_shares_by_newcombes_own_example_and_by_statsmodels():
    found = difference_interval(wilson(56, 70), wilson(48, 80))
    # Newcombe 1998, table II, (a), method 10.
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    for right in ((9, 10), (30, 30), (1, 12)):
        found = difference_interval(wilson(right[0], right[1]), wilson(20, 40))
        theirs = confint_proportions_2indep(*right, 20, 40, method="newcomb", compare="diff")
        assert found[1:] == pytest.approx(theirs)


def test_the_interval_of_an_auc_has_the_width_that_its_samples_vary_by():
    rng = np.random.default_rng(3)
    # Exponential scores, for which the formula is exact: the AUC is 4/5.
    samples = []
    for _ in range(2000):
        scores = np.concatenate([rng.exponential(4, 40), rng.exponential(1, 60)])
        labels = np.repeat([1, 0], [40, 60])
        samples.append(auc_of(labels, scores))
    found = auc_interval_by_size(0.8, 40, 60)
    inside = np.mean([found.low <= sample <= found.high for sample in samples])
    assert inside == pytest.approx(0.95, abs=0.02)
    covered = [
        each.low <= 0.8 <= each.high
        for each in (auc_interval_by_size(sample, 40, 60) for sample in samples)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def auc_of(labels, scores):
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    count = labels.sum()
    return (ranks[labels == 1].sum() - count * (count + 1) / 2) / (count * (len(labels) - count))


def test_an_auc_without_error_has_an_interval_too():
    assert auc_interval_by_size(1.0, 5, 90) == wilson(5, 5)
    assert auc_interval_by_size(0.0, 5, 90) == wilson(0, 5)


@pytest.mark.parametrize("given", [(1.2, 3, 3), (0.5, 0, 3), (0.5, 3, 0.5), (float("nan"), 3, 3)])
def test_what_has_no_interval_is_refused(given):
    with pytest.raises(InputError, match=r"an AUC from 0 to 1 and a record or more of each kind"):
        auc_interval_by_size(*given)
