import math
from datetime import date

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from statistics_rows import ask

from fedmed_flower.data.rows import Rows
from fedmed_flower.data.schema import Schema
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.request import KINDS, Request
from fedmed_flower.statistics.values import coded, text_of

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(10**5000),
    st.floats(),
    st.sampled_from(["", " a", "a", "1", "1.0", "01", "nan", "?", "it's", "é", "1e3"]),
    st.just(date(2020, 1, 2)),
)


@settings(max_examples=300)
@given(st.lists(values, max_size=12))
@example([1, 1.0, True, "1", "1.0", "01"])
@example([0.0, -0.0, math.nan, None, math.inf])
def test_values_have_the_category_of_each_alone(cells):
    codes, texts = coded(cells)
    with_none = [*texts, None]
    assert [with_none[code] for code in codes] == [text_of(cell) for cell in cells]
    assert len({*texts}) == len(texts)


@settings(max_examples=200)
@given(st.lists(st.floats(), max_size=12))
@example([0.0, -0.0, math.nan, math.inf, 1e300, 2.0, 0.1])
def test_numbers_of_a_table_have_the_category_of_each_alone(cells):
    codes, texts = coded(np.array(cells, float))
    with_none = [*texts, None]
    assert [with_none[code] for code in codes] == [text_of(cell) for cell in cells]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            *[st.sampled_from([None, "a", "it's", 'a "b"', "é", "\\", "'a' \"b\""])] * 2,
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_identities_are_texts_of_the_values(cells, with_missing):
    rows = [{"patient": n, "c": one, "d": two} for n, (one, two) in enumerate(cells)]
    columns = Columns(rows, Request(categorical=("c", "d")))
    for names in (("c",), ("c", "d")):
        codes, texts = columns.identities([(name,) for name in names], with_missing)
        for row, code in zip(rows, codes, strict=True):
            parts = tuple(None if row[n] is None else ascii((row[n],)) for n in names)
            if None in parts and not with_missing:
                assert code == -1
            else:
                assert texts[code] == ascii(parts)


@pytest.fixture(params=[1, 3])
def table(request):
    """300 rows of a table with one or three rows a patient."""
    rng = np.random.default_rng(0)
    return Rows(
        {
            "patient": np.array([f"p{n // request.param}" for n in range(300)], object),
            "age": rng.integers(20, 90, 300).astype(float),
            "lab": np.where(rng.random(300) < 0.2, np.nan, rng.normal(5, 2, 300)),
            "sex": rng.choice(np.array(["f", "m", None], object), 300, p=[0.5, 0.4, 0.1]),
            "ill": rng.integers(0, 2, 300),
        }
    )


def test_rows_of_a_table_are_answered_like_dicts(table, tmp_path):
    schema = Schema("ill", "binary", numeric=("age", "lab"), categorical=("sex",))
    asked = {
        "kinds": KINDS,
        "resolutions": {"age": 5.0, "lab": 0.5},
        "pairs": (("sex", "ill"),),
        "by": "ill",
    }
    answers = [
        ask(rows, tmp_path / f"{number}.answers", schema=schema, **asked)
        for number, rows in enumerate((table, [*map(dict, table)]))
    ]
    assert answers[0] == answers[1]
    assert answers[0]["groups"][0]["numeric"]["age"]["histogram"]


def test_rows_of_a_table_are_recognised_as_dicts_later(table, tmp_path):
    """What was answered about a table counts when the same rows come as dicts, and the reverse."""
    for one, other in ((table, [*map(dict, table)]), ([*map(dict, table)], table)):
        path = tmp_path / f"{type(one).__name__}.answers"
        first = ask(one, path, columns=("age", "sex"))
        assert ask(other[5:], path, columns=("age", "sex")) != first
        assert ask(other, path, columns=("age", "sex")) == first
