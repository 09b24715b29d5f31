"""How phenotypes and covariates are written."""

import numpy as np
import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.genomics.coding import case_status, lone_values, number_of, without_codes

GENERATOR = np.random.default_rng(4)
AGES = GENERATOR.normal(55, 12, 500).round()


@pytest.mark.parametrize("value", [None, np.nan, "", "NA", " na ", "NaN", np.str_("?")])
def test_what_is_missing(value):
    assert np.isnan(number_of(value, "age", "p1"))


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3)])
def test_what_is_a_number(value):
    assert number_of(value, "age", "p1") == 3


def test_codes_become_missing():
    found = without_codes(np.array([-9.0, 1, 99, np.nan]), (-9, 99))
    np.testing.assert_array_equal(found, [np.nan, 1, np.nan, np.nan])
    np.testing.assert_array_equal(without_codes(np.array([-9.0, 1]), ()), [-9, 1])


def test_in_plinks_coding_nought_is_missing():
    found = case_status(np.array([0.0, 1, 2, np.nan]), "1/2", "case")
    np.testing.assert_array_equal(found, [np.nan, 0, 1, np.nan])
    text = "case of a binary trait must be 1 for controls and 2 for cases, got 3"
    with pytest.raises(InputError, match=text):
        case_status(np.array([1.0, 3]), "1/2", "case")
    # Nobody has a value: nobody takes part.
    assert np.isnan(case_status(np.full(3, np.nan), "", "case")).all()


def coded(values, code, count):
    values = np.array(values, float)
    values[:count] = code
    return values


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (coded(AGES, -999, 20), -999),
        (coded(AGES, 9999, 5), 9999),
        (coded(AGES, 120, 9), 120),
        # A category of unknown sex.
        (coded(1 + np.arange(300) % 2, 9, 12), 9),
        (coded(GENERATOR.normal(size=200), 99, 3), 99),
    ],
)
def test_a_far_value_that_many_have_is_found(values, code):
    (found,) = lone_values(values)
    assert (found.value, found.times) == (code, (values == code).sum())
    assert found.people == len(values)


def test_two_codes_are_found_one_after_the_other():
    values = coded(AGES, -99, 30)
    values[30:60] = -999
    values[60] = np.nan
    assert [lone.value for lone in lone_values(values)] == [-999, -99]


@pytest.mark.parametrize(
    "values",
    [
        AGES,
        # A value of one person or two, or of fewer than one in a hundred, is not frequent.
        coded(AGES, -999, 1),
        coded(AGES, -999, 4),
        coded(AGES[:50], -999, 2),
        # Indicators and copies of an allele.
        coded(np.zeros(400), 1, 5),
        np.repeat([0.0, 1, 2], [400, 60, 8]),
        # Smokers: 0 cigarettes is no code.
        np.repeat(np.arange(0.0, 41, 5), [300, 20, 30, 30, 40, 10, 8, 4, 6]),
        np.full(30, -999.0),
        np.array([]),
        np.full(5, np.nan),
    ],
)
def test_other_values_are_taken_as_they_are(values):
    assert lone_values(values) == []
