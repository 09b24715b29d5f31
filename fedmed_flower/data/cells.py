"""The cells of a CSV or Parquet file as texts and numbers, and what is wrong with them."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.data.bounded import require_within, unpacked
from fedmed_flower.errors import InputError, shown

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = ("", "?", "NA", "N/A", "NaN", "NaT", "None", "NULL", "<NA>")
# Nothing is measured or counted beyond it, and sums of squares below it fit a float.
LARGEST = 1e30

# Data frames write classes as 1.0 where a column has gaps; "1.00" and "01" may be codes.
_WHOLE = re.compile(r"(0|-?[1-9][0-9]*)\.0")
_FLAGS = {"true": "1", "false": "0"}


def category_text(value: Any) -> str | None:
    """Return the text that a value has as a category: 1.0, 1, "1.0", " 1", True and "true" are "1".

    None, NaN and an empty text are None.
    """
    if isinstance(value, str):
        text = value.strip()
    elif value is None or (isinstance(value, Real) and value != value):
        return None
    else:
        whole = isinstance(value, float | np.floating) and float(value).is_integer()
        text = str(int(value) if whole else value).strip()
    text = _FLAGS.get(text.lower(), text)
    return (found[1] if (found := _WHOLE.fullmatch(text)) else text) or None


@dataclass
class Cells:
    """The columns of a table before they are understood; which rows are turned away, and why.

    Attributes
    ----------
    where : str
        How errors call the table.
    word, lines : str, sequence of int
        What a row is called by: "line" and its number in a text, or "row" and its number.
    names : list of str
        Of the columns, in order.
    column : callable
        Returns the cells at a place in `names`: texts or whatever else, None if missing.
    decimal : str
        The decimal mark of numbers in texts.
    ragged : int
        How many rows have more or fewer cells than the heading; they are not here.
    problems : list of str
        What was found wrong so far.
    missing : frozenset of str
        What stands for a missing value, in small letters.
    away : array of bool
        Which rows are turned away so far.
    """

    where: str
    word: str
    lines: Sequence[int]
    names: list[str]
    column: Callable[[int], list[Any]]
    decimal: str = "."
    ragged: int = 0
    problems: list[str] = field(default_factory=list)
    missing: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.away = np.zeros(len(self.lines), dtype=bool)

    def of(self, name: str) -> list[Any]:
        """Return a column's cells; None in all rows where there is no such column."""
        if name in self.names:
            return self.column(self.names.index(name))
        return [None] * len(self.lines)

    def texts(self, name: str, declared: Sequence[str] = ()) -> list[str | None]:
        """Return a column as texts, None if missing; what is declared is never missing."""
        return [
            text if text in declared or (text and text.lower() not in self.missing) else None
            for text in map(category_text, self.of(name))
        ]

    def numbers(
        self, name: str, limits: tuple[float, float] | None = None, needed: str = ""
    ) -> NDArray[np.float64]:
        """Return a column as numbers, NaN if one is missing or cannot be.

        If it is `needed`, and called so, rows that have none are turned away.
        """
        cells = self.of(name)
        found = [self._number(cell) for cell in cells]
        values = np.asarray([math.nan if value is None else value for value in found])
        values[np.isin(values, [float(text) for text in self.missing if _is_number(text)])] = np.nan
        none, far = np.asarray([value is None for value in found], bool), np.abs(values) > LARGEST
        faults = {"is no number": none, f"is beyond {LARGEST:g}": far}
        if limits:
            what = f"is outside {plain(limits[0])} to {plain(limits[1])}"
            faults[what] = ((values < limits[0]) | (values > limits[1])) & ~far
        for what, mask in faults.items():
            values[mask] = np.nan
            self.tell(needed or name, what, mask, cells, bool(needed))
        return values

    def _number(self, cell: Any) -> float | None:
        """Return a cell's number, NaN if it is missing, None if it is neither."""
        if isinstance(cell, str):
            text = cell.strip()
            if not text or text.lower() in self.missing:
                return math.nan
            cell = _FLAGS.get(text.lower(), text).replace(self.decimal, ".")
            return float(cell) if _is_number(cell) else None
        if cell is None:
            return math.nan
        try:
            return float(cell)
        except (TypeError, ValueError, OverflowError):  # Such as a date.
            return None

    def tell(
        self, name: str, what: str, mask: ArrayLike, cells: Any = None, away: bool = True
    ) -> None:
        """Note what is wrong in some rows, and turn these away where a row cannot be without."""
        wrong = np.asarray(mask, bool) & ~self.away
        if not wrong.any():
            return
        count, first = int(wrong.sum()), int(wrong.argmax())
        example = "" if cells is None else f" with {_example(cells[first])}"
        outcome = "turned away" if away else "counted as missing"
        self.problems.append(
            shown(
                f"{name} {what} in {count} row{'s' * (count > 1)}, {outcome}; the first is "
                f"{self.word} {self.lines[first]}{example}"
            )
        )
        if away:
            self.away |= wrong

    def need(self, name: str, texts: Sequence[str | None], allowed: Sequence[str] = ()) -> None:
        """Turn away rows without a text, or with none of those that are allowed."""
        self.tell(name, "is missing", [text is None for text in texts])
        if allowed:
            what = f"is none of {', '.join(allowed)}"
            self.tell(name, what, [text not in allowed for text in texts], texts)


