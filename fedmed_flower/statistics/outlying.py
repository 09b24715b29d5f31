"""Which hospital stands out in a column, or which window of time at a hospital.

Three things are compared: how numbers are distributed, the shares of categories, and the share of
missing values. A hospital stands out if both hold:

- It differs from all others together by more than chance: the p-value, corrected by Holm's method
  for the number of comparisons, is below 0.01.
- It is far from more than half of the others, each by itself: a population stability index above
  0.25, or 20 percentage points more or fewer missing values. Hospitals truly differ, so with many
  patients every difference is significant, and few are worth a name.

The one that is furthest is named. Then the others are compared again without it, so that it makes
no other hospital look odd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedmed_flower.data.outlying import Location, Outlying, outlying_categories, outlying_numbers
from fedmed_flower.statistics.drift import holm, ks_of_histograms, psi, same_shares
from fedmed_flower.statistics.pooling import pool_moments, same_bins
from fedmed_flower.statistics.types import Floats, Reported

ALL_OTHERS = "all others"
ALL_HOSPITALS = "all hospitals"
NUMBERS = "numbers"
CATEGORIES = "categories"
MISSING_VALUES = "missing values"

_LEVEL = 0.01
# Of two hospitals nobody can say which is the odd one.
_FEWEST = 3
_NOTES = {
    NUMBERS: "no cells that both have sent: give --resolution, or a range in the schema",
    CATEGORIES: "no category that both have sent",
    MISSING_VALUES: "no rows that both have sent",
}


class _Part(NamedTuple):
    """What a hospital answers about a column, and how many patients it has per row."""

    reported: Reported
    weight: float


_Parts = Sequence[_Part]


class _Measures(NamedTuple):
    """How far two groups of patients are apart.

    Attributes
    ----------
    effect : float
        What is held against the limit.
    figures : dict
        What a row shows, ``p`` among it.
    """

    effect: float
    figures: dict[str, float]


class _Kind(NamedTuple):
    """Something about a column that is compared.

    Attributes
    ----------
    what : str
    limit : float
        The effect above which a difference is worth a name.
    sections : tuple of str
        Where the column may stand in an answer.
    compare : callable
        Maps the parts of one side and of the other to `_Measures`; to None if nothing that both
        have sent can be compared.
    describe : callable
        Maps the column, the parts of one side and of the other, and where the other is, to a text.
    """

    what: str
    limit: float
    sections: tuple[str, ...]
    compare: Callable[[_Parts, _Parts], _Measures | None]
    describe: Callable[[str, _Parts, _Parts, str], str]

    def part(self, column: str, group: Reported) -> _Part | None:
        """Return what a hospital answers about a column; None if it answers nothing."""
        for section in self.sections:
            if column in group[section]:
                weight = group["patients"] / group["rows"] if group["rows"] else 1.0
                return _Part(group[section][column], weight)
        return None

    def parts(self, column: str, groups: Mapping[str, Reported]) -> dict[str, _Part]:
        """Return what each hospital answers about a column, those that answer nothing left out."""
        parts = {site: self.part(column, group) for site, group in groups.items()}
        return {site: part for site, part in parts.items() if part is not None}


def drift_between_sites(sites: Mapping[str, Reported], exact: bool = True) -> list[dict[str, Any]]:
    """Compare each hospital with all others, and name those that stand out.

    Beside the conditions above, a hospital stands out by the rules of `data.outlying`: a mean or a
    spread far from all others', and two categories that seem to be swapped. So does one at which a
    column holds numbers while it holds categories at others. Of two hospitals neither can be the
    odd one: both are named as different.

    Parameters
    ----------
    sites : mapping of str to dict
        The answer of each hospital, as `replies.read_reply` has checked it.
    exact : bool
        False if counts carry noise, which the tests do not know: then nothing is tested.

    Returns
    -------
    list of dict
        ``site``, ``against``, ``column`` and ``what``; ``psi`` (population stability index),
        ``ks`` (Kolmogorov-Smirnov, of numbers), ``difference`` (of the shares of missing values),
        ``p``, ``corrected`` (for the number of comparisons), and ``stands_out``, a text that says
        how it differs; ``note`` if there is nothing to compare.
    """
    contests = [
        _Contest(kind, column, parts)
        for kind, column in _kinds_of(sites.values())
        if len(parts := kind.parts(column, sites)) > 1
    ]
    if exact:
        _name_all(contests)
        for contest in contests:
            contest.apply_rules()
    rows = [contest.rows[site] for site in sites for contest in contests if site in contest.rows]
    return [*(rows if exact else _untested(rows)), *_other_kinds(sites)]


def drift_between_groups(
    groups: Mapping[str, Mapping[str, Reported]], exact: bool = True
) -> list[dict[str, Any]]:
    """Compare each window of time, or other group, with the first one of the same hospital.

    All hospitals that have sent both are compared together too.

    Parameters
    ----------
    groups : mapping of str to mapping
        By name of the group and by hospital the answers.
    exact : bool
        As in `drift_between_sites`.

    Returns
    -------
    list of dict
        As `drift_between_sites`, with ``group``; ``against`` is the first group.
    """
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    for about, later, first in _pairs_of_groups(groups):
        for kind, column in _kinds_of([*later.values(), *first.values()]):
            parts = [kind.parts(column, side) for side in (later, first)]
            both = [site for site in parts[0] if site in parts[1]]
            if not both:
                continue
            one, others = ([side[site] for site in both] for side in parts)
            row = about | {"column": column, "what": kind.what}
            measures = kind.compare(one, others)
            far = measures is not None and measures.effect > kind.limit
            where = f"in {row['against']!r}"
            texts.append(kind.describe(column, one, others, where) if far else "")
            rows.append(row | _figures(kind, measures))
    if not exact:
        return _untested(rows)
    tested = [(row, text) for row, text in zip(rows, texts, strict=True) if "p" in row]
    for (row, text), p in zip(tested, holm([row["p"] for row, _ in tested]), strict=True):
        row["corrected"] = float(p)
        if text and p < _LEVEL:
            row["stands_out"] = text
    return rows


class _Contest:
    """One thing about one column at several hospitals, of whom some may stand out.

    Parameters
    ----------
    kind : _Kind
    column : str
    parts : dict of str to _Part
        What two hospitals or more have answered.

    Attributes
    ----------
    rows : dict of str to dict
        What is reported of each hospital.
    p : dict of str to float
        The p-value of each hospital against the others that are left.
    """

    def __init__(self, kind: _Kind, column: str, parts: Mapping[str, _Part]) -> None:
        self._kind = kind
        self._column = column
        self._parts = parts
        self._left = list(parts)
        about = {"against": ALL_OTHERS, "column": column, "what": kind.what}
        self.rows = {
            site: {"site": site, **about, **_figures(kind, self._compared(site))} for site in parts
        }
        self.p: dict[str, float] = {site: row["p"] for site, row in self.rows.items() if "p" in row}

    def name_the_furthest(self) -> bool:
        """Name the hospital that stands out most; return whether the others may be compared again.

        By now ``corrected`` is in each row that has a p-value.
        """
        far = {
            site: distance
            for site in self._left
            if self.rows[site].get("corrected", 1.0) < _LEVEL
            and (distance := self._distance(site)) > self._kind.limit
        }
        if far and len(self._parts) < _FEWEST:
            for site in far:
                self._name(site, "; of two hospitals it cannot be said which is the odd one")
            self._left.clear()
        if not far or len(self._left) < _FEWEST:
            return False
        site = max(far, key=far.__getitem__)
        self._name(site)
        self._left.remove(site)
        for other in self._left:
            measures = self._compared(other)
            if measures is not None:
                self.p[other] = measures.figures["p"]
        return True

    def apply_rules(self) -> None:
        """Name the hospitals that stand out by the rules of `data.outlying`."""
        parts = self._parts
        found: Iterator[Outlying] = iter(())
        if self._kind.what == NUMBERS:
            locations = {site: _location([part]) for site, part in parts.items()}
            known = {site: place for site, place in locations.items() if place is not None}
            found = outlying_numbers(self._column, known)
        elif self._kind.what == CATEGORIES:
            tables = {site: _named_counts(part) for site, part in parts.items()}
            found = outlying_categories(self._column, tables)
        for outlying in found:
            self.rows[outlying.site]["stands_out"] = outlying.text

    def _others(self, site: str) -> list[_Part]:
        return [self._parts[name] for name in self._left if name != site]

    def _compared(self, site: str) -> _Measures | None:
        """Compare a hospital with the others that are left, together."""
        return self._kind.compare([self._parts[site]], self._others(site))

    def _distance(self, site: str) -> float:
        """Return the effect that a hospital has, at least, against more than half of the others.

        One with which there is nothing to compare counts as alike.
        """
        one = [self._parts[site]]
        pairs = [self._kind.compare(one, [other]) for other in self._others(site)]
        effects = [0.0 if pair is None else pair.effect for pair in pairs]
        return sorted(effects, reverse=True)[len(effects) // 2]

    def _name(self, site: str, more: str = "") -> None:
        where = "at the other hospitals" if len(self._left) > 2 else "at the other hospital"
        one = [self._parts[site]]
        text = self._kind.describe(self._column, one, self._others(site), where)
        self.rows[site]["stands_out"] = text + more


def _name_all(contests: Sequence[_Contest]) -> None:
    """Name in each contest those who stand out, one after the other."""
    going_on = True
    while going_on:
        tested = [(contest, site) for contest in contests for site in contest.p]
        corrected = holm([contest.p[site] for contest, site in tested])
        for (contest, site), p in zip(tested, corrected, strict=True):
            # Who is named stays so: p-values of the others may be greater without it.
            if "stands_out" not in contest.rows[site]:
                contest.rows[site]["corrected"] = float(p)
        named = [contest.name_the_furthest() for contest in contests]
        going_on = any(named)


def _other_kinds(sites: Mapping[str, Reported]) -> Iterator[dict[str, Any]]:
    """Yield the hospitals where a column holds numbers, but categories at more, or conversely."""
    for column in _columns(sites.values()):
        holding = {
            section: [site for site, group in sites.items() if group[section].get(column, _NO)["n"]]
            for section in _SECTIONS
        }
        fewest, most = sorted(holding, key=lambda section: len(holding[section]))
        for site in holding[fewest]:
            about = {"site": site, "against": ALL_OTHERS, "column": column, "what": "kind"}
            text = (
                f"{column} holds {_HOLDS[fewest]}; at other hospitals it holds {_HOLDS[most]}: "
                "perhaps other codes. --categorical makes codes of numbers"
            )
            yield about | {"stands_out": text}


def _pairs_of_groups(
    groups: Mapping[str, Mapping[str, Reported]],
) -> Iterator[tuple[dict[str, Any], Mapping[str, Reported], Mapping[str, Reported]]]:
    """Yield what a row says of two groups, and the hospitals' answers about the later and first."""
    for site in dict.fromkeys(site for reported in groups.values() for site in reported):
        first, *later = [name for name, reported in groups.items() if site in reported]
        for name in later:
            about = {"site": site, "group": name, "against": first}
            yield about, {site: groups[name][site]}, {site: groups[first][site]}
    first, *later = list(groups)
    for name in later:
        if len(groups[name].keys() & groups[first].keys()) > 1:
            about = {"site": ALL_HOSPITALS, "group": name, "against": first}
            yield about, groups[name], groups[first]


