"""What one hospital answers with noise, so that a privacy budget covers it.

One vector holds everything that is counted and summed. A row adds a vector to it whose length is
at most `Plan.bound`, and a patient the mean of these over all rows of that patient, so that one
patient with all records, in or out, changes the whole by no more than that. Gaussian noise on each
number then makes it one release with the noise multiplier std / bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.noise import gaussian, secure_generator
from fedmed_flower.statistics.columns import Codes, Columns, Mask
from fedmed_flower.statistics.local import Told
from fedmed_flower.statistics.request import Request

Floats = NDArray[np.float64]
_MOST_BINS, _MOST_CORRELATED, _MOST_NUMBERS = 200, 50, 1_000_000
_UNDECLARED = "with noise a column needs a declared range, or declared categories"
_SMALL = "its count, with noise, is below the minimum"


@dataclass(frozen=True)
class Block:
    """Some numbers of the vector.

    Attributes
    ----------
    kind : {"patients", "table", "moments", "pair", "correlation", "survival"}
    columns : tuple of str
    values : ndarray
        (rows, numbers) what each row adds; or, for counts, (rows,) which number it adds 1 to.
    size : int
        How many numbers.
    bound : float
        The greatest length of what a row adds.
    about : dict
        What makes an answer of the numbers.
    """

    kind: str
    columns: tuple[str, ...]
    values: NDArray[Any]
    size: int
    bound: float
    about: Told


@dataclass(frozen=True)
class Plan:
    """All that is counted of each group.

    Attributes
    ----------
    blocks : list of Block
    groups : tuple of str
    labels : ndarray
        (rows,) the group of each row, -1 for none.
    withheld : list of (str, str, str)
    """

    blocks: list[Block]
    groups: tuple[str, ...]
    labels: Codes
    withheld: list[list[str]]

    @property
    def bound(self) -> float:
        """How far one patient can move the vector of all groups."""
        return math.sqrt(sum(block.bound**2 for block in self.blocks))

    def sums(self, columns: Columns) -> Floats:
        """Return (groups, numbers) the vector, without noise."""
        rows_of = np.bincount(columns.whose)
        weights = 1.0 / rows_of[columns.whose]
        found = []
        for number in range(len(self.groups)):
            here = self.labels == number
            found.append(
                np.concatenate([_sum(block, here, weights[here]) for block in self.blocks])
            )
        return np.array(found)


def plan(columns: Columns, request: Request) -> Plan:
    """Return what a request counts; what is in the rows decides nothing of its form.

    Raises
    ------
    InputError
        Where no column is named, a condition or `by` is of one that is not declared, or too much is
        asked at once.
    """
    names = request.columns or (*columns.ranges, *columns.categories)
    if not names:
        raise InputError(f"{_UNDECLARED}: name columns, and declare them")
    declared = {*columns.ranges, *columns.categories}
    withheld = [["", name, _UNDECLARED] for name in names if name not in declared]
    # What a column holds, or whether it is there at all, is not told without noise either.
    if unknown := [c.column for c in request.where if c.column not in declared]:
        raise InputError(f"with noise a condition needs a declared range or categories: {unknown}")
    met = [columns.meets(c) for c in request.where if c.column in columns.names]
    inside = np.full(columns.count, len(met) == len(request.where))
    inside = np.logical_and.reduce([inside, *met])
    labels, groups = np.where(inside, 0, -1), ("",)
    if request.by:
        if request.by not in columns.categories:
            raise InputError(f"with noise the categories of {request.by} must be declared")
        groups = tuple(columns.categories[request.by])
        labels = np.where(inside, _coded(columns, request.by)[0], -1)
        labels[labels >= len(groups)] = -1
    everybody = np.zeros(columns.count, np.int64)
    blocks = [Block("patients", (), everybody, 1, 1.0, {})]
    numeric = [name for name in names if name in columns.ranges]
    if "correlations" in request.kinds and len(numeric) > _MOST_CORRELATED:
        raise InputError(
            f"correlations with noise are of at most {_MOST_CORRELATED} columns, got {len(numeric)}"
        )
    for name in names:
        if name in numeric:
            blocks += _numeric(columns, request, name)
        elif name in columns.categories:
            codes, size = _coded(columns, name)
            blocks.append(Block("table", (name,), codes, size, 1.0, {}))
    if "correlations" in request.kinds:
        blocks += [_correlation(columns, *pair) for pair in combinations(numeric, 2)]
    for one, other in request.pairs:
        if {one, other} <= columns.categories.keys():
            (a, rows), (b, across) = _coded(columns, one), _coded(columns, other)
            shape = {"shape": (rows, across)}
            codes = a * across + b
            blocks.append(Block("pair", (one, other), codes, rows * across, 1.0, shape))
        else:
            withheld.append(["", f"{one} by {other}", _UNDECLARED])
    if request.survival is not None:
        blocks.append(_survival(columns, request))
    if (size := len(groups) * sum(block.size for block in blocks)) > _MOST_NUMBERS:
        raise InputError(
            f"with noise at most {_MOST_NUMBERS:,} numbers can be asked for, got {size:,}"
        )
    return Plan(blocks, groups, labels.astype(np.int64), withheld)


def noised(
    planned: Plan, columns: Columns, noise_multiplier: float, minimum: int
) -> tuple[list[Told], list[list[str]]]:
    """Return the groups of an answer with noise, and what is withheld and why."""
    sums = planned.sums(columns)
    noise = gaussian(sums.size, noise_multiplier * planned.bound, secure_generator())
    sums += noise.reshape(sums.shape)
    groups, withheld = [], list(planned.withheld)
    for name, vector in zip(planned.groups, sums, strict=True):
        told, small = _told(name, planned.blocks, vector, columns, minimum)
        groups.append(told)
        withheld += [[name, what, _SMALL] for what in small]
    return groups, withheld


def _sum(block: Block, here: Mask, weights: Floats) -> Floats:
    values = block.values[here]
    if values.ndim == 1:
        return np.bincount(values, weights, block.size).astype(np.float64)
    return np.asarray(weights @ values, np.float64)


def _coded(columns: Columns, name: str) -> tuple[Codes, int]:
    """Return the number of each row's category and how many there are.

    The last two are all other categories, and a missing one.
    """
    names = columns.categories[name]
    number: dict[str | None, int] = {text: place for place, text in enumerate(names)}
    number[None] = len(names) + 1
    codes = [number.get(text, len(names)) for text in columns.texts(name)]
    return np.array(codes, np.int64), len(names) + 2


def _scaled(columns: Columns, name: str) -> tuple[Floats, Mask]:
    """Return a column clipped to its range as -1 to 1, 0 where it is missing, and where it is."""
    (low, high), numbers = map(float, columns.ranges[name]), columns.numbers(name)
    present = ~np.isnan(numbers)
    scaled = (np.where(present, numbers, low) - low) / (high - low) * 2 - 1
    # Last, so that the bound holds whatever the arithmetic has made of an odd range.
    return np.where(present, np.clip(np.nan_to_num(scaled), -1.0, 1.0), 0.0), present


def _numeric(columns: Columns, request: Request, name: str) -> list[Block]:
    scaled, present = _scaled(columns, name)
    (low, high), bins = columns.ranges[name], 1
    if "histograms" in request.kinds:
        width = columns.resolution(name) or high - low
        bins = min(max(1, math.ceil((high - low) / width)), _MOST_BINS)
    places = np.clip(((scaled + 1) / 2 * bins).astype(np.int64), 0, bins - 1)
    places = np.where(present, places, bins)
    edges = [low + (high - low) * number / bins for number in range(1, bins)]
    table = Block("table", (name,), places, bins + 1, 1.0, {"edges": edges})
    if "moments" not in request.kinds:
        return [table]
    values = np.column_stack((scaled, scaled**2))
    return [table, Block("moments", (name,), values, 2, math.sqrt(2), {})]


def _correlation(columns: Columns, one: str, other: str) -> Block:
    (x, first), (y, second) = _scaled(columns, one), _scaled(columns, other)
    both = first & second
    values = np.column_stack((np.ones_like(x), x, y, x * x, y * y, x * y)) * both[:, None]
    return Block("correlation", (one, other), values, 6, math.sqrt(6), {})


def _survival(columns: Columns, request: Request) -> Block:
    asked = request.survival
    if asked is None:
        raise InputError("no survival is asked for")
    times, events = columns.survival(asked)
    count = min(math.ceil(asked.horizon / asked.width), _MOST_BINS)
    width, known = asked.horizon / count, ~np.isnan(times)
    steps = np.clip(np.ceil(np.where(known, times, 0.0) / width), 1, count).astype(np.int64)
    places = np.where(known, 2 * (steps - 1) + events, 2 * count)
    ends = [width * number for number in range(1, count + 1)]
    return Block("survival", asked[:2], places, 2 * count + 1, 1.0, {"times": ends})


def _told(
    name: str, blocks: list[Block], vector: Floats, columns: Columns, minimum: int
) -> tuple[Told, list[str]]:
    """Return the answer that noised numbers give, without what they say of too few patients."""
    told: Told = {"name": name, "start": None, "numeric": {}, "categorical": {}}
    told |= {"correlations": [], "pairs": []}
    small: list[str] = []
    ends = np.cumsum([block.size for block in blocks])
    for block, numbers in zip(blocks, np.split(vector, ends[:-1]), strict=True):
        counts, of = np.maximum(numbers, 0.0), block.columns
        if block.kind == "patients":
            told["rows"] = told["patients"] = float(counts[0])
        elif block.kind == "moments":
            entry = told["numeric"].get(of[0])
            if entry is not None:
                entry |= _moments(numbers, entry["n"], columns.ranges[of[0]])
        elif block.kind == "correlation":
            if numbers[0] < max(minimum, 2):
                small.append(f"correlation of {of[0]} and {of[1]}")
            else:
                told["correlations"].append(_correlated(numbers, of, columns.ranges))
        elif block.kind == "survival":
            table = counts[:-1].reshape(-1, 2)
            told["survival"] = {"times": block.about["times"], "events": table[:, 1].tolist()}
            told["survival"]["censored"] = table[:, 0].tolist()
        elif block.kind == "pair":
            shape = block.about["shape"]
            names = [[*columns.categories[n], "(other)"] for n in of]
            table = counts.reshape(shape)[:-1, :-1]
            entry = {"columns": list(of), "rows": names[0], "across": names[1]}
            told["pairs"].append(entry | {"counts": table.tolist()})
        elif (count := float(counts[:-1].sum())) < minimum:
            small.append(of[0])
        else:
            entry = {"n": count, "missing": float(counts[-1])}
            if "edges" in block.about:
                told["numeric"][of[0]] = entry
                if block.about["edges"]:
                    entry["histogram"] = block.about | {"counts": counts[:-1].tolist()}
            else:
                entry |= {"names": list(columns.categories[of[0]]), "few": float(counts[-2])}
                told["categorical"][of[0]] = entry | {"counts": counts[:-2].tolist()}
    return told, small


def _moments(sums: Floats, count: float, limits: tuple[float, float]) -> Told:
    low, high = limits
    mean = min(1.0, max(-1.0, float(sums[0]) / count))
    squares = max(0.0, float(sums[1]) - count * mean**2)
    half = (high - low) / 2
    return {"mean": low + half * (mean + 1), "rest": 0.0, "m2": half**2 * squares}


def _correlated(
    sums: Floats, of: tuple[str, ...], ranges: Mapping[str, tuple[float, float]]
) -> Told:
    count, half = float(sums[0]), [(ranges[n][1] - ranges[n][0]) / 2 for n in of]
    parts = [
        {"n": count, **_moments(sums[[place, place + 2]], count, ranges[name])}
        for place, name in zip((1, 2), of, strict=True)
    ]
    means = [(m["mean"] - ranges[n][0]) / h - 1 for m, n, h in zip(parts, of, half, strict=True)]
    product = (float(sums[5]) - count * means[0] * means[1]) * half[0] * half[1]
    most = math.sqrt(parts[0]["m2"] * parts[1]["m2"])
    return {"columns": list(of), "of": parts, "product": min(most, max(-most, product))}
