"""Hospitals whose statistics of a column stand out: another unit, typing errors, swapped codes.

The statistics are those that hospitals send before the first round, see `preparation.contribution`.
Effects are compared, not p-values: hospitals truly differ, so with many patients every difference
is significant.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from fedmed_flower.data.preparation import CATEGORIES, COUNTS, MOMENTS, check_contribution
from fedmed_flower.data.schema import Schema

# A hospital is compared with this many others at least.
_FEWEST_OTHERS = 2
# A spread so many times as large, or small, as that of all others; patients by chance alone differ
# less, also in columns of a few large values.
_SPREAD_RATIO = 6.0
# A mean so many spreads away from all others.
_SPREADS_AWAY = 5.0
# A share of missing values that is higher than that of all others by so much.
_MORE_MISSING = 0.2
# Differences of shares, in standard errors, that chance alone does not make: of a swap, of missing
# values, which are compared with the highest of all others.
_SWAP_ERRORS = 5.0
_MISSING_ERRORS = 3.5
# The least logarithm of the odds of two categories for which one is the more frequent.
_LEAST_LOG_ODDS = 0.3


class Outlying(NamedTuple):
    """A hospital that stands out in a column.

    Attributes
    ----------
    site, column : str
    text : str
        How it differs from the others, and what may be the cause.
    """

    site: str
    column: str
    text: str


class Location(NamedTuple):
    """Where the values of a hospital's column lie: mean and standard deviation."""

    mean: float
    spread: float


def outlying(
    contributions: Mapping[str, Mapping[str, Any]], schema: Schema, rows: Mapping[str, int]
) -> list[Outlying]:
    """Return the hospitals of which a column's statistics differ from those of all others.

    With fewer than three hospitals that send a column, nobody stands out in it. If two hospitals
    are wrong in the same column, the one that stands out further is found first, and the other
    beside the remaining ones.

    Parameters
    ----------
    contributions : dict of str to dict
        The return value of `preparation.contribution` by hospital; those that cannot be used are
        ignored.
    schema : Schema
        The one that they were made with.
    rows : dict of str to int
        Training rows by hospital; one that is left out has as many as its fullest column values.

    Returns
    -------
    list of Outlying
        By column, in the order of the schema.
    """
    usable = {
        site: reported
        for site, reported in sorted(contributions.items())
        if check_contribution(reported, schema) is None
    }
    standing_out: list[Outlying] = []
    for column in schema.numeric:
        moments = {
            site: _moments(reported[MOMENTS + column])
            for site, reported in usable.items()
            if MOMENTS + column in reported
        }
        standing_out += outlying_numbers(column, moments)
    for column in schema.categorical:
        counts = {
            site: dict(zip(reported[CATEGORIES + column], reported[COUNTS + column], strict=True))
            for site, reported in usable.items()
            if CATEGORIES + column in reported
        }
        standing_out += outlying_categories(column, counts)
    return [*standing_out, *_of_missing(usable, schema, rows)]


def without_column(
    lacking: Mapping[str, Collection[str]],
    empty: Mapping[str, Collection[str]],
    sites: Collection[str],
) -> list[Outlying]:
    """Return the hospitals without a column, or without a value in it, that others do not lack.

    Parameters
    ----------
    lacking, empty : dict of str to collection of str
        By hospital: columns that its table does not have, and those without a value in any row.
    sites : collection of str
        All hospitals that were asked.
    """
    without = {site: {*lacking.get(site, ()), *empty.get(site, ())} for site in sites}
    standing_out = []
    for site in sorted(sites):
        others = [columns for name, columns in without.items() if name != site]
        for column in (*lacking.get(site, ()), *empty.get(site, ())):
            having = sum(column not in columns for columns in others)
            text = f"its table has no column {column}"
            if column in empty.get(site, ()):
                text = f"{column} has no value in any row: perhaps it is written in another way"
            if having:
                text += f"; {having} of {len(others)} other hospitals have values"
                standing_out.append(Outlying(site, column, text))
    return standing_out


def with_further(known: list[Outlying], others: Iterable[Outlying]) -> list[Outlying]:
    """Return known entries, and those of others that are of another hospital or column."""
    named = {(one.site, one.column) for one in known}
    return [*known, *(one for one in others if (one.site, one.column) not in named)]


def _moments(reported: list[float]) -> Location:
    count, mean, squares = reported
    return Location(mean, math.sqrt(squares / (count - 1)) if count > 1 else 0.0)


def outlying_numbers(column: str, moments: Mapping[str, Location]) -> Iterator[Outlying]:
    """Yield the hospitals whose mean or spread is far from all others, the furthest first."""
    left = dict(moments)
    while len(left) > _FEWEST_OTHERS:
        distances = {
            site: _distance(mine, [other for name, other in left.items() if name != site])
            for site, mine in left.items()
        }
        site = max(distances, key=distances.__getitem__)
        if distances[site] <= 1:
            return
        mine = left.pop(site)
        means = [other.mean for other in left.values()]
        spreads = [other.spread for other in left.values()]
        yield Outlying(
            site,
            column,
            f"{column} has the mean {mine.mean:.4g} and the standard deviation {mine.spread:.4g}; "
            f"at the other hospitals the means are {min(means):.4g} to {max(means):.4g} and the "
            f"standard deviations {min(spreads):.4g} to {max(spreads):.4g}: perhaps another unit, "
            "a code of missing values, or a typing error. A range that the schema declares for it "
            "makes values outside missing",
        )


