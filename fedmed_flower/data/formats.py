"""A table's file as cells: CSV, Parquet, Excel, Stata."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedmed_flower.data.bounded import MOST, require_within, unpacked
from fedmed_flower.data.cells import Cells, frame_cells, require
from fedmed_flower.data.plain import column_of_lines, plain_columns
from fedmed_flower.errors import InputError, shown

_Row = Sequence[Any]
_QUOTED = re.compile(r'"[^"]*"')
# Bytes that a cell takes at least.
_CELL = 8
# Characters of a text that are decoded at a time, and rows whose cells are kept together.
_PART = 1 << 20
_ROWS = 256
_BETWEEN = "\n"
_UNREADABLE = {
    ".xls": "save it as .xlsx",
    ".ods": "save it as .xlsx",
    ".sas7bdat": "export it as CSV, by PROC EXPORT",
    ".xpt": "export it as CSV, by PROC EXPORT",
    ".sav": "save it as CSV or .dta, by SAVE TRANSLATE",
    ".rds": "write it by write.csv",
    ".rdata": "write its data frame by write.csv",
}


def read_cells(path: Path) -> Cells:
    """Return the cells of a file, whose format its suffix names; see `schema.read_table`.

    Raises
    ------
    InputError
        If the file cannot be read, is not complete, is of another format or too large, or a library
        that its format needs is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in _UNREADABLE:
        raise InputError(f"{path} is of a format that is not read: {_UNREADABLE[suffix]}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    readers = {".parquet": _read_parquet, ".xlsx": _read_excel, ".dta": _read_stata}
    return readers.get(suffix, _read_text)(path, content)


def _read_text(path: Path, content: bytes) -> Cells:
    """Return the cells of a text whose first line that is not blank is the heading.

    Raises
    ------
    InputError
        If the text is empty, not in UTF-8 or not well-formed CSV. If its name ends in ``.gz``:
        also if the gzip file is incomplete or unpacks to more than `bounded.MOST` bytes.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(io.BytesIO(content)) as packed:
                content = unpacked(packed, path, "a table")
        whole = _lines(content)
        while whole.read(_PART):
            pass
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 ({error.reason}): save it in UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a complete gzip file: {error}") from None
    heading = next((line for line in _lines(content) if line.strip(" ,;\t\r\n")), "")
    require(bool(heading), f"{path} is empty")
    require("\0" not in heading, f"{path} is not a text in UTF-8: save it in UTF-8")
    # If a comma is the decimal mark, spreadsheets separate columns by semicolons. Those within
    # quotes are part of a name.
    separator = max(",;\t", key=_QUOTED.sub("", heading).count)
    decimal = "" if separator == ";" else "."
    if columns := plain_columns(content.removeprefix(codecs.BOM_UTF8), separator):
        names = [column[0].strip() for column in columns]
        lines = range(2, len(columns[0]) + 1)
        return Cells(shown(path), "line", lines, names, lambda i: columns[i][1:], decimal)
    reader = csv.reader(_lines(content), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in next(filter(_any_filled, reader), ())]
        require(bool(names), f"{path} is empty")
        texts = _QuotedColumns(len(names), reader)
    except csv.Error as error:
        text = f"{path}, line {reader.line_num}: {error}"
        if "expected after" in str(error):
            text += ": a cell ends where its quotes close, so remove the blank or text behind them"
        raise InputError(text) from None
    cells = Cells(
        shown(path),
        "line",
        texts.lines,
        names,
        texts.column,
        decimal,
        texts.ragged,
    )
    if cells.ragged:
        number, count = texts.first_ragged
        cells.problems.append(
            f"the number of cells differs from the heading's {len(names)} in {cells.ragged} "
            f"row{'s' * (cells.ragged > 1)}, rejected; the first is line {number} with {count}"
        )
    return cells


def _lines(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")


def _any_filled(line: Sequence[str]) -> bool:
    return any(map(str.strip, line))


class _QuotedColumns:
    """The rows of any text below its heading, column by column.

    The cells of many rows are kept as one text: as texts of their own they take ten times the
    memory.

    Parameters
    ----------
    width : int
        The number of columns.
    reader : csv reader
        Behind the heading.

    Attributes
    ----------
    lines : array of int
        For each row, the number of its line.
    ragged : int
        How many lines have more or fewer cells than the heading; they are left out.
    first_ragged : (int, int)
        Number and cells of the first of them.
    """

    def __init__(self, width: int, reader: Any) -> None:
        self.lines = array("q")
        self.ragged = 0
        self.first_ragged = (0, 0)
        self._parts: list[list[str | tuple[str, ...]]] = [[] for _ in range(width)]
        rows: list[list[str]] = []
        for row in reader:
            # The first cell is filled in most rows.
            if not (row and row[0].strip()) and not _any_filled(row):
                continue
            if len(row) == width:
                self.lines.append(reader.line_num)
                rows.append(row)
                if len(rows) == _ROWS:
                    self._add(rows)
                    rows = []
            else:
                if not self.ragged:
                    self.first_ragged = (reader.line_num, len(row))
                self.ragged += 1
        if rows:
            self._add(rows)

    def _add(self, rows: Sequence[Sequence[str]]) -> None:
        for parts, cells in zip(self._parts, zip(*rows, strict=True), strict=True):
            text = _BETWEEN.join(cells)
            parts.append(text if text.count(_BETWEEN) == len(cells) - 1 else cells)

    def column(self, index: int) -> Sequence[str]:
        """Return the cells of a column."""
        parts = self._parts[index]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            lines = "".join(f"{text}{_BETWEEN}" for text in texts).encode()
            if (column := column_of_lines(lines)) is not None:
                return column
        cells: list[str] = []
        for part in parts:
            cells += part.split(_BETWEEN) if isinstance(part, str) else part
        return cells


def _read_parquet(path: Path, content: bytes) -> Cells:
    """Return the cells of a Parquet file.

    Raises
    ------
    InputError
        If it is not a complete Parquet file, takes more than `bounded.MOST` bytes in memory, or
        pyarrow is not installed.
    """
    # Imported here because it takes a second, which a CSV file need not wait for.
    import pandas as pd

    try:
        _require_small(path, content)
        frame = pd.read_parquet(io.BytesIO(content), engine="pyarrow")
    except InputError:
        raise
    except ImportError:
        raise InputError(
            f"{path} needs pyarrow to be read: pip install 'fedmed-flower[parquet]'"
        ) from None
    except Exception as error:  # A broken file makes the decoders fail in a dozen ways.
        reason = shown(error, 200)
        raise InputError(f"{path} is not a complete Parquet file: {reason}") from error
    # pandas stores the index of the frame that was written; its levels are columns of the table.
    named = [name for name in frame.index.names if name is not None]
    return frame_cells(frame.reset_index(named) if named else frame, shown(path))


def _read_stata(path: Path, content: bytes) -> Cells:
    """Return the cells of a Stata file; codes stay codes, whatever labels they have.

    Raises
    ------
    InputError
        If it is not a complete Stata file, or larger than `bounded.MOST` allows.
    """
    import pandas as pd

    require_within(f"{path} has", len(content), "a table")
    try:
        frame = pd.read_stata(io.BytesIO(content), convert_categoricals=False)
    except Exception as error:  # A broken file makes the reader fail in a dozen ways.
        reason = shown(error, 200)
        raise InputError(f"{path} is not a complete Stata file: {reason}") from error
    return frame_cells(frame, shown(path))


def _read_excel(path: Path, content: bytes) -> Cells:
    """Return the cells of an Excel file with one sheet, whose first row is the heading.

    Raises
    ------
    InputError
        If it is not an Excel file, has several sheets that are not empty, a formula without a value
        or more cells than `bounded.MOST` allows, or openpyxl is not installed.
    """
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError:
        raise InputError(
            f"{path} needs openpyxl to be read: pip install 'fedmed-flower[excel]', or save it as "
            "CSV"
        ) from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        require_within(f"{path} unpacks to", size, "a table")
        books = [
            openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=values)
            for values in (True, False)
        ]
        sheets = {
            name: list(_sheet_rows(path, *(book[name] for book in books)))
            for name in books[0].sheetnames
        }
    except InputError:
        raise
    except Exception as error:  # A broken file makes the reader fail in a dozen ways.
        reason = shown(error, 200)
        raise InputError(f"{path} is not a complete Excel file: {reason}") from error
    filled = {name: rows for name, rows in sheets.items() if rows}
    listed = ", ".join(map(repr, filled))
    require(bool(filled), f"{path} is empty")
    require(len(filled) == 1, f"{path} has the sheets {listed}: keep one of them in the file")
    (numbered,) = filled.values()
    heading = numbered.pop(0)[1]
    names = ["" if name is None else str(name).strip() for name in heading]
    while names and not names[-1]:
        names.pop()
    cells = Cells(
        shown(path),
        "row",
        [number for number, _ in numbered],
        names,
        lambda index: [row[index] if index < len(row) else None for _, row in numbered],
    )
    beyond = next((n for n, row in numbered if any(map(_filled, row[len(names) :]))), None)
    require(beyond is None, f"{path}, row {beyond} has cells beyond the heading's {len(names)}")
    return cells


def _sheet_rows(path: Path, values: Any, formulas: Any) -> Iterator[tuple[int, _Row]]:
    """Yield number and cells of each row of a sheet that is not empty."""
    # The size that the file states may be false, and every row would be filled up to it.
    for sheet in (values, formulas):
        sheet.reset_dimensions()
    size = 0
    pairs = zip_longest(
        values.iter_rows(values_only=True), formulas.iter_rows(values_only=True), fillvalue=()
    )
    for number, (row, written) in enumerate(pairs, start=1):
        size += _CELL * len(row)
        if size > MOST["a table"]:
            require_within(f"{path} has cells of", size, "a table")
        for value, formula in zip(row, written, strict=False):
            if value is None and formula is not None:
                raise InputError(
                    f"{path}, row {number} has the formula {shown(str(formula), 40)} without a "
                    "value: save the file in a spreadsheet program, which computes it"
                )
        if any(map(_filled, row)):
            yield number, row


def _filled(cell: Any) -> bool:
    return cell is not None and str(cell).strip() != ""


def _require_small(path: Path, content: bytes) -> None:
    """Raise `InputError` if a Parquet file unpacks to more than a table may.

    Parquet stores a repeated text once, and a run of one number as two numbers: the file's own
    size bounds nothing.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import compute
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    about = ParquetFile(io.BytesIO(content))
    groups = (about.metadata.row_group(index) for index in range(about.num_row_groups))
    written = sum(group.total_byte_size for group in groups)
    # pandas takes eight bytes or more a cell, even if it is missing.
    size = max(written, 8 * about.metadata.num_rows * about.metadata.num_columns)
    require_within(f"{path} says that it holds", size, "a table")
    kinds = pa.string(), pa.binary(), pa.large_string(), pa.large_binary()
    texts = [field.name for field in about.schema_arrow if field.type in kinds]
    wide = [field.name for field in about.schema_arrow if not pa.types.is_primitive(field.type)]
    file = ParquetFile(io.BytesIO(content), read_dictionary=texts)
    size = 0
    for batch in file.iter_batches(columns=wide):
        size += batch.nbytes
        for column in map(batch.column, texts):
            lengths = compute.binary_length(column.dictionary)
            size += compute.sum(lengths.take(column.indices)).as_py() or 0
        require_within(f"{path} unpacks to at least", size, "a table")
