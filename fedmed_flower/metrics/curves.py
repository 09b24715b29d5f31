"""Curves and intervals of a classifier, from the counts that hospitals send after an evaluation.

A count is of rows whose score lies in a bin, without or with a class. The score is the log-odds of
the class against the rest, so a bin's probability is known, to the bin's width. Each hospital's
bins lie around its own median score; `together` puts the counts of several on one axis.

Within a bin the order of rows is unknown. Rows with and without the class that share a bin are
taken to be tied. For curves over probabilities they are spread evenly over the bin's log-odds.
A hospital's 2,048 bins are 1/500 of its interquartile range wide at the median. Noised counts
have 32 bins, each half a unit of log-odds wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.auc import BINS, EDGES, MERGED, ordered_pairs
from fedmed_flower.metrics.classification import NOISED_EDGES, classes_of_noised
from fedmed_flower.metrics.names import CALIBRATION_BINS, COUNTS, GRID, NOISED
from fedmed_flower.metrics.types import Floats

# Below this width of a bin, in log-odds, its middle gives its mean probability to eight digits.
_NARROW = 1e-3
_MOST_STEPS = 100


class Histograms(NamedTuple):
    """How many rows with and without a class have a score in each bin.

    Attributes
    ----------
    edges : array of shape (bins + 1,)
        Log-odds, ascending. Rows beyond the ends are counted in the first and the last bin.
    with_class, without : array of shape (bins,)
        Counts of rows. Those of a private run are of patients, carry noise, and can be negative.
    """

    edges: Floats
    with_class: Floats
    without: Floats


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


class RocCurve(NamedTuple):
    """Points from (0, 0) to (1, 1), each of shape (n,)."""

    false_positive_rate: Floats
    sensitivity: Floats


class PrecisionRecallCurve(NamedTuple):
    """Points from the highest threshold to the lowest, each of shape (n,)."""

    recall: Floats
    precision: Floats


class Calibration(NamedTuple):
    """How probabilities agree with what came true, in the bins that hold rows.

    Attributes
    ----------
    rows, predicted, observed : array of shape (bins,)
        The number of rows, their mean probability, and the share of them with the class.
    error : float
        The expected calibration error: the mean distance of `predicted` and `observed`, weighted
        by rows. From 0, which is perfect, to 1.
    """

    rows: Floats
    predicted: Floats
    observed: Floats
    error: float


class Recalibration(NamedTuple):
    """The straight line that maps the model's log-odds to those that fit the rows best.

    `slope` is below 1 if the model's probabilities are too extreme, as those of an overfitted model
    are. A model that is calibrated has the slope 1 and the intercept 0.
    """

    intercept: float
    slope: float


class DecisionCurve(NamedTuple):
    """The net benefit of acting on those whose probability is above a threshold; shape (n,) each.

    `model` is of acting by the model, `treat_all` of acting on everybody. To act on nobody has 0.
    """

    threshold: Floats
    model: Floats
    treat_all: Floats


def histograms_of(record: Mapping[str, Any]) -> list[Histograms]:
    """Return a hospital's counts: one entry for two classes, one for each class if there are more.

    Parameters
    ----------
    record : dict
        Metrics as `classification_metrics` returns them, or with the counts of `noised_counts`.

    Raises
    ------
    InputError
        If the record has no such counts, or they are those of a hospital that reports coarsely.
        Such a hospital merges bins of rows with and without the class at different scores, so no
        curve follows from them.
    """
    if NOISED in record:
        counts = np.asarray(record[NOISED], dtype=np.float64)
        classes = classes_of_noised(counts.size)
        if not classes:
            raise InputError(
                f"{NOISED} of {counts.size} numbers fits no number of classes: send what "
                "noised_counts returns"
            )
        scores = 1 if classes == 2 else classes
        bins = len(NOISED_EDGES) - 1
        parts = counts[: 2 * scores * bins].reshape(scores, 2, bins)
        return [Histograms(NOISED_EDGES, with_class, without) for without, with_class in parts]
    if GRID not in record or COUNTS not in record:
        raise InputError(
            f"curves need {GRID} and {COUNTS}, or {NOISED}, which a hospital with a classifier "
            f"sends; the record has {', '.join(sorted(record)) or 'nothing'}"
        )
    grids = np.asarray(record[GRID], dtype=np.float64)
    counts = np.asarray(record[COUNTS], dtype=np.float64)
    if grids.size % 3 or counts.size != 2 * BINS * (grids.size // 3):
        raise InputError(
            f"{GRID} and {COUNTS} must hold 3 and {2 * BINS} numbers a class, got {grids.size} "
            f"and {counts.size}"
        )
    if (counts == MERGED).any():
        raise InputError(
            "the hospital reports coarsely: it merges bins of scores until each holds ten "
            "patients, so no curve follows from its counts"
        )
    by_class = zip(grids.reshape(-1, 3), counts.reshape(-1, 2, BINS), strict=True)
    return [
        Histograms(centre + width * EDGES, with_class, without)
        for (centre, width, _), (without, with_class) in by_class
    ]


def together(parts: Sequence[Histograms]) -> Histograms:
    """Return the counts of several hospitals for one class, on the edges of all filled bins.

    Each hospital's counts are spread evenly within their bins, so counts may become fractions.

    Raises
    ------
    InputError
        If there are no parts, or some carry noise (a count below 0) and are not of the same edges.
    """
    if not parts:
        raise InputError("parts must hold the counts of one hospital or more, got none")
    if all(np.array_equal(part.edges, parts[0].edges) for part in parts):
        sums = (np.sum([part[group] for part in parts], axis=0) for group in (1, 2))
        return Histograms(parts[0].edges, *sums)
    for part in parts:
        _checked(part.with_class, part.without)
    union = np.unique(np.concatenate([_ends_of_filled(part) for part in parts]))
    spread = [_spread(part, union) for part in parts]
    sums = (np.sum([part[group] for part in spread], axis=0) for group in (1, 2))
    return Histograms(union, *sums)


def denoised(counts: ArrayLike) -> Floats:
    """Return the counts of at least 0 that lie nearest to noised ones and have the same sum.

    All noised counts have the same noise, so these are the likeliest ones of that sum. Add up the
    hospitals' counts first, so that noise cancels out as far as it can.

    Parameters
    ----------
    counts : array of shape (bins,)

    Raises
    ------
    InputError
        If the counts add up to 0 or less: there is then more noise than rows.

    Notes
    -----
    Projection onto the simplex: Duchi et al., Efficient Projections onto the l1-Ball for Learning
    in High Dimensions, ICML 2008, figure 1, https://doi.org/10.1145/1390156.1390191.
    """
    values = np.asarray(counts, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise InputError(f"counts must be finite and of shape (bins,), got shape {values.shape}")
    total = float(values.sum())
    if total <= 0:
        raise InputError(
            f"the noised counts add up to {total:.3g}: the noise is larger than the counts, so "
            "nothing follows from them; more patients or a higher epsilon would help"
        )
    ordered = np.sort(values)[::-1]
    excess = (np.cumsum(ordered) - total) / np.arange(1, values.size + 1)
    likeliest: Floats = np.maximum(values - excess[ordered > excess][-1], 0.0)
    return likeliest


def roc(with_class: ArrayLike, without: ArrayLike, most: int | None = None) -> RocCurve:
    """Return the ROC curve; each bin's lower edge is a threshold.

    Parameters
    ----------
    with_class, without : array of shape (bins,)
        Counts of at least 0, by ascending score; one row or more of each kind.
    most : int, optional
        The most points; at least 2. By default one for each bin with rows.

    Raises
    ------
    InputError
    """
    above, total = _above(with_class, without)
    sensitivity, false_positive_rate = above / total[:, None]
    kept = _thinned(false_positive_rate, sensitivity, most)
    return RocCurve(false_positive_rate[kept], sensitivity[kept])


def precision_recall(
    with_class: ArrayLike, without: ArrayLike, most: int | None = None
) -> PrecisionRecallCurve:
    """Return precision and recall at each bin's lower edge, without the point at recall 0.

    Parameters
    ----------
    with_class, without, most
        As `roc` takes them.

    Raises
    ------
    InputError
    """
    above, total = _above(with_class, without)
    above = above[:, 1:]
    precision = above[0] / above.sum(axis=0)
    recall = above[0] / total[0]
    kept = _thinned(recall, precision, most)
    return PrecisionRecallCurve(recall[kept], precision[kept])


def auc_of(with_class: ArrayLike, without: ArrayLike) -> float:
    """Return the area under the ROC curve; pairs of rows in one bin count half.

    Raises
    ------
    InputError
    """
    positives, negatives = _both(with_class, without)
    below = np.pad(np.cumsum([negatives, positives], axis=1), ((0, 0), (1, 0)))
    return ordered_pairs(below) / float(below[:, -1].prod())


def auc_variance(with_class: ArrayLike, without: ArrayLike) -> float:
    """Return the variance of the AUC over samples of rows, exact for counts with ties.

    Parameters
    ----------
    with_class, without : array of shape (bins,)
        Counts of at least 0, by ascending score; more than one row of each kind.

    Raises
    ------
    InputError

    Notes
    -----
    DeLong, DeLong and Clarke-Pearson, Comparing the Areas under Two or More Correlated Receiver
    Operating Characteristic Curves, Biometrics 44, 1988, equation 4 and the two sums after it, for
    one curve, https://doi.org/10.2307/2531595. It is the variance of the structural components:
    of each row with the class, the share of the rows without it that score lower, and the reverse.
    All rows of a bin have the same component, so the histogram gives the sums exactly. Rows are
    taken to be independent: with several rows a patient the variance is too small.
    """
    positives, negatives = _both(with_class, without)
    fewest = min(positives.sum(), negatives.sum())
    if fewest <= 1:
        raise InputError(
            "the variance of an AUC needs more than one row with the class and without it, got "
            f"{positives.sum():g} and {negatives.sum():g}"
        )
    auc = auc_of(positives, negatives)
    variance = 0.0
    for own, other in ((positives, negatives), (negatives[::-1], positives[::-1])):
        count = own.sum()
        components = (np.cumsum(other) - other / 2) / other.sum()
        variance += float(own @ np.square(components - auc)) / (count - 1) / count
    return variance


def auc_interval(with_class: ArrayLike, without: ArrayLike, level: float = 0.95) -> Interval:
    """Return the AUC with its confidence interval.

    Parameters
    ----------
    with_class, without : array of shape (bins,)
        Counts of at least 0, without noise, by ascending score; one row or more of each kind.
        Noise adds to the variance, so noised counts give too narrow an interval.
    level : float
        Between 0 and 1.

    Raises
    ------
    InputError

    Notes
    -----
    The variance is `auc_variance`, DeLong's. The interval is symmetric on the scale of the AUC's
    log-odds, so that it stays within 0 and 1: Pepe, The Statistical Evaluation of Medical Tests for
    Classification and Prediction, Oxford 2003, section 5.2.4.

    On normal scores it covers the true AUC 0.76 in 96% of samples of 40 and 60 rows, and 0.96 in
    94% of samples of 20 and 40 rows (symmetric on the AUC itself, in 84%). With 10 and 200 rows it
    covers 0.96 in 84%: with few rows of a kind and an AUC near 1 it is too narrow.

    If all pairs are in order, or a kind has only one row, DeLong's variance is 0 or undefined. The
    interval is then Wilson's for as many independent pairs as the rarer kind has rows: the variance
    is never larger than that (Birnbaum and Klose, Bounds for the Variance of the Mann-Whitney
    Statistic, Annals of Mathematical Statistics 28, 1957,
    https://doi.org/10.1214/aoms/1177706794). It is wider than needed.
    """
    quantile = _quantile(level)
    positives, negatives = _both(with_class, without)
    auc = min(1.0, max(0.0, auc_of(positives, negatives)))
    fewest = float(min(positives.sum(), negatives.sum()))
    variance = auc_variance(positives, negatives) if fewest > 1 else 0.0
    if not 0 < auc < 1 or variance <= 0:
        return Interval(auc, *wilson(auc * fewest, fewest, level)[1:])
    centre = math.log(auc / (1 - auc))
    reach = quantile * math.sqrt(variance) / (auc * (1 - auc))
    return Interval(auc, _expit(centre - reach), _expit(centre + reach))


def wilson(successes: float, total: float, level: float = 0.95) -> Interval:
    """Return a share with its confidence interval: Wilson's, without continuity correction.

    Parameters
    ----------
    successes, total : float
        Of 0 to `total` rows, and of more than 0; counts without noise.
    level : float
        Between 0 and 1.

    Raises
    ------
    InputError

    Notes
    -----
    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, Journal of the
    American Statistical Association 22, 1927, https://doi.org/10.1080/01621459.1927.10502953.
    Rows are taken to be independent: with several rows a patient the interval is too narrow.
    """
    quantile = _quantile(level)
    if not (0 < total < math.inf and 0 <= successes <= total):
        raise InputError(
            "a share needs a total above 0 and from 0 to that many successes, got "
            f"{successes:g} of {total:g}; counts with noise have no such interval"
        )
    share = successes / total
    shrink = 1 + quantile**2 / total
    centre = (share + quantile**2 / (2 * total)) / shrink
    spread = share * (1 - share) / total + quantile**2 / (4 * total**2)
    reach = quantile * math.sqrt(spread) / shrink
    # At the ends the sum rounds to a hair beyond.
    return Interval(
        share, max(0.0, min(centre - reach, share)), min(1.0, max(centre + reach, share))
    )


def calibration(
    edges: ArrayLike, with_class: ArrayLike, without: ArrayLike, bins: int = CALIBRATION_BINS
) -> Calibration:
    """Return how probabilities agree with what came true, in bins of equal width.

    Parameters
    ----------
    edges : array of shape (n + 1,)
        Ascending, in log-odds.
    with_class, without : array of shape (n,)
        Counts of at least 0; one row or more in all.
    bins : int
        At least 1.

    Returns
    -------
    Calibration
        A row's probability is taken from its bin of the score, over which rows are spread evenly
        in log-odds. It is therefore known to the width of that bin. A bin that lies across the end
        of a bin of probability is shared among both.

    Raises
    ------
    InputError

    Notes
    -----
    The error is that of Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian
    Binning, AAAI 2015, with bins of the probability of the class.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    counted = _on_edges(edges, with_class, without)
    shares = np.arange(1, bins) / bins
    cuts = np.log(shares / (1 - shares))
    inner = cuts[(cuts > counted.edges[0]) & (cuts < counted.edges[-1])]
    spread = _spread(counted, np.unique(np.concatenate([counted.edges, inner])))
    places = np.searchsorted(cuts, spread.edges[:-1], side="right")
    rows = spread.with_class + spread.without
    sums = np.zeros((bins, 3))
    probabilities = _mean_probabilities(spread.edges)
    np.add.at(sums, places, np.stack([rows, rows * probabilities, spread.with_class], axis=1))
    sums = sums[sums[:, 0] > 0]
    error = float(np.abs(sums[:, 1] - sums[:, 2]).sum() / sums[:, 0].sum())
    return Calibration(sums[:, 0], sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0], error)


