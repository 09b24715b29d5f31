"""A hospital's exact answer as numbers that can be added up, in an order that the question fixes.

A secure sum is over numbers of which server and hospital know beforehand what each is. So columns
and categories are those that the question names; what else a hospital's answer holds is counted as
rest. A key stands for what a hospital tells as a whole or not at all, such as the moments of a
column. It is first asked how many hospitals tell each key, and then for those that enough tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.pooling import values_below
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.types import Floats, Reported
from fedmed_flower.statistics.withheld import AND, BY, CORRELATION, HISTOGRAM

ROWS = "rows"
NUMERIC = "numeric"
CATEGORICAL = "categorical"
CATEGORY = "category"
EDGE = "edge"
REST = "rest"
CORRELATED = "correlation"
PAIR = "pair"

_MOST_CELLS = 1_000_000
_MOST_EDGES = 1_000


class Key(NamedTuple):
    """What a hospital tells as a whole or not at all.

    Attributes
    ----------
    kind : str
    columns : tuple of str
    category : str
        Of a single category; of an edge of cells, its value.
    """

    kind: str
    columns: tuple[str, ...] = ()
    category: str = ""

    @property
    def what(self) -> str:
        """Its name, as hospitals name what they withhold."""
        if self.kind == ROWS:
            return "patients"
        if self.kind == CATEGORY:
            return f"{self.columns[0]} = {self.category}"
        if self.kind == EDGE:
            return f"{HISTOGRAM}{self.columns[0]}"
        if self.kind == CORRELATED:
            return f"{CORRELATION}{AND.join(self.columns)}"
        return BY.join(self.columns)


def require_tallied(request: Request, drift: str) -> None:
    """Raise `InputError` if a question needs more than numbers that can be added up.

    Parameters
    ----------
    request : Request
    drift : str
        As `survey` takes it.
    """
    named = {name for pair in request.pairs for name in pair} | {*request.columns}
    undeclared = [*request.categorical, *(n for pair in request.pairs for n in pair)]
    for refused, what, way_out in (
        (not request.columns, "a question about all columns", "name them: --column"),
        (request.epsilon, "noise (epsilon)", "leave --epsilon out"),
        (request.by and not request.by_width, "by", "ask for one group at a time: --where"),
        (request.by_width, "windows", "ask for one window at a time: --where"),
        (drift, "drift, which compares single hospitals", "leave it out"),
        (request.weekly, "weekly counts, of which hospitals leave out some", "leave them out"),
        (request.survival, "a survival curve, whose times each hospital merges", "leave it out"),
    ):
        if refused:
            raise InputError(f'secure="sum" excludes {what}: {way_out}')
    for name in undeclared:
        if name not in request.categories:
            raise InputError(
                f'secure="sum" excludes {name} without its categories, which hospitals would have '
                f"to name: declare them: --categories {name}=A,B"
            )
    for name in request.categories:
        if name not in named:
            raise InputError(f"{name} has categories and is not asked for: name it by --column")
    if "histograms" in request.kinds:
        for name in _numeric(request):
            _require_edges(request, name)
    cells = sum(
        len(request.categories[one]) * len(request.categories[other])
        for one, other in request.pairs
    )
    if cells > _MOST_CELLS:
        raise InputError(
            f"two-way tables must have at most {_MOST_CELLS:,} cells together, got {cells:,}"
        )


def _numeric(request: Request) -> list[str]:
    return [name for name in request.columns if name not in request.categories]


def _require_edges(request: Request, name: str) -> None:
    if name not in request.ranges:
        raise InputError(
            f'secure="sum" excludes quantiles of {name} without its range, from which the cells '
            f"follow that all hospitals count: declare it: --range {name}=LOW,HIGH"
        )
    low, high = request.ranges[name]
    width = Declared(request).resolution(name)
    if width is None or not (high - low) / width <= _MOST_EDGES:
        raise InputError(
            f"the range of {name} must have at most {_MOST_EDGES} cells, got {low:g} to {high:g} "
            f"in cells of {width}: choose a larger --resolution"
        )


def edges_of(request: Request, name: str) -> list[float]:
    """Return the values below which the values of a column are counted: multiples of a width.

    Hospitals whose cells are wider know the counts at some of them.
    """
    width = Declared(request).resolution(name)
    if width is None or name not in request.ranges:
        return []
    low, high = request.ranges[name]
    return [step * width for step in range(math.ceil(low / width), math.floor(high / width) + 1)]


def keys_of(request: Request) -> list[Key]:
    """Return what is asked of each hospital, in the order of its numbers."""
    numeric = _numeric(request)
    keys = [Key(ROWS), *(Key(NUMERIC, (name,)) for name in numeric)]
    if "histograms" in request.kinds:
        keys += [Key(EDGE, (n,), repr(edge)) for n in numeric for edge in edges_of(request, n)]
    for name in request.columns:
        if name not in request.categories:
            continue
        keys += [Key(CATEGORICAL, (name,)), Key(REST, (name,))]
        if "tables" in request.kinds:
            keys += [Key(CATEGORY, (name,), value) for value in request.categories[name]]
    if "correlations" in request.kinds:
        keys += [Key(CORRELATED, pair) for pair in combinations(numeric, 2)]
    return keys + [Key(PAIR, tuple(pair)) for pair in request.pairs]


def number_of_counts(key: Key, request: Request) -> int:
    """Return how many counts belong to a key."""
    if key.kind == PAIR:
        one, other = (request.categories[name] for name in key.columns)
        return len(one) * len(other)
    return {ROWS: 2, NUMERIC: 2, CATEGORICAL: 2, CATEGORY: 1, EDGE: 1, CORRELATED: 1}.get(
        key.kind, 0
    )


def number_of_samples(key: Key) -> int:
    """Return of how many samples a key has moments."""
    return {NUMERIC: 1, CORRELATED: 2}.get(key.kind, 0)


def told(reported: Reported, request: Request) -> NDArray[np.int64]:
    """Return (keys,) 1 for what a hospital's answer tells, else 0.

    A category that is not named counts as none if the answer pools no small ones. The key of the
    rest is 1 if there is one: rows of categories that are pooled, or that the question lacks.
    """
    group = _group(reported)
    return np.array([_tells(group, key, request) for key in keys_of(request)], np.int64)


def _tells(group: Reported | None, key: Key, request: Request) -> bool:
    if group is None:
        return False
    if key.kind == ROWS:
        return True
    if key.kind == NUMERIC:
        # Without a value there are no moments, and nothing is withheld.
        return key.columns[0] in group["numeric"]
    if key.kind == EDGE:
        least, most = _below(group, key)
        return least == most
    if key.kind == CORRELATED:
        return _correlation(group, key) is not None
    if key.kind == PAIR:
        return _pair(group, key, request) is not None
    part = group["categorical"].get(key.columns[0])
    if part is None or ("tables" in request.kinds and "names" not in part):
        return False
    if key.kind == CATEGORICAL:
        return True
    if "names" not in part:
        return False
    if key.kind == REST:
        return _rest(part, request.categories[key.columns[0]]) > 0
    return key.category in part["names"] or not part["few"]


def counts(reported: Reported, request: Request, asked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the counts of all keys, 0 for those that are not asked for or not told."""
    group = _group(reported)
    numbers: list[int] = []
    for key, wanted in zip(keys_of(request), asked.tolist(), strict=True):
        size = number_of_counts(key, request)
        if group is None or not wanted or not _tells(group, key, request):
            numbers += [0] * size
        elif size:
            numbers += _counts(group, key, request)
    return np.array(numbers, np.int64)


