"""How well scores rank the rows of several sites, from each site's histograms of them.

A site lays a grid over its scores and counts, in each bin, the rows without and with the class. A
site that reports coarsely merges bins until each holds ten patients or more. The order of the rows
in a bin is then unknown, so the area under the ROC curve over all sites lies between two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.metrics.types import Floats, Whole

# Bins are 1/500 of the interquartile range wide at the median and grow outwards (sinh), so that
# narrow, skewed and far-off scores keep their order.
BINS = 2048
EDGES = np.sinh(np.linspace(-10.0, 10.0, BINS + 1))

# The fewest different patients in a bin of a coarse histogram.
FEWEST = 10
# A coarse grid is the same at each site, so that it discloses nothing of the patients. Its bins are
# no wider than a hundredth of the log-odds that they stand for; its middle is the threshold 0.
_COARSE_WIDTH = 0.01
_MIDDLE = BINS // 2
# Count of a bin that is merged into the one before it.
MERGED = -1
# AUC of a site that does not report its own.
UNREPORTED = -1.0
# Rounding changes an AUC that is reported coarsely by at most this.
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
        The counts of the rows without the class, then of those with it, each in `BINS` bins. Scores
        beyond the grid are counted at its ends.
    """
    low, centre, high = np.percentile(score, [25, 50, 75])
    width = max(0.2 * (high - low), 1e-3 * score.std(), 1e-9 * max(1.0, abs(centre)))
    # Rounded, so that the grid does not disclose one patient's score.
    width = float(f"{width:.1e}")
    centre = width * round(centre / width)
    auc = _auc(truth, score) if truth.any() and not truth.all() else 0.5
    indices = np.clip((score - centre) / width, EDGES[0], EDGES[-1])
    counts: list[int] = []
    for group in (False, True):
        counts += np.histogram(indices[truth == group], EDGES)[0].tolist()
    return (float(centre), float(width), auc), counts


def coarse_histograms(
    truth: NDArray[np.bool_], score: Floats, patients: Sequence[Hashable], cut: bool
) -> tuple[tuple[float, float, float], list[int]]:
    """Return grid and counts as `fine_histograms` does, in bins of ten different patients or more.

    Rows without the class and rows with it are binned separately, with at most one bin for ten of
    their patients; fewer than twenty patients have one bin. The first bin has no lower end and the
    last one no upper end, so that neither the lowest nor the highest score is disclosed.

    Parameters
    ----------
    truth, score
        As `fine_histograms` takes them.
    patients : sequence of n hashables
        The patient of each row.
    cut : bool
        Whether a bin ends at the threshold 0. Without and with the class, there must then be twenty
        patients or more, and ten or more on each side of the threshold.

    Returns
    -------
    tuple, list of int
        A merged bin's count stands at its first bin of the grid, and `MERGED` at the others. A bin
        holds its upper end, not its lower. The AUC is `UNREPORTED` if the rows without the class or
        those with it are of fewer than ten patients.
    """
    cells = np.searchsorted(_COARSE_WIDTH * EDGES, score, side="left").astype(np.int64) - 1
    cells = np.clip(cells, 0, BINS - 1)
    codes = numbered(patients)
    has_enough = True
    counts: list[int] = []
    for group in (False, True):
        order = np.flatnonzero(truth == group)
        order = order[np.argsort(cells[order], kind="stable")]
        patient_of_row = codes[order]
        starts = _starts(cells[order], patient_of_row, cut)
        merged = np.full(BINS, MERGED)
        merged[starts] = np.diff(np.searchsorted(cells[order], [*starts, BINS]))
        counts += merged.tolist()
        has_enough &= different(patient_of_row) >= FEWEST
    auc = _auc(truth, score) if has_enough else UNREPORTED
    return (0.0, _COARSE_WIDTH, auc), counts


