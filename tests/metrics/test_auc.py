"""Figures over many sites: those of every pair of sites, in time that grows with the sites."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed_flower.metrics import auc
from fedmed_flower.metrics.auc import EDGES, fine_histograms, merged_auc, merged_precision


def of_sites(sites, rows, seed, rounded=False):
    """Return edges, counts and the sites' own AUCs, for scores of different places and widths."""
    rng = np.random.default_rng(seed)
    edges, counts, aucs = [], [], []
    for _ in range(sites):
        truth = rng.random(rows) < rng.choice([0.1, 0.5])
        scores = rng.normal(rng.normal(), rng.choice([0.001, 1.0, 30.0]), rows) + truth
        if rounded:
            scores = np.round(scores)
        (centre, width, own), histograms = fine_histograms(truth, scores)
        edges.append(centre + width * EDGES)
        counts.append(np.reshape(histograms, (2, -1)))
        aucs.append(own)
    return np.array(edges), np.array(counts, float), np.array(aucs)


def auc_by_pairs(edges, counts, aucs):
    """Take each pair of sites by itself: the share of its pairs of rows in order."""
    right = pairs = 0.0
    for one, negatives in enumerate(counts[:, 0]):
        for other, positives in enumerate(counts[:, 1]):
            count = negatives.sum() * positives.sum()
            pairs += count
            if one == other:
                right += aucs[one] * count
                continue
            union = np.union1d(edges[one], edges[other])
            low, high = (
                np.interp(union, edges[site], np.append(0, np.cumsum(rows)))
                for site, rows in ((one, negatives), (other, positives))
            )
            right += np.diff(high) @ (low[:-1] + low[1:]) / 2
    return right / pairs if pairs else np.nan


def precision_by_pairs(edges, counts):
    """Look up each bin with rows of the class at every other site."""
    at_or_above = np.cumsum(counts[..., ::-1], axis=2)[..., ::-1]
    at_or_above = np.concatenate([at_or_above, np.zeros((*counts.shape[:2], 1))], axis=2)
    total = 0.0
    for site, (_, own) in enumerate(counts):
        rows = np.pad(counts[site].sum(axis=0), 1)
        for place in np.flatnonzero(own):
            tied = rows[place + 1] > 1 and rows[place] == rows[place + 2] == 0
            here = counts[site, :, place]
            ahead = at_or_above[site, :, place + 1] + (here if tied else here / 2 + [0, 0.5])
            low, high = edges[site, place : place + 2]
            for other in range(len(counts)):
                if other == site:
                    continue
                if tied:
                    first = np.searchsorted(edges[other], low, side="right") - 1
                    ahead = ahead + at_or_above[other][:, max(first, 0)]
                else:
                    ahead = ahead + [
                        np.interp((low + high) / 2, edges[other], row) for row in at_or_above[other]
                    ]
            total += own[place] * ahead[1] / ahead.sum()
    return total / counts[:, 1].sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 60), st.integers(0, 2**32), st.booleans())
def test_merged_figures_are_those_of_every_pair_of_sites(sites, rows, seed, rounded):
    edges, counts, aucs = of_sites(sites, rows, seed, rounded)
    if not counts.sum(axis=(0, 2)).all():
        assert np.isnan(merged_auc(edges, counts, aucs))
        assert np.isnan(merged_precision(edges, counts))
        return
    wanted = auc_by_pairs(edges, counts, aucs)
    assert merged_auc(edges, counts, aucs) == pytest.approx(wanted, abs=1e-12)
    wanted = precision_by_pairs(edges, counts)
    assert merged_precision(edges, counts) == pytest.approx(wanted, abs=1e-12)


def test_the_work_grows_with_the_sites_and_not_with_their_pairs(monkeypatch):
    looked_up = []
    interp = np.interp

    def counted(at, *rest):
        looked_up.append(np.size(at))
        return interp(at, *rest)

    monkeypatch.setattr(auc.np, "interp", counted)
    work = []
    for sites in (16, 128):
        edges, counts, aucs = of_sites(sites, 12, 0)
        looked_up.clear()
        merged_auc(edges, counts, aucs)
        merged_precision(edges, counts)
        work.append(sum(looked_up))
    # Eight times as many sites; the logarithm of their number grows from 4 to 7.
    assert work[1] < 8 * 7 / 4 * 1.1 * work[0]
