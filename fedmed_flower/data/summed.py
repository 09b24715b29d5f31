"""Moments of columns as secure sums: what each hospital adds, and what the sums say.

Three questions are asked. First, of each column, how many hospitals can tell its moments; a column
that too few can tell is asked no further. Then the number of values and their sum. Last, when the
common mean is known, the sum of squared distances to it: to take the mean's square off a sum of
squares would lose the digits of a column that is far from 0 beside its spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from fedmed_flower.data.preparation import MOMENTS
from fedmed_flower.secure.ring import COUNT, Part
from fedmed_flower.secure.wide import digits_of, value_of, wide_part

# The names of parts, each followed by a column.
TOLD = "told "
NUMBER = "number "
SUM = "sum "
SQUARES = "squares "


def added(
    contribution: Mapping[str, Any], columns: Sequence[str], means: Mapping[str, float]
) -> dict[str, int | list[float]]:
    """Return what a hospital adds to each part; zeros of a column that it does not tell.

    Parameters
    ----------
    contribution : mapping
        What `preparation.contribution` returned.
    columns : sequence of str
        All columns that may be asked for.
    means : mapping of str to float
        The common means, of the columns of which they are known.
    """
    parts: dict[str, int | list[float]] = {}
    for column in columns:
        count, mean, squares = contribution.get(MOMENTS + column, (0.0, 0.0, 0.0))
        parts[TOLD + column] = int(count > 0)
        parts[NUMBER + column] = int(count)
        parts[SUM + column] = digits_of(count * mean)
        if column in means:
            apart = mean - means[column]
            parts[SQUARES + column] = digits_of(squares + count * apart * apart)
    return parts


def parts_told(columns: Sequence[str]) -> list[Part]:
    """Return the parts of the first question."""
    return [Part(TOLD + column, 1, COUNT) for column in columns]


def parts_of_means(columns: Sequence[str]) -> list[Part]:
    """Return the parts of the second question."""
    numbers = [Part(NUMBER + column, 1, COUNT) for column in columns]
    return [*numbers, *(wide_part(SUM + column) for column in columns)]


def parts_of_squares(columns: Sequence[str]) -> list[Part]:
    """Return the parts of the third question."""
    return [wide_part(SQUARES + column) for column in columns]


def told_by(sums: Mapping[str, NDArray[Any]], column: str) -> int:
    """Return how many hospitals can tell a column."""
    return int(sums[TOLD + column][0])


def mean_of(sums: Mapping[str, NDArray[Any]], column: str) -> float:
    """Return the mean of all hospitals' values; 0 if there are none."""
    count = int(sums[NUMBER + column][0])
    return value_of(sums[SUM + column]) / count if count else 0.0


def moments(sums: Mapping[str, NDArray[Any]], means: Mapping[str, float]) -> dict[str, list[float]]:
    """Return the moments of all hospitals together, in the form of one hospital's contribution.

    Parameters
    ----------
    sums : mapping
        The sums of the second and the third question, of the same columns.
    means : mapping
        By column.
    """
    return {
        MOMENTS + column: [
            float(sums[NUMBER + column][0]),
            mean,
            max(0.0, value_of(sums[SQUARES + column])),
        ]
        for column, mean in means.items()
    }
