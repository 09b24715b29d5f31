"""How well scores rank the rows of several sites, from each site's histograms of them.

A site lays a grid over its scores and counts, in each bin, rows without and with the class. A site
that tells coarsely merges bins until each holds ten patients or more; the rows of one bin are then
in an order that nobody knows, and the area under the ROC curve over all sites lies between bounds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.metrics.types import Floats, Whole

# Bins of 1/500 of the interquartile range at the median that grow outwards (sinh), so that narrow,
# skewed and far-off scores keep their order.
BINS = 2048
EDGES = np.sinh(np.linspace(-10.0, 10.0, BINS + 1))

# Different patients in a bin that is told coarsely.
FEWEST = 10
# A coarse grid is the same at each site, so that it tells nothing of the patients. Its bins are no
# wider than a hundredth of the log-odds that they stand for; its middle is the threshold 0.
_COARSE_WIDTH, _MIDDLE = 0.01, BINS // 2
# Stands for a bin that is part of the one before it, and for an AUC that is not told.
MERGED, UNTOLD = -1, -1.0
# By how much an AUC that is told coarsely is rounded, at most.
_ROUNDED = 0.0005


def fine_histograms(
    truth: NDArray[np.bool_], score: Floats
) -> tuple[tuple[float, float, float], list[int]]:
    """Return the grid of a site (centre, width, AUC of its own rows) and its counts.

    Parameters
    ----------
    truth : array of shape (n,)
        Which rows are of the class; n at least 1.
    score : array of shape (n,)

    Returns
    -------
    tuple, list of int
        The counts are those of the rows without the class, then those with it, each in `BINS` bins.
        Scores beyond the grid are counted at its ends.
    """
    low, centre, high = np.percentile(score, [25, 50, 75])
    width = max(0.2 * (high - low), 1e-3 * score.std(), 1e-9 * max(1.0, abs(centre)))
    # Rounded, so that the grid does not tell one patient's score.
    width = float(f"{width:.1e}")
    centre = width * round(centre / width)
    own = _own_auc(truth, score) if truth.any() and not truth.all() else 0.5
    indices = np.clip((score - centre) / width, EDGES[0], EDGES[-1])
    counts: list[int] = []
    for group in (False, True):
        counts += np.histogram(indices[truth == group], EDGES)[0].tolist()
    return (float(centre), float(width), own), counts


def coarse_histograms(
    truth: NDArray[np.bool_], score: Floats, patients: Sequence[Hashable], cut: bool
) -> tuple[tuple[float, float, float], list[int]]:
    """Return grid and counts as `fine_histograms` does, in bins of ten different patients or more.

    Rows without the class and rows with it are binned by themselves, in no more bins than one for
    ten of their patients; fewer than twenty patients have one bin. The first bin begins, and the
    last one ends, anywhere: no lowest and no highest score is told.

    Parameters
    ----------
    truth, score
        As `fine_histograms` takes them.
    patients : sequence of n hashables
    cut : bool
        Whether to have a bin end at the threshold 0, on each side of which ten patients or more of
        twenty or more must be, without and with the class.

    Returns
    -------
    tuple, list of int
        A bin's count stands at its first bin of the grid, and `MERGED` at the others. Each holds
        its upper end, not its lower. The AUC is `UNTOLD` where one class has fewer than ten
        patients.
    """
    cells = np.searchsorted(_COARSE_WIDTH * EDGES, score, side="left").astype(np.int64) - 1
    cells = np.clip(cells, 0, BINS - 1)
    codes, enough, counts = numbered(patients), True, list[int]()
    for group in (False, True):
        order = np.flatnonzero(truth == group)
        order = order[np.argsort(cells[order], kind="stable")]
        patient_of_row = codes[order]
        starts = _starts(cells[order], patient_of_row, cut)
        merged = np.full(BINS, MERGED)
        merged[starts] = np.diff(np.searchsorted(cells[order], [*starts, BINS]))
        counts += merged.tolist()
        enough &= different(patient_of_row) >= FEWEST
    own = _own_auc(truth, score) if enough else UNTOLD
    return (0.0, _COARSE_WIDTH, own), counts


def numbered(patients: Sequence[Hashable]) -> Whole:
    """Return a number for each row, the same for rows of one patient."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(one, len(numbers)) for one in patients], dtype=np.int64)


def different(codes: Whole) -> int:
    """Return how many patients there are."""
    return int(np.unique(codes).size)


def _own_auc(truth: NDArray[np.bool_], score: Floats) -> float:
    # Loading scikit-learn takes a second, which a server that only averages need not wait for.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, score))