def numbered(patients: Sequence[Hashable]) -> Whole:
    """Return the number of each row's patient, counted from 0."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(one, len(numbers)) for one in patients], dtype=np.int64)


def different(codes: Whole) -> int:
    """Return how many different patients have rows, given by their numbers."""
    return int(np.unique(codes).size)


def _auc(truth: NDArray[np.bool_], score: Floats) -> float:
    # Imported here because scikit-learn takes a second to load, and a server does not need it.
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
    """Return the cells at which to cut rows into at most `most` bins of about the same size."""
    last = np.zeros(codes.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(last, codes, np.arange(1, len(codes) + 1))
    ends = np.sort(last[last > 0])
    cuts: list[int] = []
    start = 0
    for stop in (np.flatnonzero(np.diff(cells)) + 1).tolist():
        if len(cuts) == most - 1 or ends.size - np.searchsorted(ends, stop, "right") < FEWEST:
            break
        is_due = stop * most >= (len(cuts) + 1) * len(cells)
        if is_due and different(codes[start:stop]) >= FEWEST:
            # In the middle of the gap, so that the end discloses neither neighbour's score.
            cuts.append(int(cells[stop - 1] + cells[stop] + 1) // 2)
            start = stop
    return cuts


def merged_auc(edges: Floats, counts: Floats, site_aucs: Floats) -> float:
    """Return the area under the ROC curve over all sites' rows; NaN if one class is empty.

    Parameters
    ----------
    edges : array of shape (sites, bins + 1)
    counts : array of shape (sites, 2, bins)
    site_aucs : array of shape (sites,)
        The AUC among the rows of each site.

    Notes
    -----
    The AUC is the share of (negative, positive) pairs in the right order (Mann-Whitney). Each
    site's counts are spread evenly within their bins over the union of all grids' edges, so that a
    site with a narrow range of scores is not blurred by one with a wide range.
    """
    below = _sum_of_curves(edges, counts)[1]
    ordered = ordered_pairs(below)
    for auc, cumulated in zip(site_aucs, _cumulated(counts), strict=True):
        # Rows that are spread evenly within their bins have as many pairs in order on any edges.
        ordered += auc * cumulated[:, -1].prod() - ordered_pairs(cumulated)
    pairs = below[:, -1].prod()
    return float(ordered / pairs) if pairs else float("nan")


def _cumulated(counts: Floats) -> Floats:
    """Return how many rows lie below each edge: shape (sites, 2, bins + 1)."""
    return np.asarray(np.cumsum(np.pad(counts, ((0, 0), (0, 0), (1, 0))), axis=2))


def _sum_of_curves(edges: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Return how many rows of all sites lie below a score, spread evenly within their bins.

    Sites are added in pairs, then these sums in pairs: time grows with the number of edges of all
    sites times its logarithm.

    Returns
    -------
    tuple of arrays of shapes (knots,) and (2, knots)
        Scores, and the rows of both classes below them. Between the scores the rows grow linearly.
    """
    curves = []
    for site_edges, histograms, below in zip(edges, counts, _cumulated(counts), strict=True):
        filled = np.pad(histograms.any(axis=0), 1)
        # Beside an empty bin and within empty ones, a line goes on as it is.
        knots = np.flatnonzero(filled[1:] | filled[:-1])
        if len(knots):
            curves.append((site_edges[knots], below[:, knots]))
    if not curves:
        return edges[0], np.zeros((2, edges.shape[1]))
    while len(curves) > 1:
        odd = curves[len(curves) & ~1 :]
        curves = [_added(*pair) for pair in zip(curves[::2], curves[1::2], strict=False)] + odd
    return curves[0]


