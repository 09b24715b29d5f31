"""The answers of several hospitals, pooled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.statistics.types import Reported


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
    """A quantile: an estimate, and bounds between which the quantile certainly lies."""

    value: float
    low: float
    high: float


class Curve(NamedTuple):
    """A Kaplan-Meier curve: for each time the number at risk, the events and the survival."""

    times: list[float]
    at_risk: list[float]
    events: list[float]
    survival: list[float]


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
    """Return the pooled counts of categories by name, and of those too small to be named."""
    total: dict[str, float] = {}
    few = 0.0
    for part in parts:
        for name, count in zip(part["names"], part["counts"], strict=True):
            total[name] = total.get(name, 0) + count
        few += part["few"]
    return dict(sorted(total.items())), few


def pool_quantile(parts: Sequence[Reported], share: float) -> Quantile:
    """Return a quantile of all rows together.

    The bounds contain what pandas' ``quantile`` gives for the rows themselves: each value is at
    least the lower edge of its bin, and less than the upper one. The estimate interpolates as
    `cumulate` does.

    Parameters
    ----------
    parts : sequence of dict
        ``edges``, ascending, which separate the bins, and ``counts``, one more than the edges.
    share : float
        0 to 1.
    """
    lows: list[tuple[float, float]] = []
    highs: list[tuple[float, float]] = []
    for part in parts:
        lows += zip((-math.inf, *part["edges"]), part["counts"], strict=True)
        highs += zip((*part["edges"], math.inf), part["counts"], strict=True)
    index = share * (math.fsum(n for _, n in lows) - 1)
    low, high = _value_at(lows, math.floor(index)), _value_at(highs, math.ceil(index))
    edges, below = cumulate(parts)
    if not edges:
        return Quantile(math.nan, low, high)
    value = float(np.interp(index + 0.5, below.sum(axis=0), edges))
    return Quantile(min(max(value, low), high), low, high)


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
        cut = np.interp(coarsest, points, np.cumsum([0.0, *part["counts"]]))
        histograms.append(np.diff([0.0, *cut, math.fsum(part["counts"])]))
    return histograms


def pool_survival(parts: Iterable[Reported]) -> Curve:
    """Return the Kaplan-Meier curve of all patients, times rounded up as each hospital reports.

    If one hospital's interval contains times of another's, its events and censored patients are
    taken to lie evenly in it, as `cumulate` does.

    E. L. Kaplan, P. Meier, "Nonparametric estimation from incomplete observations", JASA 53, 1958.

    Parameters
    ----------
    parts : iterable of dict
        ``times``, ``events`` and ``censored``, of equal length.
    """
    reported = [part for part in parts if part["times"]]
    times = sorted({time for part in reported for time in part["times"]})
    totals = np.zeros((len(times), 2))
    for part in reported:
        start = min(0.0, part["times"][0] - 1)
        for side, name in enumerate(("events", "censored")):
            reached = np.interp(times, [start, *part["times"]], [0.0, *np.cumsum(part[name])])
            totals[:, side] += np.diff(reached, prepend=0.0)
    # Of the counts themselves: interpolated shares would not add up exactly.
    left = math.fsum(n for part in reported for name in ("events", "censored") for n in part[name])
    curve = Curve(times, [], [], [])
    alive = 1.0
    for events, censored in totals.tolist():
        alive *= max(0.0, 1 - events / left) if left > 0 else 1.0
        for values, value in zip(curve[1:], (left, events, alive), strict=True):
            values.append(value)
        left = max(0.0, left - events - censored)
    return curve


def _value_at(values: list[tuple[float, float]], index: int) -> float:
    """Return the value at an index, from 0 on, of sorted values that are given with counts."""
    reached = 0.0
    for value, count in sorted(values):
        reached += count
        if count and reached > index:
            return value
    return max((value for value, count in values if count), default=math.nan)