def _kinds_of(groups: Collection[Reported]) -> list[tuple[_Kind, str]]:
    """Return what is to be compared, column by column."""
    return [
        (kind, column)
        for column in _columns(groups)
        for kind in _KINDS
        if any(kind.part(column, group) is not None for group in groups)
    ]


def _columns(groups: Collection[Reported]) -> list[str]:
    names = (name for section in _SECTIONS for group in groups for name in group[section])
    return list(dict.fromkeys(names))


def _figures(kind: _Kind, measures: _Measures | None) -> dict[str, Any]:
    return {"note": _NOTES[kind.what]} if measures is None else dict(measures.figures)


def _untested(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{name: value for name, value in row.items() if name != "p"} for row in rows]
    return [{"note": "not tested: the counts carry noise", **row} for row in kept]


def _compare_numbers(one: _Parts, others: _Parts) -> _Measures | None:
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
    return _Measures(effect, {"psi": effect, "ks": statistic, "p": p})


def _has_edges(part: _Part) -> bool:
    # A histogram of a single cell would agree with any other.
    return bool(part.reported.get("histogram", {"edges": []})["edges"])


def _compare_categories(one: _Parts, others: _Parts) -> _Measures | None:
    """Compare the counts of the categories that both sides know, and of all other rows.

    A category that a hospital does not name is known to be absent if it has pooled none, and else
    it is unknown. Categories are left out until half of the others or more know all that are left;
    the others that do not are left out.
    """
    first, second = ([part for part in side if "names" in part.reported] for side in (one, others))
    names = {name for part in (*first, *second) for name in part.reported["names"]}
    names = {name for name in names if all(_knows(part, {name}) for part in first)}
    usable = [part for part in second if _knows(part, names)]
    while names and 2 * len(usable) < len(second):
        known = {name: sum(_knows(part, {name}) for part in second) for name in sorted(names)}
        names.remove(min(known, key=known.__getitem__))
        usable = [part for part in second if _knows(part, names)]
    if not (names and first and usable):
        return None
    counts = [_counts(part_of_side, sorted(names)) for part_of_side in (first, usable)]
    if not all(numbers.any() for numbers in counts):
        return None
    effect = psi(*counts)
    return _Measures(effect, {"psi": effect, "p": same_shares(*counts)})


