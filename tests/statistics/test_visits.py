"""Patients with several rows: what their rows, looked at together, would tell of few patients."""

from itertools import product

import numpy as np
import pytest
from statistics_rows import ask, group, where, withheld
from tiny import says

from fedmed_flower.errors import DeclinedError
from fedmed_flower.statistics.fewest import fewest_left
from fedmed_flower.statistics.withheld import FEW

MINIMUM = 10


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hospital.answers"


def visits(missed, count=100):
    """Two visits of each patient, but only the first of those who have missed the other."""
    return [
        {"patient": number, "visit": visit, "age": 20 + number + number / 1000}
        for number in range(count)
        for visit in (1, 2)
        if visit == 1 or number not in missed
    ]


def test_who_has_missed_a_visit(path):
    """The age of the one patient is the sum over first visits less that over second ones."""
    first = ask(visits({7}), path, columns=("age",), **where("visit == 1"))
    second = ask(visits({7}), path, columns=("age",), **where("visit == 2"))
    assert [told["withheld"] for told in (first, second)] == [[["", "patients", FEW]]] * 2
    assert not ask(visits({7}), path, by="visit", categorical=("visit",))["groups"]
    assert group(ask(visits({7}), path, columns=("age",)))["rows"] == 199


@pytest.mark.parametrize("missed", [range(0), range(10)])
def test_nobody_or_enough_have(path, missed):
    told = ask(visits({*missed}), path, columns=("age",), by="visit", categorical=("visit",))
    assert [found["rows"] for found in told["groups"]] == [100, 100 - len(missed)]
    assert withheld(told) == []


def spread(*kinds):
    """Return classes and patients of rows, from (patients, rows of each in class 0, 1, ...)."""
    table = np.array([rows for count, *rows in kinds for _ in range(count)])
    places = np.indices(table.shape).reshape(2, -1)
    patient_of_row, classes = (np.repeat(place, table.ravel()) for place in places)
    return classes, patient_of_row


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (((99, 1, 1), (1, 1, 0)), 1),
        # All of them have as many rows in the one as in the other: nobody is told apart.
        (((40, 1, 1),), 40),
        (((40, 1, 2), (3, 2, 4)), 43),
        # Twice the first less the second.
        (((40, 1, 2), (3, 1, 1)), 3),
        (((40, 1, 2), (30, 1, 1)), 30),
        # The first less both others, and nobody of the fourth, which has its own patients.
        (((30, 1, 1, 0, 0), (30, 1, 0, 1, 0), (4, 1, 0, 0, 0), (50, 0, 0, 0, 1)), 4),
        # Other patients, more evenly spread, do not hide them.
        (((12, 1, 1, 0, 0), (7, 0, 1, 0, 0), (30, 0, 0, 1, 1), (25, 0, 0, 1, 0)), 7),
        (((9, 1), (9, 2)), 18),
        (((9, 1),), 9),
    ],
)
def test_the_smallest_sum_of_classes(kinds, expected):
    assert fewest_left(*spread(*kinds), MINIMUM) == expected


@pytest.mark.parametrize("seed", range(10))
def test_no_smaller_one_is_overlooked(seed):
    rng = np.random.default_rng(seed)
    kinds = [[int(rng.integers(1, 30)), *rng.integers(0, 3, 3)] for _ in range(4)]
    kinds = [kind for kind in kinds if sum(kind[1:])]
    table = np.repeat([kind[1:] for kind in kinds], [kind[0] for kind in kinds], axis=0)
    sizes = [np.count_nonzero(table @ sign) for sign in product((-2, -1, 0, 1, 2), repeat=3)]
    smallest = min(size for size in sizes if size)
    assert (fewest_left(*spread(*kinds), MINIMUM) < MINIMUM) == (smallest < MINIMUM)


def test_only_so_many_widths(path):
    """A width cuts as a condition does: asked often enough, it finds the value of a patient."""
    rows = [{"patient": n, "x": n % 30, "event": n % 2} for n in range(300)]

    def asked(**request):
        return ask(rows, path, most_compared=4, columns=("x",), **request)

    for width in (5.0, 5.5):
        asked(kinds=("histograms",), resolutions={"x": width})
    asked(survival=("x", "event", 30.0, 5.0))
    asked(by="x", by_width=10.0)
    text = (
        "all requests together may compare x with at most 4 values (conditions and cell widths), "
        "and these are used up: use values of earlier requests"
    )
    for request in (
        {"kinds": ("histograms",), "resolutions": {"x": 6.0}},
        {"survival": ("x", "event", 30.0, 6.0)},
        {"by": "x", "by_width": 6.0},
        where("x > 6"),
    ):
        with pytest.raises(DeclinedError, match=says(text)):
            asked(**request)
    # Those before may be used again.
    assert group(asked(kinds=("histograms",), resolutions={"x": 5.0}))


def test_what_is_too_much_to_search_counts_as_nobody():
    """10,001 patients times 1,000 classes that each share a patient with the next."""
    patients = np.arange(10_001)
    classes = (patients[:, None] + [0, 1]).ravel() % 1000
    assert fewest_left(classes, np.repeat(patients, 2), 2) == 0.0
