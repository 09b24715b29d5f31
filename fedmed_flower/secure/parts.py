"""The names of what is summed, which server and hospital must agree upon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.secure.ring import COUNT, REAL, Layout, Part

# How a hospital's part in a mean is weighted, and by what.
BY = "by"
TOTAL = "total"
EXAMPLES = "examples"
UNIFORM = "uniform"
# The noise of the sum, as a noise multiplier, if hospitals add shares of it; and the norm to which
# each clips its own change, if the noise hides whole hospitals.
NOISE = "noise"
NORM = "norm"
# Centre and width of the grid of each score, in an evaluation.
GRIDS = "grids"

MODEL = "model/"
# One from each hospital, by which a wrong mask is noticed.
ONES = Part("tail/ones", 1, COUNT)
# Values that were beyond the bound, or no numbers.
CLIPPED = Part("tail/clipped", 1, COUNT)
LOSS = "tail/loss"
ROWS = Part("rows", 1, COUNT)
# The rows of one group's hospitals, with its name after this; the others add 0.
_ROWS_OF = "rows/"

# One from each hospital that adds figures: those with too few patients add zeros.
TOLD = Part("tail/told", 1, COUNT)
# A real figure is summed twice: as it is, to 2^-63 and up to 2^40; and in units of 2^50, to 2^-13
# and up to 2^90.
LARGE = "large/"
LARGE_UNIT = 2.0**50
_FIGURE_BOUND = 2.0**40
# By how much a sum in large units may be off, for as many hospitals as a sum can have.
_LARGE_ERROR = 2.0**-4


def rows_of(group: str) -> Part:
    """Return the part that counts the rows of a group's hospitals; of all if it is empty."""
    return Part(f"{_ROWS_OF}{group}", 1, COUNT) if group else ROWS


def rows_by_group(rows: int, own: str, layout: Layout) -> dict[str, int]:
    """Return what a hospital of a group adds to the parts of a layout that count groups' rows."""
    names = [part.name for part in layout.parts if part.name.startswith(_ROWS_OF)]
    return {name: rows if name == rows_of(own).name else 0 for name in names}


def figure_parts(name: str, size: int, whole: bool) -> tuple[Part, ...]:
    """Return the parts of a figure of this many numbers: whole ones of at least 0, or any."""
    if whole:
        return (Part(name, size, COUNT),)
    return tuple(Part(f"{unit}{name}", size, REAL, _FIGURE_BOUND) for unit in ("", LARGE))


def figure_in(part: Part, figures: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return what a hospital adds to a part of a figure; zeros if it has no such figure."""
    values = figures.get(part.name.removeprefix(LARGE))
    if values is None:
        return np.zeros(part.size, np.int64 if part.kind == COUNT else np.float64)
    return values / LARGE_UNIT if part.name.startswith(LARGE) else values


def figures_of(layout: Layout, sums: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the total of each figure of a sum, by name.

    Where a hospital's number was beyond the bound, the sum in large units is taken: the two sums
    then differ.
    """
    figures = {}
    for part in layout.parts:
        if part.name.startswith(LARGE) or part.name in (ONES.name, TOLD.name):
            continue
        total = sums[part.name]
        if part.kind == REAL:
            large = sums[f"{LARGE}{part.name}"] * LARGE_UNIT
            total = np.where(np.abs(total - large) <= _LARGE_ERROR, total, large)
        figures[part.name] = total
    return figures
