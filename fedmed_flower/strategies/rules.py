"""Rules that malicious or broken sites cannot bend.

A rule is a function of the updates. It reads their parameters through three kernels alone: order
statistics, inner products and weighted sums. Each hospital has one vote; numbers of examples count
only if a rule says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedmed_flower.arrays.updates import Updates

Floats = NDArray[np.float64]


def median(updates: Updates) -> ArrayRecord:
    """Return the median of each parameter.

    Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning, ICML 2018,
    https://arxiv.org/abs/1803.01498
    """
    return updates.order_statistics((updates.count - 1) // 2, updates.count // 2 + 1)


def trimmed_mean(updates: Updates, beta: float) -> ArrayRecord:
    """Return the mean of each parameter without the ``int(beta K)`` smallest and largest values.

    Yin et al. 2018, as `median`. The m values that remain are added in ascending order, so that the
    order of the sites has no effect; Flower adds them as `numpy.partition` leaves them. The two
    results differ by at most ``m eps`` times the mean magnitude of the values, and agree to the bit
    for m up to 2.

    Parameters
    ----------
    beta : float
        At least 0, below 0.5.
    """
    cut = int(beta * updates.count)
    return updates.order_statistics(cut, updates.count - cut)


def krum_order(distances: Floats, num_malicious: int) -> list[int]:
    """Return the indices of the updates from the most to the least trustworthy.

    Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries, NeurIPS 2017,
    https://arxiv.org/abs/1703.02757: an update's score is the sum of the squared distances to its
    ``K - f - 2`` nearest neighbours; low is good. Of equal scores, the earlier update comes first
    (two updates have equal scores if each is the other's only neighbour).

    Parameters
    ----------
    distances : ndarray of shape (K, K)
        Squared distances between the updates.
    """
    count = len(distances)
    near = min(max(1, count - num_malicious - 2), count - 1)
    others = np.sort(distances + np.diag(np.full(count, np.inf)), axis=1)[:, :near]
    return [int(k) for k in np.argsort(others.sum(axis=1), kind="stable")]


def multi_krum(
    updates: Updates, weights: Sequence[float], num_malicious: int, num_selected: int
) -> ArrayRecord:
    """Return the weighted mean of the updates that Krum trusts most.

    With one selected update, this is Krum.
    """
    order = krum_order(squared_distances(updates.gram()), num_malicious)
    return mean_of(updates, weights, order[:num_selected])


def bulyan_selection(distances: Floats, num_malicious: int) -> list[int]:
    """Return the indices of ``K - 2f`` updates, which Krum picks one after the other."""
    left = list(range(len(distances)))
    chosen: list[int] = []
    while len(chosen) < len(distances) - 2 * num_malicious:
        best = krum_order(distances[np.ix_(left, left)], num_malicious)[0]
        chosen.append(left.pop(best))
    return chosen


def nearest_to_median(count: int) -> Callable[[list[NDArray[Any]]], NDArray[Any]]:
    """Return a function that maps sorted values to the mean of the `count` nearest the median."""

    def reduce(ordered: list[NDArray[Any]]) -> NDArray[Any]:
        two = ordered[0].dtype.type(2)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / two
        # The nearest values are consecutive: move the window up while the entering value is nearer
        # the median than the leaving one.
        window = [values.copy() for values in ordered[:count]]
        for index, entering in enumerate(ordered[count:]):
            leaving = window[index % count]
            moves = entering - middle < middle - ordered[index]
            np.copyto(leaving, entering, where=moves)
        total = window[0]
        for values in window[1:]:
            total += values
        total /= total.dtype.type(count)
        return total

    return reduce


def geometric_median(
    gram: Floats, smoothing: float = 1e-6, tolerance: float = 1e-9, max_steps: int = 1000
) -> Floats:
    """Return the coefficients of the point with the least sum of distances to all updates.

    Pillutla, Kakade, Harchaoui: Robust Aggregation for Federated Learning, IEEE Transactions on
    Signal Processing 2022, https://arxiv.org/abs/1912.13445: smoothed Weiszfeld steps, here on the
    inner products alone.

    Parameters
    ----------
    gram : ndarray of shape (K, K)
        Inner products of the updates.
    smoothing : float
        Lower bound of the distances that are divided by, as a multiple of the median distance.
    tolerance : float
        Stop after a step that is shorter than this multiple of the median distance.
    max_steps : int
        Stop after this many steps at the latest.

    Returns
    -------
    ndarray of shape (K,)
        Coefficients of the updates; their sum is 1.
    """
    distances = np.sqrt(squared_distances(gram))
    # Start from the update with the least sum of distances, which lies among the honest ones: one
    # far update takes the mean with it.
    distances = distances[distances.sum(axis=1).argmin()]
    coefficients = _weiszfeld(distances, 1.0)
    for _ in range(max_steps):
        distances = _distances_to(gram, coefficients)
        following = _weiszfeld(distances, smoothing)
        step = following - coefficients
        coefficients = following
        # Compare the movement of the point: a small coefficient of a far update moves it much.
        if step @ gram @ step <= (tolerance * np.median(distances)) ** 2:
            break
    return coefficients


def centered_clipping(
    gram: Floats, tau: float | None, steps: int, start: Floats | None = None
) -> Floats:
    """Return the coefficients of the clipped mean around the global model.

    Karimireddy, He, Jaggi: Learning from History for Byzantine Robust Optimization, ICML 2021,
    https://arxiv.org/abs/2012.10333, algorithm 2. Here models are averaged, so clipping starts at
    the result of the last round, which is the global model.

    Parameters
    ----------
    gram : ndarray of shape (K, K)
        Inner products of the differences to the global model.
    tau : float, optional
        Radius of the clipping; None takes the median distance of each step.
    steps : int
        Number of clippings, each around the result of the one before.
    start : ndarray of shape (K,), optional
        Coefficients of the point where clipping starts instead of at the global model.

    Returns
    -------
    ndarray of shape (K,)
        Coefficients of the updates. The global model's coefficient is 1 minus their sum.
    """
    coefficients = np.zeros(len(gram)) if start is None else start
    for _ in range(steps):
        distances = _distances_to(gram, coefficients)
        radius = float(np.median(distances)) if tau is None else tau
        ones = np.ones(len(gram))
        shares = np.divide(radius, distances, out=ones, where=distances > radius) / len(gram)
        coefficients = coefficients * (1 - shares.sum()) + shares
    return coefficients


def nearest_neighbours(distances: Floats, num_malicious: int) -> Floats:
    """Return the matrix that replaces each update by the mean of its ``K - f`` nearest.

    Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan: Fixing by Mixing, AISTATS 2023,
    https://arxiv.org/abs/2302.01772, algorithm 2. An update is its own nearest neighbour.
    """
    count = len(distances)
    self_first = distances - np.diag(np.full(count, np.inf))
    order = np.argsort(self_first, axis=1, kind="stable")[:, : count - num_malicious]
    mix = np.zeros((count, count))
    np.put_along_axis(mix, order, 1 / order.shape[1], axis=1)
    return mix


def buckets(count: int, size: int, rng: np.random.Generator) -> Floats:
    """Return the matrix that averages updates in random buckets.

    Karimireddy, He, Jaggi: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing,
    ICLR 2022, https://arxiv.org/abs/2006.09365, algorithm 1. The last bucket may be smaller.
    """
    order = rng.permutation(count)
    mix = np.zeros((math.ceil(count / size), count))
    for bucket, start in enumerate(range(0, count, size)):
        members = order[start : start + size]
        mix[bucket, members] = 1 / len(members)
    return mix


def squared_distances(gram: Floats) -> Floats:
    """Return the squared distances between updates, from their inner products; shape (K, K)."""
    lengths = np.diag(gram)
    return np.maximum(lengths[:, None] + lengths[None, :] - 2 * gram, 0)


def mean_of(updates: Updates, weights: Sequence[float], chosen: Sequence[int]) -> ArrayRecord:
    """Return the weighted mean of the updates at the indices `chosen`."""
    shares = np.zeros(updates.count)
    shares[list(chosen)] = np.asarray(weights)[list(chosen)]
    return updates.weighted_sum(shares / shares.sum())


def _weiszfeld(distances: Floats, smoothing: float) -> Floats:
    """Return coefficients inverse to the distances, bounded by `smoothing` times the median."""
    bounded = np.maximum(distances, max(smoothing * float(np.median(distances)), 1e-300))
    coefficients: Floats = 1 / bounded / (1 / bounded).sum()
    return coefficients


def _distances_to(gram: Floats, coefficients: Floats) -> Floats:
    """Return the distance of each update to the weighted sum of all."""
    products = gram @ coefficients
    squared = np.diag(gram) - 2 * products + coefficients @ products
    return np.sqrt(np.maximum(squared, 0))
