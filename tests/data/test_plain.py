import csv
import io
import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmed_flower.data.cells import Cells, category_text
from fedmed_flower.data.plain import column_of_lines, plain_columns
from fedmed_flower.data.schema import Schema, read_table

MIXED = Schema("y", "continuous", numeric=("x", "z"), categorical=("c",))
# What spreadsheets, scripts and people write into a column of numbers.
STRANGE = [
    *(
        "",
        " ",
        " 7 ",
        "7",
        "+7",
        "-7",
        "-0",
        "0.0",
        "-0.0",
        "007",
        "1.",
        ".5",
        "-.5",
        ".",
        "-",
        "+",
    ),
    *("1_000", "0x10", "1,5", "1.250", "1.2.3", "true", "False", "NA", "?", "nan", "inf", "-inf"),
    *("1e5", "1E-5", "1e400", "1e31", "--1", "+-1", "1-", "1 2", "12-05-2020", "\u00a07", "\u0667"),
    *("９", "½", "é", "abc", "\t8", "\x1c9", "9007199254740993", "123456789012345678", "x" * 40),
    *("1234567890123456789", "0.1234567890123456789", "0.000000000000000000000001", "1" * 40),
    *("9007199254740993.0", "0.30000000000000004", "2.2250738585072014", "5e-324", "-9", "-999"),
]
texts = st.one_of(
    st.sampled_from(STRANGE),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(-1000, 1000).map(lambda value: f"{value:.3f}"),
    st.decimals(-1000, 1000, places=17).map(str),
    st.integers().map(str),
    st.text("0123456789.+- e_,", max_size=24),
)


def bits(values):
    return [struct.pack("d", value) if value == value else None for value in values]


def in_column(cells, ends="\n"):
    """Return the cells as the second column of a plain text."""
    lines = ["p;x", *(f"p{number};{cell}" for number, cell in enumerate(cells))]
    columns = plain_columns(ends.join([*lines, ""]).encode(), ";")
    return None if columns is None else columns[1][1:]


@settings(max_examples=300)
@given(st.lists(texts, min_size=3, max_size=30))
@example(STRANGE)
def test_numbers_are_those_of_python(cells):
    column = in_column([cell for cell in cells if not cell.startswith(" ")])
    assert column is not None
    values, others = column.numbers()
    for cell, value, other in zip(column, values, others, strict=True):
        if not cell:
            assert math.isnan(value)
            assert not other
        elif other:
            assert math.isnan(value)
        else:
            assert bits([value]) == bits([float(cell)]), cell


def test_decimal_numbers_are_read_without_python():
    cells = ["0", "-12", "+3.5", "120.0", ".5", "7.", "0.30000000000000004", "-1.5815382897067394"]
    values, others = in_column(cells).numbers()
    assert not others.any()
    assert bits(values) == bits(map(float, cells))


def test_many_numbers_of_full_precision_are_those_of_python():
    rng = np.random.default_rng(0)
    drawn = (*rng.normal(size=20_000), *rng.uniform(size=20_000), *(rng.normal(size=9_000) * 1e6))
    cells = [repr(float(value)) for value in drawn]
    values, others = in_column(cells).numbers()
    assert others.mean() < 0.01 or np.finfo(np.longdouble).nmant != 63
    assert bits(values[~others]) == bits(np.array(drawn)[~others])


@settings(max_examples=200)
@given(st.lists(texts, min_size=3, max_size=20), st.sampled_from(["\n", "\r\n"]))
@example(STRANGE, "\n")
def test_a_column_has_the_cells_that_the_csv_module_reads(cells, ends):
    cells = [cell for cell in cells if not cell.startswith(" ")]
    column = in_column(cells, ends)
    assert column is not None
    text = ends.join(["p;x", *(f"p;{cell}" for cell in cells), ""])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";", skipinitialspace=True)
    wanted = [line[1] for line in reader][1:]
    assert [*column] == [cell.decode() for cell in column.encoded()] == wanted
    assert [column[index] for index in range(len(column))] == wanted
    assert [*column[1:]] == wanted[1:]


def test_lines_are_a_column():
    assert [*column_of_lines("a\n\né 1\n2.5\n".encode())] == ["a", "", "é 1", "2.5"]
    assert [*column_of_lines(b"")] == []
    assert column_of_lines(b"a\0\n") is None