def recalibration(edges: ArrayLike, with_class: ArrayLike, without: ArrayLike) -> Recalibration:
    """Return calibration intercept and slope: a logistic regression of the class on the log-odds.

    Parameters
    ----------
    edges, with_class, without
        As `calibration` takes them; one row or more of each kind. A row's log-odds are those of
        the middle of its bin.

    Raises
    ------
    InputError
        Also if no line fits best: all rows with the class lie above, or below, all others.

    Notes
    -----
    Cox, Two Further Applications of a Model for Binary Regression, Biometrika 45, 1958,
    https://doi.org/10.1093/biomet/45.3-4.562; found by Newton's method.
    """
    counted = _on_edges(edges, with_class, without)
    _both(counted.with_class, counted.without)
    rows = counted.with_class + counted.without
    filled = rows > 0
    middle = ((counted.edges[:-1] + counted.edges[1:]) / 2)[filled]
    rows = rows[filled]
    events = counted.with_class[filled]
    design = np.stack([np.ones_like(middle), middle], axis=1)
    line = np.zeros(2)
    for _ in range(_MOST_STEPS):
        expected = _probabilities(design @ line)
        weights = rows * expected * (1 - expected)
        information = design.T @ (weights[:, None] * design)
        if np.linalg.cond(information) > 1e14:
            break
        step = np.linalg.solve(information, design.T @ (events - rows * expected))
        line = line + step
        if np.abs(step).max() < 1e-10 * max(1.0, np.abs(line).max()):
            return Recalibration(*map(float, line))
    raise InputError(
        "calibration has no slope here: the scores part the rows with the class from the others, "
        "or are all in one bin"
    )


