import sys
import zipfile
from datetime import date

import openpyxl
import pandas as pd
import pytest
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.data.schema import Schema, read_table

SCHEMA = Schema("ill", "binary", numeric=("age",), categorical=("sex",))
ROWS = [
    {"patient": "007", "age": 60.0, "sex": "F", "ill": 1},
    {"patient": "8", "age": 71.5, "sex": None, "ill": 0},
]


def workbook(path, *sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"sheet {number}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_an_excel_file_gives_the_rows_of_its_sheet(tmp_path):
    heading = ["patient", "age", "sex", " ill ", "admitted"]
    rows = [heading, ["007", 60, "F", True, date(2020, 1, 2)], [], [8, 71.5, None, 0, None]]
    table = read_table(workbook(tmp_path / "t.xlsx", rows, []), SCHEMA, keep=("admitted",))
    assert [{key: row[key] for key in ROWS[0]} for row in table.rows] == ROWS
    assert [row["admitted"] for row in table.rows] == ["2020-01-02 00:00:00", None]
    # A row that is rejected is named as the spreadsheet numbers it.
    rows += [["9", 50, "F", "x", None]]
    table = read_table(workbook(tmp_path / "t.xlsx", rows), SCHEMA)
    assert table.problems[0].endswith("rejected; the first is row 5 with 'x'")


def test_excel_files_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.xlsx"
    heading = ["patient", "age", "sex", "ill"]
    row = ["A", 60, "F", 1]
    for sheets, text in (
        ([[], []], " is empty"),
        (
            [[heading, row], [["x"]]],
            " has the sheets 'sheet 0', 'sheet 1': keep one of them in the file",
        ),
        ([[heading, [*row, 7]]], ", row 2 has cells beyond the heading's 4"),
        (
            [[heading, ["A", "=30+30", "F", 1]]],
            ", row 2 has the formula =30+30 without a value: save the file in a spreadsheet "
            "program, which computes it",
        ),
    ):  # fmt: skip
        workbook(path, *sheets)
        with pytest.raises(InputError, match=says(f"{path}{text}")):
            read_table(path, SCHEMA)
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(InputError, match=f"^{path} is not a complete Excel file: "):
        read_table(path, SCHEMA)
    workbook(path, [heading, row])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    text = "needs openpyxl to be read: pip install 'fedmed-flower[excel]', or save it as CSV"
    with pytest.raises(InputError, match=says(f"{path} {text}")):
        read_table(path, SCHEMA)


def test_an_excel_file_that_unpacks_to_more_than_a_table_may(tmp_path, monkeypatch):
    heading = ["patient", "age", "sex", "ill"]
    path = workbook(tmp_path / "t.xlsx", [heading, *[["A", 60, "F", 1]] * 100])
    size = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
    monkeypatch.setattr("fedmed_flower.data.bounded.MOST", {"a table": size - 1})
    with pytest.raises(InputError, match=f"^{path} unpacks to {size:,} bytes, and a table may"):
        read_table(path, SCHEMA)
    # One cell in the last column of each row would be 16,384 cells a row.
    far = openpyxl.Workbook()
    for number in range(1, 6):
        far.active.cell(number, 16384, 1)
    far.save(path)
    monkeypatch.setattr("fedmed_flower.data.bounded.MOST", {"a table": 100_000})
    monkeypatch.setattr("fedmed_flower.data.formats.MOST", {"a table": 100_000})
    with pytest.raises(InputError, match=f"^{path} has cells of 131,072 bytes, and a table may"):
        read_table(path, SCHEMA)


def test_a_stata_file_gives_codes_and_not_their_labels(tmp_path):
    path = tmp_path / "t.dta"
    frame = pd.DataFrame(
        {
            "patient": ["007", "8"],
            "age": [60.0, 71.5],
            "sex": ["F", ""],
            "ill": pd.Categorical.from_codes([1, 0], ["alive", "dead"]),
        }
    )
    frame.to_stata(path, write_index=False)
    assert read_table(path, SCHEMA).rows == ROWS
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=f"^{path} is not a complete Stata file: "):
        read_table(path, SCHEMA)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("t.xls", "save it as .xlsx"),
        ("t.sas7bdat", "export it as CSV, by PROC EXPORT"),
        ("t.SAV", "save it as CSV or .dta, by SAVE TRANSLATE"),
    ],
)
def test_formats_that_are_not_read_say_what_to_do(tmp_path, name, remedy):
    path = tmp_path / name
    path.write_bytes(b"\xd0\xcf")
    text = f"{path} is of a format that is not read: {remedy}"
    with pytest.raises(InputError, match=says(text)):
        read_table(path, SCHEMA)
