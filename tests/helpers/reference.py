"""Slow, obvious versions of the rules, in float64 on whole vectors.

`rows` is the matrix of the updates, of shape (K, P); `f` is how many of them may be malicious.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def weighted_mean(rows: Floats, weights: Floats) -> Floats:
    total = sum(weight * row for row, weight in zip(rows, weights, strict=True))
    return np.asarray(total / sum(weights))


def median(rows: Floats) -> Floats:
    return np.median(rows, axis=0)


def trimmed_mean(rows: Floats, beta: float) -> Floats:
    cut = int(beta * len(rows))
    return np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)


def gram(rows: Floats, centre: Floats) -> Floats:
    return np.array([[np.dot(a - centre, b - centre) for b in rows] for a in rows])


def distances(rows: Floats) -> Floats:
    """Squared, between each two rows."""
    return np.array([[((a - b) ** 2).sum() for b in rows] for a in rows])


def krum_scores(rows: Floats, f: int) -> Floats:
    """The sum of each row's squared distances to its K - f - 2 (at least one) nearest others."""
    near = max(1, len(rows) - f - 2)
    between = distances(rows)
    return np.array([sorted(np.delete(between[k], k))[:near] for k in range(len(rows))]).sum(axis=1)


def krum(rows: Floats, f: int) -> int:
    return int(np.argmin(krum_scores(rows, f)))


def multi_krum(rows: Floats, f: int, selected: int, weights: Floats) -> Floats:
    chosen = np.argsort(krum_scores(rows, f), kind="stable")[:selected]
    return weighted_mean(rows[chosen], weights[chosen])


def bulyan_chosen(rows: Floats, f: int) -> list[int]:
    """K - 2f rows: Krum's choice among those that are left, again and again."""
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        best = left[krum(rows[left], f)]
        chosen.append(best)
        left.remove(best)
    return chosen


def nearest_to_median(rows: Floats, count: int) -> Floats:
    """The mean of the `count` values nearest the median at each place; the smaller of a tie."""
    ordered = np.sort(rows, axis=0)
    places = np.argsort(abs(ordered - median(rows)), axis=0, kind="stable")[:count]
    return np.take_along_axis(ordered, places, axis=0).mean(axis=0)


def bulyan(rows: Floats, f: int) -> Floats:
    chosen = bulyan_chosen(rows, f)
    return nearest_to_median(rows[chosen], len(chosen) - 2 * f)


def geometric_median(rows: Floats, steps: int = 20_000) -> Floats:
    """Weiszfeld's steps, without smoothing but for a point that is hit."""
    point = rows.mean(axis=0)
    for _ in range(steps):
        shares = 1 / np.maximum(np.linalg.norm(rows - point, axis=1), 1e-15)
        following = weighted_mean(rows, shares)
        if np.array_equal(following, point):
            break
        point = following
    return point


def sum_of_distances(rows: Floats, point: Floats) -> float:
    """What the geometric median makes as small as can be."""
    return float(np.linalg.norm(rows - point, axis=1).sum())


def centered_clipping(rows: Floats, centre: Floats, tau: float | None, steps: int) -> Floats:
    point = centre
    for _ in range(steps):
        lengths = np.linalg.norm(rows - point, axis=1)
        radius = np.median(lengths) if tau is None else tau
        clipped = [
            difference * min(1, radius / length) if length else difference
            for difference, length in zip(rows - point, lengths, strict=True)
        ]
        point = point + np.mean(clipped, axis=0)
    return point


def nearest_neighbour_mixing(rows: Floats, f: int) -> Floats:
    """Each row becomes the mean of its K - f nearest, itself among them."""
    between = distances(rows)
    np.fill_diagonal(between, -1)
    nearest = np.argsort(between, axis=1, kind="stable")[:, : len(rows) - f]
    return np.array([rows[chosen].mean(axis=0) for chosen in nearest])


def bucketing(rows: Floats, size: int, order: list[int]) -> Floats:
    """Means of `size` rows each, taken in an order; the last bucket may be smaller."""
    shuffled = rows[order]
    return np.array(
        [shuffled[start : start + size].mean(axis=0) for start in range(0, len(rows), size)]
    )


def pair_order(higher: float, lower: float) -> float:
    return 1.0 if higher > lower else 0.5 if higher == lower else 0.0


def delong(with_class: Floats, without: Floats) -> tuple[float, float]:
    """The AUC of raw scores and DeLong's variance of it, pair by pair."""
    order = np.array([[pair_order(high, low) for low in without] for high in with_class])
    of_positives = order.mean(axis=1)
    of_negatives = order.mean(axis=0)
    variance = of_positives.var(ddof=1) / len(with_class)
    variance += of_negatives.var(ddof=1) / len(without)
    return float(order.mean()), float(variance)


def net_benefit(labels: Floats, probabilities: Floats, threshold: float) -> float:
    acted = probabilities > threshold
    true = (acted & (labels == 1)).sum()
    false = (acted & (labels == 0)).sum()
    return float((true - false * threshold / (1 - threshold)) / len(labels))