def decision_curve(
    edges: ArrayLike, with_class: ArrayLike, without: ArrayLike, thresholds: ArrayLike
) -> DecisionCurve:
    """Return the net benefit of acting on those whose probability is above a threshold.

    Parameters
    ----------
    edges, with_class, without
        As `calibration` takes them.
    thresholds : array of shape (k,)
        Probabilities between 0 and 1: a threshold of 0.1 says that nine needless actions are as
        bad as one that is left out.

    Returns
    -------
    DecisionCurve
        True positives a row, less false positives a row times threshold / (1 - threshold). Rows
        in the bin of a threshold are spread evenly over it.

    Raises
    ------
    InputError

    Notes
    -----
    Vickers and Elkin, Decision Curve Analysis: A Novel Method for Evaluating Prediction Models,
    Medical Decision Making 26, 2006, https://doi.org/10.1177/0272989X06295361.
    """
    wanted = np.asarray(thresholds, dtype=np.float64)
    if wanted.ndim != 1 or not ((wanted > 0) & (wanted < 1)).all():
        raise InputError(f"thresholds must be probabilities between 0 and 1, got {thresholds!r}")
    counted = _on_edges(edges, with_class, without)
    limits = np.log(wanted / (1 - wanted))
    true, false = (
        counts.sum() - np.interp(limits, counted.edges, np.pad(np.cumsum(counts), (1, 0)))
        for counts in counted[1:]
    )
    total = counted.with_class.sum() + counted.without.sum()
    prevalence = counted.with_class.sum() / total
    cost = wanted / (1 - wanted)
    model = (true - cost * false) / total
    return DecisionCurve(wanted, model, prevalence - cost * (1 - prevalence))


