import math
import pickle
from operator import add

import numpy as np
import pandas as pd
import pytest

from fedmed_flower.data.rows import Rows, TableRow, column_of


@pytest.fixture
def rows():
    return Rows(
        {
            "patient": np.array(["a", "b", "c"], object),
            "age": np.array([50.0, 61.0, math.nan]),
            "ill": np.array([0, 1, 1]),
            "sex": np.array(["f", None, "m"], object),
        }
    )


def test_rows_read_like_dicts(rows):
    assert rows[:2] == [
        {"patient": "a", "age": 50.0, "ill": 0, "sex": "f"},
        {"patient": "b", "age": 61.0, "ill": 1, "sex": None},
    ]
    second = [{"patient": "b", "age": 61.0, "ill": 1, "sex": None}]
    assert second == rows[1:2]
    assert rows != [*rows[:2]]
    assert rows[-1]["patient"] == "c"
    assert len(rows) == 3
    first = rows[0]
    assert [*first] == [*first.keys()] == ["patient", "age", "ill", "sex"]
    assert "age" in first
    assert "height" not in first
    assert first.get("height") is None
    assert dict(first) == {**first} == first | {} == {} | first
    assert first | {"age": 3} == {"patient": "a", "age": 3, "ill": 0, "sex": "f"}
    assert {"age": 3} | first == dict(first)
    assert repr(first) == "{'patient': 'a', 'age': 50.0, 'ill': 0, 'sex': 'f'}"
    with pytest.raises(KeyError, match="height"):
        first["height"]
    with pytest.raises(IndexError):
        rows[3]


def test_numbers_of_rows_are_those_of_python(rows):
    assert [type(value) for value in rows[0].values()] == [str, float, int, str]


def test_rows_cannot_be_changed(rows):
    with pytest.raises(TypeError, match="does not support item assignment"):
        rows[0]["age"] = 3.0


def test_a_row_is_the_same_object_each_time(rows):
    assert rows[1] is rows[1:][0] is [*rows][1] is Rows.of([*rows])[1]


def test_a_part_has_the_columns_of_its_rows(rows):
    assert rows.take([2, 0]).take([1]) == rows[:1]
    assert rows[::-1].column("age")[1:].tolist() == [61.0, 50.0]
    assert rows[1:][1:].column("patient").tolist() == ["c"]
    assert column_of(rows, "ill").tolist() == column_of([*map(dict, rows)], "ill") == [0, 1, 1]


def test_chosen_rows_have_columns_again(rows):
    chosen = Rows.of([rows[2], rows[0]])
    assert isinstance(chosen, Rows)
    assert chosen.column("patient").tolist() == ["c", "a"]
    other = Rows({"patient": np.array(["d"], object)})
    for mixed in (
        [rows[0], other[0]],
        [rows[0], {"patient": "d"}],
        [{"patient": "d"}, rows[0]],
        [],
    ):
        assert Rows.of(mixed) is mixed


def test_parts_of_one_table_are_joined_as_columns(rows):
    joined = Rows.joined([rows[2:], (), rows[:1]])
    assert isinstance(joined, Rows)
    assert joined.column("patient").tolist() == ["c", "a"]
    other = {"patient": "d"}
    assert Rows.joined([rows[:1], [other]]) == [rows[0], other]
    assert add(rows[:1], [other]) == [rows[0], other]
    assert add([other], rows[:1]) == [other, rows[0]]
    assert Rows.joined([(), rows[:1], ()]) == rows[:1]
    assert Rows.joined([(), ()]) == []


def test_what_is_made_of_a_column_is_made_once(rows):
    made = []

    def upper(text):
        made.append(text)
        return text.upper()

    assert rows[1:].mapped("patient", upper) == ["B", "C"]
    assert rows.mapped("patient", upper) == ["A", "B", "C"]
    assert made == ["a", "b", "c"]


def test_rows_can_be_pickled(rows):
    again = pickle.loads(pickle.dumps(rows))
    assert again[:2] == rows[:2]
    assert isinstance(pickle.loads(pickle.dumps(rows[0])), TableRow)


def test_rows_become_a_data_frame(rows):
    frame = pd.DataFrame(rows)
    assert frame["age"].tolist()[:2] == [50.0, 61.0]
    assert frame["sex"].tolist() == ["f", None, "m"]


def test_columns_have_one_length():
    with pytest.raises(ValueError, match=r"one length, got \[1, 2\]"):
        Rows({"a": np.zeros(1), "b": np.zeros(2)})
