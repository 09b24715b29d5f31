"""One cell of a row as a number, a text or a day, whatever the other rows hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np

from fedmed_flower.data.site import Row
from fedmed_flower.statistics.request import OPERATIONS, Filter
from fedmed_flower.statistics.types import Floats, Mask

# What a row holds beside its columns.
NOT_COLUMNS = ("patient", "image")
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
        whole = isinstance(value, int) or value.is_integer()
        return _whole(int(value)) if whole else repr(value)
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


def numbers_of(values: Sequence[Any]) -> Floats:
    """Return (rows,) floats; see `number_of`."""
    return np.fromiter(map(number_of, values), np.float64, len(values))


def only_whole(numbers: Floats) -> Floats:
    """Return (rows,) the whole numbers; NaN for all others."""
    return np.where(numbers == np.floor(numbers), numbers, np.nan)


def cells_of(rows: Sequence[Row], name: str) -> list[Any]:
    """Return each row's value of a column; None if it is missing, several, or unreadable."""
    return [_cell(row, name) for row in rows]


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
        value = plain(row.get(name))
    except Exception:
        # A row may be of any class: one that cannot be read is no reason to fail for all.
        return None
    return value if is_single(value) else None


def _whole(number: int) -> str:
    return str(number) if number.bit_length() <= _MOST_BITS else hex(number)
