"""Two groups of patients compared in one column: how far they are apart, and by chance or not.

Only what is known enters. Where the cells of two histograms differ, the distance is the one that is
certain; a category among a hospital's few may be any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fedmed_flower.data.outlying import Location
from fedmed_flower.statistics.drift import ks_of_histograms, psi, same_shares
from fedmed_flower.statistics.pooling import pool_moments, same_bins
from fedmed_flower.statistics.types import Floats, Reported

NUMBERS = "numbers"
CATEGORIES = "categories"
MISSING_VALUES = "missing values"
SECTIONS = ("numeric", "categorical")

_PRESENCE = ("n", "missing")


@dataclass(frozen=True)
class Part:
    """What a hospital answers about a column.

    Attributes
    ----------
    reported : dict
    weight : float
        Patients per row: of several rows of one patient only one counts as independent.
    """

    reported: Reported
    weight: float

    @property
    def tabulated(self) -> bool:
        """Whether categories were counted."""
        return "names" in self.reported

    @cached_property
    def table(self) -> dict[str, int]:
        """The rows of each category that is named."""
        if not self.tabulated:
            return {}
        return dict(zip(self.reported["names"], self.reported["counts"], strict=True))

    @cached_property
    def total(self) -> float:
        """The rows with a category, named or not."""
        return math.fsum([*self.table.values(), self.reported.get("few", 0)])

    @property
    def location(self) -> Location | None:
        """Mean and standard deviation; None if they were not sent."""
        return location([self])

    def knows(self, name: str) -> bool:
        """Return whether it is known how many rows have a category.

        One that is not named has none if nothing was pooled; else it may be among the few.
        """
        return name in self.table or not self.reported["few"]


Parts = Sequence[Part]


class Measures(NamedTuple):
    """How far two groups of patients are apart.

    Attributes
    ----------
    effect : float
        What is held against the limit; the same if the two are swapped.
    figures : dict
        What a row shows, ``p`` among it.
    """

    effect: float
    figures: dict[str, float]


class Kind(NamedTuple):
    """Something about a column that is compared.

    Attributes
    ----------
    what : str
    limit : float
        The effect above which a difference is worth a name.
    sections : tuple of str
        Where the column may stand in an answer.
    compare : callable
        Maps the parts of one side and of the other to `Measures`; to None if nothing that both
        have sent can be compared.
    describe : callable
        Maps the column, the parts of one side and of the other, and where the other is, to a text.
    nothing : str
        What is said if nothing can be compared.
    """

    what: str
    limit: float
    sections: tuple[str, ...]
    compare: Callable[[Parts, Parts], Measures | None]
    describe: Callable[[str, Parts, Parts, str], str]
    nothing: str

    def part(self, column: str, group: Reported) -> Part | None:
        """Return what a hospital answers about a column; None if it answers nothing."""
        for section in self.sections:
            if column in group[section]:
                weight = group["patients"] / group["rows"] if group["rows"] else 1.0
                return Part(group[section][column], weight)
        return None

    def parts(self, column: str, groups: Mapping[str, Reported]) -> dict[str, Part]:
        """Return what each hospital answers about a column, those that answer nothing left out."""
        parts = {site: self.part(column, group) for site, group in groups.items()}
        return {site: part for site, part in parts.items() if part is not None}


def location(parts: Parts) -> Location | None:
    """Return mean and standard deviation of all together; None if nobody has sent them."""
    moments = pool_moments([part.reported for part in parts if "mean" in part.reported])
    if not moments.n > 0:
        return None
    return Location(moments.mean, moments.sd if moments.n > 1 else 0.0)


def _compare_numbers(one: Parts, others: Parts) -> Measures | None:
    sides = [[part for part in side if _has_edges(part)] for side in (one, others)]
    first, second = ([part.reported["histogram"] for part in side] for side in sides)
    counts = same_bins([*first, *second])
    if counts is None or not first or not second:
        return None
    binned = [np.sum(counts[: len(first)], axis=0), np.sum(counts[len(first) :], axis=0)]
    if not all(numbers.any() for numbers in binned):
        return None
    patients = [
        math.fsum(part.weight * sum(part.reported["histogram"]["counts"]) for part in side)
        for side in sides
    ]
    statistic, p = ks_of_histograms(first, second, (patients[0], patients[1]))
    effect = psi(*binned)
    return Measures(effect, {"psi": effect, "ks": statistic, "p": p})


def _has_edges(part: Part) -> bool:
    # A histogram of a single cell would agree with any other.
    return bool(part.reported.get("histogram", {"edges": []})["edges"])


def _compare_categories(one: Parts, others: Parts) -> Measures | None:
    """Compare the counts of the categories that both sides know, and of all other rows.

    Categories are left out, those first that the fewest others know, until half of the others or
    more know all that are left. The others that do not are left out then.
    """
    first, second = ([part for part in side if part.tabulated] for side in (one, others))
    if not first or not second:
        return None
    names = sorted({name for part in (*first, *second) for name in part.table})
    names = [name for name in names if all(part.knows(name) for part in first)]
    names.sort(key=lambda name: -sum(part.knows(name) for part in second))
    # Of each other hospital, how many of these categories it knows before the first it does not.
    known = [_length_known(part, names) for part in second]
    count = sorted(known, reverse=True)[(len(known) - 1) // 2]
    usable = [part for part, length in zip(second, known, strict=True) if length >= count]
    counts = [_counts(side, names[:count]) for side in (first, usable)]
    if not count or not all(numbers.any() for numbers in counts):
        return None
    effect = psi(*counts)
    return Measures(effect, {"psi": effect, "p": same_shares(*counts)})


def _length_known(part: Part, names: Sequence[str]) -> int:
    unknown = (number for number, name in enumerate(names) if not part.knows(name))
    return next(unknown, len(names))


def _counts(parts: Parts, names: Sequence[str]) -> Floats:
    """Return the patients in each category, and in all others together."""
    counts = np.zeros(len(names) + 1)
    for part in parts:
        named = [part.table.get(name, 0) for name in names]
        counts += part.weight * np.array([*named, max(0.0, part.total - math.fsum(named))])
    return counts


def _compare_missing(one: Parts, others: Parts) -> Measures | None:
    first, second = (
        np.sum([[part.weight * part.reported[name] for name in _PRESENCE] for part in side], axis=0)
        for side in (one, others)
    )
    if not (first.any() and second.any()):
        return None
    difference = float(first[1] / first.sum() - second[1] / second.sum())
    return Measures(abs(difference), {"difference": difference, "p": same_shares(first, second)})


def _describe_numbers(column: str, one: Parts, others: Parts, where: str) -> str:
    here = location(one)
    there = [place for part in others if (place := part.location) is not None]
    if here is None or not there:
        return f"{column} is distributed otherwise than {where}"
    means = _span([place.mean for place in there], ".4g")
    spreads = _span([place.spread for place in there], ".4g")
    return (
        f"{column} has the mean {here.mean:.4g} and the standard deviation {here.spread:.4g}; "
        f"{where} the mean is {means} and the standard deviation {spreads}"
    )


def _describe_categories(column: str, one: Parts, others: Parts, where: str) -> str:
    """Name the category whose share differs most."""
    distances = {}
    for name in sorted({name for part in (*one, *others) for name in part.table}):
        here = _shares(one, name)
        there = _shares(others, name)
        if here and there:
            distances[name] = abs(sum(here) / len(here) - sum(there) / len(there))
    if not distances:
        return f"{column} has other shares of categories than {where}"
    name = max(distances, key=distances.__getitem__)
    spans = [_span(_shares(side, name), ".0%") for side in (one, others)]
    return f"{spans[0]} of {column} is {name!r}; {where} {spans[1]}"


def _shares(parts: Parts, name: str) -> list[float]:
    """Return the share of a category at each hospital that knows it."""
    return [
        part.table.get(name, 0) / part.total
        for part in parts
        if part.tabulated and part.total and part.knows(name)
    ]


def _describe_missing(column: str, one: Parts, others: Parts, where: str) -> str:
    shares = [_missing_share([part]) for part in others]
    return (
        f"{_missing_share(one):.0%} of {column} is missing; {where} "
        f"{_span([share for share in shares if not math.isnan(share)], '.0%')}"
    )


def _missing_share(parts: Parts) -> float:
    missing = math.fsum(part.reported["missing"] for part in parts)
    rows = missing + math.fsum(part.reported["n"] for part in parts)
    return missing / rows if rows else math.nan


def _span(values: Sequence[float], form: str) -> str:
    """Return the least and the greatest value as text; one if they look the same."""
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(ends)


KINDS = (
    Kind(
        NUMBERS,
        0.25,
        ("numeric",),
        _compare_numbers,
        _describe_numbers,
        "no cells that both have sent: give --resolution, or a range in the schema",
    ),
    Kind(
        CATEGORIES,
        0.25,
        ("categorical",),
        _compare_categories,
        _describe_categories,
        "no category that both have sent",
    ),
    Kind(
        MISSING_VALUES,
        0.2,
        SECTIONS,
        _compare_missing,
        _describe_missing,
        "no rows that both have sent",
    ),
)