def _checked(with_class: ArrayLike, without: ArrayLike) -> tuple[Floats, Floats]:
    positives = np.asarray(with_class, dtype=np.float64)
    negatives = np.asarray(without, dtype=np.float64)
    if positives.ndim != 1 or positives.shape != negatives.shape or not positives.size:
        raise InputError(
            "with_class and without must be counts in the same bins, one or more: they have the "
            f"shapes {positives.shape} and {negatives.shape}"
        )
    lowest = min(positives.min(), negatives.min())
    if not (np.isfinite(positives).all() and np.isfinite(negatives).all()) or lowest < 0:
        raise InputError(
            f"counts must be finite and at least 0, got {lowest:g}: counts with noise go through "
            "denoised first, and merged ones of a hospital that reports coarsely give no curve"
        )
    return positives, negatives


def _both(with_class: ArrayLike, without: ArrayLike) -> tuple[Floats, Floats]:
    positives, negatives = _checked(with_class, without)
    if not (positives.any() and negatives.any()):
        raise InputError(
            "the curve needs rows with the class and rows without it, got "
            f"{positives.sum():g} and {negatives.sum():g}"
        )
    return positives, negatives


def _on_edges(edges: ArrayLike, with_class: ArrayLike, without: ArrayLike) -> Histograms:
    positives, negatives = _checked(with_class, without)
    ends = np.asarray(edges, dtype=np.float64)
    are_ascending = np.isfinite(ends).all() and (np.diff(ends) > 0).all()
    if ends.shape != (positives.size + 1,) or not are_ascending:
        raise InputError(
            f"edges must be {positives.size + 1} finite, ascending numbers for "
            f"{positives.size} bins, got shape {ends.shape}"
        )
    if not (positives.any() or negatives.any()):
        raise InputError("the counts are all 0: there is no row to measure")
    return Histograms(ends, positives, negatives)


