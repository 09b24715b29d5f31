"""What one hospital answers with noise, so that a privacy budget covers it.

One vector holds everything that is counted and summed. Each row has a vector of length `Plan.bound`
or less, and a patient adds the mean of the vectors of all the patient's rows. So one patient, with
all rows in or out, changes the sum by at most that bound. Gaussian noise on each number then makes
it one release with the noise multiplier std / bound.

What a row adds depends only on the row and on what is declared. If other patients' rows decided how
it is read, one of them could change the sum by more. So a plan is made before any row is read, and
each cell is read by itself. A cell that does not fit its column counts as missing, and so does the
cell of a column that a row lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.rows import Rows
from fedmed_flower.data.site import Row, patient_text
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.noise import noised_once
from fedmed_flower.statistics.columns import follow_up
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.request import Filter, Request, Survival, require_comparable
from fedmed_flower.statistics.types import Codes, Floats, Mask, Reported
from fedmed_flower.statistics.values import (
    cells_of,
    coded,
    numbers_meet,
    numbers_of,
    only_whole,
    texts_meet,
)

_MOST_BINS = 200
_MOST_CORRELATED = 50
_MOST_NUMBERS = 1_000_000
_UNDECLARED = "with noise a column needs a declared range, or declared categories"
_SMALL = "its count, with noise, is below the minimum"


class Cells:
    """The rows of a hospital, read cell by cell as is declared of their columns.

    Parameters
    ----------
    rows : sequence of dict
        A row whose ``patient`` is not a valid name is left out.
    declared : Declared

    Attributes
    ----------
    patients : list of str
        The patient of each row that is not left out.
    """

    def __init__(self, rows: Sequence[Row], declared: Declared) -> None:
        rows = Rows.of(rows)
        patients = list(map(_patient, rows))
        named = [index for index, patient in enumerate(patients) if patient is not None]
        self.patients = [patient for patient in patients if patient is not None]
        self._rows = rows.take(named) if isinstance(rows, Rows) else [rows[i] for i in named]
        self._declared = declared
        self._codes: dict[str, Codes] = {}
        self._scaled: dict[str, tuple[Floats, Mask]] = {}

    def codes(self, name: str) -> Codes:
        """Return (rows,) the number of each row's category of a column.

        The declared categories come first. One number behind them stands for all other categories,
        and the last for a missing value.
        """
        if name not in self._codes:
            names = self._declared.categories[name]
            number: dict[str | None, int] = {text: index for index, text in enumerate(names)}
            number[None] = len(names) + 1
            codes = [number.get(text, len(names)) for text in self._texts(name)]
            self._codes[name] = np.array(codes, np.int64)
        return self._codes[name]

    def scaled(self, name: str) -> tuple[Floats, Mask]:
        """Return a column clipped to its range and scaled to -1 to 1, and which rows have a value.

        A missing value is 0.
        """
        if name not in self._scaled:
            low, high = map(float, self._declared.ranges[name])
            numbers = self._numbers(name)
            present = ~np.isnan(numbers)
            with np.errstate(over="ignore"):
                scaled = (np.where(present, numbers, low) - low) / (high - low) * 2 - 1
            # Clipped last: the bound must hold whatever rounding makes of an extreme range.
            scaled = np.where(present, np.clip(np.nan_to_num(scaled), -1.0, 1.0), 0.0)
            self._scaled[name] = scaled, present
        return self._scaled[name]

    def meets(self, condition: Filter) -> Mask:
        """Return (rows,) whether a row meets a condition."""
        if self._declared.is_categorical(condition.column):
            return texts_meet(self._texts(condition.column), condition)
        return numbers_meet(self._numbers(condition.column), condition)

    def follow_up(self, asked: Survival) -> tuple[Floats, Codes]:
        """Return times and events; see `fedmed_flower.statistics.columns.follow_up`."""
        return follow_up(self._numbers(asked.time), self._texts(asked.event), asked.horizon)

    def _numbers(self, name: str) -> Floats:
        numbers = numbers_of(cells_of(self._rows, name))
        return only_whole(numbers) if self._declared.is_whole(name) else numbers

    def _texts(self, name: str) -> list[str | None]:
        codes, texts = coded(cells_of(self._rows, name))
        # The last one stands for a missing value, -1.
        with_none = [*texts, None]
        return [with_none[code] for code in codes.tolist()]


@dataclass(frozen=True)
class Block:
    """Some numbers of the vector.

    Attributes
    ----------
    kind : {"patients", "table", "moments", "pair", "correlation", "survival"}
    columns : tuple of str
    values : callable
        Maps `Cells` to (rows, numbers), what each row adds. For counts it maps to (rows,), the
        index of the number to which each row adds 1.
    size : int
        How many numbers.
    bound : float
        The greatest length of what a row adds.
    about : dict
        What else the answer says: edges or times of the cells, shape of the table.
    """

    kind: str
    columns: tuple[str, ...]
    values: Callable[[Cells], NDArray[Any]]
    size: int
    bound: float
    about: Reported = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All that is counted of each group, before any row is looked at.

    Attributes
    ----------
    blocks : list of Block
    groups : tuple of str
    by : str
        The column that makes the groups; empty for one group of all rows.
    where : tuple of Filter
        The conditions that rows meet.
    withheld : list of (str, str, str)
        Group, what is withheld, and why.
    declared : Declared
    """

    blocks: list[Block]
    groups: tuple[str, ...]
    by: str
    where: tuple[Filter, ...]
    withheld: list[list[str]]
    declared: Declared

    @property
    def bound(self) -> float:
        """How far one patient can move the vector of all groups."""
        return math.sqrt(sum(block.bound**2 for block in self.blocks))

    @property
    def size(self) -> int:
        """How many numbers leave, of all groups."""
        return len(self.groups) * sum(block.size for block in self.blocks)

    def sums(self, cells: Cells) -> Floats:
        """Return (groups, numbers) the vector, without noise."""
        _, patient_of_row = np.unique(cells.patients, return_inverse=True)
        weights = 1.0 / np.bincount(patient_of_row)[patient_of_row]
        labels = self._labels(cells)
        groups = [np.flatnonzero(labels == number) for number in range(len(self.groups))]
        sums = [_sums(block, block.values(cells), groups, weights) for block in self.blocks]
        return np.concatenate(sums, axis=1)

    def _labels(self, cells: Cells) -> Codes:
        """Return (rows,) the group of each row, -1 if the row is in no group."""
        labels = np.zeros(len(cells.patients), np.int64)
        if self.by:
            labels = cells.codes(self.by).copy()
            labels[labels >= len(self.groups)] = -1
        for condition in self.where:
            labels[~cells.meets(condition)] = -1
        return labels