def _counts(group: Reported, key: Key, request: Request) -> list[int]:
    if key.kind == ROWS:
        return [group["rows"], group["patients"]]
    if key.kind == EDGE:
        return [int(_below(group, key)[0])]
    if key.kind == CORRELATED:
        part = _correlation(group, key)
        return [part["of"][0]["n"]] if part is not None else [0]
    if key.kind == PAIR:
        table = _pair(group, key, request)
        return [] if table is None else [int(number) for number in table.ravel()]
    part = group["numeric" if key.kind == NUMERIC else "categorical"][key.columns[0]]
    if key.kind == CATEGORY:
        return [dict(zip(part["names"], part["counts"], strict=True)).get(key.category, 0)]
    return [part["n"], part["missing"]]


def squares(reported: Reported, request: Request, asked: NDArray[np.bool_]) -> Floats:
    """Return the sum of squares of each sample, 0 for one that is not asked for or not told."""
    return about(reported, request, asked, np.zeros(_samples(request)), np.ones(_samples(request)))[
        1
    ]


def about(
    reported: Reported,
    request: Request,
    asked: NDArray[np.bool_],
    centres: Floats,
    units: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Return sums of samples' distances from given centres, in given units.

    Parameters
    ----------
    reported : dict
        A hospital's answer.
    request : Request
    asked : (keys,) bool array
    centres, units : (samples,) float array
        A correlation has two samples: of the rows that have both columns.

    Returns
    -------
    sums, squares : (samples,) float array
    products : (correlations,) float array
    """
    group = _group(reported)
    sums: list[float] = []
    found: list[float] = []
    products: list[float] = []
    for key, wanted in zip(keys_of(request), asked.tolist(), strict=True):
        size = number_of_samples(key)
        if not size:
            continue
        start = len(sums)
        parts = _sampled(group, key) if wanted and group is not None else None
        if parts is None or group is None or not _tells(group, key, request):
            sums += [0.0] * size
            found += [0.0] * size
            products += [0.0] * (size == 2)
            continue
        count = parts[0]["n"]
        away = []
        for index, part in enumerate(parts, start=start):
            unit = units[index]
            # The mean first: what rounding took from it is lost in a larger number.
            away.append((part["mean"] - centres[index] + part["rest"]) / unit)
            sums.append(count * away[-1])
            found.append(part["m2"] / unit**2 + count * away[-1] ** 2)
        if size == 2:
            product = _correlation(group, key)["product"]  # type: ignore[index]
            both = float(units[start] * units[start + 1])
            products.append(product / both + count * away[0] * away[1])
    return np.array(sums), np.array(found), np.array(products)


def _samples(request: Request) -> int:
    return sum(number_of_samples(key) for key in keys_of(request))


def _group(reported: Reported) -> Reported | None:
    return next((group for group in reported["groups"] if group["name"] == ""), None)


def _sampled(group: Reported, key: Key) -> list[Reported] | None:
    if key.kind == NUMERIC:
        part = group["numeric"].get(key.columns[0])
        return [part] if part is not None and "mean" in part else None
    part = _correlation(group, key)
    return None if part is None else part["of"]


def _below(group: Reported, key: Key) -> tuple[float, float]:
    """Return how many values of a column lie below an edge, at least and at most."""
    part = group["numeric"].get(key.columns[0], {})
    if part.get("n") == 0:
        return 0.0, 0.0
    if "histogram" not in part:
        return 0.0, math.inf
    least, most = values_below([part["histogram"]], [float(key.category)])
    return float(least[0]), float(most[0])


def _correlation(group: Reported, key: Key) -> Reported | None:
    for part in group["correlations"]:
        if tuple(part["columns"]) == key.columns:
            return dict(part)
        if tuple(part["columns"]) == key.columns[::-1]:
            return {**part, "of": part["of"][::-1]}
    return None


def _pair(group: Reported, key: Key, request: Request) -> NDArray[np.int64] | None:
    """Return a two-way table in the declared order; None if it has other categories, or is none."""
    part = next((one for one in group["pairs"] if tuple(one["columns"]) == key.columns), None)
    rows, across = (list(request.categories[name]) for name in key.columns)
    if part is None or not {*part["rows"]} <= {*rows} or not {*part["across"]} <= {*across}:
        return None
    table = np.zeros((len(rows), len(across)), np.int64)
    places = np.ix_(
        [rows.index(name) for name in part["rows"]],
        [across.index(name) for name in part["across"]],
    )
    table[places] = part["counts"]
    return table


def _rest(part: Reported, categories: Sequence[str]) -> int:
    """Return the rows of a column in no category that is declared and named."""
    named: Mapping[str, Any] = dict(zip(part["names"], part["counts"], strict=True))
    return int(part["n"] - sum(named.get(category, 0) for category in categories))
