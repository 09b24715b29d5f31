"""Moments by sums are those of all hospitals' contributions merged one by one."""

import numpy as np
import pytest
from tables import SCHEMA, patients

from fedmed_flower.data import summed
from fedmed_flower.data.preparation import MOMENTS, Preparation, contribution

COLUMNS = ("age", "pressure")


def contributions(count, scale=1.0, shift=0.0):
    """Return what hospitals contribute, their columns in other units."""
    made = []
    for site in range(count):
        rows = [
            row | {name: row[name] * scale + shift for name in COLUMNS}
            for row in patients(20 + 7 * site, site)
        ]
        made.append(contribution(rows, SCHEMA, 1))
    return made


def by_sums(made):
    """Return the moments of all contributions, as three sums give them."""

    def added(names, means):
        parts = [summed.added(each, COLUMNS, means) for each in made]
        return {name: np.sum([np.atleast_1d(part[name]) for part in parts], 0) for name in names}

    of_means = added([part.name for part in summed.parts_of_means(COLUMNS)], {})
    means = {column: summed.mean_of(of_means, column) for column in COLUMNS}
    squares = added([part.name for part in summed.parts_of_squares(COLUMNS)], means)
    return summed.moments(of_means | squares, means)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-25, 0), (1e25, 0), (1.0, 1e6)])
@pytest.mark.parametrize("count", [1, 4])
def test_moments_are_the_merged_ones(count, scale, shift):
    made = contributions(count, scale, shift)
    found = Preparation.agreed(SCHEMA, {"all": by_sums(made)})
    merged = Preparation.agreed(SCHEMA, {str(n): each for n, each in enumerate(made)})
    for column in COLUMNS:
        assert found.means[column] == pytest.approx(merged.means[column], rel=1e-13)
        # A mean is rounded where it is much larger than the spread.
        room = 1e-13 if not shift else 1e-9
        assert found.scales[column] == pytest.approx(merged.scales[column], rel=room)
    assert found.still == merged.still == ()


def test_a_column_that_is_the_same_everywhere_is_found_to_be():
    rows = [row | {"age": 71.3} for row in patients(40, 0)]
    found = by_sums([contribution(rows, SCHEMA, 1)] * 3)
    assert Preparation.agreed(SCHEMA, {"all": found}).still == ("age",)


def test_a_column_that_is_not_told_adds_nothing():
    (made,) = contributions(1)
    del made[MOMENTS + "age"]
    parts = summed.added(made, COLUMNS, {"age": 50.0})
    assert parts["told age"] == parts["number age"] == 0
    assert not any(parts["sum age"] + parts["squares age"])
    assert parts["told pressure"] == 1
    assert parts["number pressure"] == made[MOMENTS + "pressure"][0]
    # Squares are of columns alone of which the mean is known.
    assert "squares pressure" not in parts