def plan(request: Request, declared: Declared) -> Plan:
    """Return what is counted, as request and schema decide.

    Raises
    ------
    InputError
        If neither request nor schema names a column; if a condition or `by` uses an undeclared
        column; if a condition, `by` or survival uses a column of the wrong kind; if request and
        schema declare a column differently; or if too many correlations or numbers are asked for.
    """
    names = request.columns or tuple(dict.fromkeys((*declared.ranges, *declared.categories)))
    _require_declared(request, declared, names)
    numeric = [name for name in names if declared.has_range(name)]
    blocks = [Block("patients", (), _everybody, 1, 1.0)]
    withheld = []
    for name in names:
        if declared.has_range(name):
            blocks += _numeric(request, declared, name)
        elif declared.has_categories(name):
            blocks.append(_table(declared, name))
        else:
            withheld.append(["", name, _UNDECLARED])
    if "correlations" in request.kinds:
        blocks += [_correlation(*pair) for pair in combinations(numeric, 2)]
    for one, other in request.pairs:
        if declared.has_categories(one) and declared.has_categories(other):
            blocks.append(_pair(declared, one, other))
        else:
            withheld.append(["", f"{one} by {other}", _UNDECLARED])
    if request.survival is not None:
        blocks.append(_survival(request.survival))
    groups = tuple(declared.categories[request.by]) if request.by else ("",)
    planned = Plan(blocks, groups, request.by, request.where, withheld, declared)
    if planned.size > _MOST_NUMBERS:
        raise InputError(
            f"with noise at most {_MOST_NUMBERS:,} numbers can be asked for, got "
            f"{planned.size:,}: ask for fewer columns, pairs or groups"
        )
    return planned


def noised(
    planned: Plan, cells: Cells, noise_multiplier: float, minimum: int
) -> tuple[list[Reported], list[list[str]]]:
    """Return the groups of an answer with noise, and what is withheld and why."""
    sums = noised_once(planned.sums(cells), noise_multiplier * planned.bound)
    groups = []
    withheld = list(planned.withheld)
    for name, vector in zip(planned.groups, sums, strict=True):
        reported, small = _answer_of_group(name, planned.blocks, vector, planned.declared, minimum)
        groups.append(reported)
        withheld += [[name, what, _SMALL] for what in small]
    return groups, withheld


