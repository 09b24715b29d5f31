"""One cell of a row as a number, a text or a day, whatever the other rows hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.rows import Rows, column_of
from fedmed_flower.data.site import Row
from fedmed_flower.statistics.request import OPERATIONS, Filter
from fedmed_flower.statistics.types import Cells, Codes, Floats, Mask

# What a row holds beside its columns.
NOT_COLUMNS = ("patient", "image")
# Values of these types that are equal are the same.
_SIMPLE = {str, type(None)}
_MISSING = {"", "nan", "none", "nat", "<na>", "na", "?"}
# Python refuses decimal texts of more than 4,300 digits; longer integers are written in hex.
_MOST_BITS = 10_000


def plain(value: Any) -> Any:
    """Return a number of NumPy or torch as one of Python, and a masked one as None."""
    if value is np.ma.masked:
        return None
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_single(value: Any) -> bool:
    """Return whether a cell holds a text, a number, True or False, a date, or nothing."""
    return value is None or isinstance(plain(value), str | int | float | date)


def are_single(cells: NDArray[Any]) -> bool:
    """Return whether all cells of a table's column are single."""
    if cells.dtype != object:
        return True
    values = cells.tolist()
    return {*map(type, values)} <= _SIMPLE or all(map(is_single, values))


def is_gap(value: Any) -> bool:
    """Return whether a plain value stands for a missing one."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    # Only NaN and pandas' missing time are not equal to themselves.
    return value is None or (isinstance(value, float | date) and value != value)


def number_of(value: Any) -> float:
    """Return a number, a text of one or a truth value as a float below 1e100; NaN for all else."""
    value = plain(value)
    if isinstance(value, str):
        return float(value) if is_number(value) else math.nan
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan
    # Squares of larger numbers, and their sums, would overflow.
    return number if abs(number) < 1e100 else math.nan


def is_number(text: str) -> bool:
    """Return whether a text is a number below 1e100."""
    try:
        return abs(float(text)) < 1e100 and "_" not in text
    except ValueError:
        return False


def text_of(value: Any) -> str | None:
    """Return a single value as a category, in which 1, 1.0, "1" and True are the same.

    None if it is missing, or several values.
    """
    value = plain(value)
    if is_gap(value) or not is_single(value):
        return None
    if isinstance(value, int | float):
        return _number_text(value)
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    # Spreadsheets and data frames write a code as 1.0 if its column has gaps.
    return str(int(number)) if text.endswith(".0") and number.is_integer() else text


def day_of(value: Any) -> float:
    """Return a date, or a text that begins with one, as a number of days; NaN for all else."""
    value = plain(value)
    if isinstance(value, str):
        try:
            return float(date.fromisoformat(value.strip()[:10]).toordinal())
        except ValueError:
            return math.nan
    if isinstance(value, date) and not is_gap(value):
        return float(value.toordinal())
    return math.nan


def date_text(day: float) -> str:
    """Return the date of a number of days as `day_of` gives it, such as 2020-01-13."""
    return date.fromordinal(max(1, min(int(day), date.max.toordinal()))).isoformat()


def week_text(week: int, dated: bool) -> str:
    """Return the first day of a week: a Monday's date, or "day 14" where days are numbered.

    Parameters
    ----------
    week : int
        Weeks since the first of the calendar, or since day 0.
    dated : bool
        Whether days are those of the calendar.
    """
    # The first day of the calendar is a Monday.
    return date_text(7.0 * week + 1) if dated else f"day {7 * week}"


def numbers_of(values: Cells) -> Floats:
    """Return (rows,) floats; see `number_of`."""
    if isinstance(values, np.ndarray):
        numbers = values.astype(np.float64, copy=False)
        large = np.abs(numbers) >= 1e100
        return np.where(large, np.nan, numbers) if large.any() else numbers
    return np.fromiter(map(number_of, values), np.float64, len(values))


def only_whole(numbers: Floats) -> Floats:
    """Return (rows,) the whole numbers; NaN for all others."""
    return np.where(numbers == np.floor(numbers), numbers, np.nan)


def cells_of(rows: Sequence[Row], name: str) -> Cells:
    """Return each row's value of a column; None if it is missing, several, or unreadable.

    A column of numbers of a table is returned as an array, in which NaN is missing.
    """
    if isinstance(rows, Rows) and name not in NOT_COLUMNS:
        if name not in rows.names:
            return [None] * len(rows)
        cells = column_of(rows, name)
        if isinstance(cells, np.ndarray) or {*map(type, cells)} <= _SIMPLE:
            return cells
        return [_single(cell) for cell in cells]
    return [_cell(row, name) for row in rows]


def coded(values: Cells) -> tuple[Codes, list[str]]:
    """Return the number of each value's category, -1 if it is missing, and the categories.

    See `text_of`; it is called once for values that are the same.
    """
    if isinstance(values, np.ndarray):
        known = ~np.isnan(values)
        distinct, numbers = np.unique(values[known], return_inverse=True)
        codes = np.full(len(values), -1, np.int64)
        codes[known] = numbers
        return codes, _number_texts(distinct)
    # Other values may be equal and yet not the same.
    if {*map(type, values)} <= _SIMPLE:
        text_by_value = {value: text_of(value) for value in dict.fromkeys(values)}
        number: dict[str | None, int] = {None: -1}
        for text in text_by_value.values():
            number.setdefault(text, len(number) - 1)
        code_of = {value: number[text] for value, text in text_by_value.items()}
        codes = np.fromiter(map(code_of.__getitem__, values), np.int64, len(values))
    else:
        texts = list(map(text_of, values))
        number = {None: -1}
        for text in texts:
            number.setdefault(text, len(number) - 1)
        codes = np.fromiter(map(number.__getitem__, texts), np.int64, len(values))
    return codes, [text for text in number if text is not None]


def numbers_meet(numbers: Floats, condition: Filter) -> Mask:
    """Return for each number whether it meets a condition; NaN meets none."""
    compare = OPERATIONS[condition.operation]
    value = float(condition.value)
    return np.asarray(compare(numbers, value) & ~np.isnan(numbers))


def texts_meet(texts: Sequence[str | None], condition: Filter) -> Mask:
    """Return for each category whether it meets a condition; a missing one meets none."""
    compare = OPERATIONS[condition.operation]
    wanted = text_of(condition.value)
    return np.array([text is not None and compare(text, wanted) for text in texts], bool)


def _cell(row: Row, name: str) -> Any:
    if name in NOT_COLUMNS:
        return None
    try:
        return _single(row.get(name))
    except Exception:
        # A row may be of any class: one that cannot be read is no reason to fail for all.
        return None


def _single(value: Any) -> Any:
    value = plain(value)
    return value if is_single(value) else None


def _number_texts(values: NDArray[Any]) -> list[str]:
    """Return the text of each number of an array; none is NaN."""
    # To write the whole list takes half the time of number after number.
    texts = repr(values.tolist())[1:-1].split(", ") if values.size else []
    for index in np.flatnonzero(values == np.floor(values)).tolist():
        if math.isfinite(value := values[index].item()):
            texts[index] = _number_text(value)
    return texts


def _number_text(value: float) -> str:
    whole = isinstance(value, int) or value.is_integer()
    return _whole(int(value)) if whole else repr(value)


def _whole(number: int) -> str:
    return str(number) if number.bit_length() <= _MOST_BITS else hex(number)
