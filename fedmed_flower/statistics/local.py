"""What one hospital answers without noise: numbers of the minimum of patients or more.

Numbers count rows; the minimum counts patients.

An error may not depend on whether a group could be told of, else it would tell that too. So a
request is looked at in three steps, of which each has left its trace in the hospital's file before
the next begins: the values it compares with are noted, it is held against the columns, and it is
answered.
"""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Callable, Iterator
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.cells import coarse_enough, grid, merge_neighbours, pool_small
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.fewest import class_codes, fewest
from fedmed_flower.statistics.guard import (
    LACKING,
    NEW,
    OUTSIDE,
    Guard,
    Members,
    note_compared,
    open_guard,
)
from fedmed_flower.statistics.request import Request, Survival, require_comparable
from fedmed_flower.statistics.types import Codes, Mask, Reported

log = logging.getLogger("flwr.fedmed")

MOST_COMPARED = 20
OTHERS = "all others"
FEW = "fewer patients than the minimum, alone or beside earlier answers"
MISSING = "there is no such column of single values"
_MOST_WEEKS, _MOST_CELLS = 10_000, 1_000_000
# Beyond that a week has no number of its own.
_LAST_DAY = 1e15


def answer_exactly(
    path: Path,
    columns: Columns,
    request: Request,
    minimum: int,
    hide_missing: bool = False,
    most_compared: int = MOST_COMPARED,
) -> Reported:
    """Answer a request as far as that may be told beside earlier answers, and write that down.

    Parameters
    ----------
    path : Path
        The hospital's file of answers.
    columns : Columns
    request : Request
    minimum : int
        The fewest patients of whom a number is told; at least 1.
    hide_missing : bool
        That a row lacks a value is then told of the minimum of patients only.
    most_compared : int
        How many different values the conditions on one column, and the widths of its cells, may
        use, all requests together.

    Returns
    -------
    dict
        The groups, and what is withheld and why.

    Raises
    ------
    InputError
        If conditions, `by`, `weekly` or survival name what is not there or does not fit, which
        the columns decide and no condition; or where the file cannot be used.
    DeclinedError
        If conditions on a column, or its widths, have used too many values.
    """
    note_compared(path, _compared(columns, request), most_compared)
    _require_sound(columns, request)
    with open_guard(path, columns, minimum, hide_missing) as guard:
        return Local(columns, request, guard).answer()


def _compared(columns: Columns, request: Request) -> list[tuple[str, float | str]]:
    """Return by which values of columns that are there a request tells rows apart."""
    found = [(condition.column, condition.value) for condition in request.where]
    if request.by_width:
        found.append((request.by, request.by_width))
    if request.survival is not None:
        time, _, *lengths = request.survival
        found += [(time, length) for length in lengths]
    if "histograms" in request.kinds:
        for name in _wanted(columns, request):
            width = columns.declared.resolution(name)
            if width is not None and not columns.is_categorical(name):
                found.append((name, width))
    return [(name, value) for name, value in found if name in columns.names]


def _require_sound(columns: Columns, request: Request) -> None:
    """Raise `InputError` where a request names what is not there, or what does not fit."""
    for condition in request.where:
        columns.require(condition.column)
        require_comparable(condition, columns.is_categorical(condition.column))
    columns.require(*(name for name in (request.by, request.weekly) if name))
    if request.survival is not None:
        columns.require(*request.survival[:2])
        if columns.is_categorical(request.survival.time):
            raise InputError(
                f"{request.survival.time} holds no numbers, which a survival curve needs"
            )


def _wanted(columns: Columns, request: Request) -> list[str]:
    """Return the columns that are asked for and are there."""
    # The curve tells of its columns; beside a table of events it would often be withheld.
    others = (request.by, request.weekly, *(request.survival or ())[:2])
    wanted = request.columns or tuple(name for name in columns.names if name not in others)
    return [name for name in wanted if name in columns.names]


