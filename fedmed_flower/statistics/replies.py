"""What a hospital's answer must satisfy before it is added to others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fedmed_flower.statistics.types import Reported
from fedmed_flower.statistics.values import week_text

_MOST_LETTERS = 64 * 2**20
_MOST_COUNT = 1e12
# The sum of squares of 1e12 values below 1e100; those of all hospitals can be added up.
_MOST_SQUARES = 1e213
# Values are below 1e100, and an edge or a time at most a few widths, of at most 2e100, beyond.
_FARTHEST = 1e101
_MOST_GROUPS = 10_000
# A horizon is at most 10,000 widths, and rounded up to one.
_MOST_TIMES = 10_001
# What rounding may add to sums in floating point.
_ROUNDING = 1 + 1e-6


def read_reply(text: object) -> dict[str, Any]:
    """Return an answer as a dict, once every part of it is checked.

    Raises
    ------
    ValueError
        If a part is not what it must be; the error's text names the part.
    """
    if not isinstance(text, str):
        raise ValueError(f"the answer must be a text, got {type(text).__name__}")
    if len(text) > _MOST_LETTERS:
        raise ValueError(
            f"the answer must have at most {_MOST_LETTERS:,} letters, got {len(text):,}"
        )
    try:
        reported = json.loads(text)
        exact = reported["noise"] is None
        if not exact:
            for name in ("epsilon", "delta", "multiplier"):
                _number(reported["noise"][name], name, least=0.0)
        _number(reported["minimum"], "minimum", least=1)
        if len(reported["groups"]) > _MOST_GROUPS:
            raise ValueError(
                f"groups must be at most {_MOST_GROUPS:,}, got {len(reported['groups']):,}"
            )
        names = [_read_group(group, exact) for group in reported["groups"]]
        if len(set(names)) < len(names):
            raise ValueError("groups must have different names, two have the same")
        for entry in reported["withheld"]:
            _texts(entry, "withheld", count=3)
    except ValueError:
        raise
    except Exception as error:  # A hostile answer can be wrong in a dozen ways.
        raise ValueError(f"{type(error).__name__} {error}"[:200]) from None
    checked: dict[str, Any] = reported
    return checked


def _read_group(group: Reported, exact: bool) -> str:
    _texts([group["name"]], "group")
    if group["start"] is not None:
        _number(group["start"], "start")
    rows = _count(group["rows"], "rows", exact)
    if _count(group["patients"], "patients", exact) > rows:
        raise ValueError("there are more patients than rows")
    most = rows if exact else math.inf
    _texts(group["numeric"], "columns")
    _texts(group["categorical"], "columns")
    for name, reported in group["numeric"].items():
        _read_numeric(reported, name, exact, most)
    for name, reported in group["categorical"].items():
        _read_categorical(reported, name, exact, most)
    for reported in group["correlations"]:
        _read_correlation(reported, most)
    for reported in group["pairs"]:
        _read_pair(reported, exact, most)
    if "survival" in group:
        _read_survival(group["survival"], exact, most)
    if "weeks" in group:
        _read_weeks(group["weeks"], exact, most)
    return str(group["name"])


def _read_numeric(reported: Reported, name: str, exact: bool, most: float) -> None:
    count = _counted(reported, name, exact, most)
    if "mean" in reported:
        _moments(reported, name)
    if "histogram" in reported:
        edges = reported["histogram"]["edges"]
        counts = reported["histogram"]["counts"]
        _ascending(edges, name)
        _counts(counts, name, exact, count if exact else math.inf, len(edges) + 1)
        if not isinstance(reported["histogram"].get("whole", False), bool):
            raise ValueError(f"whole of {name} must be true or false")


def _read_categorical(reported: Reported, name: str, exact: bool, most: float) -> None:
    count = _counted(reported, name, exact, most)
    if "names" not in reported:
        return
    names = reported["names"]
    _texts(names, name)
    counts = [*reported["counts"], reported["few"]]
    _counts(counts, name, exact, count if exact else math.inf, len(names) + 1)
    if len(set(names)) < len(names):
        raise ValueError(f"{name} has a category twice")


def _read_correlation(reported: Reported, most: float) -> None:
    _texts(reported["columns"], "correlation", count=2)
    both = reported["of"]
    if len(both) != 2 or both[0]["n"] != both[1]["n"] or not both[0]["n"] <= most:
        raise ValueError("the two columns of a correlation must have the same number of rows")
    for part in both:
        _number(part["n"], "n", 0.0, _MOST_COUNT)
        _moments(part, "a correlation")
    _number(reported["product"], "product")
    if abs(reported["product"]) > math.sqrt(both[0]["m2"] * both[1]["m2"]) * _ROUNDING:
        raise ValueError("a correlation is above 1")


def _read_pair(reported: Reported, exact: bool, most: float) -> None:
    """Check a two-way table."""
    _texts(reported["columns"], "pair", count=2)
    _texts(reported["rows"], "pair")
    _texts(reported["across"], "pair")
    if len(reported["counts"]) != len(reported["rows"]):
        raise ValueError("a table must have a name for each row")
    for counts in reported["counts"]:
        _counts(counts, "a table", exact, most, len(reported["across"]))


def _read_survival(reported: Reported, exact: bool, most: float) -> None:
    _ascending(reported["times"], "times", least=0.0)
    if len(reported["times"]) > _MOST_TIMES:
        raise ValueError(
            f"a curve must have at most {_MOST_TIMES:,} times, got {len(reported['times']):,}"
        )
    for name in ("events", "censored"):
        _counts(reported[name], name, exact, most, len(reported["times"]))
    if math.fsum([*reported["events"], *reported["censored"]]) > most:
        raise ValueError("a curve counts more rows than its group has")


def _read_weeks(reported: Reported, exact: bool, most: float) -> None:
    first = reported["first"]
    if _number(first, "first week") % 1:
        raise ValueError("the first week must be a whole number")
    if reported["start"] not in [week_text(int(first), dated) for dated in (True, False)]:
        raise ValueError("the start of the weeks must be the first day of the first week")
    known = [count for count in reported["counts"] if count is not None]
    if len(reported["counts"]) > 10_000:
        raise ValueError("there are more than 10,000 weeks")
    _counts(known, "weeks", exact, most, len(known))


def _number(value: object, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:  # type: ignore
        raise ValueError(
            f"{name} must be a finite number from {least:g} to {most:g}, got {str(value)[:40]}"
        )
    return float(value)  # type: ignore[arg-type]


def _count(value: object, name: str, exact: bool, most: float = math.inf) -> float:
    if exact and not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {str(value)[:40]}")
    return _number(value, name, 0.0, min(most, _MOST_COUNT))


def _counts(values: Sequence[object], name: str, exact: bool, most: float, length: int) -> None:
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{name} must have {length} counts")
    if math.fsum(_count(value, name, exact) for value in values) > most:
        raise ValueError(f"{name} counts more rows than there are")


def _counted(reported: Reported, name: str, exact: bool, most: float) -> float:
    if "hospitals" in reported:
        raise ValueError(f"{name} is of one hospital, and says of how many it is")
    count = _count(reported["n"], name, exact)
    if count + _count(reported["missing"], name, exact) > most:
        raise ValueError(f"{name} counts more rows than there are")
    return count


def _moments(reported: Reported, name: str) -> None:
    for part in ("mean", "rest"):
        _number(reported[part], name, -1e100, 1e100)
    _number(reported["m2"], name, 0.0, _MOST_SQUARES)


def _ascending(values: object, name: str, least: float = -_FARTHEST) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{name} must have a list of edges")
    numbers = [_number(value, name, least, _FARTHEST) for value in values]
    if any(not low < high for low, high in pairwise(numbers)):
        raise ValueError(f"the edges of {name} do not ascend")


def _texts(values: Any, name: str, count: int | None = None) -> None:
    complete = isinstance(values, list | dict) and (count is None or len(values) == count)
    if not complete or not all(isinstance(text, str) and len(text) <= 400 for text in values):
        number = "texts" if count is None else f"{count} texts"
        raise ValueError(f"{name[:40]} must have {number} of at most 400 letters")
