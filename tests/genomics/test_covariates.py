"""Whether covariates can be told apart, from sums of several hospitals."""

import numpy as np
import pytest
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.genomics.covariates import CovariateCheck, require_distinct

GENERATOR = np.random.default_rng(6)


def sums_of(columns):
    centred = np.column_stack(columns)
    centred = centred - centred.mean(0)
    return centred.T @ centred


def test_a_sum_of_others_is_named_with_them():
    a, b, c, d = GENERATOR.normal(size=(4, 90)) * [[1], [30], [0.01], [5]] + 1000
    text = (
        "the covariate sum follows from a and c at each hospital, so their effects cannot be told "
        "apart: take sum out of covariates"
    )
    with pytest.raises(InputError, match=says(text)):
        require_distinct(sums_of([a, b, c, d, a - 40 * c]), ["a", "b", "c", "d", "sum"])
    require_distinct(sums_of([a, b, c, d]), list("abcd"))
    # Nearly the same is not the same.
    require_distinct(sums_of([a, a + 1e-3 * d]), ["a", "more"])


def test_nothing_is_checked_until_every_hospital_has_sent_its_sums():
    constant = np.zeros((1, 1))
    varying = np.ones((1, 1))
    sums = np.array([[constant, constant], [varying, varying]])
    check = CovariateCheck(["array"])
    check.add(sums, np.array([[30, 40], [0, 0]]), (0, 1))
    assert not check.done
    check.add(sums, np.array([[0, 0], [0, 40]]), (0, 1))
    assert check.done
    # The second hospital leaves the study before it has sent anything.
    check = CovariateCheck(["array"])
    with pytest.raises(InputError, match="the covariate array is the same for everybody"):
        check.add(sums, np.array([[30, 40], [0, 0]]), (0,))


def test_the_variant_of_most_people_counts():
    sums = np.array([[[[0.0]], [[5.0]]]])
    CovariateCheck(["age"]).add(sums, np.array([[10, 400]]), (0,))
    with pytest.raises(InputError):
        CovariateCheck(["age"]).add(sums, np.array([[400, 10]]), (0,))


def test_without_covariates_there_is_nothing_to_check():
    assert CovariateCheck([]).done
