"""Why a figure is withheld, as far as a server may know, and the question that asks for it alone.

A hospital sends one reason, `FEW`, whether a figure is of few patients by itself or only beside
what it has disclosed. Which of the two it is would be the answer to a question that nobody has put,
about patients whom the minimum protects; so no hospital says it. The server knows what it was sent.
If other answers to the same question are about the same column, and the counts do not exclude that
the figure could be disclosed alone, the server shows it as `BESIDE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

from fedmed_flower.statistics.request import KINDS, Request
from fedmed_flower.statistics.types import Reported

FEW = "fewer patients than the minimum, alone or beside earlier answers"
NO_DATES = "fewer patients than the minimum have a date that can be read, such as 2020-01-13"
MISSING = "there is no such column of single values"
BESIDE = (
    "perhaps because of other answers: ask for it alone at a hospital that has not answered yet"
)
HISTOGRAM = "histogram of "
CORRELATION = "correlation of "
AND = " and "
BY = " by "


class Withheld(NamedTuple):
    """One figure that a hospital has withheld.

    Attributes
    ----------
    site, group, what : str
        `what` is the figure's name, as the hospital sends it.
    why : str
        The reason that the hospital gives, or `BESIDE`.
    alone : Request or None
        The question that asks for the figure and as little else as possible; None unless `why` is
        `BESIDE`.
    """

    site: str
    group: str
    what: str
    why: str
    alone: Request | None


def all_withheld(survey: Mapping[str, Any]) -> Iterator[Withheld]:
    """Yield what the hospitals have withheld, hospital by hospital.

    Parameters
    ----------
    survey : mapping
        The content of ``statistics.json``.

    Raises
    ------
    InputError
        If the request in it is none.
    """
    request = Request.from_text(json.dumps(survey["request"]))
    for site, reported in survey["sites"].items():
        groups = {group["name"]: group for group in reported["groups"]}
        for name, what, why in reported["withheld"]:
            alone = None
            if why == FEW and name in groups and not request.epsilon:
                alone = _alone(request, groups[name], what, reported["minimum"])
            yield Withheld(site, name, what, why if alone is None else BESIDE, alone)


def _alone(request: Request, group: Reported, what: str, minimum: float) -> Request | None:
    """Return the question for a figure alone; None if that asks no less, or cannot help."""
    found = _figure(request, group, what)
    if found is None:
        return None
    kind, columns = found
    others = _other_answers(group, kind)
    if not others.intersection(columns) or not _can_be_disclosed(group, columns, minimum):
        return None

    def about(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in named.items() if name in columns}

    return replace(
        request,
        columns=columns,
        kinds=tuple(one for one in KINDS if one in ("tables", "moments", kind)),
        pairs=tuple(pair for pair in request.pairs if kind == "pairs" and pair == columns),
        survival=None,
        weekly="",
        categorical=tuple(name for name in request.categorical if name in columns),
        whole=tuple(name for name in request.whole if name in columns),
        resolutions=about(request.resolutions),
        ranges=about(request.ranges),
        categories=about(request.categories),
    )


def _other_answers(group: Reported, kind: str) -> set[str]:
    """Return the columns about which more was disclosed than what every request discloses."""
    names = {name for part in (*group["correlations"], *group["pairs"]) for name in part["columns"]}
    # A column and its bands are one variable.
    bands = [name for name in group["categorical"] if name.endswith("-band")]
    names |= {name.removesuffix("-band") for name in bands}
    if kind != "histograms":
        names |= {name for name, reported in group["numeric"].items() if "histogram" in reported}
    return names


def _figure(request: Request, group: Reported, what: str) -> tuple[str, tuple[str, ...]] | None:
    """Return kind and columns of the figure that a hospital names so; None if it is no extra."""
    numeric = group["numeric"]
    if what.startswith(HISTOGRAM) and what.removeprefix(HISTOGRAM) in numeric:
        return "histograms", (what.removeprefix(HISTOGRAM),)
    if what.startswith(CORRELATION):
        parts = what.removeprefix(CORRELATION).split(AND)
        for index in range(1, len(parts)):
            one, other = AND.join(parts[:index]), AND.join(parts[index:])
            if one in numeric and other in numeric:
                return "correlations", (one, other)
    for one, other in request.pairs:
        if what == f"{one}{BY}{other}":
            return "pairs", (one, other)
    return None


def _can_be_disclosed(group: Reported, columns: tuple[str, ...], minimum: float) -> bool:
    """Return whether the counts that were sent leave open that a figure could be disclosed."""
    counts = [group["numeric"].get(name) or group["categorical"].get(name) for name in columns]
    if any(reported is None or reported["n"] < minimum for reported in counts):
        return False
    # At least the difference, and at most all, of the rows that lack the one have the other.
    return not any(
        one["missing"] < other["missing"] < minimum for one, other in permutations(counts, 2)
    )
