"""The rows of one hospital as columns."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.site import Row, patient_text, some_of
from fedmed_flower.errors import InputError, shown
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.request import Filter, Request, Survival
from fedmed_flower.statistics.types import Codes, Floats, Mask
from fedmed_flower.statistics.values import (
    NOT_COLUMNS,
    cells_of,
    day_of,
    is_gap,
    is_number,
    is_single,
    numbers_meet,
    numbers_of,
    only_whole,
    text_of,
    texts_meet,
)

log = logging.getLogger("flwr.fedmed")

# No request can name a longer column.
_MOST_LETTERS = 200
_EVENTS: Mapping[str | None, int] = {"1": 1, "0": 0}


class Columns:
    """The rows of a hospital, column by column.

    Parameters
    ----------
    rows : sequence of dict
        Each has ``patient``. A column is a key whose values are all single: numbers, texts, dates.
    request : Request
    schema : object, optional
        As `Declared` takes them.

    Attributes
    ----------
    names : tuple of str
    patients : list of str
        The patient of each row.
    declared : Declared
    """

    def __init__(self, rows: Sequence[Row], request: Request, schema: Any = None) -> None:
        self._rows = rows
        self.declared = Declared(request, schema)
        self.patients = [patient_text(row["patient"]) for row in rows]
        all_single: dict[Any, bool] = {}
        for row in rows:
            for name, value in row.items():
                all_single[name] = all_single.get(name, True) and is_single(value)
        self.names = tuple(
            name for name, single in all_single.items() if single and _can_be_named(name)
        )
        self._kinds: dict[str, bool] = {}
        self._texts: dict[str, list[str | None]] = {}
        self._days: dict[str, tuple[Floats, bool]] = {}
        self._numbers: dict[str, NDArray[np.float64]] = {}

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.patients)

    @cached_property
    def patient_of_row(self) -> Codes:
        """For each row, the number of its patient."""
        return np.unique(self.patients, return_inverse=True)[1].astype(np.int64)

    def is_categorical(self, name: str) -> bool:
        """Return whether a column holds categories: as declared, else by most of its values."""
        declared = self.declared.is_categorical(name)
        return self._holds_categories(name) if declared is None else declared

    def _holds_categories(self, name: str) -> bool:
        """Return whether a column holds categories, whatever a request declares it to be."""
        if name not in self._kinds:
            by_schema = self.declared.by_schema(name)
            self._kinds[name] = self._mostly_texts(name) if by_schema is None else by_schema
        return self._kinds[name]

    def _mostly_texts(self, name: str) -> bool:
        given = cells_of(self._rows, name)
        numbers = sum(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
        return 2 * numbers < sum(not is_gap(value) for value in given)

    def numbers(self, name: str) -> Floats:
        """Return a column as (rows,) floats; NaN if there is no number below 1e100.

        In a column that is declared whole, other numbers count as missing. The hospital's log says
        how many.
        """
        if name not in self._numbers:
            self._numbers[name] = self._read_numbers(name)
        return self._numbers[name]

    def _read_numbers(self, name: str) -> Floats:
        numbers = numbers_of(cells_of(self._rows, name))
        if not self.declared.is_whole(name):
            return numbers
        whole = only_whole(numbers)
        fractions = numbers[~np.isnan(numbers) & np.isnan(whole)]
        if fractions.size:
            log.warning(
                "%s is declared to hold whole numbers: %d of %d values, such as %g, count as "
                "missing",
                shown(name),
                fractions.size,
                np.count_nonzero(~np.isnan(numbers)),
                fractions[0],
            )
        return whole

    def texts(self, name: str) -> list[str | None]:
        """Return a column as categories, in which 1, 1.0, "1" and True are the same.

        None for a missing value. In a column of numbers, a text that is no number is missing, and
        so is a number that is not whole if the schema says that all are.
        """
        if name not in self._texts:
            texts = [text_of(value) for value in cells_of(self._rows, name)]
            if not self._holds_categories(name):
                texts = [text if text and is_number(text) else None for text in texts]
            if self.declared.whole_by_schema(name):
                texts = [text if text and float(text).is_integer() else None for text in texts]
            self._texts[name] = texts
        return self._texts[name]

    def codes(self, name: str) -> tuple[Codes, list[str]]:
        """Return the number of each row's category, -1 if it is missing, and the categories."""
        texts = self.texts(name)
        names = sorted({text for text in texts if text is not None})
        number = {text: index for index, text in enumerate(names)}
        return np.array([-1 if t is None else number[t] for t in texts], np.int64), names

    def days(self, name: str) -> tuple[Floats, bool]:
        """Return a column as (rows,) numbers of days, and whether it holds dates.

        The hospital's log says how many values are no date that can be read.
        """
        if name not in self._days:
            self._days[name] = self._read_days(name)
        return self._days[name]

    def _read_days(self, name: str) -> tuple[Floats, bool]:
        values = cells_of(self._rows, name)
        dates = sum(isinstance(value, str | date) and not is_gap(value) for value in values)
        if 2 * dates < sum(not is_gap(value) for value in values):
            return self.numbers(name), False
        days = np.array([day_of(value) for value in values], np.float64)
        wrong = [v for v, day in zip(values, days, strict=True) if not is_gap(v) and day != day]
        if wrong:
            log.warning(
                "%s: no date in %d of %d values, such as %s: write dates as 2020-01-13",
                shown(name),
                len(wrong),
                len(values),
                quoted(wrong[0], 40),
            )
        return days, True

    def family(self, name: str) -> tuple[str, ...]:
        """Return the columns made of the same values, such as ``age`` and ``age-band``."""
        source = name.removesuffix("-band")
        if source not in self.declared.bands:
            return (name,)
        return tuple(one for one in (source, f"{source}-band") if one in self.names)

    def identities(self, family: tuple[str, ...]) -> list[str | None]:
        """Return a text of each row's values in some columns; None if all are missing."""
        # As texts, whatever a request declares: later requests must recognise the row.
        rows = zip(*map(self.texts, family), strict=True)
        return [ascii(values) if any(v is not None for v in values) else None for values in rows]

    def contents(self) -> list[str]:
        """Return a text for each row that distinguishes a patient's rows, whatever their order."""
        count = Counter(self.patients)
        return [
            ascii(sorted((name, text_of(row.get(name))) for name in self.names))
            if count[patient] > 1
            else ""
            for row, patient in zip(self._rows, self.patients, strict=True)
        ]

    def require(self, *names: str) -> None:
        """Raise `InputError` if one of these columns is missing."""
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=1)
                listing = some_of(self.names, 10)
                hint = f"did you mean {near[0]}?" if near else f"there are {listing}"
                raise InputError(f"there is no column {name!r} of single values: {hint}")

    def meets(self, condition: Filter) -> Mask:
        """Return for each row whether it meets a condition that fits the kind of its column."""
        if self.is_categorical(condition.column):
            return texts_meet(self.texts(condition.column), condition)
        return numbers_meet(self.numbers(condition.column), condition)

    def survival(self, survival: Survival) -> tuple[Floats, Codes]:
        """Return times and events of two columns that exist; see `follow_up`."""
        return follow_up(self.numbers(survival.time), self.texts(survival.event), survival.horizon)


def follow_up(times: Floats, events: Sequence[str | None], horizon: float) -> tuple[Floats, Codes]:
    """Return times and events, both (rows,).

    A time is NaN if it is below 0, or if time or event is missing. A time beyond the horizon is
    infinite and censored. An event is "1" if it happened and "0" if the time is that of censoring.
    """
    happened = np.array([_EVENTS.get(text, -1) for text in events], np.int64)
    with np.errstate(invalid="ignore"):
        times = np.where((happened < 0) | (times < 0), np.nan, times)
        happened = np.where(times > horizon, 0, happened)
        times = np.where(times > horizon, np.inf, times)
    return times, happened


def _can_be_named(name: object) -> bool:
    return isinstance(name, str) and len(name) <= _MOST_LETTERS and name not in NOT_COLUMNS
