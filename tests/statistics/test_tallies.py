"""Which numbers of a hospital's answer are added up, worked out by hand."""

import numpy as np
import pytest
from statistics_rows import ask, make_patients

from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.tallies import (
    CATEGORICAL,
    CATEGORY,
    EDGE,
    NUMERIC,
    PAIR,
    REST,
    ROWS,
    about,
    counts,
    edges_of,
    keys_of,
    squares,
    told,
)


def answer(**more):
    group = {"name": "", "start": None, "rows": 100, "patients": 90, "numeric": {}}
    group |= {"categorical": {}, "correlations": [], "pairs": []} | more
    return {"groups": [group], "withheld": []}


def table(names, numbers, few=0, missing=3):
    part = {"n": sum(numbers) + few, "missing": missing}
    return part | {"names": names, "counts": numbers, "few": few}


def told_of(request, reported):
    return dict(zip(keys_of(request), told(reported, request).tolist(), strict=True))


SEX = Request(columns=("sex",), categories={"sex": ("f", "m", "x")})
EVERYTHING = np.ones(6, bool)


@pytest.mark.parametrize(
    ("part", "tells", "numbers"),
    [
        # A category that nobody has is told as none, if no small ones are pooled.
        (table(["f", "m"], [60, 30]), [1, 0, 1, 1, 1], [90, 3, 60, 30, 0]),
        (table(["f", "m"], [60, 20], few=10), [1, 1, 1, 1, 0], [90, 3, 60, 20, 0]),
        (table(["f", "z"], [60, 30]), [1, 1, 1, 1, 1], [90, 3, 60, 0, 0]),
        (None, [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_categories(part, tells, numbers):
    reported = answer(categorical={} if part is None else {"sex": part})
    kinds = [key.kind for key in keys_of(SEX)]
    assert kinds == [ROWS, CATEGORICAL, REST, CATEGORY, CATEGORY, CATEGORY]
    assert told(reported, SEX).tolist() == [1, *tells]
    assert counts(reported, SEX, EVERYTHING).tolist() == [100, 90, *numbers]


def test_what_is_not_asked_for_adds_nothing():
    reported = answer(categorical={"sex": table(["f", "m"], [60, 30])})
    asked = np.array([False, True, False, True, False, False])
    assert counts(reported, SEX, asked).tolist() == [0, 0, 90, 3, 60, 0, 0]


def test_an_answer_without_a_group_adds_nothing():
    nothing = {"groups": [], "withheld": []}
    assert not told(nothing, SEX).any()
    assert not counts(nothing, SEX, EVERYTHING).any()


def test_a_table_with_another_category_is_not_told():
    request = Request(
        columns=("sex",),
        categories={"sex": ("f", "m"), "ward": ("a", "b")},
        pairs=(("sex", "ward"),),
    )
    part = {"columns": ["sex", "ward"], "rows": ["m"], "across": ["a", "b"], "counts": [[4, 5]]}
    key = keys_of(request)[-1]
    assert key.kind == PAIR
    assert told_of(request, answer(pairs=[part]))[key] == 1
    found = counts(answer(pairs=[part]), request, np.ones(len(keys_of(request)), bool))
    assert found[-4:].tolist() == [0, 0, 4, 5]
    assert told_of(request, answer(pairs=[part | {"across": ["a", "c"]}]))[key] == 0


def test_moments_are_about_any_centre(tmp_path):
    rows = make_patients(200)
    kinds = ("moments", "correlations")
    request = Request(columns=("age", "lab"), kinds=kinds)
    reported = ask(rows, tmp_path / "book", columns=("age", "lab"), kinds=kinds)
    known = [row for row in rows if row["lab"] is not None]
    samples = [
        np.array([row["age"] for row in rows], float),
        np.array([row["lab"] for row in known]),
        np.array([row["age"] for row in known], float),
        np.array([row["lab"] for row in known]),
    ]
    centres = np.array([40.0, 1e6, 41.0, 1e6 + 1])
    units = np.array([2.0, 8.0, 4.0, 0.5])
    asked = np.ones(len(keys_of(request)), bool)
    sums, second, products = about(reported, request, asked, centres, units)
    away = [(s - c) / u for s, c, u in zip(samples, centres, units, strict=True)]
    np.testing.assert_allclose(sums, [a.sum() for a in away], rtol=1e-9)
    np.testing.assert_allclose(second, [a @ a for a in away], rtol=1e-9)
    np.testing.assert_allclose(products, [away[2] @ away[3]], rtol=1e-8)
    np.testing.assert_allclose(squares(reported, request, asked), [s @ s for s in samples])


def test_values_below_an_edge_are_told_where_they_are_known():
    request = Request(
        columns=("age",),
        kinds=("histograms",),
        ranges={"age": (0.0, 40.0)},
        resolutions={"age": 10.0},
    )
    assert edges_of(request, "age") == [0.0, 10.0, 20.0, 30.0, 40.0]
    # Cells below 10, from 10 to 30, in which 20 divides, and above; nobody is below 10.
    histogram = {"edges": [10.0, 30.0], "counts": [0, 50, 40]}
    part = {"n": 90, "missing": 0, "histogram": histogram}
    edges = {
        key.category: number
        for key, number in told_of(request, answer(numeric={"age": part})).items()
        if key.kind == EDGE
    }
    assert edges == {"0.0": 1, "10.0": 1, "20.0": 0, "30.0": 1, "40.0": 0}
    everything = np.ones(7, bool)
    found = counts(answer(numeric={"age": part}), request, everything)
    assert found.tolist() == [100, 90, 90, 0, 0, 0, 0, 50, 0]
    # Nobody has a value: all is known, and the column is told with its edges.
    empty = told_of(request, answer(numeric={"age": {"n": 0, "missing": 90}}))
    assert set(empty.values()) == {1}
    assert [key.kind for key in empty][:2] == [ROWS, NUMERIC]
