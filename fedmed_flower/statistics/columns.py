"""The rows of one hospital as columns."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.site import Row, patient_text, some_of
from fedmed_flower.errors import InputError
from fedmed_flower.statistics.request import OPERATIONS, Filter, Request, Survival

Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]
_NOT_COLUMNS = ("patient", "image")
_MISSING = {"", "nan", "none", "nat", "<na>", "na", "?"}


class Columns:
    """The rows of a hospital, column by column.

    Parameters
    ----------
    rows : sequence of dict
        Each with ``patient``; a column is what holds single values: numbers, texts, dates.
    request : Request
        Its declarations win over those of `schema`.
    schema : object, optional
        What the hospital declares: ``numeric``, ``categorical``, ``ranges`` and ``categories``, any
        of which may be missing.

    Attributes
    ----------
    names : tuple of str
    patients : list of str
        Of each row.
    ranges, categories : dict
        What is declared.
    """

    def __init__(self, rows: Sequence[Row], request: Request, schema: Any = None) -> None:
        self._rows, self._request, self._schema = rows, request, schema
        self.patients = [patient_text(row["patient"]) for row in rows]
        self.ranges = {**_declared(schema, "ranges"), **request.ranges}
        self.categories = {**_declared(schema, "categories"), **request.categories}
        found: dict[str, bool] = {}
        for row in rows:
            for name, value in row.items():
                found[name] = found.get(name, True) and _single(value)
        self.names = tuple(
            name for name, single in found.items() if single and name not in _NOT_COLUMNS
        )
        self._kinds: dict[str, bool] = {}
        self._texts: dict[str, list[str | None]] = {}
        self._numbers: dict[str, NDArray[np.float64]] = {}

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.patients)

    @cached_property
    def whose(self) -> Codes:
        """A number for each row that is the same for the rows of one patient."""
        return np.unique(self.patients, return_inverse=True)[1].astype(np.int64)

    def is_categorical(self, name: str) -> bool:
        """Return whether a column holds categories: as declared, or by what most values are."""
        if not self._own_kind(name):
            if name in (*self._request.categorical, *self.categories):
                return True
            if name in (*self.ranges, *self._request.resolutions):
                return False
        return self._holds_categories(name)

    def _own_kind(self, name: str) -> bool | None:
        """Return what the hospital's own schema says."""
        schema = self._schema
        coded = {"binary": "target", "multi-class": "target", "survival": "event"}
        if name and name == getattr(schema, coded.get(getattr(schema, "task", ""), ""), ""):
            return True
        if name in (*getattr(schema, "categorical", ()), *_declared(schema, "categories")):
            return True
        numeric = (*getattr(schema, "numeric", ()), *_declared(schema, "ranges"))
        return False if name in numeric else None

    def _holds_categories(self, name: str) -> bool:
        """Return whether a column holds categories, whatever a request declares it to be."""
        if name not in self._kinds:
            own = self._own_kind(name)
            self._kinds[name] = self._mostly_texts(name) if own is None else own
        return self._kinds[name]

    def _mostly_texts(self, name: str) -> bool:
        given = [v for row in self._rows if (v := _item(row.get(name))) is not None]
        numbers = sum(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
        return 2 * numbers < len([v for v in given if not _gap(v)])

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a column as (rows,) floats; NaN where there is no number below 1e100."""
        if name not in self._numbers:
            values = (_number(row.get(name)) for row in self._rows)
            self._numbers[name] = np.fromiter(values, np.float64, self.count)
        return self._numbers[name]

    def texts(self, name: str) -> list[str | None]:
        """Return a column as categories, in which 1, 1.0, "1" and True are the same.

        None where there is no value, which text in a column of numbers is not.
        """
        if name not in self._texts:
            texts = [_text(row.get(name)) for row in self._rows]
            if not self._holds_categories(name):
                texts = [text if text and _is_number(text) else None for text in texts]
            self._texts[name] = texts
        return self._texts[name]

    def codes(self, name: str) -> tuple[Codes, list[str]]:
        """Return a column as numbers of its categories, -1 where there is none, and their names."""
        texts = self.texts(name)
        names = sorted({text for text in texts if text is not None})
        number = {text: place for place, text in enumerate(names)}
        return np.array([-1 if t is None else number[t] for t in texts], np.int64), names

    def days(self, name: str) -> tuple[NDArray[np.float64], bool]:
        """Return a column of dates as numbers of days, and whether it holds dates."""
        values = [_item(row.get(name)) for row in self._rows]
        dates = sum(isinstance(value, str | date) and not _gap(value) for value in values)
        if 2 * dates < sum(not _gap(value) for value in values):
            return self.numbers(name), False
        return np.array([_day(value) for value in values], np.float64), True

    def family(self, name: str) -> tuple[str, ...]:
        """Return the columns that tell of the same values, such as ``age`` and ``age-band``."""
        source = name.removesuffix("-band")
        if source not in _declared(self._schema, "bands"):
            return (name,)
        return tuple(one for one in (source, f"{source}-band") if one in self.names)

    def identities(self, family: tuple[str, ...]) -> list[str | None]:
        """Return a text of each row's values in some columns; None where it has none of them."""
        # By their texts, whatever a request declares them to be: a row must be known again.
        each = zip(*map(self.texts, family), strict=True)
        return [ascii(values) if any(v is not None for v in values) else None for values in each]

    def contents(self) -> list[str]:
        """Return a text for each row that tells a patient's rows apart, whatever their order."""
        many = Counter(self.patients)
        return [
            ascii(sorted((name, _text(row.get(name))) for name in self.names))
            if many[patient] > 1
            else ""
            for row, patient in zip(self._rows, self.patients, strict=True)
        ]

    def require(self, name: str) -> None:
        """Raise `InputError` where there is no such column."""
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            some = some_of(self.names, 10)
            hint = f"did you mean {near[0]}?" if near else f"there are {some}"
            raise InputError(f"there is no column {name!r} of single values: {hint}")

    def meets(self, condition: Filter) -> Mask:
        """Return for each row whether it meets a condition.

        Raises
        ------
        InputError
            Where there is no such column, or it cannot be compared so.
        """
        name, operation, value = condition
        self.require(name)
        compare = OPERATIONS[operation]
        if not self.is_categorical(name):
            if isinstance(value, str):
                raise InputError(f"{name} holds numbers and cannot be compared with {value!r}")
            numbers = self.numbers(name)
            return np.asarray(compare(numbers, value) & ~np.isnan(numbers))
        if operation not in ("==", "!="):
            raise InputError(f"{name} holds categories: compare it by == or !=, not {operation}")
        wanted = _text(value)
        return np.array([t is not None and compare(t, wanted) for t in self.texts(name)], bool)

    def survival(self, survival: Survival) -> tuple[NDArray[np.float64], Codes]:
        """Return the times, NaN where time or event is missing or the time is below 0, and events.

        Times beyond the horizon are censored there.
        """
        for name in (survival.time, survival.event):
            self.require(name)
        event = np.array([_EVENTS.get(text, -1) for text in self.texts(survival.event)], np.int64)
        times = self.numbers(survival.time).copy()
        with np.errstate(invalid="ignore"):
            times[(event < 0) | (times < 0)] = np.nan
            event = np.where(times > survival.horizon, 0, event)
        return np.minimum(times, survival.horizon), event

    def resolution(self, name: str) -> float | None:
        """Return how finely a numeric column may be told; None where nothing says."""
        if name in self._request.resolutions:
            return float(self._request.resolutions[name])
        if name not in self.ranges:
            return None
        low, high = self.ranges[name]
        step = 10.0 ** math.floor(math.log10((high - low) / 50))
        return max(round(n * step, 12) for n in (1, 2, 5) if n * step <= (high - low) / 50)


_EVENTS: Mapping[str | None, int] = {"1": 1, "0": 0}


def _declared(schema: Any, name: str) -> dict[str, Any]:
    return dict(getattr(schema, name, None) or {})


def _item(value: Any) -> Any:
    """Return a number of NumPy or torch as one of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _single(value: Any) -> bool:
    return value is None or isinstance(_item(value), str | int | float | date)


def _gap(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    # What is not equal to itself is NaN, or pandas' missing time.
    return value is None or (isinstance(value, float | date) and value != value)


def _number(value: Any) -> float:
    value = _item(value)
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan
    # Beyond that squares and their sums would be no floats.
    return number if abs(number) < 1e100 else math.nan


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < 1e100
    except ValueError:
        return False


def _text(value: Any) -> str | None:
    value = _item(value)
    if _gap(value):
        return None
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return str(int(value)) if whole else repr(value)
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    # As spreadsheets and data frames write a code in a column with gaps.
    return str(int(number)) if text.endswith(".0") and number.is_integer() else text


def _day(value: Any) -> float:
    if isinstance(value, str):
        try:
            return float(date.fromisoformat(value.strip()[:10]).toordinal())
        except ValueError:
            return math.nan
    return float(value.toordinal()) if isinstance(value, date) else math.nan
