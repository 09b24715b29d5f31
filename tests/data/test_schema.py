import csv
import gzip
import math
import pickle
import re
import sys
from dataclasses import replace
from datetime import date
from decimal import Decimal
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.data.cells import MISSING, category_text
from fedmed_flower.data.datalist import split_patients
from fedmed_flower.data.schema import Schema, empty_columns, read_table, table_of
from fedmed_flower.data.site import SiteData, require_patients

HEART = Schema("ill", "binary", numeric=("age", "chol"), categorical=("sex",))
NUMBER = Schema("y", "continuous", numeric=("x",))


def written(folder, text, name="t.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder, text, schema, **options):
    """Read a text; of the problems the file's name is left out."""
    path = written(folder, text)
    table = read_table(path, schema, **options)
    assert all(problem.startswith(f"{path}: ") for problem in table.problems)
    return table.rows, table.rejected, [one.split(": ", 1)[1] for one in table.problems]


def column(rows, name):
    return [row[name] for row in rows]


def test_a_table_becomes_rows(tmp_path):
    text = "patient,age,chol,sex,ill,ward\nA,63,2.5,1,1,x\n B , 41 ,, 0,0,y\n"
    rows, rejected, problems = read(tmp_path, text, HEART)
    assert rows[0] == {"patient": "A", "age": 63.0, "chol": 2.5, "sex": "1", "ill": 1}
    assert rows[1].items() >= {"patient": "B", "age": 41.0, "sex": "0", "ill": 0}.items()
    assert math.isnan(rows[1]["chol"])
    assert isinstance(rows[0]["ill"], int)
    assert (rejected, problems) == (0, [])


@pytest.mark.parametrize("name", ["t.csv.gz", "t.txt", "t.tsv"])
def test_texts_of_all_kinds_give_the_same_rows(tmp_path, name):
    text = "patient;age;chol;sex;ill\nA;63,5;2,5;1,2;1\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    wanted = {"patient": "A", "age": 63.5, "chol": 2.5, "sex": "1,2", "ill": 1}
    assert read_table(path, HEART).rows == [wanted]
    path = written(tmp_path, text.replace(",", ".").replace(";", "\t"))
    assert read_table(path, HEART).rows == [wanted | {"sex": "1.2"}]


def test_a_byte_order_mark_and_quotes_with_line_breaks(tmp_path):
    text = '\ufeffpatient,age,chol,sex,ill\n"A,\nA",1,1,0,1\nB,1,x,0,1\n'
    rows, _, problems = read(tmp_path, text, HEART)
    assert column(rows, "patient") == ["A,\nA", "B"]
    assert problems == [
        "chol is not a number in 1 row, counted as missing; the first is line 4 with 'x'"
    ]


def test_parquet_gives_the_same_rows_as_a_text(tmp_path):
    frame = pd.DataFrame(
        {
            "patient": ["A", "B", "C"],
            "age": pd.array([63, None, 41], dtype="Int64"),
            "chol": np.float32([2.5, np.inf, np.nan]),
            "sex": [True, False, None],
            "ill": pd.Categorical([1.0, 0.0, 1.0]),
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    frame.set_index("patient").to_parquet(tmp_path / "indexed.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    for name, word, first in (("t.parquet", "row", 2), ("t.csv", "line", 3)):
        table = read_table(tmp_path / name, HEART)
        assert table.problems == (
            f"{tmp_path / name}: chol is beyond 1e+30 in 1 row, counted as missing; the first is "
            f"{word} {first} with 'inf'",
        )
        assert column(table.rows, "sex") == ["1", "0", None]
        assert column(table.rows, "ill") == [1, 0, 1]
        assert repr(column(table.rows, "age")) == "[63.0, nan, 41.0]"
        assert repr(column(table.rows, "chol")) == "[2.5, nan, nan]"
    indexed = read_table(tmp_path / "indexed.parquet", HEART)
    assert column(indexed.rows, "patient") == ["A", "B", "C"]


def test_a_frame_is_left_as_it_was_and_its_index_does_not_count():
    frame = pd.DataFrame({"patient": [7, 7.0], "x": [1, 2], "y": ["3", "?"]}, index=[5, 5])
    before = frame.copy()
    table = table_of(frame, NUMBER, "stays")
    assert table.rows == [{"patient": "7", "x": 1.0, "y": 3.0}]
    assert table.rejected == 1
    assert table.problems == ("stays: target y is missing in 1 row, rejected; the first is row 2",)
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(one, "1") for one in (1, 1.0, "1", " 1 ", "1.0", True, "True", "TRUE", np.int8(1))],
        *[(one, "1") for one in (np.float32(1), np.bool_(True), Decimal("1.0"))],
        *[(one, "0") for one in (0, -0.0, False, "false", "0.0")],
        *[(one, None) for one in (None, math.nan, np.float32("nan"), "", "  ")],
        *[("01", "01"), ("250.00", "250.00"), (2.5, "2.5"), (-3.0, "-3"), ("F", "F")],
        *[(1e20, "100000000000000000000"), (math.inf, "inf"), ("-3.0", "-3"), ("1.0.0", "1.0.0")],
    ],
)
def test_one_category_has_one_text(value, text):
    assert category_text(value) == text


def test_bands_have_their_lower_end(tmp_path):
    schema = Schema("y", "continuous", ("age", "x"), bands={"age": (50, 65), "x": (2.5,)})
    text = "patient,age,x,y\nA,49.9,2.4,1\nB,50,2.5,1\nC,64,,1\nD,65,9,1\nE,?,9,1\n"
    rows, _, _ = read(tmp_path, text, schema)
    assert column(rows, "age-band") == ["<50", "50-65", "50-65", ">=65", None]
    assert column(rows, "x-band") == ["<2.5", ">=2.5", None, ">=2.5", ">=2.5"]


def test_values_outside_the_plausible_range_are_missing_and_told(tmp_path):
    schema = replace(HEART, ranges={"age": (0, 120)}, bands={"age": (50,)})
    text = "patient,age,chol,sex,ill\nA,120,1,1,1\nB,-1,1,1,0\nC,999,1,1,0\nD,0,1,1,0\n"
    rows, rejected, problems = read(tmp_path, text, schema)
    assert repr(column(rows, "age")) == "[120.0, nan, nan, 0.0]"
    assert column(rows, "age-band") == [">=50", None, None, "<50"]
    assert rejected == 0
    assert problems == [
        "age is outside 0 to 120 in 2 rows, counted as missing; the first is line 3 with '-1'"
    ]


def test_a_column_mostly_outside_its_range_may_be_of_another_unit(tmp_path):
    schema = replace(HEART, ranges={"chol": (20, 1500)})
    heading = "patient,age,chol,sex,ill\n"
    most = f"{heading}A,1,0.9,1,1\nB,1,1.1,1,0\nC,1,99,1,0\nD,1,,1,0\n"
    told = (
        "chol is outside 20 to 1500 in 2 rows, counted as missing; the first is line 2 with '0.9'"
    )
    advice = ": perhaps they are of another unit: convert them, or correct the range of 'chol'"
    assert read(tmp_path, most, schema)[2] == [told + advice]
    half = f"{heading}A,1,0.9,1,1\nB,1,1.1,1,0\nC,1,99,1,0\nD,1,88,1,0\n"
    assert read(tmp_path, half, schema)[2] == [told]


def test_a_category_that_is_not_declared_is_kept_and_told(tmp_path):
    schema = replace(HEART, categories={"sex": ("f", "m")}, codes={"sex": {"W": "f"}})
    text = "patient,age,chol,sex,ill\nA,1,1,W,1\nB,1,1,F,0\nC,1,1,,0\nD,1,1,M,0\nE,1,1,m,0\n"
    rows, rejected, problems = read(tmp_path, text, schema)
    assert column(rows, "sex") == ["f", "F", None, "M", "m"]
    assert rejected == 0
    assert problems == [
        "sex is not one of f, m in 2 rows, counted as none of them; the first is line 3 with 'F': "
        "write it as one of them, or declare it in categories or codes of 'sex'"
    ]


def test_a_fraction_in_a_column_of_whole_numbers_is_missing_and_told(tmp_path):
    schema = replace(HEART, whole=("chol",), ranges={"chol": (0, 9)})
    text = "patient,age,chol,sex,ill\nA,1.5,2.0,1,1\nB,1,2.5,1,0\nC,1,,1,0\nD,1,99.5,1,0\n"
    rows, rejected, problems = read(tmp_path, text, schema)
    assert repr(column(rows, "chol")) == "[2.0, nan, nan, nan]"
    assert column(rows, "age") == [1.5, 1, 1, 1]
    assert rejected == 0
    assert problems == [
        "chol is outside 0 to 9 in 1 row, counted as missing; the first is line 5 with '99.5'",
        "chol is not a whole number in 1 row, counted as missing; the first is line 3 with '2.5'",
    ]


def test_a_fraction_in_a_target_of_whole_numbers_is_rejected(tmp_path):
    schema = replace(NUMBER, whole=("y",))
    rows, rejected, problems = read(tmp_path, "patient,x,y\nA,1,10\nB,1,1.5\n", schema)
    assert (column(rows, "y"), rejected) == ([10.0], 1)
    assert problems == [
        "target y is not a whole number in 1 row, rejected; the first is line 3 with '1.5'"
    ]


def test_texts_and_infinite_values_in_a_numeric_column(tmp_path):
    cells = ["3", "abc", "1_000", "inf", "-1e40", "true", "?", "n/a", "", "1e3", "4,5"]
    text = "patient\tx\ty\n" + "".join(f"A\t{cell}\t1\n" for cell in cells)
    rows, rejected, problems = read(tmp_path, text, NUMBER)
    nan = math.nan
    wanted = [3, nan, nan, nan, nan, 1, nan, nan, nan, 1000, nan]
    np.testing.assert_array_equal(column(rows, "x"), wanted)
    assert rejected == 0
    assert problems == [
        "x is not a number in 3 rows, counted as missing; the first is line 3 with 'abc'",
        "x is beyond 1e+30 in 2 rows, counted as missing; the first is line 5 with 'inf'",
    ]


def test_what_is_no_number_in_a_frame():
    cells = [date(2020, 1, 1), [1, 2], 1 + 2j, 10**400, Decimal("1.5"), pd.NA, pd.NaT, None]
    frame = pd.DataFrame({"patient": "A", "x": pd.Series(cells, dtype=object), "y": 1.0})
    table = table_of(frame, NUMBER, "t")
    np.testing.assert_array_equal(column(table.rows, "x"), [*[math.nan] * 4, 1.5, *[math.nan] * 3])
    assert table.problems == (
        "t: x is not a number in 4 rows, counted as missing; the first is row 1 with '2020-01-01'",
    )
    dates = frame.assign(x=pd.to_datetime("2020-01-01"))
    assert "x is not a number in 8 rows" in table_of(dates, NUMBER, "t").problems[0]


def test_codes_of_missing_values(tmp_path):
    text = "patient,age,chol,sex,ill\nA,-9,-9.0,-9,1\nB,1,NA,none,0\nC,2,3,dk,\n"
    rows, rejected, problems = read(tmp_path, text, HEART, missing=("-9", "NA", "NONE"))
    assert repr(column(rows, "age") + column(rows, "chol")) == "[nan, 1.0, nan, nan]"
    assert column(rows, "sex") == [None, None]
    # Nothing always stands for a missing value.
    assert rejected == 1
    assert problems == [
        "target ill is missing in 1 row, rejected; the first is line 4",
        "chol has no value in any row",
        "sex has no value in any row",
    ]


def test_a_declared_category_is_not_missing(tmp_path):
    schema = Schema(
        "y",
        "multi-class",
        categorical=("drug", "other"),
        categories={"drug": ("None", "A")},
        classes=("NA", "EU"),
    )
    text = "patient,drug,other,y\nA,None,None,EU\nB,none,A,NA\n"
    rows, _, _ = read(tmp_path, text, schema)
    assert column(rows, "drug") == ["None", None]
    assert column(rows, "other") == [None, "A"]
    assert column(rows, "y") == [1, 0]


def test_a_feature_that_is_not_there_is_missing(tmp_path):
    text = "patient,AGE,sex,ill\nA,3,1,1\n"
    rows, rejected, problems = read(tmp_path, text, HEART)
    assert math.isnan(rows[0]["age"])
    assert rejected == 0
    assert problems == [
        "there is no column 'age' (near: 'AGE'): counted as missing in all rows",
        "there is no column 'chol': counted as missing in all rows",
    ]


def test_columns_that_must_be_there(tmp_path):
    path = written(tmp_path, "pid,Age,Chol,gender,Ill\nA,3,1,1,1\n")
    listed = "its columns are 'pid', 'Age', 'Chol', 'gender', 'Ill'"
    with pytest.raises(
        InputError, match=says(f"{path} has no column 'ill' (near: 'Ill'), the target; {listed}")
    ):
        read_table(path, HEART)
    here = replace(HEART, target="Ill")
    with pytest.raises(
        InputError,
        match=says(
            f"{path} has none of the features 'age' (near: 'Age'), 'chol' (near: 'Chol'), 'sex'; "
            f"{listed}"
        ),
    ):
        read_table(path, here)
    named = replace(here, patient="id", numeric=("Age",))
    with pytest.raises(
        InputError, match=says(f"{path} has no column 'id' (near: 'pid'), the patient; {listed}")
    ):
        read_table(path, named)
    with pytest.raises(InputError, match=says(f"{path} has no column 'fold', the split; {listed}")):
        read_table(path, replace(here, numeric=("Age",)), split="fold")
    survival = Schema("Age", "survival", numeric=("Chol",), event="dead")
    with pytest.raises(InputError, match=says(f"{path} has no column 'dead', the event; {listed}")):
        read_table(path, survival)
    many = pd.DataFrame({f"c{number}": [1] for number in range(31)})
    with pytest.raises(InputError, match=r", 'c29', \.\.\.$"):
        table_of(many, HEART, "t")


def test_without_patients_each_row_is_one(tmp_path):
    rows, _, problems = read(tmp_path, "x,y,Patient\n1,1,A\n2,?,A\n\n3,1,A\n", NUMBER)
    assert column(rows, "patient") == [2, 5]
    assert problems == [
        "target y is missing in 1 row, rejected; the first is line 3",
        "there is no column 'patient' (near: 'Patient'): each row counts as a patient, named "
        "after its line",
    ]


def test_a_row_without_its_patient_is_rejected(tmp_path):
    schema = replace(NUMBER, patient="id")
    text = "id,x,y\n007,1,1\n,1,1\nNA,1,1\n7.0,1,1\n"
    rows, rejected, problems = read(tmp_path, text, schema)
    assert column(rows, "patient") == ["007", "7"]
    assert rejected == 2
    assert problems == ["patient id is missing in 2 rows, rejected; the first is line 3"]


def test_classes(tmp_path):
    schema = Schema("ill", "binary", numeric=("x",), classes=("no", "yes"))
    rows, rejected, problems = read(
        tmp_path, "patient,x,ill\nA,1,yes\nB,1,no\nC,1,Yes\nD,1,\nE,1,2\n", schema
    )
    assert column(rows, "ill") == [1, 0]
    assert rejected == 3
    assert problems == [
        "target ill is missing in 1 row, rejected; the first is line 5",
        "target ill is not one of no, yes in 2 rows, rejected; the first is line 4 with 'Yes'",
    ]
    given = Schema("ill", "binary", numeric=("x",))
    assert given.classes == ("0", "1")
    flags = pd.DataFrame({"patient": ["A", "B", "C"], "x": 1, "ill": [True, 0.0, "1.0"]})
    assert column(table_of(flags, given, "t").rows, "ill") == [1, 0, 1]


def test_counts(tmp_path):
    schema = Schema("days", "count", numeric=("x",))
    cells = ["0", "3.0", "-1", "2.5", "1e20", "x", "inf", ""]
    text = "patient,x,days\n" + "".join(f"A,1,{cell}\n" for cell in cells)
    rows, rejected, problems = read(tmp_path, text, schema)
    assert column(rows, "days") == [0, 3]
    assert all(isinstance(value, int) for value in column(rows, "days"))
    assert rejected == 6
    assert problems == [
        "target days is not a number in 1 row, rejected; the first is line 7 with 'x'",
        "target days is beyond 1e+30 in 1 row, rejected; the first is line 8 with 'inf'",
        "target days is missing in 1 row, rejected; the first is line 9",
        "target days is not a count (0, 1, 2, ...) in 3 rows, rejected; the first is line 4 "
        "with '-1'",
    ]


def test_a_target_outside_its_range_is_rejected(tmp_path):
    schema = replace(NUMBER, ranges={"y": (0, 10)})
    rows, rejected, problems = read(tmp_path, "patient,x,y\nA,1,10\nB,1,11\n", schema)
    assert (column(rows, "y"), rejected) == ([10.0], 1)
    assert problems == [
        "target y is outside 0 to 10 in 1 row, rejected; the first is line 3 with '11'"
    ]


def test_survival(tmp_path):
    schema = Schema("T", "survival", numeric=("x",), event="E")
    text = "patient,x,T,E\nA,1,5.5,1.0\nB,1,3,0\nC,1,0,1\nD,1,-2,1\nE,1,?,1\nF,1,1,\nG,1,1,2\n"
    rows, rejected, problems = read(tmp_path, text, schema)
    # A death on the day of admission is an event.
    assert [(row["T"], row["E"]) for row in rows] == [(5.5, 1), (3.0, 0), (0.0, 1)]
    assert rejected == 4
    assert problems == [
        "target T is missing in 1 row, rejected; the first is line 6",
        "target T is below 0 in 1 row, rejected; the first is line 5 with '-2'",
        "event E is missing in 1 row, rejected; the first is line 7",
        "event E is not one of 0, 1 in 1 row, rejected; the first is line 8 with '2'",
    ]


LUNG = "patient,age,time,status\n" + "".join(
    f"P{number},60,{time},{status}\n"
    for number, (time, status) in enumerate(
        [(306, 2), (455, 2), (1010, 1), (210, 2), (883, 2), (1022, 1)]
    )
)
SURVIVAL = Schema("time", "survival", numeric=("age",), event="status")


def test_a_text_that_the_codes_of_an_event_lack_is_not_valid(tmp_path):
    schema = replace(SURVIVAL, codes={"status": {"1": 0, "2": 1}})
    rows, rejected, problems = read(tmp_path, LUNG + "P6,60,5,0\n", schema)
    assert (len(rows), rejected) == (6, 1)
    assert problems == [
        "event status is not one of 1, 2 in 1 row, rejected; the first is line 8 with '0'"
    ]


def test_a_binary_target_coded_1_and_2_is_refused(tmp_path):
    schema = Schema("ill", "binary", numeric=("age",))
    values = [1, 1, 2] * 3
    text = "patient,age,ill\n" + "".join(f"P{n},60,{value}\n" for n, value in enumerate(values))
    with pytest.raises(InputError, match=re.escape("target ill is '1' (6 rows), '2' (3 rows)")):
        read(tmp_path, text, schema)
    rows, _, _ = read(tmp_path, text, replace(schema, codes={"ill": {1: "0", 2: "1"}}))
    assert column(rows, "ill") == [0, 0, 1] * 3
    # Class 0 first: the classes themselves can be named too.
    rows, _, _ = read(tmp_path, text, replace(schema, classes=("1", "2")))
    assert column(rows, "ill") == [0, 0, 1] * 3


@pytest.mark.parametrize(
    ("values", "listed", "remedy"),
    [
        (
            ["yes", "no", "no"],
            "'no' (6 rows), 'yes' (3 rows)",
            "the two classes by classes=('no', 'yes'), class 0 first; or what each text stands "
            "for, by codes={'ill': {'no': ..., 'yes': ...}}",
        ),
        (
            ["yes", "no", "lost"],
            "'yes' (3 rows), 'no' (3 rows), 'lost' (3 rows)",
            "the two classes by classes=('...', '...'), class 0 first; or what each text stands "
            "for, by codes={'ill': {'lost': ..., 'no': ..., 'yes': ...}}",
        ),
        (
            ["yes", "no", "2"],
            "'yes' (3 rows), 'no' (3 rows), '2' (3 rows)",
            "what each text stands for, by codes={'ill': {'2': ..., 'no': ..., 'yes': ...}}",
        ),
    ],
)
def test_a_target_of_words_is_refused_until_its_classes_are_named(tmp_path, values, listed, remedy):
    schema = Schema("ill", "binary", numeric=("age",))
    lines = "".join(f"P{n},60,{value}\n" for n, value in enumerate(values * 3))
    path = written(tmp_path, f"patient,age,ill\n{lines}")
    text = (
        f"{path}: target ill is {listed} and must be one of 0, 1: if other hospitals write "
        f"it so, change this table; else say in the schema {remedy}; add "
        "those that mean missing to missing of read_table"
    )
    with pytest.raises(InputError, match=says(text)):
        read_table(path, schema)


def test_a_schema_that_has_named_its_classes_is_asked_for_codes(tmp_path):
    schema = Schema("ill", "binary", numeric=("age",), classes=("no", "yes"))
    lines = "".join(f"P{n},60,{value}\n" for n, value in enumerate(["non", "oui"] * 3))
    text = "else say in the schema what each text stands for, by codes="
    with pytest.raises(InputError, match=re.escape(text)):
        read(tmp_path, f"patient,age,ill\n{lines}", schema)
    # As the error for a schema without classes advises.
    rows, _, _ = read(
        tmp_path, f"patient,age,ill\n{lines}", replace(schema, classes=("non", "oui"))
    )
    assert column(rows, "ill") == [0, 1] * 3


def test_a_rare_2_beside_1_alone_is_a_code_and_not_dirt(tmp_path):
    schema = Schema("ill", "binary", numeric=("age",))
    heading = "patient,age,ill\n"
    ones = "".join(f"P{number},60,1\n" for number in range(60))
    with pytest.raises(InputError, match=re.escape("'1' (60 rows), '2' (1 row)")):
        read(tmp_path, f"{heading}{ones}X,60,2\n", schema)
    # Beside both classes it is one wrong cell.
    _, rejected, _ = read(tmp_path, f"{heading}{ones}Y,60,0\nX,60,2\n", schema)
    assert rejected == 1


def test_codes_bring_categories_of_hospitals_to_one(tmp_path):
    schema = replace(HEART, codes={"sex": {"female": "F", "2": "F", "-": "unknown"}})
    text = "patient,age,chol,sex,ill\nA,1,1,female,1\nB,1,1,2,0\nC,1,1,M,0\nD,1,1,-,0\nE,1,1,,0\n"
    rows, _, _ = read(tmp_path, text, schema)
    assert column(rows, "sex") == ["F", "F", "M", "unknown", None]


def test_missing_values_of_r_excel_and_sas(tmp_path):
    cells = ["#N/A", ".", "-", "F"]
    text = "patient,age,chol,sex,ill\n" + "".join(f"P,{c},1,{c},1\n" for c in cells)
    rows, _, _ = read(tmp_path, text, HEART)
    assert column(rows, "sex") == [None, None, None, "F"]
    # The results of a test are no missing values.
    text = "patient,age,chol,sex,ill\nA,1,1,+,1\nB,1,1,-,0\n"
    assert column(read(tmp_path, text, HEART)[0], "sex") == ["+", "-"]


@pytest.mark.parametrize(
    ("value", "empty"),
    [
        *((gap, True) for gap in (None, math.nan, np.float32("nan"), pd.NaT)),
        *((value, False) for value in (0, "", date(2020, 1, 13), pd.NA, np.array([1.0, 2.0]))),
    ],
)
def test_a_column_is_empty_if_all_its_values_are_gaps(value, empty):
    """Also rows that are rejected later, whatever they hold, are looked at."""
    rows = [{"x": None}, {"x": value}, {}]
    assert empty_columns(rows, ["x", "y"]) == (("x", "y") if empty else ("y",))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([-999] * 5 + [*range(20, 90)], "-999"),
        ([9999] * 5 + [*range(20, 90)], "9999"),
        ([-9] * 3 + [*range(20, 90)], "-9"),
        ([9] * 3 + [0, 1, 2, 3] * 5, "9"),
        # Once is no code; a large value among large ones is none.
        ([-99, *range(20, 90)], None),
        ([89] * 5 + [*range(20, 90)], None),
        ([-9] * 3 + [*range(-20, 20)], None),
        ([0, 1] * 20, None),
    ],
)
def test_a_far_and_frequent_value_may_mean_missing(tmp_path, values, code):
    text = "patient,x,y\n" + "".join(f"P{n},{value},1\n" for n, value in enumerate(values))
    _, _, problems = read(tmp_path, text, NUMBER)
    if code is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.startswith(f"x is {code} in {values.count(int(code))} of {len(values)} rows")
        assert problem.endswith(f"add \"{code}\" to missing, or declare the range of 'x'")
        missing = (*MISSING, code)
        rows, _, problems = read(tmp_path, text, NUMBER, missing=missing)
        assert problems == []
        assert sum(math.isnan(value) for value in column(rows, "x")) == values.count(int(code))


