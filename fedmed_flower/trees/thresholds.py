"""Where trees may split a feature: at edges that are no single patient's value.

A tree grown on a hospital's rows splits at values that its patients have. Here the edges come
first: multiples of a round number, where the feature's range is declared, and else quantiles with
enough patients between any two. Trees are grown on the numbers of the bins between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.cells import LARGEST
from fedmed_flower.trees.ensembles import Tree

Edges = NDArray[np.float32]
# XGBoost's histograms have as many bins unless told otherwise.
_MOST_BINS = 256
# A threshold above all features, where a split only tells whether a value is missing.
BEYOND = 2 * LARGEST


def spaced_edges(low: float, high: float, step: float) -> Edges:
    """Return the multiples of `step` from `low` to `high`, ascending.

    Parameters
    ----------
    low, high : float
        Finite, `low` below `high`.
    step : float
        Above 0; about a fiftieth of the range.
    """
    numbers = np.arange(math.ceil(low / step), math.floor(high / step) + 1, dtype=np.float64)
    return np.unique((numbers * step).astype(np.float32))


def quantile_edges(values: NDArray[np.float32], patients: NDArray[np.intp], least: int) -> Edges:
    """Return edges with at least so many patients below the first, above the last and between two.

    An edge is the roundest number that parts the two values beside it.

    Parameters
    ----------
    values : (n,) float32 array
        NaN if missing; such rows count for nothing.
    patients : (n,) int array
        Whose row it is.
    least : int
        At least 1. It is more where there would be more than 256 bins.

    Returns
    -------
    (k,) float32 array
        Ascending.
    """
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    values, patients = values[order], patients[order]
    least = max(least, -(-len(np.unique(patients)) // _MOST_BINS))
    ends = [0]
    while (end := _end_of_bin(values, patients, ends[-1], least)) is not None:
        ends.append(end)
    # What is left behind the last end are too few for a bin of their own.
    inner = ends[1:-1]
    return np.array([roundest(values[end - 1], values[end]) for end in inner], np.float32)


def _end_of_bin(
    values: NDArray[np.float32], patients: NDArray[np.intp], start: int, least: int
) -> int | None:
    """Return where the bin ends that begins at a place; None if too few patients follow."""
    end = start + least
    while end <= len(values):
        lacking = least - len(np.unique(patients[start:end]))
        if not lacking:
            # Equal values stay together.
            return int(np.searchsorted(values, values[end - 1], "right"))
        end += lacking
    return None


def roundest(low: np.float32, high: np.float32) -> np.float32:
    """Return a number of few digits above `low` and not above `high`, near their middle."""
    if low < 0 <= high:
        return np.float32(0)
    width, middle = float(high) - float(low), (float(low) + float(high)) / 2
    coarsest = math.ceil(math.log10(max(abs(float(low)), abs(float(high)))))
    for power in range(coarsest, math.floor(math.log10(width)) - 2, -1):
        step = 10.0**power
        found = np.float32(math.floor(middle / step + 0.5) * step)
        if low < found <= high:
            return found
    return high


def in_bins(features: NDArray[np.float32], edges: Sequence[Edges]) -> NDArray[np.float32]:
    """Return which bin each value is in: how many edges are not above it; NaN if it is missing.

    Parameters
    ----------
    features : (n, width) float32 array
    edges : sequence of width float32 arrays
        Of each feature.

    Returns
    -------
    (n, width) float32 array
    """
    bins = np.empty_like(features)
    for index, own in enumerate(edges):
        bins[:, index] = np.searchsorted(own, features[:, index], "right")
    bins[np.isnan(features)] = np.nan
    return bins


def at_edges(tree: Tree, edges: Sequence[Edges]) -> Tree:
    """Return a tree, grown on the numbers of bins, that splits the features themselves alike.

    Each threshold is an edge, or plus or minus `BEYOND` where no edge parts the values.

    Parameters
    ----------
    tree : dict
        As `fedmed_flower.trees.ensembles.read_trees` returns it.
    edges : sequence of float32 arrays
        Of each feature.
    """
    values = list(tree["split_conditions"])
    for index, child in enumerate(tree["left_children"]):
        if child >= 0:
            own = (-BEYOND, *edges[tree["split_indices"][index]].tolist(), BEYOND)
            # Below a threshold of 2.5 lie the bins 0 to 2, which end at the third edge.
            values[index] = own[min(max(math.ceil(values[index]), 0), len(own) - 1)]
    return tree | {"split_conditions": values}
