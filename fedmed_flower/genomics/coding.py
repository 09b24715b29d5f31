"""How phenotypes and covariates are written: numbers, missing values, cases and controls."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.cells import MISSING, plain
from fedmed_flower.errors import InputError, shown
from fedmed_flower.genomics.types import Floats

# PLINK's code of a missing phenotype or covariate.
MISSING_CODES: Collection[float] = (-9.0,)
CODINGS = ("0/1", "1/2")
_TEXTS = {text.lower() for text in MISSING}
# A value that may stand for a missing one has at least this share of the people, and this many.
_FREQUENT = 0.01
_FEWEST = 3
# It is this many standard deviations from the mean of the others, and this many from the next.
_FAR = 3.0
_ALONE = 0.5
# Below this number of different other values, it is further from the next than they are apart.
_FEW_VALUES = 10


def number_of(value: Any, column: str, name: str) -> float:
    """Return a value of a row as a number; NaN if it is None, NaN, empty or ``NA``.

    Raises
    ------
    InputError
        If it is no number; the error names the column and the person.
    """
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, str) and value.strip().lower() in _TEXTS):
        return math.nan
    if not isinstance(value, Real):
        raise InputError(f"{column} of patient {name} must be a number, got {value!r}")
    return float(value)


def without_codes(values: Floats, codes: Collection[float]) -> Floats:
    """Return (n,) values with NaN in the place of each code of a missing one."""
    return np.where(np.isin(values, list(codes)), np.nan, values)


def case_status(values: Floats, coding: str, column: str) -> Floats:
    """Return 0 for controls, 1 for cases and NaN if missing.

    Parameters
    ----------
    values : (n,) float array
        NaN if missing.
    coding : {"0/1", "1/2", ""}
        How controls and cases are written. In ``1/2``, PLINK's coding, 0 is missing. Without a
        declaration it is ``0/1``, if values are 0 or 1 and somebody has 0.
    column : str
        The column's name, for errors.

    Raises
    ------
    InputError
        If a value is not of the coding, or none is declared and the values do not tell which it is.
    """
    if coding == "1/2":
        values = without_codes(values, (0.0,))
    present = set(values[np.isfinite(values)].tolist())
    allowed = {1.0, 2.0} if coding == "1/2" else {0.0, 1.0}
    if not coding and present and (present == {1.0} or (2.0 in present and present < {0, 1, 2})):
        has = " and ".join(plain(value) for value in sorted(present))
        raise InputError(
            f"{column} of a binary trait has the values {has} alone, so it is not clear what 1 is: "
            'declare coding="1/2" if it is a control and 2 a case, as PLINK writes them, or '
            'coding="0/1" if it is a case and 0 a control'
        )
    if odd := sorted(present - allowed):
        low, high = coding.split("/") if coding else ("0", "1")
        way_out = "" if coding else ', or 1 and 2 as PLINK writes them if you declare coding="1/2"'
        raise InputError(
            f"{column} of a binary trait must be {low} for controls and {high} for cases{way_out}, "
            f"got {plain(odd[0])}"
        )
    return values - 1 if coding == "1/2" else values


def require_quantitative(values: Floats) -> None:
    """Raise `InputError` if the phenotypes of a fam file are those of cases and controls.

    They are, as PLINK reads them, if all are 0, 1 or 2; 0 is then missing.
    """
    present = set(values[np.isfinite(values)].tolist())
    if present and present <= {0.0, 1.0, 2.0}:
        raise InputError(
            "the phenotypes of the fam file are all 0, 1 or 2, which are missing, control and case "
            'there: set trait="binary", or give a quantitative phenotype in the rows'
        )


class Lone(NamedTuple):
    """A value that many people have and that is far from all others."""

    value: float
    times: int
    people: int


def lone_values(values: Floats) -> list[Lone]:
    """Return values that may stand for a missing one, such as -999 or 99.

    Such a value is the smallest or the largest, at least one in a hundred people and three of them
    have it, and it is far from all others. If ten other values or more are different, far means 3
    standard deviations from their mean and half a one from the next; if fewer are, farther from the
    next than they are apart. Two values alone, such as those of an indicator, are both taken as
    they are.

    Parameters
    ----------
    values : (n,) float array
        NaN if missing.

    Examples
    --------
    >>> ages = np.array([40.0, 41, 43, 47, 52, 55, 58, 60, 61, 64, 70, -999, -999, -999])
    >>> lone_values(ages)
    [Lone(value=-999.0, times=3, people=14)]
    """
    rest = values[np.isfinite(values)]
    people = len(rest)
    found: list[Lone] = []
    while True:
        different, counts = np.unique(rest, return_counts=True)
        if len(different) < 3:
            return found
        for index, others in ((0, different[1:]), (-1, different[:-1])):
            value = float(different[index])
            times = int(counts[index])
            frequent = times >= max(_FEWEST, _FREQUENT * people)
            if frequent and _is_far(value, others, rest[rest != value]):
                found.append(Lone(value, times, people))
                rest = rest[rest != value]
                break
        else:
            return found


def _is_far(value: float, different: NDArray[Any], others: NDArray[Any]) -> bool:
    gap = float(np.abs(different - value).min())
    if len(different) < _FEW_VALUES:
        return bool(gap > different[-1] - different[0])
    deviation = float(others.std())
    away = abs(value - float(others.mean()))
    return away > _FAR * deviation and gap > _ALONE * deviation


def lone_text(column: str, lone: Lone) -> str:
    """Return the warning about a value that may stand for a missing one."""
    return (
        f"{shown(column)} is {plain(lone.value)} for {lone.times} of {lone.people} people, far "
        "from all other values: it counts as a number. If it stands for a missing value, declare "
        "it in missing of the client"
    )