@pytest.mark.parametrize(
    ("values", "count", "first"),
    [
        ([*range(20, 80), 1e9, 1e9], 2, "line 62 with '1000000000.0'"),
        ([-6000, *range(20, 80), 7e5], 1, "line 2 with '-6000'"),
        ([*range(20, 80), 7e5], 1, "line 62 with '700000.0'"),
        ([10.0 ** (n / 20) for n in range(60)], 0, ""),
        # As many as a code would be, or too few others to tell.
        ([0, 1, 2, 3] * 20 + [400], 0, ""),
    ],
)
def test_few_values_far_from_all_others_are_named(tmp_path, values, count, first):
    text = "patient,x,y\n" + "".join(f"P{n},{value},1\n" for n, value in enumerate(values))
    rows, _, problems = read(tmp_path, text, NUMBER)
    assert column(rows, "x") == values
    declared = replace(NUMBER, ranges={"x": (-1e10, 1e10)})
    assert read(tmp_path, text, declared)[2] == []
    if count:
        assert f" in {count} row" in problems[0]
        assert problems[0].startswith("x is far from its other values (")
        assert f"kept; the first is {first}: if it is a typing error" in problems[0]
    else:
        assert problems == []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_large_column_is_called_even_only_if_it_has_no_stray_value(data):
    size = data.draw(st.integers(40, 300))
    kind = data.draw(st.sampled_from(["normal", "lognormal", "few"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = {
        "normal": rng.normal(size=size),
        "lognormal": rng.lognormal(0, 2, size),
        "few": rng.integers(0, 9, size) / 4,
    }[kind]
    for place in data.draw(st.lists(st.integers(0, size - 1), max_size=5)):
        values[place] = data.draw(st.sampled_from([1e9, -1e9, 50.0, -60.0, 500.0, 3.0]))
    frame = pd.DataFrame({"patient": [f"P{n}" for n in range(size)], "x": values, "y": 1.0})
    found = []
    for large in (10**9, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedmed_flower.data.cells._LARGE", large)
            patch.setattr("fedmed_flower.data.cells._PART", data.draw(st.integers(1, 4)))
            found.append(table_of(frame, NUMBER, "t").problems)
    assert found[0] == found[1]


def test_points_between_groups_of_thousands(tmp_path):
    heading = "patient;age;chol;sex;ill\n"
    # A decimal comma in the column, or in another one.
    rows, _, _ = read(tmp_path, f"{heading}A;60;1.250;F;0\nB;70;1.250,5;M;1\n", HEART)
    assert column(rows, "chol") == [1250, 1250.5]
    rows, _, _ = read(tmp_path, f"{heading}A;60,5;1.250;F;0\nB;70;12.345.678;M;1\n", HEART)
    assert column(rows, "chol") == [1250, 12345678]
    rows, _, _ = read(tmp_path, f"{heading}A;60.5;1.250;F;0\nB;70;0.875;M;1\n", HEART)
    assert column(rows, "chol") == [1.25, 0.875]
    rows, _, _ = read(tmp_path, f"{heading}A;60.5;1.250;F;0\n", HEART)
    assert column(rows, "chol") == [1.25]
    for text in ("A;60;1.250;F;0\n", "A;60;1.250;F;0\nB;70;2,5;M;1\nC;70;2.5;M;1\n"):
        with pytest.raises(
            InputError,
            match=re.escape("1.250 in the column 'chol' may be 1250 or 1.25: say which by dec"),
        ):
            read(tmp_path, heading + text, HEART)
    for decimal, value in ((",", 1250), (".", 1.25)):
        rows, _, _ = read(tmp_path, f"{heading}A;60;1.250;F;0\n", HEART, decimal=decimal)
        assert column(rows, "chol") == [value]
    with pytest.raises(InputError, match=says('decimal must be "", "." or ",", got \';\'')):
        read(tmp_path, heading, HEART, decimal=";")


def test_no_row_that_can_be_used(tmp_path):
    path = written(tmp_path, "patient,x,y\nA,1,\nB,1,?\n,2,3\n")
    with pytest.raises(
        InputError,
        match=says(
            f"{path}: none of 3 rows can be used: target y is missing in 2 rows, rejected; the "
            "first is line 2; patient patient is missing in 1 row, rejected; the first is line 4"
        ),
    ):
        read_table(path, NUMBER)
    path = written(tmp_path, "patient,x,y\nA,1,2,3\n")
    with pytest.raises(
        InputError,
        match=says(
            f"{path}: none of 1 rows can be used: the number of cells differs from the heading's 3 "
            "in 1 row, rejected; the first is line 2 with 4"
        ),
    ):
        read_table(path, NUMBER)


def test_rows_of_another_length_are_rejected(tmp_path):
    text = "patient,x,y\nA,1,2\nB,1\nC,1,2,\n,,\nD,3,4\n"
    rows, rejected, problems = read(tmp_path, text, NUMBER)
    assert column(rows, "patient") == ["A", "D"]
    assert rejected == 2
    assert problems == [
        "the number of cells differs from the heading's 3 in 2 rows, rejected; the first is "
        "line 3 with 2"
    ]


def test_splits_that_the_table_names(tmp_path):
    text = "patient,x,y,fold\nA,1,1,Train\nA,2,1,train\nB,1,1,test\nC,1,1,dev\nD,1,1,\n"
    rows, rejected, problems = read(tmp_path, text, NUMBER, split="fold")
    data = SiteData(**split_patients(rows, 0), rejected=rejected)
    require_patients(data)
    assert column(data.train, "patient") == ["A", "A"]
    assert column(data.test, "patient") == ["B"]
    assert data.rejected == 2
    assert problems == [
        "split fold is missing in 1 row, rejected; the first is line 6",
        "split fold is not one of train, val, test in 1 row, rejected; the first is line 5 with "
        "'dev'",
    ]


def test_further_columns_are_kept_as_texts(tmp_path):
    text = "patient,x,y,year,ward\nA,1,2,2015,\n"
    rows, _, problems = read(tmp_path, text, NUMBER, keep=("year", "ward", "y", "site"))
    wanted = {"patient": "A", "x": 1.0, "y": 2.0, "year": "2015", "ward": None, "site": None}
    assert rows == [wanted]
    assert problems == [
        "there is no column 'site': counted as missing in all rows",
        "ward has no value in any row",
    ]
    error = "keep names 'split', which is a key of rows with another meaning: rename the column"
    with pytest.raises(InputError, match=says(error)):
        read(tmp_path, text, NUMBER, keep=("split",))


@pytest.mark.parametrize(
    ("cells", "count"),
    [
        (["13.01.2020", "1.2.21", "", "2020-01-13"], 2),
        (["1/13/2020 10:15", "2/1/2020"], 2),
        (["2020-01-13", "20200113", "43843"], 0),
        (["1.2.3", "J10", "13.01.2020"], 0),
        (["1.13/2020", "10.11.120", ""], 0),
    ],
)
def test_kept_dates_that_statistics_cannot_read_are_named(tmp_path, cells, count):
    text = "patient,x,y,admitted\n" + "".join(f"A,1,1,{cell}\n" for cell in cells)
    rows, _, problems = read(tmp_path, text, NUMBER, keep=("admitted",))
    assert column(rows, "admitted") == [cell or None for cell in cells]
    told = (
        f"admitted is a date such as {cells[0]!r} in {count} rows, of which statistics by time "
        "read none: write it as 2020-01-13"
    )
    assert problems == ([told] if count else [])


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    def fails(name, content, text):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=says(f"{path}{text}")):
            read_table(path, NUMBER)

    rows = b"patient,x,y\nA,1,2\n"
    fails("none.csv", b"", " is empty")
    fails("blank.csv", b"\n , ,\n", " is empty")
    fails("heading.csv", b"patient,x,y\n", " holds no rows")
    twice = b"patient,x,x ,y\nA,1,2,3\n"
    fails("twice.csv", twice, " has 2 columns 'x': rename all but one")
    latin = " is not in UTF-8 (invalid continuation byte): save it in UTF-8"
    fails(
        "latin.csv",
        "patient,x,y\nMüller,1,2\n".encode("latin-1"),
        latin.replace("continuation", "start"),
    )
    wide = rows.decode().encode("utf-16-le")
    fails("wide.csv", wide, " is not a text in UTF-8: save it in UTF-8")
    fails("open.csv", b'patient,x,y\nA,1,"2\n', ", line 2: unexpected end of data")
    long = b"patient,x,y\nA,1," + b"2" * (csv.field_size_limit() + 1) + b"\n"
    fails("long.csv", long, ", line 2: field larger than field limit (131072)")
    packed = gzip.compress(rows)
    cut = (
        " is not a complete gzip file: Compressed file ended before the end-of-stream marker was "
        "reached"
    )
    fails("cut.csv.gz", packed[:-9], cut)
    fails("not.csv.gz", rows, " is not a complete gzip file: Not a gzipped file (b'pa')")
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=says(f"{tmp_path / 'a'} cannot be read: Is a directory")):
        read_table(tmp_path / "a", NUMBER)
    absent = tmp_path / "absent.parquet"
    with pytest.raises(
        InputError, match=says(f"{absent} cannot be read: No such file or directory")
    ):
        read_table(absent, NUMBER)
    text = tmp_path / "text.parquet"
    text.write_bytes(rows)
    with pytest.raises(InputError, match=rf"^{text} is not a complete Parquet file: .*[Pp]arquet"):
        read_table(text, NUMBER)
    whole = tmp_path / "whole.parquet"
    pd.DataFrame({"patient": ["A"], "x": [1], "y": [2]}).to_parquet(whole)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    cut = tmp_path / "cut.parquet"
    with pytest.raises(InputError, match=f"^{cut} is not a complete Parquet file: "):
        read_table(cut, NUMBER)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        InputError,
        match=says(f"{whole} needs pyarrow to be read: pip install 'fedmed-flower[parquet]'"),
    ):
        read_table(whole, NUMBER)


def test_frames_without_rows_or_with_a_column_twice():
    empty = pd.DataFrame({"patient": [], "x": [], "y": []})
    with pytest.raises(InputError, match=says("stays holds no rows")):
        table_of(empty, NUMBER, "stays")
    twice = pd.DataFrame([["A", 1, 2, 3]], columns=["patient", "x", "x", "y"])
    with pytest.raises(InputError, match=says("stays has 2 columns 'x': rename all but one")):
        table_of(twice, NUMBER, "stays")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"task": "ranking"}, "task must be one of binary, multi-class, count, continuous, "
         "survival, got 'ranking'"),
        ({"numeric": "age"}, "numeric must be a tuple of columns, got 'age'"),
        ({"numeric": ("",)}, "numeric must name columns by texts without blanks around them, "
         "got ''"),
        ({"target": " y"}, "target must name columns by texts without blanks around them, "
         "got ' y'"),
        ({"numeric": (), "categorical": ()}, "numeric and categorical name no column: name a "
         "feature"),
        ({"numeric": ("a", "b", "a")}, "numeric names 'a', named in numeric before"),
        ({"categorical": ("a",)}, "categorical names 'a', named in numeric before"),
        ({"categorical": ("a-band",), "bands": {"a": (1,)}}, "bands names 'a-band', named in "
         "categorical before"),
        ({"target": "a"}, "target 'a' is in numeric too: the model would be given what it must "
         "not see"),
        ({"patient": "c"}, "patient 'c' is in categorical too: the model would be given what it "
         "must not see"),
        ({"task": "survival", "event": "a"}, "event 'a' is in numeric too: the model would be "
         "given what it must not see"),
        ({"task": "survival", "event": "y"}, "event names 'y', named in target before"),
        ({"numeric": ("patient",), "patient": "id"}, "numeric names 'patient', which is a "
         "key of rows with another meaning: rename the column"),
        ({"target": "split"}, "target names 'split', which is a key of rows with another "
         "meaning: rename the column"),
        ({"ranges": ("a", 0, 1)}, "ranges must be a dict by column, got ('a', 0, 1)"),
        ({"ranges": {"A": (0, 1)}}, "ranges names 'A' (near: 'a'), which is not a numeric column"),
        ({"ranges": {"c": (0, 1)}}, "ranges names 'c', which is not a numeric column"),
        ({"ranges": {"y": (0, 1)}}, "ranges names 'y', which is not a numeric column"),
        ({"whole": "a"}, "whole must be a tuple of columns, got 'a'"),
        ({"whole": ("A",)}, "whole names 'A' (near: 'a'), which is not a numeric column"),
        ({"ranges": {"a": (1, 1)}}, "ranges of 'a' must be finite numbers in ascending order, "
         "got (1, 1)"),
        ({"ranges": {"a": (0, math.inf)}}, "ranges of 'a' must be finite numbers in ascending "
         "order, got (0, inf)"),
        ({"ranges": {"a": (0, 1, 2)}}, "ranges of 'a' must be two numbers, got (0, 1, 2)"),
        ({"bands": {"c": (1,)}}, "bands names 'c', which is not a numeric column"),
        ({"bands": {"a": (2, 1)}}, "bands of 'a' must be finite numbers in ascending order, "
         "got (2, 1)"),
        ({"bands": {"a": ()}}, "bands of 'a' must be finite numbers in ascending order, got ()"),
        ({"bands": {"a": ("1",)}}, "bands of 'a' must be finite numbers in ascending order, "
         "got ('1',)"),
        ({"categories": {"a": ("1",)}}, "categories names 'a', which is not a categorical column"),
        ({"categories": {"c": "12"}}, "categories of 'c' must be a tuple of texts, got '12'"),
        ({"categories": {"c": ()}}, "categories of 'c' must be one or more different texts, none "
         "of them empty, got ()"),
        ({"categories": {"c": ("1", "1.0")}}, "categories of 'c' must be one or more different "
         "texts, none of them empty, got ('1', '1.0')"),
        ({"classes": ("a", "b", "c")}, "classes must be two for a binary task, got 3"),
        ({"classes": ("a", "")}, "classes must be one or more different texts, none of them "
         "empty, got ('a', '')"),
        ({"task": "multi-class"}, "classes must be two or more for a multi-class task, got 0"),
        ({"task": "count", "classes": ("0", "1")}, "classes are for binary and multi-class tasks, "
         "not count"),
        ({"task": "survival"}, "event must name columns by texts without blanks around them, "
         "got ''"),
        ({"event": "E"}, "event is for a survival task, not binary"),
        ({"codes": {"Y": {"1": "0"}}}, "codes names 'Y' (near: 'y'), which is not a categorical "
         "column, a target with classes or the event"),
        ({"codes": {"a": {"1": "0"}}}, "codes names 'a', which is not a categorical column, a "
         "target with classes or the event"),
        ({"codes": {"y": {"1": "2"}}}, "codes of 'y' gives '1' the meaning '2': it must be one of "
         "0, 1"),
        ({"codes": {"c": {"1": ""}}}, "codes of 'c' gives '1' the meaning None: it must be a "
         "text"),
        ({"codes": {"y": {}}}, "codes of 'y' must be a dict, got {}"),
        ({"codes": {"c": {"1": "x", 1: "y"}}}, "codes of 'c' must be one or more different texts, "
         "none of them empty, got ('1', 1)"),
    ],
)  # fmt: skip
def test_what_a_schema_refuses(fields, text):
    fine = {"target": "y", "task": "binary", "numeric": ("a", "b"), "categorical": ("c",)}
    assert Schema(**fine).features == ("a", "b", "c")
    with pytest.raises(InputError, match=says(text)):
        Schema(**fine | fields)


def test_a_schema_can_be_copied_to_another_process():
    ranges = MappingProxyType({"a": (0, np.int64(1))})
    schema = Schema("y", "binary", ["a"], ["c"], {"c": ["1.0", "x"]}, ranges)
    assert schema.numeric == ("a",)
    assert schema.categories == {"c": ("1", "x")}
    assert schema.ranges == {"a": (0.0, 1.0)}
    assert pickle.loads(pickle.dumps(schema)) == schema
