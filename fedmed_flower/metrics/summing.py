"""A hospital's figures as sums that add up over hospitals, and the record that all sums make.

A secure sum tells the server no hospital's figures, so that nothing can be averaged there: each
hospital sends what adds up. A mean over rows is sent as its sum with its number of rows. Counts are
sent as they are. Scores are counted on one grid, the same at each hospital. What follows from these
counts, such as the sensitivity, and what is no sum, such as the lowest Dice, is not sent.

`record_of_sums` makes one record of the total, as one hospital with all rows would send it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.auc import BINS, EDGES, MERGED, ordered_pairs
from fedmed_flower.metrics.coarse import is_of_one_patient
from fedmed_flower.metrics.findings import mean_over_findings
from fedmed_flower.metrics.names import (
    CALIBRATION,
    CONFUSION,
    COUNT,
    COUNTS,
    GRID,
    HIGH,
    KAPPA,
    LOW,
    NOISED,
    NOISED_DICE,
    NOISED_ERRORS,
    PAIRS,
    RATES,
    TARGET,
    in_groups,
)
from fedmed_flower.metrics.types import Floats, Whole

# Of centre 0 and width 1. A hospital's own grid has a quarter of these bins.
SUM_BINS = 8192
SUM_EDGES = np.sinh(np.linspace(-10.0, 10.0, SUM_BINS + 1))
# Centre and width of the grid on which all hospitals count a score, in log odds. On the first one
# no bin is wider than a four-hundredth of the log odds that it stands for; its ends are at +-110.
Grid = tuple[float, float]
FIRST_GRID: Grid = (0.0, 0.01)
# Of each score: pairs of rows of one hospital in the right order, less those in order by the grid.
ORDER = "score-order"
# What names of sums begin with: a sum, and the number of rows that a sum over rows is of.
SUM = "sum/"
ROWS = "rows/"

_ROWS = "num-examples"
# Whole numbers of at least 0, whatever the rows are.
_WHOLE = (_ROWS, CONFUSION, COUNTS, PAIRS)
_ADDED = (CONFUSION, CALIBRATION, PAIRS, NOISED, NOISED_DICE, NOISED_ERRORS)
# What follows from a list of counts over all rows.
_FOLLOWING = {
    CONFUSION: (*RATES, KAPPA),
    COUNTS: ("auc", "average-precision", LOW, HIGH),
    CALIBRATION: ("calibration-error",),
    TARGET: ("mae", "rmse", "r2"),
    COUNT: ("mae", "deviance", "d2"),
    PAIRS: ("c-index",),
    NOISED: (*RATES, "auc", KAPPA),
    NOISED_ERRORS: ("mae",),
}
# No sum of a hospital is larger: a float of that size has no digits left for the others'.
_MOST = 2.0**90


def sums_of_record(
    record: Mapping[str, Any], grids: Sequence[Grid] = ()
) -> dict[str, NDArray[Any]]:
    """Return one hospital's figures as sums, by names that begin with `SUM` or `ROWS`.

    Parameters
    ----------
    record : mapping
        As `measure` of a client returns it, with plain numbers and lists. Of a group without
        metrics, such as that of a hospital with too few patients, nothing is returned: not even
        its number of rows.
    grids : sequence of Grid
        One a score, the same at all hospitals; empty for `FIRST_GRID`.

    Raises
    ------
    InputError
        If the figures are coarse: bins of several widths do not add up. If there is not one grid
        a score.
    """
    sums: dict[str, NDArray[Any]] = {}
    means = mean_over_findings(record)
    for group, part in in_groups(record).items():
        rows = part.get(_ROWS)
        if not isinstance(rows, int | float) or not 0 < rows < math.inf or len(part) == 1:
            continue
        sums[f"{SUM}{_ROWS}{group}"] = np.atleast_1d(rows)
        following = {name for key in part for name in _FOLLOWING.get(key, ())}
        # The mean over findings follows from the sums of each.
        following |= set() if group else means.keys()
        for name, value in part.items():
            if name in (_ROWS, GRID) or name in following or is_of_one_patient(name):
                continue
            if name == COUNTS:
                fitting = grids if not group else _grids_of_group(len(part[GRID]) // 3, grids)
                counts, order = _on_one_grid(part[GRID], value, fitting)
                sums[f"{SUM}{COUNTS}{group}"] = counts
                sums[f"{SUM}{ORDER}{group}"] = order
            elif name in (TARGET, COUNT):
                sums[f"{SUM}{name}{group}"] = _powers(name, value)
            elif name in _ADDED:
                sums[f"{SUM}{name}{group}"] = np.asarray(value)
            elif is_fit(total := np.atleast_1d(np.asarray(value, np.float64)) * rows):
                sums[f"{SUM}{name}{group}"] = total
                sums[f"{ROWS}{name}{group}"] = np.atleast_1d(rows)
    return sums


def _grids_of_group(scores: int, grids: Sequence[Grid]) -> Sequence[Grid]:
    """Return the grids of a group, which are those of all rows if it has as many scores.

    A grade and those above are told from others by a score of their own.
    """
    return grids if len(grids) == scores else ()


def is_whole(name: str) -> bool:
    """Return whether a sum of this name is of whole numbers of at least 0."""
    return name.startswith(ROWS) or name.removeprefix(SUM).partition("@")[0] in _WHOLE


def is_fit(values: Floats) -> bool:
    """Return whether values can be added: finite, and of a size that others' digits survive."""
    return bool((np.abs(values) <= _MOST).all())