def read_text(path: Path, content: bytes) -> Cells:
    """Return the cells of a text with a heading, by lines.

    Raises
    ------
    InputError
        If it is no such text in UTF-8, or, if it is called ``.gz``, no whole gzip file or one
        that unpacks to more than `bounded.MOST` bytes.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(io.BytesIO(content)) as packed:
                content = unpacked(packed, path, "a table")
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 ({error.reason}): save it as such") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file: {error}") from None
    heading = next((line for line in lines if line.strip(" ,;\t\r\n")), "")
    require(bool(heading), f"{path} is empty")
    require("\0" not in heading, f"{path} is no text in UTF-8: save it as such")
    # Where a comma is the decimal mark, spreadsheets separate columns by semicolons.
    separator = max(",;\t", key=heading.count)
    lines.seek(0)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        found = [(reader.line_num, line) for line in reader if any(map(str.strip, line))]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    names = [name.strip() for name in found.pop(0)[1]]
    whole = [(number, line) for number, line in found if len(line) == len(names)]
    cells = Cells(
        shown(path),
        "line",
        [number for number, _ in whole],
        names,
        lambda index: [line[index] for _, line in whole],
        "," if separator == ";" else ".",
        len(found) - len(whole),
    )
    if cells.ragged:
        number, line = next(one for one in found if len(one[1]) != len(names))
        cells.problems.append(
            f"the heading has {len(names)} cells, other than {cells.ragged} "
            f"row{'s' * (cells.ragged > 1)}, turned away; the first is line {number} with "
            f"{len(line)}"
        )
    return cells


def read_parquet(path: Path, content: bytes) -> Cells:
    """Return the cells of a Parquet file.

    Raises
    ------
    InputError
        If it is none, it has more than `bounded.MOST` bytes as numbers and texts in memory, or
        pyarrow is not installed.
    """
    # Loading pandas takes a second, which a table in a text need not wait for.
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
        raise InputError(f"{path} is no whole Parquet file: {reason}") from error
    # A column that pandas took for the index when the file was written.
    named = [name for name in frame.index.names if name is not None]
    return frame_cells(frame.reset_index(named) if named else frame, shown(path))


def frame_cells(frame: DataFrame, where: str) -> Cells:
    """Return the cells of a data frame, but for its index."""

    def column(index: int) -> list[Any]:
        values = frame.iloc[:, index]
        there = values.notna()
        return [cell if known else None for cell, known in zip(values, there, strict=True)]

    names = [str(name).strip() for name in frame.columns]
    return Cells(where, "row", range(1, len(frame) + 1), names, column)


def _require_small(path: Path, content: bytes) -> None:
    """Raise `InputError` where a Parquet file holds more than a table may.

    Parquet writes a text that is repeated once, and a run of one number as two numbers.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import compute
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    about = ParquetFile(io.BytesIO(content))
    groups = (about.metadata.row_group(index) for index in range(about.num_row_groups))
    written = sum(group.total_byte_size for group in groups)
    # Pandas takes eight bytes or more a cell, even for none.
    size = max(written, 8 * about.metadata.num_rows * about.metadata.num_columns)
    require_within(f"{path} says that it holds", size, "a table")
    kinds = pa.string(), pa.binary(), pa.large_string(), pa.large_binary()
    texts = [field.name for field in about.schema_arrow if field.type in kinds]
    wide = [one.name for one in about.schema_arrow if not pa.types.is_primitive(one.type)]
    file, size = ParquetFile(io.BytesIO(content), read_dictionary=texts), 0
    for batch in file.iter_batches(columns=wide):
        size += batch.nbytes
        for column in map(batch.column, texts):
            lengths = compute.binary_length(column.dictionary)
            size += compute.sum(lengths.take(column.indices)).as_py() or 0
        require_within(f"{path} unpacks to at least", size, "a table")


def plain(number: float) -> str:
    """Return a number as a person writes it: 50 and 2.5."""
    return f"{number:.12g}"


def near_names(name: str, names: Iterable[str]) -> str:
    """Return which names are like one, as an addition in brackets; nothing if none is."""
    folded = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), folded)
    return f" (near: {', '.join(repr(folded[text]) for text in near)})" if near else ""


def require(fulfilled: bool, text: str) -> None:
    """Raise `InputError` with a text where something is not as it must be."""
    if not fulfilled:
        raise InputError(text)


def _example(cell: Any) -> str:
    try:
        return repr(str(cell)[:40])
    except Exception:  # Such as a whole number of 5,000 digits.
        return f"a {type(cell).__name__}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