def _added(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Return the sum of two curves of `_sum_of_curves`."""
    knots = np.union1d(one[0], other[0])
    rows = zip(one[1], other[1], strict=True)
    sums = [np.interp(knots, one[0], a) + np.interp(knots, other[0], b) for a, b in rows]
    return knots, np.stack(sums)


def ordered_pairs(below: Floats) -> float:
    """Count pairs in the right order from the cumulated counts of both classes; ties count half."""
    negatives, positives = np.diff(below, axis=1)
    return float(positives @ (below[0, :-1] + negatives / 2))


def bounded_auc(
    edges: Floats, counts: Floats, site_aucs: Floats, known: float | None = None
) -> tuple[float, float, float] | None:
    """Return the AUC over all sites' rows, with bounds, if some sites report coarsely.

    Parameters
    ----------
    edges : array of shape (sites, classes, bins + 1)
    counts : array of shape (sites, classes, 2, bins)
        `MERGED` if a bin is merged into the one before it.
    site_aucs : array of shape (sites, classes)
        The AUC among the rows of each site, or `UNREPORTED`.
    known : float, optional
        The AUC over all rows, if it is known; it is then the estimate.

    Returns
    -------
    tuple or None
        An estimate and two bounds, rounded outwards to three digits; means over the classes. None
        if a class, or its rest, is empty.

    Notes
    -----
    If the bins of two rows do not overlap, they show the order of the rows. Within a site, the AUC
    shows how many pairs are in order. All other pairs are unknown: one bound takes them all to be
    in the wrong order, the other in the right one. The estimate assumes that the share of them in
    order is that of the pairs within a site whose bins overlap; half if no site reports its AUC.
    """
    classes = range(site_aucs.shape[1])
    parts = [_bounded(edges[:, c], counts[:, c], site_aucs[:, c]) for c in classes]
    value, low, high = (float(mean) for mean in np.mean(parts, axis=0))
    if math.isnan(value):
        return None
    value = value if known is None else float(known)
    # Sums of many terms may be off by their last digits.
    low = math.floor(1e3 * low - 1e-6) / 1e3
    high = math.ceil(1e3 * high + 1e-6) / 1e3
    return value, max(0.0, min(low, value)), min(1.0, max(high, value))


def _bounded(edges: Floats, counts: Floats, site_aucs: Floats) -> tuple[float, float, float]:
    bins = [
        [_intervals(site_edges, group) for group in site]
        for site_edges, site in zip(edges, counts, strict=True)
    ]
    negatives, positives = (np.concatenate([site[group] for site in bins], 1) for group in (0, 1))
    pairs = float(negatives[2].sum() * positives[2].sum())
    if not pairs:
        return math.nan, math.nan, math.nan
    surely, perhaps = _ordered(negatives, positives)
    ordered = 0.0  # Pairs within sites that are in order, by the AUC.
    error = 0.0  # Rounding error of this number.
    settled = 0.0  # Pairs within sites whose bins overlap and that are in order, by the AUC.
    overlapping = 0.0  # All pairs within sites whose bins overlap.
    for site, auc, histograms in zip(bins, site_aucs, counts, strict=True):
        if auc == UNREPORTED:
            continue
        site_surely, site_perhaps = _ordered(*site)
        site_pairs = float(site[0][2].sum() * site[1][2].sum())
        ordered += auc * site_pairs
        error += _ROUNDED * site_pairs * bool((histograms < 0).any())
        settled += auc * site_pairs - site_surely
        overlapping += site_perhaps - site_surely
        surely -= site_surely
        perhaps -= site_perhaps
    share = min(1.0, max(0.0, settled / overlapping)) if overlapping else 0.5
    value = ordered + surely + share * (perhaps - surely)
    low = ordered - error + surely
    high = ordered + error + perhaps
    return value / pairs, low / pairs, high / pairs


def _intervals(edges: Floats, counts: Floats) -> Floats:
    """Return lower end, upper end and rows of each bin that is not empty: shape (3, n).

    No row of a bin lies on its lower end.
    """
    starts = np.flatnonzero(counts >= 0)
    ends = edges.copy()
    # Rows beyond the grid are counted at its ends.
    ends[0] = -np.inf
    ends[-1] = np.inf
    lower = ends[starts]
    upper = ends[[*starts[1:], len(counts)]]
    if len(starts) == len(counts):
        # A fine histogram: its bins hold their lower ends, which the site rounded in another way.
        slack = 16 * np.finfo(float).eps * (np.abs(ends) + abs(ends[_MIDDLE])) + 1e-300
        lower = lower - slack[:-1]
        upper = upper + slack[1:]
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
    """Return how many rows have ends below each limit, or at it if the side is "right"."""
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
    score as high or higher. A row is taken to lie in the middle of its bin, with half of the bin's
    other rows above it. Two or more rows between two empty bins are taken to have one score, as a
    table of few categories gives. Other sites' rows in bins that overlap are taken to have it too.
    """
    if not counts.sum(axis=(0, 2)).all():
        return float("nan")
    knots, below = _sum_of_curves(edges, counts)
    bins = np.nonzero(counts.any(axis=1))
    ends = edges[bins[0], bins[1] + 1]
    order = np.argsort(ends)
    ends = ends[order]
    # Rows of the bins that end first.
    ended = np.pad(np.cumsum(counts[bins[0], :, bins[1]][order], axis=0), ((1, 0), (0, 0))).T
    total = 0.0
    for site_edges, histograms, own in zip(edges, counts, _cumulated(counts), strict=True):
        indices = np.flatnonzero(histograms[1])
        rows = np.pad(histograms.sum(axis=0), 1)
        tied = ((rows[1:-1] > 1) & (rows[:-2] == 0) & (rows[2:] == 0))[indices]
        # Tied rows are all counted.
        in_bin = histograms[:, indices]
        same = np.where(tied, in_bin, in_bin / 2 + [[0.0], [0.5]])
        low = site_edges[indices]
        middle = (low + site_edges[indices + 1]) / 2
        # Other sites' rows below: those of all sites without the site's own.
        whole = ended[:, np.searchsorted(ends, low, side="right")]
        whole -= own[:, np.searchsorted(site_edges, low, side="right") - 1]
        part = np.stack([np.interp(middle, knots, group) for group in below])
        part -= [np.interp(middle, site_edges, group) for group in own]
        others = ended[:, -1:] - own[:, -1:] - np.where(tied, whole, part)
        ahead = own[:, -1:] - own[:, indices + 1] + same + others
        total += float(histograms[1, indices] @ (ahead[1] / ahead.sum(axis=0)))
    return total / float(counts[:, 1].sum())
