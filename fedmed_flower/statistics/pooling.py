"""The answers of several hospitals, pooled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.statistics.types import Floats, Reported

# What rounding may leave in a bin, as a share of all values.
_ROUNDING = 1e-9
# What a category begins with, if it is a number or a band: 60, <60, 60-75, >=75.
_NUMBER = re.compile(r"(?:<|>=)?(-?[0-9]{1,15}(?:\.[0-9]{1,15})?)")


class Moments(NamedTuple):
    """Number, mean and variance of a sample.

    The mean is NaN without a value, the variance is NaN without two.
    """

    n: float
    mean: float
    variance: float

    @property
    def sd(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance)


class Quantile(NamedTuple):
    """A quantile of all rows.

    Attributes
    ----------
    estimate : float
        Interpolated in a bin. No patient need have this value.
    low, high : float
        The quantile is at least `low`, and below `high`. Of whole numbers it is at most `high`.
    """

    estimate: float
    low: float
    high: float


def pool_moments(parts: Iterable[Reported]) -> Moments:
    """Return the moments of all rows together.

    By the formula of T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", COMPSTAT 1982.

    Parameters
    ----------
    parts : iterable of dict
        ``n``, ``mean``, ``rest`` (to be added to the mean) and ``m2``.
    """
    known = [part for part in parts if part["n"] > 0]
    count = math.fsum(part["n"] for part in known)
    if not known:
        return Moments(0.0, math.nan, math.nan)
    # Relative to one of the means, so that a mean far from 0 costs no digits.
    base = known[0]["mean"]
    shifts = [part["mean"] - base + part["rest"] for part in known]
    shift = math.fsum(p["n"] * s for p, s in zip(known, shifts, strict=True)) / count
    between = (p["n"] * (s - shift) ** 2 for p, s in zip(known, shifts, strict=True))
    squares = math.fsum([*(part["m2"] for part in known), *between])
    return Moments(count, base + shift, squares / (count - 1) if count > 1 else math.nan)


def pool_correlation(parts: Sequence[Reported]) -> float:
    """Return Pearson's correlation of all rows together; NaN if a column is constant.

    Parameters
    ----------
    parts : sequence of dict
        ``of``, the moments of both columns over the same rows, and ``product``.
    """
    together = [pool_moments([part["of"][side] for part in parts]) for side in (0, 1)]
    if not together[0].n > 1:
        return math.nan
    products = [part["product"] for part in parts]
    for part in parts:
        x, y = (m["mean"] - t.mean + m["rest"] for m, t in zip(part["of"], together, strict=True))
        products.append(part["of"][0]["n"] * x * y)
    spread = math.sqrt(together[0].variance * together[1].variance) * (together[0].n - 1)
    return min(1.0, max(-1.0, math.fsum(products) / spread)) if spread > 0 else math.nan


def pool_counts(parts: Iterable[Reported]) -> tuple[dict[str, float], float]:
    """Return the pooled counts of categories by name, and of those too small to be named.

    Names that begin with a number come first, as it grows, and so do bands: <60, 60-75, >=75.
    """
    total: dict[str, float] = {}
    few = 0.0
    for part in parts:
        for name, count in zip(part["names"], part["counts"], strict=True):
            total[name] = total.get(name, 0) + count
        few += part["few"]
    return {name: total[name] for name in sorted(total, key=place_of)}, few


def place_of(name: str) -> tuple[float, bool, str]:
    """Return the place of a category among others; see `pool_counts`."""
    number = _NUMBER.match(name)
    if number is None:
        return math.inf, True, name
    return float(number[1]), not name.startswith("<"), name


def pool_quantile(parts: Sequence[Reported], share: float) -> Quantile:
    """Return a quantile of all rows together.

    The bounds contain what pandas' ``quantile`` gives for the rows themselves: each value is at
    least the lower edge of its bin, and less than the upper one. If all hospitals declare that the
    column holds whole numbers, a bin's values lie between the first and the last whole number in
    it. The estimate interpolates as `cumulate` does.

    Parameters
    ----------
    parts : sequence of dict
        ``edges``, ascending, which separate the bins, and ``counts``, one more than the edges;
        ``whole`` if the values are declared to be whole numbers.
    share : float
        0 to 1.
    """
    whole = only_whole(parts)
    lows: list[tuple[float, float]] = []
    highs: list[tuple[float, float]] = []
    for part in parts:
        edges = np.array(part["edges"], np.float64)
        upper = edges
        if whole:
            edges = np.ceil(edges)
            upper = edges - 1
        lows += zip([-math.inf, *edges.tolist()], part["counts"], strict=True)
        highs += zip([*upper.tolist(), math.inf], part["counts"], strict=True)
    index = share * (math.fsum(n for _, n in lows) - 1)
    low = _between(lows, index)
    high = _between(highs, index)
    all_edges, below = cumulate(parts)
    if not all_edges:
        return Quantile(math.nan, low, high)
    value = float(np.interp(index + 0.5, below.sum(axis=0), all_edges))
    return Quantile(min(max(value, low), high), low, high)


def only_whole(parts: Sequence[Reported]) -> bool:
    """Return whether all histograms are of columns that are declared to hold whole numbers."""
    return all(part.get("whole", False) for part in parts)


def cumulate(parts: Sequence[Reported]) -> tuple[list[float], NDArray[np.float64]]:
    """Return all edges in ascending order, and how many values of each histogram lie below each.

    The values of a bin are taken to lie evenly in it, those of an open one between its edge and the
    outermost edge of all histograms.

    Returns
    -------
    edges : list of float
    below : ndarray of shape (parts, edges)
    """
    edges = sorted({edge for part in parts for edge in part["edges"]})
    below = np.zeros((len(parts), len(edges)))
    for number, part in enumerate(parts if edges else ()):
        points = [edges[0], *part["edges"], edges[-1]]
        below[number] = np.interp(edges, points, [0.0, *np.cumsum(part["counts"])])
    return edges, below


def below_edges(parts: Sequence[Reported]) -> tuple[list[float], Floats, Floats]:
    """Return all edges in ascending order, and bounds of how many values lie below each.

    Returns
    -------
    edges : list of float
    least, most : ndarray of shape (edges,)
        As `values_below` returns them.
    """
    edges = sorted({edge for part in parts for edge in part["edges"]})
    return edges, *values_below(parts, edges)


def values_below(
    parts: Sequence[Reported], points: Sequence[float] | Floats
) -> tuple[Floats, Floats]:
    """Return how many values lie below each point, at least and at most; both (points,).

    They agree at a point that divides no bin of any histogram in which there are values.
    """
    least = np.zeros(len(points))
    most = np.zeros(len(points))
    for part in parts:
        reached = np.concatenate(([0.0], np.cumsum(part["counts"])))
        least += reached[np.searchsorted(part["edges"], points, side="right")]
        most += reached[np.searchsorted(part["edges"], points, side="left") + 1]
    return least, most


def same_bins(parts: Sequence[Reported]) -> list[NDArray[np.float64]] | None:
    """Return histograms in the bins of the coarsest of them; None if that has a single bin.

    The values of a bin are taken to lie evenly in it, those of an open one between its edge and one
    average width beyond the outermost edge of all: what a hospital counts above its own last edge
    is not all below that of another.
    """
    # Of histograms with as many bins it does not matter which comes first.
    coarsest: list[float] = min(
        (part["edges"] for part in parts), key=lambda edges: (len(edges), edges), default=[]
    )
    if not coarsest:
        return None
    edges = np.unique([edge for part in parts for edge in part["edges"]])
    width = float(edges[-1] - edges[0]) / edges.size or 1.0
    histograms = []
    for part in parts:
        points = [edges[0] - width, *part["edges"], edges[-1] + width]
        reached = np.cumsum([0.0, *part["counts"]])
        cut = np.interp(coarsest, points, reached)
        counts = np.diff([0.0, *cut, reached[-1]])
        # What is left by rounding, of either sign, counts nobody.
        histograms.append(np.where(counts > _ROUNDING * reached[-1], counts, 0.0))
    return histograms


def _between(values: list[tuple[float, float]], index: float) -> float:
    """Return the value at an index, interpolated between the two values next to it."""
    lower = _value_at(values, math.floor(index))
    upper = _value_at(values, math.ceil(index))
    share = index - math.floor(index)
    if lower == upper or not share:
        return lower
    return (1 - share) * lower + share * upper


def _value_at(values: list[tuple[float, float]], index: int) -> float:
    """Return the value at an index, from 0 on, of sorted values that are given with counts."""
    reached = 0.0
    for value, count in sorted(values):
        reached += count
        if count and reached > index:
            return value
    return max((value for value, count in values if count), default=math.nan)
