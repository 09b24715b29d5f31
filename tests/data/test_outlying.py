import math

import numpy as np
import pytest

from fedmed_flower.data.outlying import outlying, without_column
from fedmed_flower.data.preparation import contribution
from fedmed_flower.data.schema import Schema

SCHEMA = Schema("ill", "binary", numeric=("age", "creatinine"), categorical=("sex",))
SITES = {"east": 120, "north": 200, "south": 80, "west": 150}


def patients(count, rng):
    """Ages are normal, creatinine has a long tail, two of three patients are men."""
    return [
        {
            "patient": f"{number}",
            "age": float(rng.normal(60, 12)),
            "creatinine": float(rng.lognormal(0, 0.6)),
            "sex": "M" if rng.random() < 0.67 else "F",
        }
        for number in range(count)
    ]


def tables(seed, sites=SITES):
    rng = np.random.default_rng(seed)
    return {site: patients(count, rng) for site, count in sites.items()}


def named(rows, schema=SCHEMA):
    contributions = {site: contribution(each, schema, 10) for site, each in rows.items()}
    counts = {site: len(each) for site, each in rows.items()}
    return outlying(contributions, schema, counts)


def changed(rows, site, column, change):
    rows[site] = [
        row | {column: change(row[column], number)} for number, row in enumerate(rows[site])
    ]
    return rows


def test_hospitals_that_differ_by_chance_alone_are_not_named():
    assert [named(tables(seed)) for seed in range(200)] == [[]] * 200


@pytest.mark.parametrize("count", [3, 10])
@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("age", lambda value, number: 1e9 if number == 7 else value),
        ("age", lambda value, number: value * 10),
        ("age", lambda value, number: value / 10),
        ("creatinine", lambda value, number: value * 88.4),
        ("age", lambda value, number: math.nan if number % 10 < 3 else value),
        ("sex", lambda value, number: {"M": "F", "F": "M"}[value]),
    ],
)
def test_a_hospital_that_stands_out_is_named_with_its_column(count, column, change):
    for seed in range(10):
        rows = tables(seed, {f"site {number}": 150 for number in range(count)})
        (one,) = named(changed(rows, "site 1", column, change))
        assert (one.site, one.column) == ("site 1", column)


def test_the_text_says_how_it_differs():
    def rows(ages):
        # Deviations of -10, 0, 10: a standard deviation of 10 for 3 values, in 4 copies 8.6.
        return [
            {"patient": f"{number}", "age": age, "creatinine": 1.0 + number % 2, "sex": sex}
            for number, (age, sex) in enumerate(ages)
        ]

    ages = [(50.0, "M"), (60.0, "M"), (70.0, "F")] * 4
    older = [(age + 6, sex) for age, sex in ages]
    months = [(age * 12, sex) for age, sex in ages]
    schema = Schema("ill", "binary", numeric=("age", "creatinine"))
    (one,) = named({"a": rows(ages), "b": rows(older), "c": rows(months)}, schema)
    assert one == (
        "c",
        "age",
        "age has the mean 720 and the standard deviation 102.3; at the other hospitals the means "
        "are 60 to 66 and the standard deviations 8.528 to 8.528: perhaps another unit, a code of "
        "missing values, or a typing error. A range that the schema declares for it makes values "
        "outside missing",
    )


def test_two_that_are_wrong_in_one_column_are_both_named():
    rows = changed(tables(0), "east", "age", lambda value, number: 1e9 if number == 7 else value)
    rows = changed(rows, "south", "age", lambda value, _: value * 12)
    assert [one.site for one in named(rows)] == ["east", "south"]


def test_with_two_hospitals_nobody_knows_which_is_wrong():
    rows = tables(0, {"east": 100, "west": 100})
    assert named(changed(rows, "west", "age", lambda value, _: value * 12)) == []


def test_a_column_that_others_have_is_named_where_it_is_missing():
    lacking = {"south": ["weight"], "east": ["height"]}
    empty = {"south": ["age"], "east": ["weight"], "north": ["weight"]}
    assert without_column(lacking, empty, ["east", "north", "south", "west"]) == [
        ("east", "height", "its table has no column height; 3 of 3 other hospitals have values"),
        (
            "east",
            "weight",
            "weight has no value in any row: perhaps it is written in another way; 1 of 3 other "
            "hospitals have values",
        ),
        (
            "north",
            "weight",
            "weight has no value in any row: perhaps it is written in another way; 1 of 3 other "
            "hospitals have values",
        ),
        ("south", "weight", "its table has no column weight; 1 of 3 other hospitals have values"),
        (
            "south",
            "age",
            "age has no value in any row: perhaps it is written in another way; 3 of 3 other "
            "hospitals have values",
        ),
    ]
    # Nobody stands out in what nobody has.
    assert without_column({}, {"a": ["x"], "b": ["x"]}, ["a", "b"]) == []
    assert without_column({}, {"a": ["x"]}, ["a"]) == []


def test_a_hospital_that_reports_no_value_is_named_without_a_share():
    rows = tables(0)
    gone = changed(rows, "south", "age", lambda value, number: value if number < 9 else math.nan)
    (one,) = named(gone)
    assert one[:2] == ("south", "age")
    assert one.text == (
        "too few of its patients have a value of age to report any; at the other hospitals at most "
        "0% is missing"
    )


def test_what_cannot_be_used_or_never_varies_elsewhere_is_not_compared():
    contributions = {
        "a": {"moments age": [20, 0.0, 0.0]},
        "b": {"moments age": [20, 0.0, 0.0]},
        "c": {"moments age": [20, 5.0, 80.0]},
        "d": {"moments age": ["x", 0, 0]},
        "e": {},
    }
    assert outlying(contributions, Schema("ill", "binary", numeric=("age",)), {}) == []
