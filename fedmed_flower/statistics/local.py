"""What one hospital answers without noise: each number is of at least the minimum of patients.

Numbers count rows; the minimum counts patients.

An error must not depend on whether a group may be disclosed, because it would disclose that. So a
request is handled in three steps: the values that it compares with are recorded, it is checked
against the columns, and it is answered. What a step records has reached the hospital's file before
the next begins.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from fedmed_flower.arrays.sums import exact_sum
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
from fedmed_flower.statistics.types import Codes, Floats, Mask, Reported
from fedmed_flower.statistics.values import date_text, week_text
from fedmed_flower.statistics.withheld import (
    AND,
    BY,
    CORRELATION,
    FEW,
    HISTOGRAM,
    MISSING,
    NO_DATES,
)

log = logging.getLogger("flwr.fedmed")

MOST_COMPARED = 20
OTHERS = "all others"
_MOST_WEEKS = 10_000
# Quartiles can be read off that many.
_FEWEST_BINS = 4
_MOST_CELLS = 1_000_000
# Later days count as this one: floats far beyond it cannot distinguish two weeks.
_LAST_DAY = 1e15


def answer_exactly(
    path: Path,
    columns: Columns,
    request: Request,
    minimum: int,
    hide_missing: bool = False,
    most_compared: int = MOST_COMPARED,
) -> Reported:
    """Answer a request as far as the answer may leave beside earlier ones, and record that.

    Parameters
    ----------
    path : Path
        The hospital's file of answers.
    columns : Columns
    request : Request
    minimum : int
        The fewest patients behind a number that leaves; at least 1.
    hide_missing : bool
        If true, the rows without a value are protected like any other class: they belong to no
        patient or to at least `minimum`. If false, their number may be disclosed.
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
        If conditions, `by`, `weekly` or survival name a column that is missing or does not fit,
        whoever meets the conditions; or if the file cannot be used.
    DeclinedError
        If conditions on a column, or its widths, have used too many values.
    """
    note_compared(path, _compared(columns, request), most_compared)
    _require_sound(columns, request)
    with open_guard(path, columns, minimum, hide_missing) as guard:
        return Local(columns, request, guard).answer()


def _compared(columns: Columns, request: Request) -> list[tuple[str, float | str]]:
    """Return the values by which a request distinguishes rows, with their columns.

    Columns that the hospital lacks are left out.
    """
    compared = [(condition.column, condition.value) for condition in request.where]
    if request.by_width:
        compared.append((request.by, request.by_width))
    if request.survival is not None:
        time, _, *lengths = request.survival
        compared += [(time, length) for length in lengths]
    if "histograms" in request.kinds:
        for name in _wanted(columns, request):
            width = columns.declared.resolution(name)
            if width is not None and not columns.is_categorical(name):
                compared.append((name, width))
    return [(name, value) for name, value in compared if name in columns.names]


def _require_sound(columns: Columns, request: Request) -> None:
    """Raise `InputError` if a request names a column that is missing or does not fit."""
    for condition in request.where:
        columns.require(condition.column)
        require_comparable(condition, columns.is_categorical(condition.column))
    columns.require(*(name for name in (request.by, request.weekly) if name))
    if request.survival is not None:
        columns.require(*request.survival[:2])
        if columns.is_categorical(request.survival.time):
            raise InputError(request.survival.no_times)


def _wanted(columns: Columns, request: Request) -> list[str]:
    """Return the columns that are asked for and exist."""
    # The curve covers its own columns; beside a table of events it would often be withheld.
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
        self._columns = columns
        self._request = request
        self._guard = guard
        self._group = ""
        self._withheld: list[list[str]] = []
        self._known_moments: dict[tuple[str, bytes], Reported] = {}
        # Rows that came after earlier answers and are too few to be counted.
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
        # What is disclosed first decides what may follow. So what every request discloses goes
        # first, whatever else is asked; then parts about one column, and those about two last,
        # correlations behind the tables that were named.
        for part in (
            self._moments,
            self._categories,
            self._histograms,
            self._pairs,
            self._survival,
            self._weeks,
            self._correlations,
        ):
            for entry, (name, _, inside) in zip(reported, groups, strict=True):
                self._group = name
                part(entry, inside)
        return {"groups": reported, "withheld": self._withheld}

    def _or_withheld(self, part: Callable[..., Any], what: str, *arguments: Any) -> Any:
        """Return a part of the answer; if it fails, withhold it as if it had too few patients.

        `part` takes `what`, its name in the answer, and the arguments.
        """
        try:
            return part(what, *arguments)
        except (sqlite3.Error, OSError):
            # The file has failed, which does not depend on the question.
            raise
        except Exception:
            # The failure itself could disclose that somebody is in the group.
            log.exception("%s could not be computed and is withheld", what)
            return self._withhold(what)

    def _groups(self, what: str) -> list[tuple[str, float | None, Mask]]:
        """Return name, start of the window and rows of each group that may be disclosed."""
        request = self._request
        columns = self._columns
        guard = self._guard
        if request.by_width and self._lacks_dates(request.by):
            self._withhold(what, NO_DATES)
            return []
        masks = [columns.meets(condition) for condition in request.where]
        inside = np.logical_and.reduce([np.ones(columns.count, bool), *masks])
        labels, names = self._by()
        everybody = guard.members()
        for usable, waiting in self._attempts(inside & (labels >= 0), everybody):
            classes = guard.labels(everybody)[usable]
            patient_of_row = columns.patient_of_row[usable]
            pooled = pool_small(labels[usable], classes, patient_of_row, guard.minimum)
            if pooled is None:
                continue
            reported = np.full(columns.count, OUTSIDE, np.int64)
            reported[usable] = np.where(pooled < 0, len(names), pooled)
            # Each column of a condition gets cells by its conditions. All rows (key "") get cells
            # by every condition, as if each had been asked alone.
            cells: dict[str, list[Codes]] = {"": [reported, *(m.astype(np.int64) for m in masks)]}
            for condition, mask in zip(request.where, masks, strict=True):
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
        """Return each row's group, -1 if it is in no group, and each group's name and start."""
        name = self._request.by
        width = self._request.by_width
        columns = self._columns
        if not name:
            return np.zeros(columns.count, np.int64), [("", None)]
        if not width:
            codes, texts = columns.codes(name)
            return codes, [(text[:200], None) for text in texts]
        days, dated = columns.days(name)
        known = ~np.isnan(days)
        steps, width = grid(days[known], width)
        labels = np.full(days.size, OUTSIDE, np.int64)
        distinct, labels[known] = np.unique(steps, return_inverse=True)
        starts = [float(step * width) for step in distinct]
        if dated:
            return labels, [(f"from {date_text(start)}", start) for start in starts]
        return labels, [(f"{start:g} to {start + width:g}", start) for start in starts]

    def _moments(self, entry: Reported, inside: Mask) -> None:
        for name in _wanted(self._columns, self._request):
            if not self._columns.is_categorical(name):
                self._or_withheld(self._moments_of, name, entry, inside)

    def _moments_of(self, name: str, entry: Reported, inside: Mask) -> None:
        guard = self._guard
        members = guard.members(name)
        numbers = self._columns.numbers(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(numbers), members):
            if guard.admit([members], [self._cells(inside, usable, 0)], waiting):
                reported = _counted(inside, usable)
                if "moments" in self._request.kinds and usable.any():
                    reported |= self._moments_among(name, usable)
                entry["numeric"][name] = reported
                return
        self._withhold(name)

    def _moments_among(self, name: str, usable: Mask) -> Reported:
        """Return the moments of a column in some rows; they are kept for its correlations."""
        key = (name, hashlib.blake2b(usable.tobytes()).digest())
        if key not in self._known_moments:
            self._known_moments[key] = moments(self._columns.numbers(name)[usable])
        return self._known_moments[key]

    def _histograms(self, entry: Reported, inside: Mask) -> None:
        if "histograms" not in self._request.kinds:
            return
        correlated = list(entry["numeric"]) if "correlations" in self._request.kinds else []
        for name, reported in entry["numeric"].items():
            if reported["n"]:
                what = f"{HISTOGRAM}{name}"
                others = [other for other in correlated if other != name]
                histogram = self._or_withheld(self._histogram, what, name, others, inside)
                if histogram is not None:
                    reported["histogram"] = histogram

    def _histogram(
        self, what: str, name: str, others: Sequence[str], inside: Mask
    ) -> Reported | None:
        guard = self._guard
        columns = self._columns
        asked = columns.declared.resolution(name)
        if asked is None:
            return self._withhold(what, "it has neither a resolution nor a declared range")
        numbers = columns.numbers(name)
        members = guard.members(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(numbers), members):
            values = numbers[usable]
            patient_of_row = columns.patient_of_row[usable]
            steps, width = grid(values, asked)
            while not coarse_enough(steps, patient_of_row, guard.minimum) and width < 1e100:
                steps, width = grid(values, 2 * width)
            labels = guard.labels(members)[usable]
            bins = self._bins(steps, labels, usable, others)
            if bins is None:
                continue
            # The lower end of a merged bin and the upper end of a merged last bin are not
            # disclosed. So the lowest and the highest value stay unknown unless enough patients
            # share their bin.
            full = [end for low, high in bins if low == high for end in (low, high + 1)]
            edges = sorted({*full, *(high + 1 for _, high in bins[:-1])})
            indices = np.searchsorted(np.array(edges, np.int64), steps, side="right")
            if guard.admit([members], [self._cells(inside, usable, indices)], waiting):
                counts = np.bincount(indices, minlength=len(edges) + 1).tolist()
                return {
                    "edges": [edge * width for edge in edges],
                    "counts": counts,
                    "whole": columns.declared.is_whole(name),
                }
        return self._withhold(what)

    def _bins(
        self, steps: Codes, labels: Codes, usable: Mask, others: Sequence[str]
    ) -> list[tuple[int, int]] | None:
        """Return the bins of a histogram, with which a correlation may still be disclosed.

        A correlation distinguishes the rows that lack the other column. For it, each bin must have
        none of them or enough. Bins are merged for that while half of them, and four, are left.

        Parameters
        ----------
        steps, labels : ndarray
            (usable rows,) the step of each row on the grid, and its class so far.
        usable : ndarray of bool
            (rows,)
        others : sequence of str
            The columns with which a correlation is asked for.
        """
        patient_of_row = self._columns.patient_of_row[usable]
        minimum = self._guard.minimum
        bins = finest = merge_neighbours(steps, [labels], patient_of_row, minimum)
        for other in others:
            lacking = np.isnan(self._columns.numbers(other)[usable]).astype(np.int64)
            if finest is None or not lacking.any():
                continue
            split = class_codes(labels, lacking)
            if fewest(split, patient_of_row) < minimum:
                continue
            merged = merge_neighbours(steps, [split], patient_of_row, minimum)
            if merged is not None and len(merged) >= max(_FEWEST_BINS, len(finest) / 2):
                bins = merged
                labels = split
        return bins

    def _categories(self, entry: Reported, inside: Mask) -> None:
        columns = self._columns
        for name in self._request.columns:
            if name not in columns.names:
                self._withhold(name, MISSING)
        for name in _wanted(columns, self._request):
            if columns.is_categorical(name):
                self._or_withheld(self._categories_of, name, entry, inside)

    def _categories_of(self, name: str, entry: Reported, inside: Mask) -> None:
        guard = self._guard
        columns = self._columns
        tabulated = "tables" in self._request.kinds
        members = guard.members(name)
        codes, texts = columns.codes(name)
        attempts = list(self._attempts(inside & (codes >= 0), members))
        # A table without new rows is better than one in which no category can be named.
        for must_name, (usable, waiting) in product((True, False), attempts):
            labels = guard.labels(members)[usable]
            patient_of_row = columns.patient_of_row[usable]
            values = codes[usable] if tabulated else np.zeros_like(codes[usable])
            pooled = pool_small(values, labels, patient_of_row, guard.minimum)
            if pooled is None or (must_name and not (pooled >= 0).any()):
                continue
            cells = self._cells(inside, usable, np.where(pooled < 0, len(texts), pooled))
            if guard.admit([members], [cells], waiting):
                reported = _counted(inside, usable)
                if tabulated:
                    named, counts = np.unique(pooled[pooled >= 0], return_counts=True)
                    reported["names"] = [texts[code][:200] for code in named]
                    reported["counts"] = counts.tolist()
                    reported["few"] = int((pooled < 0).sum())
                entry["categorical"][name] = reported
                return
        self._withhold(name)

    def _correlations(self, entry: Reported, inside: Mask) -> None:
        asked = "correlations" in self._request.kinds
        for one, other in combinations(entry["numeric"] if asked else (), 2):
            what = f"{CORRELATION}{one}{AND}{other}"
            reported = self._or_withheld(self._correlation, what, one, other, inside)
            if reported is not None:
                entry["correlations"].append(reported)

    def _pairs(self, entry: Reported, inside: Mask) -> None:
        for one, other in self._request.pairs:
            reported = self._or_withheld(self._pair, f"{one}{BY}{other}", one, other, inside)
            if reported is not None:
                entry["pairs"].append(reported)

    def _correlation(self, what: str, one: str, other: str, inside: Mask) -> Reported | None:
        guard = self._guard
        columns = self._columns
        x = columns.numbers(one)
        y = columns.numbers(other)
        keys = [guard.members(one), guard.members(other)]
        for usable, waiting in self._attempts(inside & ~np.isnan(x + y), *keys):
            cells = self._cells(inside, usable, 0)
            if usable.any() and guard.admit(keys, [cells, cells], waiting):
                parts = [self._moments_among(name, usable) for name in (one, other)]
                comoments = comoment(x[usable], y[usable], *parts)
                return {"columns": [one, other], "of": parts, "product": comoments}
        return self._withhold(what)

    def _pair(self, what: str, one: str, other: str, inside: Mask) -> Reported | None:
        guard = self._guard
        columns = self._columns
        for name in (one, other):
            if name not in columns.names:
                return self._withhold(what, MISSING)
            if not columns.is_categorical(name):
                return self._withhold(what, f"{name} holds numbers and is not declared categorical")
        a, names = columns.codes(one)
        b, others = columns.codes(other)
        joint = a * len(others) + b
        keys = [guard.members(one), guard.members(other), guard.members(one, other)]
        for usable, waiting in self._attempts(inside & (a >= 0) & (b >= 0), *keys):
            classes = class_codes(joint[usable], guard.labels(keys[2])[usable])
            cells = [self._cells(inside, usable, codes[usable]) for codes in (a, b, joint)]
            small = fewest(classes, columns.patient_of_row[usable]) < guard.minimum
            if usable.any() and not small and guard.admit(keys, cells, waiting):
                rows, row_indices = np.unique(a[usable], return_inverse=True)
                across, column_indices = np.unique(b[usable], return_inverse=True)
                if rows.size * across.size > _MOST_CELLS:
                    return self._withhold(what, f"it has more than {_MOST_CELLS:,} cells")
                table = np.zeros((rows.size, across.size), np.int64)
                np.add.at(table, (row_indices, column_indices), 1)
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
        guard = self._guard
        columns = self._columns
        times, events = columns.survival(asked)
        keys = [guard.members(*names) for names in ((asked.time,), (asked.event,), asked[:2])]
        for usable, waiting in self._attempts(inside & ~np.isnan(times), *keys):
            if not usable.any():
                continue
            happened = events[usable]
            patient_of_row = columns.patient_of_row[usable]
            width = asked.width
            steps, beyond = _steps(times[usable], asked.horizon, width)
            # Those beyond are in one cell, however fine the grid up to the horizon.
            up_to = steps < beyond
            while beyond > 2 and not coarse_enough(
                (2 * steps + happened)[up_to], patient_of_row[up_to], guard.minimum
            ):
                width *= 2
                steps, beyond = _steps(times[usable], asked.horizon, width)
            labels = [guard.labels(key)[usable] for key in keys]
            constraints = [labels[0], class_codes(labels[2], happened)]
            bins = merge_neighbours(steps, constraints, patient_of_row, guard.minimum)
            if bins is None:
                continue
            ends = [high for _, high in bins]
            # If the last bin is merged, the longest time is not disclosed, nor whether it is beyond
            # the horizon.
            if bins[-1][0] != bins[-1][1]:
                ends[-1] = beyond
            indices = np.searchsorted(np.array(ends), steps)
            values = (indices, happened, 2 * indices + happened)
            cells = [self._cells(inside, usable, value) for value in values]
            if guard.admit(keys, cells, waiting):
                # A bin of a single step also needs its lower end, where the empty bin before it
                # ends.
                stops = sorted({*ends, *(low - 1 for low, high in bins if 1 < low == high)})
                counts = np.zeros((len(stops), 2), np.int64)
                counts[np.searchsorted(stops, ends)] = np.bincount(
                    values[2], minlength=2 * len(bins)
                ).reshape(-1, 2)
                entry["survival"] = {
                    "times": [
                        number * width if number == beyond else min(number * width, asked.horizon)
                        for number in stops
                    ],
                    "events": counts[:, 1].tolist(),
                    "censored": counts[:, 0].tolist(),
                }
                return
        self._withhold(what)

    def _weeks(self, entry: Reported, inside: Mask) -> None:
        if name := self._request.weekly:
            self._or_withheld(self._weeks_of, f"weeks by {name}", name, entry, inside)

    def _weeks_of(self, what: str, name: str, entry: Reported, inside: Mask) -> None:
        guard = self._guard
        columns = self._columns
        days, dated = columns.days(name)
        days = np.clip(days, -_LAST_DAY, _LAST_DAY)
        members = guard.members(name)
        if self._lacks_dates(name):
            self._withhold(what, NO_DATES)
            return
        for usable, waiting in self._attempts(inside & ~np.isnan(days), members):
            # The first day of the calendar is a Monday.
            steps = np.floor((days[usable] - dated) / 7).astype(np.int64)
            weeks, indices = np.unique(steps, return_inverse=True)
            labels = guard.labels(members)[usable]
            patient_of_row = columns.patient_of_row[usable]
            pooled = pool_small(indices.astype(np.int64), labels, patient_of_row, guard.minimum)
            if pooled is None or not (pooled >= 0).any():
                continue
            known, counts = np.unique(pooled[pooled >= 0], return_counts=True)
            first, last = int(weeks[known[0]]), int(weeks[known[-1]])
            cells = self._cells(inside, usable, np.where(pooled < 0, len(weeks), pooled))
            if guard.admit([members], [cells], waiting):
                if last - first >= _MOST_WEEKS:
                    self._withhold(what, f"it spans more than {_MOST_WEEKS:,} weeks")
                    return
                reported: list[int | None] = [0] * (last - first + 1)
                for week in weeks[(weeks >= first) & (weeks <= last)]:
                    reported[int(week) - first] = None
                for index, count in zip(known, counts, strict=True):
                    reported[int(weeks[index]) - first] = int(count)
                start = week_text(first, dated)
                entry["weeks"] = {"first": first, "start": start, "counts": reported}
                return
        self._withhold(what)

    def _lacks_dates(self, name: str) -> bool:
        """Return whether a column holds dates, and too few patients have one that can be read."""
        days, dated = self._columns.days(name)
        readable = self._columns.patient_of_row[~np.isnan(days)]
        return dated and len(np.unique(readable)) < self._guard.minimum

    def _attempts(self, usable: Mask, *keys: Members) -> Iterator[tuple[Mask, Mask]]:
        """Yield the rows of an answer, and those that wait.

        First all rows are in it. If that answer may not leave, new rows may be too few: the second
        attempt has only rows that earlier answers have counted.
        """
        yield usable & ~self._waiting, self._waiting
        new = self._waiting | np.logical_or.reduce([self._guard.labels(k) == NEW for k in keys])
        known = usable & ~new
        if known.any() or not usable.any():
            yield known, new

    def _cells(self, inside: Mask, usable: Mask, values: Codes | int) -> Codes:
        cells = np.full(usable.size, OUTSIDE, np.int64)
        cells[inside] = LACKING
        cells[usable] = values
        return cells

    def _withhold(self, what: str, why: str = FEW) -> Reported | None:
        self._withheld.append([self._group, what[:400], why])
        return None


def moments(values: Floats) -> Reported:
    """Return number, mean, what rounding took from the mean, and sum of squared deviations."""
    count = len(values)
    mean = exact_sum(values) / count
    rest = exact_sum(values - mean) / count
    far = values - mean - rest
    return {"n": count, "mean": mean, "rest": rest, "m2": exact_sum(far * far)}


def comoment(x: Floats, y: Floats, moments_x: Reported, moments_y: Reported) -> float:
    """Return the sum of products of deviations."""
    first, second = (v - m["mean"] - m["rest"] for v, m in ((x, moments_x), (y, moments_y)))
    return exact_sum(first * second)


def _counted(inside: Mask, usable: Mask) -> Reported:
    count = int(usable.sum())
    return {"n": count, "missing": int(inside.sum()) - count}


def _steps(times: Floats, horizon: float, width: float) -> tuple[Codes, int]:
    """Return the step of each time, and the one of all times beyond the horizon.

    A time is rounded up to a multiple of the width or to the horizon: step 1 is from 0 to the first
    multiple, both included.
    """
    steps = _upward(np.minimum(times, horizon), width)
    beyond = int(_upward(np.array(horizon), width)) + 1
    return np.where(times > horizon, beyond, steps), beyond


def _upward(times: Floats, width: float) -> Codes:
    return np.maximum(1, -grid(np.negative(times), width)[0])