def _starts(cells: Whole, codes: Whole, cut: bool) -> list[int]:
    """Return the cells at which bins begin; rows are given by their cells, in ascending order."""
    most = max(1, different(codes) // FEWEST)
    if not cut:
        return [0, *_cuts(cells, codes, most)]
    below = int(np.searchsorted(cells, _MIDDLE))
    # A patient with several rows may be on both sides.
    left = min(different(codes[:below]) // FEWEST, most - 1)
    right = min(different(codes[below:]) // FEWEST, most - left)
    lower = _cuts(cells[:below], codes[:below], left)
    return [0, *lower, _MIDDLE, *_cuts(cells[below:], codes[below:], right)]


def _cuts(cells: Whole, codes: Whole, most: int) -> list[int]:
    """Return where to cut rows into at most so many bins of much the same size."""
    last = np.zeros(codes.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(last, codes, np.arange(1, len(codes) + 1))
    ends = np.sort(last[last > 0])
    cuts, start = list[int](), 0
    for stop in (np.flatnonzero(np.diff(cells)) + 1).tolist():
        if len(cuts) == most - 1 or ends.size - np.searchsorted(ends, stop, "right") < FEWEST:
            break
        is_due = stop * most >= (len(cuts) + 1) * len(cells)
        if is_due and different(codes[start:stop]) >= FEWEST:
            # In the middle of the gap, so that the end tells neither neighbour's score.
            cuts.append(int(cells[stop - 1] + cells[stop] + 1) // 2)
            start = stop
    return cuts


def merged_auc(edges: Floats, counts: Floats, own: Floats) -> float:
    """Return the area under the ROC curve over all sites' rows; NaN if one class is empty.

    Parameters
    ----------
    edges : array of shape (sites, bins + 1)
    counts : array of shape (sites, 2, bins)
    own : array of shape (sites,)
        The AUC among a site's own rows.

    Notes
    -----
    The AUC is the share of (negative, positive) pairs in the right order (Mann-Whitney). Each
    site's counts are spread evenly within their bins over the union of all grids' edges, so that a
    site with a narrow range of scores is not blurred by one with a wide range.
    """
    union = np.unique(edges)
    below = np.zeros((2, len(union)))
    ordered = 0.0
    for own_edges, own_auc, histograms in zip(edges, own, counts, strict=True):
        cumulated = np.pad(np.cumsum(histograms, axis=1), ((0, 0), (1, 0)))
        spread = np.asarray([np.interp(union, own_edges, group) for group in cumulated])
        ordered += own_auc * spread[:, -1].prod() - ordered_pairs(spread)
        below += spread
    pairs = below[:, -1].prod()
    return float((ordered + ordered_pairs(below)) / pairs) if pairs else float("nan")


def ordered_pairs(below: Floats) -> float:
    """Count pairs in the right order from the cumulated counts of both classes; ties count half."""
    negatives, positives = np.diff(below, axis=1)
    return float(positives @ (below[0, :-1] + negatives / 2))


def bounded_auc(
    edges: Floats, counts: Floats, own: Floats, alone: float | None = None
) -> tuple[float, float, float] | None:
    """Return the area under the ROC curve over the rows of all sites, some of which tell coarsely.

    Parameters
    ----------
    edges : array of shape (sites, classes, bins + 1)
    counts : array of shape (sites, classes, 2, bins)
        With `MERGED` where a bin is part of the one before it.
    own : array of shape (sites, classes)
        The AUC among a site's own rows, or `UNTOLD`.
    alone : float, optional
        The AUC where it is known.

    Returns
    -------
    tuple or None
        An estimate and two bounds, rounded outwards to three digits; means over the classes. None
        where a class, or its rest, is empty.

    Notes
    -----
    Of a pair of rows of two sites the bins tell the order, unless they overlap. Of the pairs within
    a site as many are in order as its AUC says. For the bounds all other pairs are taken to be in
    the wrong order, and in the right one; for the estimate, as many of them to be in order as of
    those within a site whose bins overlap, or half of them where no site has told its AUC.
    """
    parts = [_bounded(edges[:, c], counts[:, c], own[:, c]) for c in range(own.shape[1])]
    value, low, high = (float(mean) for mean in np.mean(parts, axis=0))
    if math.isnan(value):
        return None
    value = value if alone is None else float(alone)
    # Sums of many terms may be off by their last digits.
    low, high = math.floor(1e3 * low - 1e-6) / 1e3, math.ceil(1e3 * high + 1e-6) / 1e3
    return value, max(0.0, min(low, value)), min(1.0, max(high, value))


def _bounded(edges: Floats, counts: Floats, own: Floats) -> tuple[float, float, float]:
    bins = [
        [_intervals(site_edges, group) for group in site]
        for site_edges, site in zip(edges, counts, strict=True)
    ]
    negatives, positives = (np.concatenate([site[group] for site in bins], 1) for group in (0, 1))
    pairs = float(negatives[2].sum() * positives[2].sum())
    if not pairs:
        return math.nan, math.nan, math.nan
    surely, perhaps = _ordered(negatives, positives)
    # Of pairs within sites: in order by the AUC, its error, in order of those that overlap, these.
    ordered = error = settled = overlapping = 0.0
    for site, auc, histograms in zip(bins, own, counts, strict=True):
        if auc == UNTOLD:
            continue
        surely_here, perhaps_here = _ordered(*site)
        here = float(site[0][2].sum() * site[1][2].sum())
        ordered += auc * here
        error += _ROUNDED * here * bool((histograms < 0).any())
        settled += auc * here - surely_here
        overlapping += perhaps_here - surely_here
        surely -= surely_here
        perhaps -= perhaps_here
    share = min(1.0, max(0.0, settled / overlapping)) if overlapping else 0.5
    value = ordered + surely + share * (perhaps - surely)
    low, high = ordered - error + surely, ordered + error + perhaps
    return value / pairs, low / pairs, high / pairs


def _intervals(edges: Floats, counts: Floats) -> Floats:
    """Return lower end, upper end and rows of each bin that is not empty: shape (3, n).

    No row of a bin lies on its lower end.
    """
    starts = np.flatnonzero(counts >= 0)
    ends = edges.copy()
    # Rows beyond the grid are counted at its ends.
    ends[0], ends[-1] = -np.inf, np.inf
    lower, upper = ends[starts], ends[[*starts[1:], len(counts)]]
    if len(starts) == len(counts):
        # The site has found its bins by other roundings, and they hold their lower ends.
        slack = 16 * np.finfo(float).eps * (np.abs(ends) + abs(ends[_MIDDLE])) + 1e-300
        lower, upper = lower - slack[:-1], upper + slack[1:]
    rows = counts[starts]
    return np.stack([lower, upper, rows])[:, rows > 0]


def _ordered(negatives: Floats, positives: Floats) -> tuple[float, float]:
    """Count the pairs that are surely in the right order, and those that can be."""
    lower, upper, rows = positives
    surely_below = _rows_up_to(negatives[1], negatives[2], lower, "right")
    perhaps_below = _rows_up_to(negatives[0], negatives[2], upper, "left")
    return float(rows @ surely_below), float(rows @ perhaps_below)


def _rows_up_to(
    ends: Floats, rows: Floats, limits: Floats, side: Literal["left", "right"]
) -> Floats:
    """Return how many rows have ends below each limit; at it too where the side is "right"."""
    order = np.argsort(ends)
    cumulated = np.append(0.0, np.cumsum(rows[order]))
    return np.asarray(cumulated[np.searchsorted(ends[order], limits, side)])


def merged_precision(edges: Floats, counts: Floats) -> float:
    """Return the average precision over all sites' rows; NaN if one class is empty.

    Parameters
    ----------
    edges : array of shape (sites, bins + 1)
    counts : array of shape (sites, 2, bins)

    Notes
    -----
    It is the mean, over the rows with the class, of the share of the class among the rows that
    score as high or higher. A row is taken to stand in the middle of its bin, with half of the
    others there above it. But two or more rows between two empty bins are taken to have one score,
    as a table of few categories gives, which other sites' rows in bins that overlap have as well.
    """
    if not counts.sum(axis=(0, 2)).all():
        return float("nan")
    # Rows at or above each edge.
    above = np.cumsum(np.pad(counts, ((0, 0), (0, 0), (0, 1)))[..., ::-1], axis=2)[..., ::-1]
    total = 0.0
    for site, own in enumerate(counts):
        indices = np.flatnonzero(own[1])
        rows = np.pad(own.sum(axis=0), 1)
        tied = ((rows[1:-1] > 1) & (rows[:-2] == 0) & (rows[2:] == 0))[indices]
        # Whoever stands there is counted in whole.
        same = np.where(tied, own[:, indices], own[:, indices] / 2 + [[0.0], [0.5]])
        ahead = above[site][:, indices + 1] + same
        low = edges[site, indices]
        middle = (low + edges[site, indices + 1]) / 2
        for other in np.flatnonzero(np.arange(len(counts)) != site):
            bins = np.searchsorted(edges[other], low, side="right") - 1
            whole = above[other][:, np.clip(bins, 0, counts.shape[2])]
            part = [np.interp(middle, edges[other], each) for each in above[other]]
            ahead += np.where(tied, whole, part)
        total += float(own[1, indices] @ (ahead[1] / ahead.sum(axis=0)))
    return total / float(counts[:, 1].sum())
