"""The rows of one hospital as columns."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.rows import Rows
from fedmed_flower.data.site import Row, patients_of, some_of
from fedmed_flower.errors import InputError, shown
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.fewest import numbered
from fedmed_flower.statistics.request import Filter, Request, Survival
from fedmed_flower.statistics.types import Codes, Floats, Mask
from fedmed_flower.statistics.values import (
    NOT_COLUMNS,
    are_single,
    cells_of,
    coded,
    day_of,
    is_gap,
    is_number,
    is_single,
    numbers_meet,
    numbers_of,
    only_whole,
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
        self._rows = Rows.of(rows)
        self.declared = Declared(request, schema)
        self.patients = patients_of(self._rows)
        names = _single_columns(self._rows)
        self.names = tuple(name for name in names if _can_be_named(name))
        self._kinds: dict[str, bool] = {}
        self._written: dict[str, tuple[Codes, list[str]]] = {}
        self._days: dict[str, tuple[Floats, bool]] = {}
        self._numbers: dict[str, NDArray[np.float64]] = {}

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.patients)

    @cached_property
    def patient_of_row(self) -> Codes:
        """For each row, the number of its patient, in the order of `distinct_patients`."""
        number = {patient: index for index, patient in enumerate(self.distinct_patients)}
        return np.fromiter(map(number.__getitem__, self.patients), np.int64, self.count)

    @cached_property
    def distinct_patients(self) -> list[str]:
        """The patients in the order of their first rows."""
        return [*dict.fromkeys(self.patients)]

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
        if isinstance(given, np.ndarray):
            return False
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
        codes, names = self._coded(name)
        # The last one stands for a missing value, -1.
        texts = [*names, None]
        return [texts[code] for code in codes.tolist()]

    def _as_written(self, name: str) -> tuple[Codes, list[str]]:
        """Return the number of each row's text of a column, -1 if it is missing, and the texts."""
        if name in self._written:
            return self._written[name]
        cells = cells_of(self._rows, name)
        written = coded(cells)
        # The texts of a table's numbers, few of which are the same, take more memory than they.
        if not isinstance(cells, np.ndarray):
            self._written[name] = written
        return written

    def _coded(self, name: str) -> tuple[Codes, list[str]]:
        """Return what `codes` returns, with the categories in any order."""
        codes, names = self._as_written(name)
        if self._holds_categories(name):
            return codes, names
        # Not as a request declares: `identities` must not depend on it.
        whole = self.declared.whole_by_schema(name)
        cells = cells_of(self._rows, name)
        if isinstance(cells, np.ndarray):
            numbers = numbers_of(cells)
            return np.where(np.isnan(only_whole(numbers) if whole else numbers), -1, codes), names
        usable = [is_number(text) and not (whole and float(text) % 1) for text in names]
        return np.where(np.array([*usable, False])[codes], codes, -1), names

    def codes(self, name: str) -> tuple[Codes, list[str]]:
        """Return the number of each row's category, -1 if it is missing, and the categories."""
        codes, texts = self._coded(name)
        distinct, numbers = numbered(codes)
        # The first one is -1 if a value is missing.
        known = distinct[distinct >= 0].tolist()
        names = sorted(texts[code] for code in known)
        place = {text: index for index, text in enumerate(names)}
        places = np.array([-1] * (distinct.size - len(known)) + [place[texts[c]] for c in known])
        return places.astype(np.int64)[numbers], names

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

    def identities(
        self, families: Sequence[tuple[str, ...]], with_missing: bool
    ) -> tuple[Codes, list[str]]:
        """Return the number of each row's text of its values in families of columns, and the texts.

        The values of a family, or their text, are missing if all of them are. A row in which a
        family is missing has the number -1, unless `with_missing`.
        """
        # As texts, whatever a request declares: later requests must recognise the row.
        written = []
        for family in families:
            parts = [self._coded(name) for name in family]
            missing = np.logical_and.reduce([codes < 0 for codes, _ in parts])
            written.append(_together(parts, missing))
        if with_missing:
            missing = np.zeros(self.count, bool)
        else:
            missing = np.logical_or.reduce([codes < 0 for codes, _ in written])
        return _together(written, missing)

    def contents(self) -> list[str]:
        """Return a text for each row that distinguishes a patient's rows, whatever their order."""
        several = np.bincount(self.patient_of_row)[self.patient_of_row] > 1
        contents = [""] * self.count
        rows = np.flatnonzero(several)
        if not rows.size:
            return contents
        parts = []
        for name in sorted(self.names):
            codes, texts = self._as_written(name)
            written = [ascii((name, text)) for text in (*texts, None)]
            parts.append([written[code] for code in codes[rows].tolist()])
        cells_of_row = zip(*parts, strict=True) if parts else [()] * rows.size
        for row, cells in zip(rows.tolist(), cells_of_row, strict=True):
            contents[row] = f"[{', '.join(cells)}]"
        return contents

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


def _single_columns(rows: Sequence[Row]) -> list[Any]:
    """Return the names of the columns that hold single values only."""
    if isinstance(rows, Rows):
        names = rows.names if len(rows) else ()
        return [name for name in names if are_single(rows.column(name))]
    all_single: dict[Any, bool] = {}
    for row in rows:
        for name, value in row.items():
            all_single[name] = all_single.get(name, True) and is_single(value)
    return [name for name, single in all_single.items() if single]


def _together(parts: Sequence[tuple[Codes, list[str]]], missing: Mask) -> tuple[Codes, list[str]]:
    """Return the number of each row's combination of texts, and each combination as one text.

    Parameters
    ----------
    parts : sequence of (ndarray, list of str)
        For each part (rows,) the number of the row's text, -1 if it is missing, and the texts.
    missing : ndarray of bool
        (rows,) which rows have the number -1.
    """
    if len(parts) == 1 and missing[parts[0][0] < 0].all():
        # No combination lacks the only part.
        codes, texts = parts[0]
        return np.where(missing, -1, codes), _in_tuples(texts)
    joint = np.zeros(missing.size, np.int64)
    for codes, texts in parts:
        joint = joint * (len(texts) + 1) + codes + 1
    left, numbers = numbered(joint)
    columns: list[list[str | None]] = []
    for _, texts in reversed(parts):
        left, codes = np.divmod(left, len(texts) + 1)
        with_none = [None, *texts]
        columns.insert(0, [with_none[code] for code in codes.tolist()])
    return np.where(missing, -1, numbers), [ascii(v) for v in zip(*columns, strict=True)]


def _in_tuples(texts: Sequence[str]) -> list[str]:
    """Return for each text the `ascii` of a tuple that holds it alone."""
    letters = "".join(texts)
    if letters.isascii() and letters.isprintable() and "\\" not in letters:
        if "'" not in letters:
            return [f"('{text}',)" for text in texts]
        if '"' not in letters and all("'" in text for text in texts):
            return [f'("{text}",)' for text in texts]
    return [ascii((text,)) for text in texts]


def _can_be_named(name: object) -> bool:
    return isinstance(name, str) and len(name) <= _MOST_LETTERS and name not in NOT_COLUMNS
