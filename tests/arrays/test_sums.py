import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmed_flower.arrays.sums import exact_sum

floats = st.floats(allow_nan=False, allow_infinity=False)


def bits(value):
    return struct.pack("d", value)


@settings(max_examples=300)
@given(st.lists(st.one_of(floats, st.floats(-1, 1), st.sampled_from([1e16, -1e16, 2.0**53]))))
@example([])
@example([-0.0])
@example([5e-324, -5e-324, 1e-300])
@example([1e300, 1.0, -1e300])
@example([1.0, 2.0**-53, 2.0**-106])
def test_short_sums_are_those_of_python(values):
    try:
        wanted = math.fsum(values)
    except OverflowError:
        with pytest.raises(OverflowError):
            exact_sum(np.array(values))
    else:
        assert bits(exact_sum(np.array(values, float))) == bits(wanted)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30_000), st.integers(0, 60))
def test_long_sums_are_those_of_python(seed, count, spread):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count) * 2.0 ** rng.integers(-spread, spread + 1, count)
    # Sums that cancel have many digits to lose.
    cancelling = np.concatenate((values, -values[::2], rng.normal(size=3)))
    for part in (values, cancelling, values * values):
        assert bits(exact_sum(part)) == bits(math.fsum(part.tolist()))


def test_numbers_that_are_not_finite():
    assert exact_sum(np.array([1.0, np.inf])) == np.inf
    assert math.isnan(exact_sum(np.array([1.0, np.nan])))
    with pytest.raises(ValueError, match="inf"):
        exact_sum(np.array([np.inf, -np.inf]))


def test_the_numbers_stay_as_they_were():
    values = np.arange(5.0)
    exact_sum(values)
    assert values.tolist() == [0, 1, 2, 3, 4]