def _knows(part: _Part, names: Collection[str]) -> bool:
    return not part.reported["few"] or set(names) <= set(part.reported["names"])


def _named_counts(part: _Part) -> dict[str, Any]:
    return dict(zip(part.reported.get("names", ()), part.reported.get("counts", ()), strict=True))


def _counts(parts: _Parts, names: Sequence[str]) -> Floats:
    """Return the patients in each category, and in all others together."""
    total = np.zeros(len(names) + 1)
    for part in parts:
        table = _named_counts(part)
        named = [table.get(name, 0) for name in names]
        rest = max(0, sum(table.values()) + part.reported["few"] - sum(named))
        total += part.weight * np.array([*named, rest])
    return total


def _compare_missing(one: _Parts, others: _Parts) -> _Measures | None:
    first, second = (
        np.sum([[part.weight * part.reported[name] for name in _PRESENCE] for part in side], axis=0)
        for side in (one, others)
    )
    if not (first.any() and second.any()):
        return None
    difference = float(first[1] / first.sum() - second[1] / second.sum())
    return _Measures(abs(difference), {"difference": difference, "p": same_shares(first, second)})


def _location(parts: _Parts) -> Location | None:
    known = [part.reported for part in parts if "mean" in part.reported]
    moments = pool_moments(known)
    if not moments.n > 0:
        return None
    return Location(moments.mean, moments.sd if moments.n > 1 else 0.0)


