"""Who is better served by a model: by hand, and with chances worked out by statsmodels."""

import math

import pytest
from statsmodels.stats.proportion import confint_proportions_2indep

from fedmed_flower.metrics.counts import counted
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.reports.worth import ALONE, FEDERATED, Chance, chance_of, gain, in_words, sides


def test_sides_are_ordered_by_size_and_a_change_below_three_digits_is_on_neither():
    changes = {"a": 0.01, "b": -0.2, "c": 0.3, "d": 0.0004, "e": -0.1}
    assert sides(changes, "auc") == (["c", "a"], ["b", "e"], ["d"])
    assert sides(changes, "loss") == (["b", "e"], ["c", "a"], ["d"])


@pytest.mark.parametrize("rows", [20, 100, 400])
def test_chance_of_an_accuracy_is_that_of_two_shares(rows):
    chance = Chance("accuracy", {"north": (rows,)})
    low, high = confint_proportions_2indep(
        round(0.9 * rows), rows, round(0.8 * rows), rows, method="newcomb", compare="diff"
    )
    assert chance.explains("north", 0.9, 0.8) == (low <= 0 <= high)
    assert chance.explains("north", 0.8, 0.9) == (low <= 0 <= high)
    assert chance.explains("north", 0.8, 0.8) is True


def test_chance_is_not_known_of_other_metrics_nor_without_counts():
    summary = {"test": {"sites": {"north": {"dice": 0.8, "auc": 0.8, "num-examples": 99}}}}
    assert chance_of(summary, None, "dice").rows == {}
    assert chance_of(summary, None, "auc").rows == {}
    assert chance_of(summary, None, "accuracy").rows == {"north": (99.0,)}
    assert Chance("auc", {}).explains("north", 0.9, 0.1) is None
    for odd in (-0.1, 1.1, math.nan):
        assert Chance("auc", {"north": (5, 5)}).explains("north", odd, 0.5) is None


def test_rows_of_each_class_are_counted_if_all_may_be_known():
    labels = [1] * 20 + [0] * 40
    scores = [0.1 * row - 3 for row in range(60)]
    records = {way: outcome_metrics("binary", labels, scores, coarse=way) for way in (False, True)}
    exact, coarse = (counted({"north": each}, ("well", "ill")) for each in records.values())
    assert chance_of({}, exact, "auc").rows == {"north": (20, 40)}
    # Such a hospital keeps its confusion counts to itself if one is small.
    assert chance_of({}, coarse, "auc").rows == {}
    noised = {"test": {"sites": {"north": {}}}}
    noised["sent"] = {"evaluate": {"north": ["metrics.noised-counts"]}}
    assert chance_of(noised, exact, "auc").rows == {}


def made(main="auc", rows=(200, 200)):
    alone = {"a": 0.7, "b": 0.9, "c": 0.80, "d": 0.6, "e": 0.5}
    federated = {"a": 0.9, "b": 0.7, "c": 0.81, "d": 0.7}
    known = dict.fromkeys("abc", rows)
    return gain(FEDERATED, federated, ALONE, alone, Chance(main, known))


def test_a_difference_that_chance_explains_is_no_gain():
    found = made()
    assert found.changes == pytest.approx({"a": 0.2, "b": -0.2, "c": 0.01, "d": 0.1})
    assert found.known == (["a"], ["b"], ["c"])
    assert found.unknown == (["d"], [], [])
    # On three records of each kind nothing is told.
    assert made(rows=(3, 3)).known == ([], [], ["a", "b", "c"])


def test_it_is_said_in_words():
    assert in_words(made()) == (
        "1 of 3 hospitals is better served by the federated "
        "model than by one trained on their own records alone (a +0.200); 1 is worse served "
        "(b −0.200), and at 1 the difference is no more than chance can make. The federated model "
        "is better at 1 of 1 hospital (d +0.100) and worse at none than one trained on their own "
        "records alone; how much of this is chance is not known."
    )
    assert in_words(made(rows=(3, 3)), named=False).startswith(
        "At 3 of 3 hospitals the difference between the federated model and one trained on their "
        "own records alone is no more than chance can make. The federated model is better at 1 "
    )
    lower = gain(FEDERATED, {"a": 0.5}, ALONE, {"a": 0.7}, Chance("loss", {}))
    assert in_words(lower) == (
        "The federated model is better at 1 of 1 hospital (a −0.200) and worse at none than "
        "one trained on their own records alone; how much of this is chance is not known."
    )


def test_many_hospitals_are_not_all_named():
    many = {f"h{number}": 0.9 for number in range(20)}
    found = gain(FEDERATED, many, ALONE, dict.fromkeys(many, 0.5), Chance("auc", {}))
    assert in_words(found).count("+0.400") == 8
    assert ", …)" in in_words(found)
    assert gain(FEDERATED, {"a": 1.0}, ALONE, {"b": 1.0}, Chance("auc", {})) is None
