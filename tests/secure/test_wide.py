"""Numbers of any size in digits: exact in a sum, whoever has large ones."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.secure.ring import Layout
from fedmed_flower.secure.wide import MOST, digits_of, value_of, wide_part

NUMBERS = st.floats(-MOST, MOST, allow_subnormal=False)


@given(NUMBERS)
def test_digits_give_back_their_number(value):
    found = value_of(np.array(digits_of(value)))
    assert found == value if abs(value) >= 2.0**-227 else abs(found - value) <= 2.0**-281


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_the_sum_over_hospitals_is_rounded_but_at_the_end(values):
    layout = Layout((wide_part("sum"),))
    words = [layout.encode({"sum": np.array(digits_of(value))}) for value in values]
    assert not any(encoded.clipped for encoded in words)
    total = sum(encoded.words[1] for encoded in words)
    found = value_of(layout.decode((words[0].words[0], total), len(values))["sum"])
    exact = sum(map(Fraction, values))
    # A unit in the last place of the largest digit, and what the smallest digit cannot hold.
    room = 2 * abs(exact) * Fraction(2) ** -52 + len(values) * Fraction(2) ** -280
    assert abs(Fraction(found) - exact) <= room


def test_the_sum_of_large_numbers_keeps_a_small_one():
    large = digits_of(1e30)
    total = np.array(large) - np.array(large) + np.array(digits_of(3e-9))
    assert value_of(total) == 3e-9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2 * MOST])
def test_what_no_digits_hold_is_refused_without_showing_it(value):
    text = "a number of a sum must be finite and at most 9.71e+83"
    with pytest.raises(InputError, match=says(text)):
        digits_of(value)
