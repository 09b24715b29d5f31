"""What one hospital answers without noise: numbers of the minimum of patients or more.

Numbers count rows; the minimum counts patients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date
from itertools import combinations
from typing import Any

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.cells import coarse_enough, grid, merge_neighbours, pool_small
from fedmed_flower.statistics.columns import Codes, Columns, Mask
from fedmed_flower.statistics.fewest import class_codes, fewest
from fedmed_flower.statistics.guard import LACKING, NEW, OUTSIDE, Guard, Members
from fedmed_flower.statistics.request import Request

MOST_COMPARED = 20
OTHERS = "all others"
FEW = "fewer patients than the minimum, alone or beside earlier answers"
MISSING = "there is no such column of single values"
_MOST_WEEKS = 10_000
Told = dict[str, Any]


class Local:
    """Answers one request over the rows of one hospital.

    Parameters
    ----------
    columns : Columns
    request : Request
    guard : Guard
    most_compared : int
        How many different values the conditions on one column, and the widths of its cells, may
        use, all requests together.
    """

    def __init__(
        self, columns: Columns, request: Request, guard: Guard, most_compared: int = MOST_COMPARED
    ) -> None:
        self._columns, self._request, self._guard = columns, request, guard
        self._most_compared, self._group = most_compared, ""
        self._withheld: list[list[str]] = []
        # Rows that have come since earlier answers, and are too few to be told of.
        self._waiting = np.zeros(columns.count, bool)

    def answer(self) -> Told:
        """Return the groups, and what is withheld and why.

        Raises
        ------
        InputError
            Where conditions, `by` or survival name what is not there.
        DeclinedError
            Where conditions on a column, or its widths, have used too many values.
        """
        groups = self._groups()
        told: list[Told] = []
        for name, start, inside in groups:
            patients = int(np.unique(self._columns.whose[inside]).size)
            counts = {"rows": int(inside.sum()), "patients": patients}
            told.append({"name": name, "start": start, **counts})
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
            for entry, (name, _, inside) in zip(told, groups, strict=True):
                self._group = name
                part(entry, inside)
        return {"groups": told, "withheld": self._withheld}

    def _groups(self) -> list[tuple[str, float | None, Mask]]:
        """Return name, start of the window and rows of each group that may be told of."""
        request, columns, guard = self._request, self._columns, self._guard
        met = [columns.meets(condition) for condition in request.where]
        for condition in request.where:
            guard.compare(condition.column, condition.value, self._most_compared)
        if request.by_width:
            guard.compare(request.by, request.by_width, self._most_compared)
        inside = np.logical_and.reduce([np.ones(columns.count, bool), *met])
        labels, names = self._by()
        everybody = guard.members()
        for usable, waiting in self._attempts(inside & (labels >= 0), everybody):
            old, whose = guard.labels(everybody)[usable], columns.whose[usable]
            pooled = pool_small(labels[usable], old, whose, guard.minimum)
            if pooled is None:
                continue
            told = np.full(columns.count, OUTSIDE, np.int64)
            told[usable] = np.where(pooled < 0, len(names), pooled)
            # Of each variable in a condition the rows are told apart by that condition alone; of
            # the hospital's rows by all of them, as if each had been asked for by itself.
            cells: dict[str, list[Codes]] = {"": [told, *(m.astype(np.int64) for m in met)]}
            for condition, mask in zip(request.where, met, strict=True):
                cells.setdefault(condition.column, []).append(mask.astype(np.int64))
            if request.by:
                cells.setdefault(request.by, []).append(told)
            keys = [guard.members(*([name] if name else [])) for name in cells]
            if guard.admit(keys, [class_codes(*c) for c in cells.values()], waiting):
                self._waiting = waiting
                guard.beside = tuple(name for name in cells if name)
                if not request.by:
                    return [("", None, usable)]
                parts = [(*name, told == n) for n, name in enumerate([*names, (OTHERS, None)])]
                return [part for part in parts if part[2].any()]
        self._withhold("patients")
        return []

    def _by(self) -> tuple[Codes, list[tuple[str, float | None]]]:
        """Return the group of each row, -1 for none, and name and start of each group."""
        name, width, columns = self._request.by, self._request.by_width, self._columns
        if not name:
            return np.zeros(columns.count, np.int64), [("", None)]
        columns.require(name)
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

    def _wanted(self, categorical: bool) -> list[str]:
        """Return the columns of one kind that are asked for."""
        request, columns = self._request, self._columns
        # The curve tells of its columns; beside a table of events it would often be withheld.
        others = (request.by, request.weekly, *(request.survival or ())[:2])
        wanted = request.columns or tuple(n for n in columns.names if n not in others)
        for name in wanted:
            if name not in columns.names and categorical:
                self._withhold(name, MISSING)
        present = [name for name in wanted if name in columns.names]
        return [name for name in present if columns.is_categorical(name) == categorical]

    def _moments(self, entry: Told, inside: Mask) -> None:
        guard, columns = self._guard, self._columns
        entry["numeric"] = {}
        for name in self._wanted(categorical=False):
            members, numbers = guard.members(name), columns.numbers(name)
            for usable, waiting in self._attempts(inside & ~np.isnan(numbers), members):
                if guard.admit([members], [self._cells(inside, usable, 0)], waiting):
                    entry["numeric"][name] = told = _counted(inside, usable)
                    if "moments" in self._request.kinds and usable.any():
                        told |= moments(numbers[usable].tolist())
                    break
            else:
                self._withhold(name)

    def _histograms(self, entry: Told, inside: Mask) -> None:
        if "histograms" in self._request.kinds:
            for name, told in entry["numeric"].items():
                if told["n"] and (found := self._histogram(name, inside)) is not None:
                    told["histogram"] = found

    def _histogram(self, name: str, inside: Mask) -> Told | None:
        guard, columns = self._guard, self._columns
        if (asked := columns.resolution(name)) is None:
            return self._withhold(f"histogram of {name}", "nothing says how finely to tell it")
        guard.compare(name, asked, self._most_compared)
        numbers, members = columns.numbers(name), guard.members(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(numbers), members):
            values, whose = numbers[usable], columns.whose[usable]
            steps, width = grid(values, asked)
            while not coarse_enough(steps, whose, guard.minimum) and width < 1e100:
                steps, width = grid(values, 2 * width)
            labels = guard.labels(members)[usable]
            bins = merge_neighbours(steps, [labels], whose, guard.minimum)
            if bins is None:
                continue
            # Where a bin had to be merged its lower end is not told, nor the upper one of the last:
            # the lowest and the highest value are those of the minimum of patients, or unknown.
            full = [end for low, high in bins if low == high for end in (low, high + 1)]
            edges = sorted({*full, *(high + 1 for _, high in bins[:-1])})
            places = np.searchsorted(np.array(edges, np.int64), steps, side="right")
            if guard.admit([members], [self._cells(inside, usable, places)], waiting):
                counts = np.bincount(places, minlength=len(edges) + 1).tolist()
                return {"edges": [edge * width for edge in edges], "counts": counts}
        return self._withhold(f"histogram of {name}")

    def _categories(self, entry: Told, inside: Mask) -> None:
        guard, columns = self._guard, self._columns
        tabulated = "tables" in self._request.kinds
        entry["categorical"] = {}
        for name in self._wanted(categorical=True):
            members, (codes, texts) = guard.members(name), columns.codes(name)
            attempts = list(self._attempts(inside & (codes >= 0), members))
            # Rather a table without new rows than one in which no category can be named.
            for number, (usable, waiting) in enumerate([*attempts, *attempts]):
                labels, whose = guard.labels(members)[usable], columns.whose[usable]
                pooled = pool_small(codes[usable] * tabulated, labels, whose, guard.minimum)
                if pooled is None or (number < len(attempts) and not (pooled >= 0).any()):
                    continue
                several = np.where(pooled < 0, len(texts), pooled)
                if guard.admit([members], [self._cells(inside, usable, several)], waiting):
                    entry["categorical"][name] = told = _counted(inside, usable)
                    if tabulated:
                        found, counts = np.unique(pooled[pooled >= 0], return_counts=True)
                        told["names"] = [texts[code][:200] for code in found]
                        told["counts"], told["few"] = counts.tolist(), int((pooled < 0).sum())
                    break
            else:
                self._withhold(name)

    def _correlations(self, entry: Told, inside: Mask) -> None:
        asked = "correlations" in self._request.kinds
        pairs = combinations(entry["numeric"] if asked else (), 2)
        found = [self._correlation(one, other, inside) for one, other in pairs]
        entry["correlations"] = [told for told in found if told is not None]

    def _pairs(self, entry: Told, inside: Mask) -> None:
        found = [self._pair(one, other, inside) for one, other in self._request.pairs]
        entry["pairs"] = [told for told in found if told is not None]

    def _correlation(self, one: str, other: str, inside: Mask) -> Told | None:
        guard, columns = self._guard, self._columns
        x, y = columns.numbers(one), columns.numbers(other)
        keys = [guard.members(one), guard.members(other)]
        for usable, waiting in self._attempts(inside & ~np.isnan(x + y), *keys):
            cells = self._cells(inside, usable, 0)
            if usable.any() and guard.admit(keys, [cells, cells], waiting):
                parts = [moments(values[usable].tolist()) for values in (x, y)]
                product = comoment(x[usable], y[usable], *parts)
                return {"columns": [one, other], "of": parts, "product": product}
        return self._withhold(f"correlation of {one} and {other}")

    def _pair(self, one: str, other: str, inside: Mask) -> Told | None:
        guard, columns, what = self._guard, self._columns, f"{one} by {other}"
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
            small = fewest(classes, columns.whose[usable]) < guard.minimum
            if usable.any() and not small and guard.admit(keys, cells, waiting):
                rows, across = np.unique(a[usable]), np.unique(b[usable])
                size = len(names) * len(others)
                table = np.bincount(joint[usable], minlength=size).reshape(len(names), -1)
                return {
                    "columns": [one, other],
                    "rows": [names[code][:200] for code in rows],
                    "across": [others[code][:200] for code in across],
                    "counts": table[np.ix_(rows, across)].tolist(),
                }
        return self._withhold(what)

    def _survival(self, entry: Told, inside: Mask) -> None:
        asked, guard, columns = self._request.survival, self._guard, self._columns
        if asked is None:
            return
        times, events = columns.survival(asked)
        if columns.is_categorical(asked.time):
            raise InputError(f"{asked.time} holds no numbers, which a survival curve needs")
        for length in (asked.width, asked.horizon):
            guard.compare(asked.time, length, self._most_compared)
        keys = [guard.members(*names) for names in ((asked.time,), (asked.event,), asked[:2])]
        for usable, waiting in self._attempts(inside & ~np.isnan(times), *keys):
            happened, whose, width = events[usable], columns.whose[usable], asked.width
            if not usable.any():
                continue
            steps, end = _upward(times[usable], width), _upward(asked.horizon, width)
            while end > 1 and not coarse_enough(2 * steps + happened, whose, guard.minimum):
                width *= 2
                steps, end = _upward(times[usable], width), _upward(asked.horizon, width)
            labels = [guard.labels(key)[usable] for key in keys]
            apart = [labels[0], class_codes(labels[2], happened)]
            bins = merge_neighbours(steps, apart, whose, guard.minimum)
            if bins is None:
                continue
            ends = [high for _, high in bins]
            # Where the last bin had to be merged, the longest time is not told.
            ends[-1] = ends[-1] if bins[-1][0] == bins[-1][1] else int(end)
            places = np.searchsorted(np.array(ends), steps)
            values = (places, happened, 2 * places + happened)
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
        self._withhold(f"survival by {asked.time}")

    def _weeks(self, entry: Told, inside: Mask) -> None:
        guard, columns, name = self._guard, self._columns, self._request.weekly
        if not name:
            return
        columns.require(name)
        days, dated = columns.days(name)
        members = guard.members(name)
        for usable, waiting in self._attempts(inside & ~np.isnan(days), members):
            # The first day of the calendar is a Monday.
            steps = np.floor((days[usable] - dated) / 7).astype(np.int64)
            weeks, places = np.unique(steps, return_inverse=True)
            labels, whose = guard.labels(members)[usable], columns.whose[usable]
            pooled = pool_small(places.astype(np.int64), labels, whose, guard.minimum)
            if pooled is None or not (pooled >= 0).any():
                continue
            known, counts = np.unique(pooled[pooled >= 0], return_counts=True)
            first, last = int(weeks[known[0]]), int(weeks[known[-1]])
            if last - first >= _MOST_WEEKS:
                self._withhold(f"weeks by {name}", "they are more than 10,000 weeks")
                return
            cells = self._cells(inside, usable, np.where(pooled < 0, len(weeks), pooled))
            if guard.admit([members], [cells], waiting):
                told: list[int | None] = [0] * (last - first + 1)
                for week in weeks[(weeks >= first) & (weeks <= last)]:
                    told[int(week) - first] = None
                for place, count in zip(known, counts, strict=True):
                    told[int(weeks[place]) - first] = int(count)
                start = _date(7.0 * first + 1) if dated else f"day {7 * first}"
                entry["weeks"] = {"first": first, "start": start, "counts": told}
                return
        self._withhold(f"weeks by {name}")

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

    def _withhold(self, what: str, why: str = FEW) -> Told | None:
        self._withheld.append([self._group, what[:400], why])
        return None


def moments(values: list[float]) -> Told:
    """Return number, mean and sum of squared deviations, the mean with what rounding left over."""
    count = len(values)
    mean = math.fsum(values) / count
    rest = math.fsum(value - mean for value in values) / count
    squares = math.fsum((value - mean - rest) ** 2 for value in values)
    return {"n": count, "mean": mean, "rest": rest, "m2": squares}


def comoment(x: Any, y: Any, of_x: Told, of_y: Told) -> float:
    """Return the sum of products of deviations."""
    first, second = (v - m["mean"] - m["rest"] for v, m in ((x, of_x), (y, of_y)))
    return math.fsum(first * second)


def _counted(inside: Mask, usable: Mask) -> Told:
    count = int(usable.sum())
    return {"n": count, "missing": int(inside.sum()) - count}


def _upward(times: Any, width: float) -> Any:
    """Return the number of widths to which each time is rounded up."""
    return -grid(np.negative(np.asarray(times, float)), width)[0]


def _date(day: float) -> str:
    return date.fromordinal(max(1, min(int(day), date.max.toordinal()))).isoformat()