def _describe_numbers(column: str, one: _Parts, others: _Parts, where: str) -> str:
    here = _location(one)
    there = [place for part in others if (place := _location([part])) is not None]
    if here is None or not there:
        return f"{column} is distributed otherwise than {where}"
    means = _span([place.mean for place in there], ".4g")
    spreads = _span([place.spread for place in there], ".4g")
    return (
        f"{column} has the mean {here.mean:.4g} and the standard deviation {here.spread:.4g}; "
        f"{where} the mean is {means} and the standard deviation {spreads}"
    )


def _describe_categories(column: str, one: _Parts, others: _Parts, where: str) -> str:
    """Name the category whose share differs most."""
    texts = {}
    for name in sorted({name for part in (*one, *others) for name in _named_counts(part)}):
        here = _shares(one, name)
        there = [share for part in others for share in _shares([part], name)]
        if here and there:
            text = f"{here[0]:.0%} of {column} is {name!r}; {where} {_span(there, '.0%')}"
            texts[text] = abs(here[0] - sum(there) / len(there))
    if not texts:
        return f"{column} has other shares of categories than {where}"
    return max(texts, key=texts.__getitem__)


def _shares(parts: _Parts, name: str) -> list[float]:
    """Return the share of a category, as a list; empty if it is unknown."""
    tabulated = [part for part in parts if "names" in part.reported and part.reported["n"]]
    if not tabulated or not all(_knows(part, {name}) for part in tabulated):
        return []
    counts = _counts(tabulated, [name])
    return [float(counts[0] / counts.sum())] if counts.any() else []


def _describe_missing(column: str, one: _Parts, others: _Parts, where: str) -> str:
    shares = [_missing_share([part]) for part in others]
    return (
        f"{_missing_share(one):.0%} of {column} is missing; {where} "
        f"{_span([share for share in shares if not math.isnan(share)], '.0%')}"
    )


def _missing_share(parts: _Parts) -> float:
    missing = math.fsum(part.reported["missing"] for part in parts)
    rows = missing + math.fsum(part.reported["n"] for part in parts)
    return missing / rows if rows else math.nan


def _span(values: Sequence[float], form: str) -> str:
    """Return the least and the greatest value as text; one if they look the same."""
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(ends)


_SECTIONS = ("numeric", "categorical")
_HOLDS = {"numeric": "numbers", "categorical": "categories"}
_PRESENCE = ("n", "missing")
_NO = {"n": 0}
_KINDS = (
    _Kind(NUMBERS, 0.25, ("numeric",), _compare_numbers, _describe_numbers),
    _Kind(CATEGORIES, 0.25, ("categorical",), _compare_categories, _describe_categories),
    _Kind(MISSING_VALUES, 0.2, _SECTIONS, _compare_missing, _describe_missing),
)
