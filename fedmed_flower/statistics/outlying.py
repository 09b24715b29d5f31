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

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fedmed_flower.data.outlying import Outlying, outlying_categories, outlying_numbers
from fedmed_flower.statistics.comparison import (
    CATEGORIES,
    KINDS,
    NUMBERS,
    SECTIONS,
    Kind,
    Measures,
    Part,
)
from fedmed_flower.statistics.drift import holm
from fedmed_flower.statistics.types import Reported

ALL_OTHERS = "all others"
ALL_HOSPITALS = "all hospitals"

_LEVEL = 0.01
# Of two hospitals nobody can say which is the odd one.
_FEWEST = 3
# Of more categories no two are looked at for a swap, since there are too many pairs.
_MOST_CATEGORIES = 100
_HOLDS = {"numeric": "numbers", "categorical": "categories"}
_NO = {"n": 0}


def drift_between_sites(
    groups: Mapping[str, Mapping[str, Reported]], exact: bool = True
) -> list[dict[str, Any]]:
    """Compare each hospital with all others in each group, and name those that stand out.

    Beside the conditions above, a hospital stands out by the rules of `data.outlying`: a mean or a
    spread far from all others', and two categories that seem to be swapped. So does one at which a
    column holds numbers while it holds categories at others. Of two hospitals neither can be the
    odd one: both are named as different.

    Parameters
    ----------
    groups : mapping of str to mapping
        By name of the group and by hospital the answers, as `replies.read_reply` has checked them.
    exact : bool
        False if counts carry noise, which the tests do not know: then nothing is tested.

    Returns
    -------
    list of dict
        ``site``, ``group``, ``against``, ``column`` and ``what``; ``psi`` (population stability
        index), ``ks`` (Kolmogorov-Smirnov, of numbers), ``difference`` (of the shares of missing
        values), ``p``, ``corrected`` (for the number of comparisons), and ``stands_out``, a text
        that says how it differs; ``note`` if there is nothing to compare.
    """
    contests = {
        name: [
            _Contest(kind, column, parts)
            for kind, column in _kinds_of(sites.values())
            if len(parts := kind.parts(column, sites)) > 1
        ]
        for name, sites in groups.items()
    }
    if exact:
        together = [contest for of_group in contests.values() for contest in of_group]
        _name_all(together)
        for contest in together:
            contest.apply_rules()
    changes: list[dict[str, Any]] = []
    for name, sites in groups.items():
        compared = [c.rows[site] for site in sites for c in contests[name] if site in c.rows]
        rows = [*(compared if exact else _untested(compared)), *_other_kinds(sites)]
        changes += [row | {"group": name} for row in rows]
    return changes


def drift_between_groups(
    groups: Mapping[str, Mapping[str, Reported]], exact: bool = True
) -> list[dict[str, Any]]:
    """Compare each window of time, or other group, with the first one of the same hospital.

    All hospitals that have sent both are compared together too.

    Parameters
    ----------
    groups, exact
        As `drift_between_sites` takes them.

    Returns
    -------
    list of dict
        As `drift_between_sites` returns them; ``against`` is the first group.
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
    kind : Kind
    column : str
    parts : dict of str to Part
        What two hospitals or more have answered.

    Attributes
    ----------
    rows : dict of str to dict
        What is reported of each hospital.
    p : dict of str to float
        The p-value of each hospital against the others that are left.
    """

    def __init__(self, kind: Kind, column: str, parts: Mapping[str, Part]) -> None:
        self._kind = kind
        self._column = column
        self._parts = parts
        self._left = list(parts)
        # Between two hospitals; 0 if they cannot be compared.
        self._effects: dict[tuple[str, str], float] = {}
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
            places = {site: part.location for site, part in parts.items()}
            known = {site: place for site, place in places.items() if place is not None}
            found = outlying_numbers(self._column, known)
        elif self._kind.what == CATEGORIES:
            tables = {site: part.table for site, part in parts.items()}
            if len({name for table in tables.values() for name in table}) <= _MOST_CATEGORIES:
                found = outlying_categories(self._column, tables)
        for outlying in found:
            self.rows[outlying.site]["stands_out"] = outlying.text

    def _others(self, site: str) -> list[Part]:
        return [self._parts[name] for name in self._left if name != site]

    def _compared(self, site: str) -> Measures | None:
        """Compare a hospital with the others that are left, together."""
        return self._kind.compare([self._parts[site]], self._others(site))

    def _distance(self, site: str) -> float:
        """Return the effect that a hospital has, at least, against more than half of the others.

        One with which there is nothing to compare counts as alike.
        """
        effects = [self._effect(site, other) for other in self._left if other != site]
        return sorted(effects, reverse=True)[len(effects) // 2]

    def _effect(self, site: str, other: str) -> float:
        pair = (min(site, other), max(site, other))
        if pair not in self._effects:
            measures = self._kind.compare(*([self._parts[name]] for name in pair))
            self._effects[pair] = 0.0 if measures is None else measures.effect
        return self._effects[pair]

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
            for section in SECTIONS
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


def _kinds_of(groups: Collection[Reported]) -> list[tuple[Kind, str]]:
    """Return what is to be compared, column by column."""
    return [
        (kind, column)
        for column in _columns(groups)
        for kind in KINDS
        if any(kind.part(column, group) is not None for group in groups)
    ]


def _columns(groups: Collection[Reported]) -> list[str]:
    names = (name for section in SECTIONS for group in groups for name in group[section])
    return list(dict.fromkeys(names))


def _figures(kind: Kind, measures: Measures | None) -> dict[str, Any]:
    return {"note": kind.nothing} if measures is None else dict(measures.figures)


def _untested(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{name: value for name, value in row.items() if name != "p"} for row in rows]
    return [{"note": "not tested: the counts carry noise", **row} for row in kept]
