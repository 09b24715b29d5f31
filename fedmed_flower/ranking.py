"""How well scores rank the rows of several sites, from each site's histograms of them.

Of each site there are the edges of its bins, ascending, and its counts of rows without and with the
class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def merged_auc(edges: Floats, counts: Floats, own: Floats) -> float:
    """Return the area under the ROC curve over all sites' rows; NaN where one class is empty.

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


def merged_precision(edges: Floats, counts: Floats) -> float:
    """Return the average precision over all sites' rows; NaN where one class is empty.

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
        places = np.flatnonzero(own[1])
        rows = np.pad(own.sum(axis=0), 1)
        tied = ((rows[1:-1] > 1) & (rows[:-2] == 0) & (rows[2:] == 0))[places]
        # Whoever stands there is counted in whole.
        same = np.where(tied, own[:, places], own[:, places] / 2 + [[0.0], [0.5]])
        ahead = above[site][:, places + 1] + same
        low = edges[site, places]
        middle = (low + edges[site, places + 1]) / 2
        for other in np.flatnonzero(np.arange(len(counts)) != site):
            bins = np.searchsorted(edges[other], low, side="right") - 1
            whole = above[other][:, np.clip(bins, 0, counts.shape[2])]
            part = [np.interp(middle, edges[other], each) for each in above[other]]
            ahead += np.where(tied, whole, part)
        total += float(own[1, places] @ (ahead[1] / ahead.sum(axis=0)))
    return total / float(counts[:, 1].sum())