def record_of_sums(sums: Mapping[str, NDArray[Any]], grids: Sequence[Grid] = ()) -> dict[str, Any]:
    """Return the sums over all hospitals as one record, as one hospital with all rows sends it.

    Parameters
    ----------
    sums : mapping of str to ndarray
        The total of what `sums_of_record` returns at each hospital.
    grids : sequence of Grid
        As `sums_of_record` was given them.

    Returns
    -------
    dict
        For `pool`. Of a group without rows it is only ``num-examples``; of a metric that no
        hospital has measured, nothing.
    """
    named = {name.removeprefix(SUM): value for name, value in sums.items() if SUM in name[:4]}
    record: dict[str, Any] = {}
    for group, part in in_groups(named).items():
        rows = part[_ROWS][0].item()
        record[f"{_ROWS}{group}"] = rows
        if not rows:
            continue
        if COUNTS in part:
            fitting = grids if not group else _grids_of_group(part[ORDER].size, grids)
            grid, counts = _on_own_grid(part[COUNTS], part[ORDER], fitting)
            record |= {f"{GRID}{group}": grid, f"{COUNTS}{group}": counts}
        for name, value in part.items():
            if name in (_ROWS, COUNTS, ORDER):
                continue
            if name in (TARGET, COUNT):
                record[f"{name}{group}"] = _from_powers(name, value)
            elif name in _ADDED:
                record[f"{name}{group}"] = value.tolist()
            elif count := sums[f"{ROWS}{name}{group}"][0].item():
                means = (value / count).tolist()
                record[f"{name}{group}"] = means if len(means) > 1 else means[0]
    return record


