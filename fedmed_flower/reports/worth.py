"""Which hospitals are better served by one model than by another, and which may only seem so.

A figure on few test records moves by chance. A hospital counts as better or worse served only if
the 95% interval of the difference leaves out 0. The interval follows from the two figures and the
numbers of test records (`metrics.differences`), so that it needs no scores of single records. It
takes the two tests to be independent although they are on the same records, which is cautious.
Only the AUC of two classes and the accuracy have such an interval. Of other metrics, of tests with
noise and of runs without counts nothing is known of chance, and that is said. No HTML is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedmed_flower.metrics.counts import Counts
from fedmed_flower.metrics.curves import Interval, wilson
from fedmed_flower.metrics.differences import auc_interval_by_size, difference_interval
from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports.frame import capital, count_of, format_value
from fedmed_flower.reports.noise import noise_of
from fedmed_flower.reports.summary import by_site, nested

ALONE = "one trained on their own records alone"
FEDERATED = "the federated model"
OWN = "their own model of this run"
TUNED = "the fine-tuned model"
_MOST_NAMED = 8
_CHANGE = "+,.3f"
_MOST_ROWS = 1e12


class Sides(NamedTuple):
    """Who is better served, who is worse, and who neither; the largest change first."""

    better: list[str]
    worse: list[str]
    neither: list[str]


def sides(changes: Mapping[str, float], main: str) -> Sides:
    """Return the hospitals by the direction of their change, as far as three digits show it."""
    sign = -1 if lower_is_better(main) else 1
    shown = {site: sign * round(change, 3) for site, change in changes.items()}
    better = sorted((s for s in shown if shown[s] > 0), key=lambda s: -sign * changes[s])
    worse = sorted((s for s in shown if shown[s] < 0), key=lambda s: sign * changes[s])
    return Sides(better, worse, [s for s in shown if not shown[s]])


@dataclass(frozen=True)
class Chance:
    """How far chance moves a metric at each hospital.

    Attributes
    ----------
    metric
        Its name.
    rows
        By hospital the numbers of test records behind it: for ``auc`` with and without the class,
        for ``accuracy`` all of them. A hospital of which they are not known is missing.
    """

    metric: str
    rows: Mapping[str, tuple[float, ...]]

    def explains(self, site: str, one: float, other: float) -> bool | None:
        """Return whether chance explains that two models differ so; None if it is not known."""
        rows = self.rows.get(site)
        if rows is None or not (0 <= one <= 1 and 0 <= other <= 1):
            return None
        _, low, high = difference_interval(self._interval(one, rows), self._interval(other, rows))
        return low <= 0 <= high

    def _interval(self, value: float, rows: tuple[float, ...]) -> Interval:
        if self.metric == "auc":
            return auc_interval_by_size(value, *rows)
        return wilson(value * rows[0], rows[0])


def chance_of(summary: dict[str, Any], counts: Counts | None, metric: str) -> Chance:
    """Return how far chance moves a metric at each hospital.

    Parameters
    ----------
    counts
        Those of the test, as `scores.of_test` returns them.
    """
    noise = noise_of(summary, counts)
    noised = frozenset() if noise is None else noise.sites
    rows: dict[str, tuple[float, ...]] = {}
    if metric == "auc" and counts is not None and len(counts.classes) == 2:
        for site in counts.sites.keys() - noised:
            confusion = counts.confusion(site)
            if confusion is not None:
                rows[site] = (sum(confusion[1]), sum(confusion[0]))
    elif metric == "accuracy":
        tested = by_site(nested(summary, "test", "sites"), "num-examples")
        rows = {site: (count,) for site, count in tested.items() if site not in noised}
    known = {site: each for site, each in rows.items() if 1 <= min(each) <= max(each) < _MOST_ROWS}
    return Chance(metric, known)


@dataclass(frozen=True)
class Gain:
    """What one model is to the hospitals beside another, on each hospital's own test records.

    Attributes
    ----------
    model, other
        What the two are called.
    changes
        The metric of the one less that of the other, of each hospital that has both.
    known
        The hospitals where it is known what chance can make. Where chance explains the difference,
        they are on neither side.
    unknown
        The other hospitals, by figures alone.
    """

    model: str
    other: str
    changes: dict[str, float]
    known: Sides
    unknown: Sides


def gain(
    model: str, values: Mapping[str, float], other: str, others: Mapping[str, float], chance: Chance
) -> Gain | None:
    """Return what one model is to the hospitals beside another; None if no hospital has both."""
    changes = differences(values, others)
    if not changes:
        return None
    explained = {site: chance.explains(site, values[site], others[site]) for site in changes}
    beyond = {site: changes[site] for site in changes if explained[site] is False}
    unknown = {site: changes[site] for site in changes if explained[site] is None}
    known = sides(beyond, chance.metric)
    within = [site for site in changes if explained[site]]
    return Gain(
        model,
        other,
        changes,
        known._replace(neither=known.neither + within),
        sides(unknown, chance.metric),
    )


def differences(values: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """Return what the hospitals that are in both have in `values`, less what in `others`."""
    return {site: value - others[site] for site, value in values.items() if site in others}


def in_words(gain: Gain, named: bool = True) -> str:
    """Return who is better served by the one model, as text.

    Parameters
    ----------
    named
        Whether the hospitals are named, with their changes.
    """

    def counted(sites: list[str]) -> str:
        return _named(sites, gain.changes) if named else ""

    sentences = []
    better, worse, neither = gain.known
    count = len(better) + len(worse) + len(neither)
    if better or worse:
        sentence = (
            f"{len(better) or 'none'} of {count_of(count, 'hospital')} {_is(better)} better served "
            f"by {gain.model} than by {gain.other}{counted(better)}; {len(worse) or 'none'} "
            f"{_is(worse)} worse served{counted(worse)}"
        )
        if neither:
            sentence += f", and at {len(neither)} the difference is no more than chance can make"
        sentences.append(sentence)
    elif neither:
        sentences.append(
            f"at {len(neither)} of {count_of(count, 'hospital')} the difference between "
            f"{gain.model} and {gain.other} is no more than chance can make"
        )
    better, worse, neither = gain.unknown
    if count := len(better) + len(worse) + len(neither):
        equal = f", and equal at {len(neither)}" if neither else ""
        sentences.append(
            f"{gain.model} is better at {len(better) or 'none'} of {count_of(count, 'hospital')}"
            f"{counted(better)} and worse at {len(worse) or 'none'}{counted(worse)} than "
            f"{gain.other}{equal}; how much of this is chance is not known"
        )
    return f"{'. '.join(map(capital, sentences))}."


def _is(sites: list[str]) -> str:
    return "are" if len(sites) > 1 else "is"


def _named(sites: list[str], changes: Mapping[str, float]) -> str:
    """Return the first hospitals with their changes, in brackets."""
    if not sites:
        return ""
    first = [f"{site} {format_value(changes[site], _CHANGE)}" for site in sites[:_MOST_NAMED]]
    more = ", …" if len(sites) > _MOST_NAMED else ""
    return f" ({', '.join(first)}{more})"
