"""Where trees may split a feature: at edges that are chosen before any tree is grown.

A tree grown on a hospital's rows splits at values that its patients have. Here the edges come
first: multiples of a round number if the feature's range is declared, else quantiles with enough
patients between any two. Trees are grown on the numbers of the bins between edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.cells import LARGEST
from fedmed_flower.trees.ensembles import Tree

Edges = NDArray[np.float32]
# The bins of XGBoost's histograms by default.
_MOST_BINS = 256
# A threshold above all values: a split there only separates missing values from others.
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
    """Return edges with at least `least` patients below the first, above the last, between two.

    An edge is the roundest number that separates the two values beside it.

    Parameters
    ----------
    values : (n,) float32 array
        NaN if missing; such rows are left out.
    patients : (n,) int array
        The patient of each row.
    least : int
        At least 1. A larger number is used if there would be more than 256 bins.

    Returns
    -------
    (k,) float32 array
        Ascending.
    """
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    values = values[order]
    patients = patients[order]
    least = max(least, math.ceil(len(np.unique(patients)) / _MOST_BINS))
    ends = [0]
    while (end := _end_of_bin(values, patients, ends[-1], least)) is not None:
        ends.append(end)
    # Rows behind the last end have too few patients for a bin of their own.
    inner = ends[1:-1]
    return np.array([roundest(values[end - 1], values[end]) for end in inner], np.float32)


def _end_of_bin(
    values: NDArray[np.float32], patients: NDArray[np.intp], start: int, least: int
) -> int | None:
    """Return the end of the bin that begins at index `start`; None if too few patients follow."""
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
    width = float(high) - float(low)
    middle = (float(low) + float(high)) / 2
    coarsest = math.ceil(math.log10(max(abs(float(low)), abs(float(high)))))
    for power in range(coarsest, math.floor(math.log10(width)) - 2, -1):
        step = 10.0**power
        rounded = np.float32(math.floor(middle / step + 0.5) * step)
        if low < rounded <= high:
            return rounded
    return high


def in_bins(features: NDArray[np.float32], edges: Sequence[Edges]) -> NDArray[np.float32]:
    """Return the bin of each value: the number of edges at or below it; NaN if it is missing.

    Parameters
    ----------
    features : (n, width) float32 array
    edges : sequence of width float32 arrays
        The edges of each feature.

    Returns
    -------
    (n, width) float32 array
    """
    bins = np.empty_like(features)
    for index, feature_edges in enumerate(edges):
        bins[:, index] = np.searchsorted(feature_edges, features[:, index], "right")
    bins[np.isnan(features)] = np.nan
    return bins


def at_edges(tree: Tree, edges: Sequence[Edges]) -> Tree:
    """Turn a tree grown on the numbers of bins into one that splits the features the same way.

    Each threshold is an edge, or plus or minus `BEYOND` if no edge separates the values.

    Parameters
    ----------
    tree : dict
        As `fedmed_flower.trees.ensembles.read_trees` returns it.
    edges : sequence of float32 arrays
        The edges of each feature.
    """
    values = list(tree["split_conditions"])
    for index, child in enumerate(tree["left_children"]):
        if child >= 0:
            thresholds = (-BEYOND, *edges[tree["split_indices"][index]].tolist(), BEYOND)
            # Below a threshold of 2.5 lie the bins 0 to 2, which end at the third edge.
            number = min(max(math.ceil(values[index]), 0), len(thresholds) - 1)
            values[index] = thresholds[number]
    return tree | {"split_conditions": values}