def partial_metrics(sums: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Return the metrics that some hospitals could not measure, with the number of others' rows."""
    partial = {}
    for name, value in sums.items():
        metric = name.removeprefix(ROWS)
        group = f"@{metric.partition('@')[2]}" if "@" in metric else ""
        if name.startswith(ROWS) and value[0] != sums[f"{SUM}{_ROWS}{group}"][0]:
            partial[metric] = int(value[0])
    return partial


def finer_grids(sums: Mapping[str, NDArray[Any]], grids: Sequence[Grid] = ()) -> list[Grid] | None:
    """Return grids that resolve the scores of all rows; None if these ones do.

    A grid resolves a score if its bins in the middle are as narrow as those of a hospital's own
    grid, a five-hundredth of the distance of the quartiles, and no row is in the bins at its ends,
    or a wider grid would not help. Whoever chooses a grid learns no more
    than by the choice of a model, whose last layer could shift and stretch the scores.
    """
    counts = sums.get(f"{SUM}{COUNTS}")
    if counts is None or not counts.any():
        return None
    wanted: list[Grid] = []
    fine = True
    for histograms, grid in _with_grids(counts, grids):
        edges = edges_of(grid)
        rows = histograms.sum(axis=0)
        quarters, (low, centre, high) = _quartiles(edges, rows)
        middles = (edges[:-1] + edges[1:]) / 2
        spread = math.sqrt(np.average((middles - centre) ** 2, weights=rows))
        width = max(0.2 * (high - low), 1e-3 * spread, 1e-9 * max(1.0, abs(centre)))
        fine &= bool(np.diff(edges)[quarters[1]] <= 0.01 * width)
        fine &= not rows[[0, -1]].any() or width <= 2 * grid[1]
        wanted.append((centre, float(f"{width:.1e}")))
    return None if fine else wanted


def edges_of(grid: Grid) -> Floats:
    """Return the edges of a grid, shape (8193,), in log odds."""
    centre, width = grid
    return np.asarray(centre + width * SUM_EDGES)


def _with_grids(counts: ArrayLike, grids: Sequence[Grid]) -> list[tuple[Whole, Grid]]:
    """Return the histograms of each score, without and with the class, and its grid."""
    histograms = np.asarray(counts).reshape(-1, 2, SUM_BINS)
    return [*zip(histograms, grids or [FIRST_GRID] * len(histograms), strict=True)]


def _quartiles(edges: Floats, rows: Whole) -> tuple[Whole, tuple[float, float, float]]:
    """Return the bins in which the quartiles of rows are, and their middles."""
    below = np.cumsum(rows)
    bins = np.searchsorted(below, below[-1] * np.array([0.25, 0.5, 0.75]))
    low, centre, high = (float(value) for value in (edges[bins] + edges[bins + 1]) / 2)
    return bins, (low, centre, high)


def _powers(key: str, sums: ArrayLike) -> Floats:
    """Turn the mean and the spread of a target into sums that add up.

    These are the sum of the target y, and that of y squared; for counts, of 2 y log y.
    """
    rows, mean, spread, error, absolute = np.asarray(sums, dtype=np.float64)
    return np.asarray([rows, rows * mean, spread + _about_zero(key, rows, mean), error, absolute])


def _from_powers(key: str, sums: Floats) -> list[float]:
    """Return rows, mean and spread of the target, and the rest, from sums over all hospitals.

    The spread is the difference of two sums: it has lost as many digits as the mean is larger than
    the standard deviation, twice.
    """
    rows, total, power, error, absolute = (float(value) for value in sums)
    mean = total / rows
    spread = power - _about_zero(key, rows, mean)
    # A target that is the same in each row has a spread by rounding alone.
    rounding = 64 * np.finfo(float).eps * abs(power)
    return [rows, mean, spread if spread > rounding else 0.0, error, absolute]


def _about_zero(key: str, rows: float, mean: float) -> float:
    """Return what the spread of rows grows by if it is taken about 0, not about their mean."""
    if key == TARGET:
        return rows * mean**2
    return 2 * rows * mean * math.log(mean) if mean > 0 else 0.0


def _on_one_grid(
    grid: ArrayLike, counts: ArrayLike, wanted: Sequence[Grid]
) -> tuple[Whole, Floats]:
    """Return a hospital's counts on the grids of all, and the pairs that these have wrong."""
    fine = np.asarray(counts, dtype=np.int64).reshape(-1, 2, BINS)
    if (fine == MERGED).any():
        raise InputError(
            "figures that are coarse do not add up: set coarse-figures=false in the node config; "
            "of a secure sum the server sees no single hospital's counts"
        )
    grids = np.asarray(grid, dtype=np.float64).reshape(-1, 3)
    summed = np.zeros((len(fine), 2, SUM_BINS), dtype=np.int64)
    order = np.zeros(len(fine))
    if wanted and len(wanted) != len(fine):
        raise InputError(f"there must be one grid for each of {len(fine)} scores: {len(wanted)}")
    for score, (centre, width, auc) in enumerate(grids):
        edges = edges_of(wanted[score] if wanted else FIRST_GRID)
        summed[score] = rebinned(centre + width * EDGES, fine[score], edges)
        order[score] = auc * float(fine[score].sum(axis=1).prod()) - _in_order(summed[score])
    return summed.ravel(), order


def _on_own_grid(
    counts: ArrayLike, order: ArrayLike, grids: Sequence[Grid]
) -> tuple[list[float], list[int]]:
    """Return grids (centre, width, AUC of all rows) for the scores of all rows, and the counts."""
    own: list[float] = []
    fine: list[int] = []
    summed = _with_grids(counts, grids)
    for (histograms, grid), corrected in zip(summed, np.asarray(order), strict=True):
        edges = edges_of(grid)
        quarters, (low, centre, high) = _quartiles(edges, histograms.sum(axis=0))
        # The bins in the middle are then no wider than those of the sum.
        width = max(0.2 * (high - low), 50 * float(np.diff(edges)[quarters].max()))
        pairs = float(histograms.sum(axis=1).prod())
        auc = (_in_order(histograms) + float(corrected)) / pairs if pairs else 0.5
        own += [centre, width, min(1.0, max(0.0, auc))]
        fine += rebinned(edges, histograms, centre + width * EDGES).ravel().tolist()
    return own, fine


def _in_order(histograms: Whole) -> float:
    """Count the pairs that bins show to be in the right order; those of one bin count half."""
    return ordered_pairs(np.pad(np.cumsum(histograms, axis=1), ((0, 0), (1, 0))))


def rebinned(edges: Floats, counts: Whole, wanted: Floats) -> Whole:
    """Return counts on another grid: each bin goes whole to the one that holds its middle.

    Parameters
    ----------
    edges, wanted : array of shape (bins + 1,) and (others + 1,)
        Both ascending. What lies beyond the ends of `wanted` goes to its end bins.
    counts : array of shape (k, bins)

    Returns
    -------
    array of shape (k, others)
    """
    middles = (edges[:-1] + edges[1:]) / 2
    places = np.clip(np.searchsorted(wanted, middles, side="right") - 1, 0, len(wanted) - 2)
    moved = np.zeros((len(counts), len(wanted) - 1), dtype=np.int64)
    for row, of_row in zip(moved, counts, strict=True):
        np.add.at(row, places, of_row)
    return moved