def _patient(row: Row) -> str | None:
    """Return the patient of a row; None if the row has no valid one."""
    try:
        return patient_text(row["patient"])
    except Exception:
        # Whatever the cell holds: an error would let one row decide whether there is an answer.
        return None


def _require_declared(request: Request, declared: Declared, names: Sequence[str]) -> None:
    """Raise `InputError` if a request needs what is not declared."""
    declared.require_agreement()
    if not names:
        raise InputError(f"{_UNDECLARED}: name columns, and declare them")
    known = {*declared.ranges, *declared.categories}
    if unknown := [c.column for c in request.where if c.column not in known]:
        raise InputError(f"with noise a condition needs a declared range or categories: {unknown}")
    for condition in request.where:
        require_comparable(condition, declared.is_categorical(condition.column) is True)
    if request.by and not declared.has_categories(request.by):
        raise InputError(f"with noise the categories of {request.by} must be declared")
    if request.survival is not None and declared.is_categorical(request.survival.time):
        raise InputError(request.survival.no_times)
    numeric = sum(declared.has_range(name) for name in names)
    if "correlations" in request.kinds and numeric > _MOST_CORRELATED:
        raise InputError(
            f"correlations with noise are of at most {_MOST_CORRELATED} columns, got {numeric}: "
            "name fewer columns"
        )


def _sums(block: Block, values: NDArray[Any], groups: Sequence[Codes], weights: Floats) -> Floats:
    """Return (groups, numbers), the weighted sum of what the rows of each group add.

    `groups` holds the indices of each group's rows.
    """
    if values.ndim == 1:
        sums = [np.bincount(values[rows], weights[rows], block.size) for rows in groups]
    else:
        sums = [weights[rows] @ values[rows] for rows in groups]
    return np.array(sums, np.float64)


def _everybody(cells: Cells) -> Codes:
    return np.zeros(len(cells.patients), np.int64)


def _table(declared: Declared, name: str) -> Block:
    size = len(declared.categories[name]) + 2
    return Block("table", (name,), lambda cells: cells.codes(name), size, 1.0)


def _numeric(request: Request, declared: Declared, name: str) -> list[Block]:
    low, high = declared.ranges[name]
    bins = 1
    if "histograms" in request.kinds:
        width = declared.resolution(name) or high - low
        bins = max(1, math.ceil(min((high - low) / width, _MOST_BINS)))

    def indices(cells: Cells) -> Codes:
        scaled, present = cells.scaled(name)
        inside = np.clip(((scaled + 1) / 2 * bins).astype(np.int64), 0, bins - 1)
        return np.where(present, inside, bins)

    def squares(cells: Cells) -> Floats:
        scaled, _ = cells.scaled(name)
        return np.column_stack((scaled, scaled**2))

    edges = [low + (high - low) * number / bins for number in range(1, bins)]
    blocks = [Block("table", (name,), indices, bins + 1, 1.0, {"edges": edges})]
    if "moments" in request.kinds:
        blocks.append(Block("moments", (name,), squares, 2, math.sqrt(2)))
    return blocks


def _pair(declared: Declared, one: str, other: str) -> Block:
    rows, across = (len(declared.categories[name]) + 2 for name in (one, other))

    def indices(cells: Cells) -> Codes:
        return cells.codes(one) * across + cells.codes(other)

    return Block("pair", (one, other), indices, rows * across, 1.0, {"shape": (rows, across)})


def _correlation(one: str, other: str) -> Block:
    def products(cells: Cells) -> Floats:
        x, x_present = cells.scaled(one)
        y, y_present = cells.scaled(other)
        both = x_present & y_present
        return np.column_stack((np.ones_like(x), x, y, x * x, y * y, x * y)) * both[:, None]

    return Block("correlation", (one, other), products, 6, math.sqrt(6))


def _survival(asked: Survival) -> Block:
    count = min(math.ceil(asked.horizon / asked.width), _MOST_BINS)
    width = asked.horizon / count

    def indices(cells: Cells) -> Codes:
        times, events = cells.follow_up(asked)
        known = ~np.isnan(times)
        # Times beyond the horizon are censored at it.
        steps = np.clip(np.ceil(np.where(known, times, 0.0) / width), 1, count).astype(np.int64)
        return np.where(known, 2 * (steps - 1) + events, 2 * count)

    ends = [width * number for number in range(1, count + 1)]
    return Block("survival", asked[:2], indices, 2 * count + 1, 1.0, {"times": ends})