class Local:
    """Answers one request, which fits the columns, over the rows of one hospital.

    Parameters
    ----------
    columns : Columns
    request : Request
    guard : Guard
    """

    def __init__(self, columns: Columns, request: Request, guard: Guard) -> None:
        self._columns, self._request, self._guard = columns, request, guard
        self._group = ""
        self._withheld: list[list[str]] = []
        # Rows that have come since earlier answers, and are too few to be told of.
        self._waiting = np.zeros(columns.count, bool)

    def answer(self) -> Reported:
        """Return the groups, and what is withheld and why."""
        groups = self._or_withheld(self._groups, "patients") or []
        reported: list[Reported] = []
        for name, start, inside in groups:
            patients = int(np.unique(self._columns.patient_of_row[inside]).size)
            entry: Reported = {"name": name, "start": start, "rows": int(inside.sum())}
            entry |= {"patients": patients, "numeric": {}, "categorical": {}}
            reported.append(entry | {"correlations": [], "pairs": []})
        # What cannot be told more coarsely goes first, and histograms go last: they make do with
        # the cells that are left to them.
        for part in (
            self._moments,
            self._correlations,
            self._pairs,
            self._categories,
            self._survival,
            self._weeks,
            self._histograms,
        ):
            for entry, (name, _, inside) in zip(reported, groups, strict=True):
                self._group = name
                part(entry, inside)
        return {"groups": reported, "withheld": self._withheld}

    def _or_withheld(self, part: Callable[..., Any], what: str, *arguments: Any) -> Any:
        """Return a part of the answer; where it fails, it is withheld as if it were of too few.

        `part` takes what it is called, and the arguments.
        """
        try:
            return part(what, *arguments)
        except (sqlite3.Error, OSError):
            # Of the file, which is the same trouble for every question.
            raise
        except Exception:
            # That something failed could tell that there was somebody for whom it could.
            log.exception("%s could not be computed and is withheld", what)
            return self._withhold(what)

    def _groups(self, what: str) -> list[tuple[str, float | None, Mask]]:
        """Return name, start of the window and rows of each group that may be told of."""
        request, columns, guard = self._request, self._columns, self._guard
        met = [columns.meets(condition) for condition in request.where]
        inside = np.logical_and.reduce([np.ones(columns.count, bool), *met])
        labels, names = self._by()
        everybody = guard.members()
        for usable, waiting in self._attempts(inside & (labels >= 0), everybody):
            old, patient_of_row = guard.labels(everybody)[usable], columns.patient_of_row[usable]
            pooled = pool_small(labels[usable], old, patient_of_row, guard.minimum)
            if pooled is None:
                continue
            reported = np.full(columns.count, OUTSIDE, np.int64)
            reported[usable] = np.where(pooled < 0, len(names), pooled)
            # Of each variable in a condition the rows are told apart by that condition alone; of
            # the hospital's rows by all of them, as if each had been asked for by itself.
            cells: dict[str, list[Codes]] = {"": [reported, *(m.astype(np.int64) for m in met)]}
            for condition, mask in zip(request.where, met, strict=True):
                cells.setdefault(condition.column, []).append(mask.astype(np.int64))
            if request.by:
                cells.setdefault(request.by, []).append(reported)
            keys = [guard.members(*([name] if name else [])) for name in cells]
            if guard.admit(keys, [class_codes(*c) for c in cells.values()], waiting):
                self._waiting = waiting
                guard.beside = tuple(name for name in cells if name)
                if not request.by:
                    return [("", None, usable)]
                parts = [(*name, reported == n) for n, name in enumerate([*names, (OTHERS, None)])]
                return [part for part in parts if part[2].any()]
        self._withhold(what)
        return []

    def _by(self) -> tuple[Codes, list[tuple[str, float | None]]]:
        """Return the group of each row, -1 for none, and name and start of each group."""
        name, width, columns = self._request.by, self._request.by_width, self._columns
        if not name:
            return np.zeros(columns.count, np.int64), [("", None)]
        if not width:
            codes, texts = columns.codes(name)
            return codes, [(text[:200], None) for text in texts]
        days, dated = columns.days(name)
        labels, known = np.full(days.size, OUTSIDE, np.int64), ~np.isnan(days)
        steps, width = grid(days[known], width)
        found, labels[known] = np.unique(steps, return_inverse=True)
        starts = [float(step * width) for step in found]
        if dated:
            return labels, [(f"from {_date(start)}", start) for start in starts]
        return labels, [(f"{start:g} to {start + width:g}", start) for start in starts]

    def _moments(self, entry: Reported, inside: Mask) -> None:
        for name in _wanted(self._columns, self._request):
            if not self._columns.is_categorical(name):
                self._or_withheld(self._moments_of, name, entry, inside)

    def _moments_of(self, name: str, entry: Reported, inside: Mask) -> None:
        guard = self._guard
        members, numbers = guard.members(name), self._columns.numbers(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(numbers), members):
            if guard.admit([members], [self._cells(inside, usable, 0)], waiting):
                reported = _counted(inside, usable)
                if "moments" in self._request.kinds and usable.any():
                    reported |= moments(numbers[usable].tolist())
                entry["numeric"][name] = reported
                return
        self._withhold(name)

    def _histograms(self, entry: Reported, inside: Mask) -> None:
        if "histograms" not in self._request.kinds:
            return
        for name, reported in entry["numeric"].items():
            if reported["n"]:
                found = self._or_withheld(self._histogram, f"histogram of {name}", name, inside)
                if found is not None:
                    reported["histogram"] = found

    def _histogram(self, what: str, name: str, inside: Mask) -> Reported | None:
        guard, columns = self._guard, self._columns
        if (asked := columns.declared.resolution(name)) is None:
            return self._withhold(what, "nothing says how finely to tell it")
        numbers, members = columns.numbers(name), guard.members(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(numbers), members):
            values, patient_of_row = numbers[usable], columns.patient_of_row[usable]
            steps, width = grid(values, asked)
            while not coarse_enough(steps, patient_of_row, guard.minimum) and width < 1e100:
                steps, width = grid(values, 2 * width)
            labels = guard.labels(members)[usable]
            bins = merge_neighbours(steps, [labels], patient_of_row, guard.minimum)
            if bins is None:
                continue
            # Where a bin had to be merged its lower end is not told, nor the upper one of the last:
            # the lowest and the highest value are those of the minimum of patients, or unknown.
            full = [end for low, high in bins if low == high for end in (low, high + 1)]
            edges = sorted({*full, *(high + 1 for _, high in bins[:-1])})
            indices = np.searchsorted(np.array(edges, np.int64), steps, side="right")
            if guard.admit([members], [self._cells(inside, usable, indices)], waiting):
                counts = np.bincount(indices, minlength=len(edges) + 1).tolist()
                return {"edges": [edge * width for edge in edges], "counts": counts}
        return self._withhold(what)

    def _categories(self, entry: Reported, inside: Mask) -> None:
        columns = self._columns
        for name in self._request.columns:
            if name not in columns.names:
                self._withhold(name, MISSING)
        for name in _wanted(columns, self._request):
            if columns.is_categorical(name):
                self._or_withheld(self._categories_of, name, entry, inside)

    def _categories_of(self, name: str, entry: Reported, inside: Mask) -> None:
        guard, columns = self._guard, self._columns
        tabulated = "tables" in self._request.kinds
        members, (codes, texts) = guard.members(name), columns.codes(name)
        attempts = list(self._attempts(inside & (codes >= 0), members))
        # Rather a table without new rows than one in which no category can be named.
        for number, (usable, waiting) in enumerate([*attempts, *attempts]):
            labels, patient_of_row = guard.labels(members)[usable], columns.patient_of_row[usable]
            pooled = pool_small(codes[usable] * tabulated, labels, patient_of_row, guard.minimum)
            if pooled is None or (number < len(attempts) and not (pooled >= 0).any()):
                continue
            several = np.where(pooled < 0, len(texts), pooled)
            if guard.admit([members], [self._cells(inside, usable, several)], waiting):
                reported = _counted(inside, usable)
                if tabulated:
                    found, counts = np.unique(pooled[pooled >= 0], return_counts=True)
                    reported["names"] = [texts[code][:200] for code in found]
                    reported["counts"], reported["few"] = counts.tolist(), int((pooled < 0).sum())
                entry["categorical"][name] = reported
                return
        self._withhold(name)

    def _correlations(self, entry: Reported, inside: Mask) -> None:
        asked = "correlations" in self._request.kinds
        for one, other in combinations(entry["numeric"] if asked else (), 2):
            what = f"correlation of {one} and {other}"
            reported = self._or_withheld(self._correlation, what, one, other, inside)
            if reported is not None:
                entry["correlations"].append(reported)

    def _pairs(self, entry: Reported, inside: Mask) -> None:
        for one, other in self._request.pairs:
            reported = self._or_withheld(self._pair, f"{one} by {other}", one, other, inside)
            if reported is not None:
                entry["pairs"].append(reported)

    def _correlation(self, what: str, one: str, other: str, inside: Mask) -> Reported | None:
        guard, columns = self._guard, self._columns
        x, y = columns.numbers(one), columns.numbers(other)
        keys = [guard.members(one), guard.members(other)]
        for usable, waiting in self._attempts(inside & ~np.isnan(x + y), *keys):
            cells = self._cells(inside, usable, 0)
            if usable.any() and guard.admit(keys, [cells, cells], waiting):
                parts = [moments(values[usable].tolist()) for values in (x, y)]
                product = comoment(x[usable], y[usable], *parts)
                return {"columns": [one, other], "of": parts, "product": product}
        return self._withhold(what)

    def _pair(self, what: str, one: str, other: str, inside: Mask) -> Reported | None:
        guard, columns = self._guard, self._columns
        for name in (one, other):
            if name not in columns.names:
                return self._withhold(what, MISSING)
            if not columns.is_categorical(name):
                return self._withhold(what, f"{name} holds numbers and is not declared categorical")
        (a, names), (b, others) = columns.codes(one), columns.codes(other)
        joint = a * len(others) + b
        keys = [guard.members(one), guard.members(other), guard.members(one, other)]
        for usable, waiting in self._attempts(inside & (a >= 0) & (b >= 0), *keys):
            classes = class_codes(joint[usable], guard.labels(keys[2])[usable])
            cells = [self._cells(inside, usable, codes[usable]) for codes in (a, b, joint)]
            small = fewest(classes, columns.patient_of_row[usable]) < guard.minimum
            if usable.any() and not small and guard.admit(keys, cells, waiting):
                rows, row_of = np.unique(a[usable], return_inverse=True)
                across, column_of = np.unique(b[usable], return_inverse=True)
                if rows.size * across.size > _MOST_CELLS:
                    return self._withhold(what, f"it has more than {_MOST_CELLS:,} cells")
                table = np.zeros((rows.size, across.size), np.int64)
                np.add.at(table, (row_of, column_of), 1)
                return {
                    "columns": [one, other],
                    "rows": [names[code][:200] for code in rows],
                    "across": [others[code][:200] for code in across],
                    "counts": table.tolist(),
                }
        return self._withhold(what)

    def _survival(self, entry: Reported, inside: Mask) -> None:
        if (asked := self._request.survival) is not None:
            what = f"survival by {asked.time}"
            self._or_withheld(self._survival_of, what, asked, entry, inside)

    def _survival_of(self, what: str, asked: Survival, entry: Reported, inside: Mask) -> None:
        guard, columns = self._guard, self._columns
        times, events = columns.survival(asked)
        keys = [guard.members(*names) for names in ((asked.time,), (asked.event,), asked[:2])]
        for usable, waiting in self._attempts(inside & ~np.isnan(times), *keys):
            happened, patient_of_row, width = (
                events[usable],
                columns.patient_of_row[usable],
                asked.width,
            )
            if not usable.any():
                continue
            steps, end = _upward(times[usable], width), _upward(asked.horizon, width)
            while end > 1 and not coarse_enough(
                2 * steps + happened, patient_of_row, guard.minimum
            ):
                width *= 2
                steps, end = _upward(times[usable], width), _upward(asked.horizon, width)
            labels = [guard.labels(key)[usable] for key in keys]
            apart = [labels[0], class_codes(labels[2], happened)]
            bins = merge_neighbours(steps, apart, patient_of_row, guard.minimum)
            if bins is None:
                continue
            ends = [high for _, high in bins]
            # Where the last bin had to be merged, the longest time is not told.
            ends[-1] = ends[-1] if bins[-1][0] == bins[-1][1] else int(end)
            indices = np.searchsorted(np.array(ends), steps)
            values = (indices, happened, 2 * indices + happened)
            cells = [self._cells(inside, usable, value) for value in values]
            if guard.admit(keys, cells, waiting):
                # A step that is a cell by itself begins where an empty cell ends.
                stops = sorted({*ends, *(low - 1 for low, high in bins if 1 < low == high)})
                counts = np.zeros((len(stops), 2), np.int64)
                counts[np.searchsorted(stops, ends)] = np.bincount(
                    values[2], minlength=2 * len(bins)
                ).reshape(-1, 2)
                entry["survival"] = {
                    "times": [number * width for number in stops],
                    "events": counts[:, 1].tolist(),
                    "censored": counts[:, 0].tolist(),
                }
                return
        self._withhold(what)

    def _weeks(self, entry: Reported, inside: Mask) -> None:
        if name := self._request.weekly:
            self._or_withheld(self._weeks_of, f"weeks by {name}", name, entry, inside)

    def _weeks_of(self, what: str, name: str, entry: Reported, inside: Mask) -> None:
        guard, columns = self._guard, self._columns
        days, dated = columns.days(name)
        days = np.clip(days, -_LAST_DAY, _LAST_DAY)
        members = guard.members(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(days), members):
            # The first day of the calendar is a Monday.
            steps = np.floor((days[usable] - dated) / 7).astype(np.int64)
            weeks, indices = np.unique(steps, return_inverse=True)
            labels, patient_of_row = guard.labels(members)[usable], columns.patient_of_row[usable]
            pooled = pool_small(indices.astype(np.int64), labels, patient_of_row, guard.minimum)
            if pooled is None or not (pooled >= 0).any():
                continue
            known, counts = np.unique(pooled[pooled >= 0], return_counts=True)
            first, last = int(weeks[known[0]]), int(weeks[known[-1]])
            cells = self._cells(inside, usable, np.where(pooled < 0, len(weeks), pooled))
            if guard.admit([members], [cells], waiting):
                if last - first >= _MOST_WEEKS:
                    self._withhold(what, "they are more than 10,000 weeks")
                    return
                reported: list[int | None] = [0] * (last - first + 1)
                for week in weeks[(weeks >= first) & (weeks <= last)]:
                    reported[int(week) - first] = None
                for index, count in zip(known, counts, strict=True):
                    reported[int(weeks[index]) - first] = int(count)
                start = _date(7.0 * first + 1) if dated else f"day {7 * first}"
                entry["weeks"] = {"first": first, "start": start, "counts": reported}
                return
        self._withhold(what)

    def _attempts(self, usable: Mask, *keys: Members) -> Iterator[tuple[Mask, Mask]]:
        """Give the rows of an answer and those that wait.

        First all rows are in it; then, where new ones are too few to be told of, the known ones.
        """
        yield usable & ~self._waiting, self._waiting
        new = self._waiting | np.logical_or.reduce([self._guard.labels(k) == NEW for k in keys])
        if (known := usable & ~new).any() or not usable.any():
            yield known, new

    def _cells(self, inside: Mask, usable: Mask, values: Codes | int) -> Codes:
        cells = np.full(usable.size, OUTSIDE, np.int64)
        cells[inside] = LACKING
        cells[usable] = values
        return cells

    def _withhold(self, what: str, why: str = FEW) -> Reported | None:
        self._withheld.append([self._group, what[:400], why])
        return None


def moments(values: list[float]) -> Reported:
    """Return number, mean and sum of squared deviations, the mean with what rounding left over."""
    count = len(values)
    mean = math.fsum(values) / count
    rest = math.fsum(value - mean for value in values) / count
    squares = math.fsum((value - mean - rest) ** 2 for value in values)
    return {"n": count, "mean": mean, "rest": rest, "m2": squares}


def comoment(x: Any, y: Any, of_x: Reported, of_y: Reported) -> float:
    """Return the sum of products of deviations."""
    first, second = (v - m["mean"] - m["rest"] for v, m in ((x, of_x), (y, of_y)))
    return math.fsum(first * second)


def _counted(inside: Mask, usable: Mask) -> Reported:
    count = int(usable.sum())
    return {"n": count, "missing": int(inside.sum()) - count}


def _upward(times: Any, width: float) -> Any:
    """Return the number of widths to which each time is rounded up."""
    return -grid(np.negative(np.asarray(times, float)), width)[0]


def _date(day: float) -> str:
    return date.fromordinal(max(1, min(int(day), date.max.toordinal()))).isoformat()