def _above(with_class: ArrayLike, without: ArrayLike) -> tuple[Floats, Floats]:
    """Return the rows at or above the edges of bins with rows, from the top, and all rows.

    The first has shape (2, n), with rows of the class first, and begins with no row.
    """
    counts = np.stack(_both(with_class, without))
    filled = counts[:, counts.any(axis=0)]
    above = np.pad(np.cumsum(filled[:, ::-1], axis=1), ((0, 0), (1, 0)))
    return above, above[:, -1]


def _thinned(x: Floats, y: Floats, most: int | None) -> Any:
    """Return which points to keep: the ends, and of the rest those at equal steps on the way."""
    if most is None or len(x) <= most:
        return slice(None)
    if most < 2:
        raise InputError(f"most must be at least 2 points, got {most}")
    way = np.pad(np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))), (1, 0))
    wanted = np.searchsorted(way, np.linspace(0.0, way[-1], most)[1:-1])
    return np.unique([0, *wanted, len(x) - 1])


def _ends_of_filled(part: Histograms) -> Floats:
    """Return the edges of the bins that hold rows, and the two ends."""
    filled = (part.with_class > 0) | (part.without > 0)
    kept = np.pad(filled, (1, 0)) | np.pad(filled, (0, 1))
    kept[[0, -1]] = True
    return part.edges[kept]


def _spread(part: Histograms, edges: Floats) -> Histograms:
    """Return counts on finer edges, spread evenly within their bins."""
    groups = (
        np.diff(np.interp(edges, part.edges, np.pad(np.cumsum(counts), (1, 0))))
        for counts in part[1:]
    )
    # Differences of sums round to a hair below 0.
    return Histograms(edges, *(np.maximum(counts, 0.0) for counts in groups))


def _mean_probabilities(edges: Floats) -> Floats:
    """Return the mean probability of log-odds that are spread evenly over each bin."""
    widths = np.diff(edges)
    integral = np.diff(np.logaddexp(0.0, edges))
    middle = _probabilities((edges[:-1] + edges[1:]) / 2)
    return np.where(widths < _NARROW, middle, integral / widths)


def _probabilities(log_odds: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -log_odds))


def _expit(log_odds: float) -> float:
    return float(_probabilities(np.asarray(log_odds)))


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, such as 0.95, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