def _distance(mine: Location, others: list[Location]) -> float:
    """Return how far a hospital is from all others; above 1 it stands out."""
    means = sorted(other.mean for other in others)
    spreads = sorted(other.spread for other in others)
    if spreads[-1] == 0:
        # A column that is constant elsewhere has no scale to measure by.
        return 0.0
    gap = max(means[0] - mine.mean, mine.mean - means[-1], 0.0)
    away = gap / (_SPREADS_AWAY * spreads[-1] + (means[-1] - means[0]))
    wider = mine.spread / spreads[-1] / _SPREAD_RATIO
    # A value that is rare may be constant at one hospital by chance.
    narrower = spreads[0] / mine.spread / _SPREAD_RATIO if mine.spread > 0 else 0.0
    return max(away, wider, narrower)


def outlying_categories(column: str, counts: Mapping[str, Mapping[str, int]]) -> Iterator[Outlying]:
    """Yield the hospitals in which two categories seem to be swapped."""
    texts = sorted({text for reported in counts.values() for text in reported})
    for first, second in combinations(texts, 2):
        pairs = {
            site: _Pair(reported[first], reported[second])
            for site, reported in counts.items()
            if first in reported and second in reported
        }
        for site, mine in pairs.items():
            others = [other for name, other in pairs.items() if name != site]
            if len(others) >= _FEWEST_OTHERS and _swapped(mine, others):
                shares = [other.share for other in others]
                yield Outlying(
                    site,
                    column,
                    f"of the patients whose {column} is {first!r} or {second!r}, {mine.share:.0%} "
                    f"have {first!r}; at the other hospitals {min(shares):.0%} to "
                    f"{max(shares):.0%}: perhaps the two are swapped",
                )


class _Pair(NamedTuple):
    """How many patients of a hospital have one category, and how many the other."""

    first: int
    second: int

    @property
    def share(self) -> float:
        """Of those who have one of the two, the share that has the first."""
        return self.first / (self.first + self.second)

    @property
    def log_odds(self) -> float:
        """The logarithm of the odds, which is finite (Haldane 1956)."""
        return math.log((self.first + 0.5) / (self.second + 0.5))

    @property
    def error(self) -> float:
        """The standard error of `log_odds` (Gart and Zweifel 1967)."""
        return math.sqrt(1 / (self.first + 0.5) + 1 / (self.second + 0.5))


def _swapped(mine: _Pair, others: list[_Pair]) -> bool:
    """Return whether the category that all others have less often is the more frequent one here.

    It is also asked whether the odds fit those of the others once the two are swapped back.
    """
    together = _Pair(sum(other.first for other in others), sum(other.second for other in others))
    sign = math.copysign(1, together.log_odds)
    turned = [sign * other.log_odds for other in others]
    agree = min(turned) > 0 and abs(together.log_odds) >= _LEAST_LOG_ODDS
    if not agree or sign * mine.log_odds > 0:
        return False
    error = math.hypot(mine.error, together.error)
    slack = max(turned) - min(turned) + 3 * error
    return (
        abs(mine.log_odds - together.log_odds) > _SWAP_ERRORS * error
        and abs(-mine.log_odds - together.log_odds) <= slack
    )


def _of_missing(
    usable: Mapping[str, Mapping[str, Any]], schema: Schema, rows: Mapping[str, int]
) -> Iterator[Outlying]:
    """Yield the hospitals that lack more values of a numeric column than all others do."""
    totals = {site: _most_values(reported, rows.get(site, 0)) for site, reported in usable.items()}
    for column in schema.numeric:
        shares = {
            site: 1 - reported.get(MOMENTS + column, [0])[0] / totals[site]
            for site, reported in usable.items()
            if totals[site]
        }
        for site, share in shares.items():
            others = {name: other for name, other in shares.items() if name != site}
            if len(others) < _FEWEST_OTHERS:
                continue
            most = max(others, key=others.__getitem__)
            error = math.hypot(*(_error(shares[name], totals[name]) for name in (site, most)))
            if share - others[most] > max(_MORE_MISSING, _MISSING_ERRORS * error):
                text = f"{share:.0%} of {column} is missing"
                if MOMENTS + column not in usable[site]:
                    text = f"too few of its patients have a value of {column} to report any"
                rest = f"at the other hospitals at most {others[most]:.0%} is missing"
                yield Outlying(site, column, f"{text}; {rest}")


def _most_values(reported: Mapping[str, Any], rows: int) -> float:
    """Return a hospital's rows: as many as it has said, or as its fullest column has values."""
    counts = [float(values[0]) for key, values in reported.items() if key.startswith(MOMENTS)]
    return max([float(rows), *counts])


def _error(share: float, count: float) -> float:
    """Return the standard error of a share; of 0 and 1 that of one more or less."""
    return math.sqrt(max(share * (1 - share), 1 / count) / count)
