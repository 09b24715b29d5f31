"""Numbers of any size in a secure sum, and units that follow from them."""

import numpy as np
import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.secure.magnitudes import in_sizes, part_of, total, units
from fedmed_flower.secure.ring import Layout


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 3e11, 1e13, 1e25, 1e45])
def test_sums_of_numbers_of_any_size_come_through_a_layout(size):
    layout = Layout((part_of("squares", 3),))
    parts = [np.array([size, 0.0, size * number]) for number in (1, 2, 3)]
    sums = [layout.encode({"squares": in_sizes(part)}) for part in parts]
    assert not any(clipped for _, clipped in sums)
    small = sum(words[0] for words, _ in sums)
    large = sum(words[1] for words, _ in sums)
    found = total(layout.decode((small, large), 3)["squares"])
    np.testing.assert_allclose(found, np.sum(parts, 0), rtol=1e-7)


def test_what_is_beyond_all_sizes_is_noticed():
    with pytest.raises(InputError, match="a number of a sum must be finite and at most"):
        in_sizes(np.array([1e90]))


def test_columns_in_units_have_squares_of_at_most_one():
    squares = np.array([0.0, 1.0, 4.0, 1e-20, 7e18])
    found = units(squares)
    assert (squares / found**2 <= 1).all()
    assert (squares[1:] / found[1:] ** 2 > 0.2).all()
    assert (np.frexp(found)[0] == 0.5).all()