def _answer_of_group(
    name: str, blocks: list[Block], vector: Floats, declared: Declared, minimum: int
) -> tuple[Reported, list[str]]:
    """Return a group's answer made from noised numbers, and what is left out as too small."""
    reported: Reported = {"name": name, "start": None, "numeric": {}, "categorical": {}}
    reported |= {"correlations": [], "pairs": []}
    small: list[str] = []
    ends = np.cumsum([block.size for block in blocks])
    for block, numbers in zip(blocks, np.split(vector, ends[:-1]), strict=True):
        withheld = _ADD[block.kind](reported, block, numbers, declared, minimum)
        if withheld is not None:
            small.append(withheld)
    return reported, small


# Each of these adds a block's noised numbers to a group's answer. It returns the name of what it
# withholds as too small, None if it withholds nothing.


def _add_patients(
    reported: Reported, block: Block, numbers: Floats, declared: Declared, minimum: int
) -> None:
    reported["rows"] = reported["patients"] = float(np.maximum(numbers[0], 0.0))


def _add_table(
    reported: Reported, block: Block, numbers: Floats, declared: Declared, minimum: int
) -> str | None:
    (column,) = block.columns
    counts = np.maximum(numbers, 0.0)
    count = float(counts[:-1].sum())
    if count < minimum:
        return column
    entry: Reported = {"n": count, "missing": float(counts[-1])}
    edges = block.about.get("edges")
    if edges is None:
        entry |= {"names": list(declared.categories[column]), "few": float(counts[-2])}
        reported["categorical"][column] = entry | {"counts": counts[:-2].tolist()}
    else:
        reported["numeric"][column] = entry
        if edges:
            entry["histogram"] = block.about | {"counts": counts[:-1].tolist()}
    return None


def _add_moments(
    reported: Reported, block: Block, numbers: Floats, declared: Declared, minimum: int
) -> None:
    (column,) = block.columns
    # The column's table comes before; it is missing if it was too small.
    entry = reported["numeric"].get(column)
    if entry is not None:
        entry |= _moments(numbers, entry["n"], declared.ranges[column])


def _add_correlation(
    reported: Reported, block: Block, numbers: Floats, declared: Declared, minimum: int
) -> str | None:
    if numbers[0] < max(minimum, 2):
        one, other = block.columns
        return f"correlation of {one} and {other}"
    reported["correlations"].append(_correlated(numbers, block.columns, declared.ranges))
    return None


def _add_pair(
    reported: Reported, block: Block, numbers: Floats, declared: Declared, minimum: int
) -> None:
    rows, across = ([*declared.categories[name], "(other)"] for name in block.columns)
    # The last row and the last column count missing values.
    table = np.maximum(numbers, 0.0).reshape(block.about["shape"])[:-1, :-1]
    entry = {"columns": list(block.columns), "rows": rows, "across": across}
    reported["pairs"].append(entry | {"counts": table.tolist()})


def _add_survival(
    reported: Reported, block: Block, numbers: Floats, declared: Declared, minimum: int
) -> None:
    # The last number counts missing times.
    table = np.maximum(numbers[:-1], 0.0).reshape(-1, 2)
    reported["survival"] = {
        "times": block.about["times"],
        "events": table[:, 1].tolist(),
        "censored": table[:, 0].tolist(),
    }


_ADD: dict[str, Callable[[Reported, Block, Floats, Declared, int], str | None]] = {
    "patients": _add_patients,
    "table": _add_table,
    "moments": _add_moments,
    "correlation": _add_correlation,
    "pair": _add_pair,
    "survival": _add_survival,
}


def _moments(sums: Floats, count: float, limits: tuple[float, float]) -> Reported:
    low, high = limits
    mean = min(1.0, max(-1.0, float(sums[0]) / count))
    squares = max(0.0, float(sums[1]) - count * mean**2)
    half = (high - low) / 2
    return {"mean": low + half * (mean + 1), "rest": 0.0, "m2": half**2 * squares}


def _correlated(
    sums: Floats, columns: tuple[str, ...], ranges: Mapping[str, tuple[float, float]]
) -> Reported:
    count = float(sums[0])
    half = [(ranges[name][1] - ranges[name][0]) / 2 for name in columns]
    parts = [
        {"n": count, **_moments(sums[[index, index + 2]], count, ranges[name])}
        for index, name in zip((1, 2), columns, strict=True)
    ]
    means = [
        (m["mean"] - ranges[n][0]) / h - 1 for m, n, h in zip(parts, columns, half, strict=True)
    ]
    product = (float(sums[5]) - count * means[0] * means[1]) * half[0] * half[1]
    most = math.sqrt(parts[0]["m2"] * parts[1]["m2"])
    return {"columns": list(columns), "of": parts, "product": min(most, max(-most, product))}
