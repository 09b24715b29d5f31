"""Two sides of a column compared by hand."""

import math

import numpy as np
import pytest
from scipy.stats import kstwobign

from fedmed_flower.statistics.comparison import CATEGORIES, KINDS, MISSING_VALUES, NUMBERS, Part
from fedmed_flower.statistics.drift import same_shares

BY_NAME = {kind.what: kind for kind in KINDS}


def table(names, counts, few=0, missing=0, weight=1.0):
    size = sum(counts) + few
    reported = {"n": size, "missing": missing, "names": names, "counts": counts, "few": few}
    return Part(reported, weight)


def numbers(edges, counts, weight=1.0, **more):
    reported = {"n": sum(counts), "missing": 0, "histogram": {"edges": edges, "counts": counts}}
    return Part(reported | more, weight)


def compare(what, one, others):
    return BY_NAME[what].compare(one, others)


def describe(what, one, others, where="elsewhere"):
    return BY_NAME[what].describe("x", one, others, where)


def test_numbers_by_hand():
    one = numbers([0.0, 1.0], [10, 20, 10])
    others = [numbers([0.0, 1.0], [5, 5, 10]), numbers([0.0, 1.0], [5, 5, 10])]
    found = compare(NUMBERS, [one], others)
    # Shares 1/4, 1/2, 1/4 against 1/4, 1/4, 1/2.
    assert found.figures["psi"] == pytest.approx(math.log(2) / 2)
    assert found.figures["ks"] == 0.25
    assert found.figures["p"] == pytest.approx(kstwobign.sf(0.25 * math.sqrt(20)))
    assert found.effect == found.figures["psi"]
    # Ten rows of each patient are one tenth of the evidence, and as far apart.
    tenth = [Part(part.reported, 0.1) for part in (one, *others)]
    fewer = compare(NUMBERS, tenth[:1], tenth[1:])
    assert fewer.figures["psi"] == found.figures["psi"]
    assert fewer.figures["p"] == pytest.approx(kstwobign.sf(0.25 * math.sqrt(2)))


def test_a_constant_column_is_compared_and_a_histogram_of_one_cell_is_not():
    spread = numbers([0.0, 1.0, 2.0], [10, 10, 10, 10])
    constant = numbers([0.0, 1.0], [0, 40, 0])
    assert compare(NUMBERS, [constant], [spread]).figures["ks"] == 0.5
    merged = numbers([], [40])
    assert compare(NUMBERS, [merged], [spread]) is None
    assert compare(NUMBERS, [spread], [merged, Part({"n": 9, "missing": 0}, 1.0)]) is None


def test_categories_by_hand():
    found = compare(CATEGORIES, [table(["f", "m"], [30, 70])], [table(["f", "m"], [140, 60])])
    expected = 0.4 * math.log(0.7 / 0.3) * 2
    assert found.figures["psi"] == pytest.approx(expected)
    assert found.figures["p"] == same_shares([30, 70], [140, 60])


@pytest.mark.parametrize(
    ("other", "cells"),
    [
        # Who has pooled none has no z.
        (table(["x", "y"], [50, 50]), ([50, 30, 20], [50, 50, 0])),
        # The few may be of z, or of y: x, and all else.
        (table(["x"], [50], few=50), ([50, 50], [50, 50])),
        (table(["x", "w"], [50, 30], few=20), ([50, 0, 50], [50, 30, 20])),
    ],
)
def test_only_known_counts_are_compared(other, cells):
    found = compare(CATEGORIES, [table(["x", "y", "z"], [50, 30, 20])], [other])
    assert found.figures["p"] == pytest.approx(same_shares(*cells))
    back = compare(CATEGORIES, [other], [table(["x", "y", "z"], [50, 30, 20])])
    assert back.effect == pytest.approx(found.effect)


def test_categories_go_that_the_fewest_others_know():
    """Two of three others know x, all know y: y and all else are compared with all three."""
    one = table(["rare", "x", "y"], [20, 40, 40])
    others = [table(["y"], [60], few=40), table(["x", "y"], [20, 60], few=20)]
    found = compare(CATEGORIES, [one], [*others, table(["x", "y"], [30, 50], few=20)])
    # x is known by two of three, which is half or more; then the first is left out.
    assert found.figures["p"] == pytest.approx(same_shares([40, 40, 20], [50, 110, 40]))
    found = compare(CATEGORIES, [one], [*others, others[0], others[0]])
    assert found.figures["p"] == pytest.approx(same_shares([40, 60], [240, 160]))


def test_without_a_category_that_both_know_nothing_is_compared():
    assert compare(CATEGORIES, [table(["x"], [50], 50)], [table(["y"], [50], 50)]) is None
    assert compare(CATEGORIES, [table([], [], 50)], [table(["y"], [50])]) is None
    untabulated = Part({"n": 50, "missing": 0}, 1.0)
    assert compare(CATEGORIES, [untabulated], [table(["y"], [50])]) is None


def test_missing_values_by_hand():
    one, other = Part({"n": 60, "missing": 40}, 1.0), Part({"n": 190, "missing": 10}, 0.5)
    found = compare(MISSING_VALUES, [one], [other])
    assert found.figures["difference"] == pytest.approx(0.4 - 0.05)
    assert found.figures["p"] == same_shares([60, 40], [95, 5])
    back = compare(MISSING_VALUES, [other], [one])
    assert back.figures["difference"] == -found.figures["difference"]
    assert back.effect == found.effect
    assert compare(MISSING_VALUES, [one], [Part({"n": 0, "missing": 0}, 1.0)]) is None


def test_texts():
    moments = {"mean": 5.0, "rest": 0.0, "m2": 36.0}
    one = numbers([1.0], [3, 2], **moments)
    others = [numbers([1.0], [3, 2], **moments | {"mean": mean}) for mean in (7.0, 9.0)]
    assert describe(NUMBERS, [one], others) == (
        "x has the mean 5 and the standard deviation 3; elsewhere the mean is 7 to 9 and the "
        "standard deviation 3"
    )
    bare = numbers([1.0], [3, 2])
    assert describe(NUMBERS, [bare], others) == "x is distributed otherwise than elsewhere"
    found = describe(
        CATEGORIES, [table(["f", "m"], [30, 70])], [table(["f"], [70], 30), table(["m"], [99], 1)]
    )
    assert found == "30% of x is 'f'; elsewhere 70%"
    unknown = describe(CATEGORIES, [table(["f"], [30], 70)], [table(["m"], [30], 70)])
    assert unknown == "x has other shares of categories than elsewhere"
    shares = [Part({"n": n, "missing": 100 - n}, 1.0) for n in (50, 98, 95)]
    assert describe(MISSING_VALUES, shares[:1], shares[1:]) == (
        "50% of x is missing; elsewhere 2% to 5%"
    )


def test_the_effect_is_the_same_from_both_sides():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sides = [
            numbers(sorted(rng.choice(20, 4, replace=False).tolist()), rng.integers(0, 30, 5))
            for _ in range(2)
        ]
        one, other = ([side] for side in sides)
        assert compare(NUMBERS, one, other).effect == pytest.approx(
            compare(NUMBERS, other, one).effect
        )