@pytest.mark.parametrize("cell", ["two\nlines", "zero\0", '"quoted"', "é"])
def test_cells_of_all_kinds_stay_as_they_are(tmp_path, cell):
    quoted = '"' + cell.replace('"', '""') + '"'
    lines = ["patient,x,z,c,y", *(f"p{n},1.5,{n},b,{n}" for n in range(600)), f"q,1,2,{quoted},3"]
    (tmp_path / "t.csv").write_text("\n".join(lines), "utf-8", newline="")
    table = read_table(tmp_path / "t.csv", MIXED)
    assert table.rows.column("c").tolist() == ["b"] * 600 + [cell]
    assert table.rows.column("z").tolist() == [*map(float, range(600)), 2.0]
    assert table.rows.column("x").tolist() == [1.5] * 600 + [1.0]


def test_a_heading_alone_has_columns_without_cells():
    (column,) = plain_columns(b"x\n", ",")
    assert [*column] == ["x"]
    assert [*column[1:]] == column[1:].encoded() == column[1:].numbers()[0].tolist() == []


@pytest.mark.parametrize(
    "text",
    [
        'patient,x,y\n"a",1,2\nb,3,4\n' + "c,5,6\n" * 9,
        "patient,x,y\na, 1,2\nb,3,4\n" + "c,5,6\n" * 9,
        "patient,x,y\na,1,2,\nb,3,4\n" + "c,5,6\n" * 9,
        "patient,x,y\na,1,2\n\nb,3,4\n" + "c,5,6\n" * 9,
        "patient,x,y\na,1,2\n,,\nb,3,4\n" + "c,5,6\n" * 9,
        "patient,x,y\na,1,2\rb,3,4\r" + "c,5,6\n" * 9,
        "patient,x,y\na,1,2\nb,3\0,4\n" + "c,5,6\n" * 9,
        "patient,x,y\na,1,2\n b,3,4\n" + "c,5,6\n" * 9,
        "patient,x,y\nb,3," + "4" * 110_000 + "\n",
    ],
    ids=[
        *("quotes", "blanks", "ragged", "blank line", "row without cells", "old line ends"),
        *("zero byte", "blank before a row", "long cell"),
    ],
)
def test_other_texts_are_not_plain(text):
    assert plain_columns(text.encode(), ",") is None


@settings(max_examples=200)
@given(
    st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=12),
    st.sampled_from(",;\t"),
    st.sampled_from([("NA", "?"), ("-9", "nan"), ("true", "7")]),
)
@example([(text, "1", text) for text in STRANGE], "\t", ("NA", "?", "-9"))
@example([("1.250", "1.5", "a"), ("2", "2", "b")], ";", ("NA",))
def test_a_plain_table_is_read_as_one_with_quotes(tmp_path_factory, lines, separator, missing):
    """Quotation marks, which change nothing, send the same table through the csv module."""
    folder = tmp_path_factory.mktemp("t")
    cells = [[text.replace(separator, "") for text in line] for line in lines]
    rows = [[f"p{n}", *line, str(n)] for n, line in enumerate(cells)]
    body = "".join(separator.join(row) + "\n" for row in rows)
    found = []
    for name, heading in (("plain", "patient"), ("other", '"patient"')):
        path = folder / "t.csv"
        path.write_text(separator.join([heading, "x", "z", "c", "y"]) + "\n" + body, "utf-8")
        try:
            table = read_table(path, MIXED, missing=missing, keep=("x",))
        except Exception as error:
            found.append((type(error), str(error)))
        else:
            lists = {name: table.rows.column(name).tolist() for name in table.rows.names}
            found.append((repr(lists), table.problems, table.rejected, table.lines))
    assert found[0] == found[1]


@settings(max_examples=200)
@given(st.lists(texts, min_size=1, max_size=20), st.sampled_from([".", ","]))
@example(STRANGE, ".")
@example(STRANGE, ",")
def test_columns_are_read_as_cell_by_cell(cells, decimal):
    """Each cell by itself, as `Cells` reads one that stands alone."""
    lines = range(1, len(cells) + 1)
    missing = frozenset(("", "na", "?", "-9"))
    table = Cells("t", "line", lines, ["x"], lambda _: cells, decimal, missing=missing)
    numbers = [table._number(cell, decimal == ",") for cell in cells]
    wanted = [
        math.nan if number is None or number == -9 or abs(number) > 1e30 else number
        for number in numbers
    ]
    assert bits(table.numbers("x")) == bits(wanted)
    assert table.texts("x") == [
        None if text is None or text.lower() in missing else text
        for text in map(category_text, cells)
    ]
