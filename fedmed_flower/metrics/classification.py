"""Metrics of a classifier, from one hospital's rows and from noised counts.

A hospital never sends a list of scores. For metrics over all hospitals it sends counts: the
confusion matrix, and for each class two histograms of the score (rows without and with the class)
on a grid around the hospital's median. A hospital that reports coarsely sends only counts of ten
patients or more, and rounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.auc import (
    FEWEST,
    UNREPORTED,
    coarse_histograms,
    different,
    fine_histograms,
    numbered,
    ordered_pairs,
)
from fedmed_flower.metrics.names import CONFUSION, COUNTS, GRID, KAPPA
from fedmed_flower.privacy.noise import noised_once

_NOISED_BINS = 32
NOISED_EDGES = np.linspace(-8.0, 8.0, _NOISED_BINS + 1)


Value = float | int | list[int] | list[float]


def class_margins(logits: ArrayLike) -> NDArray[np.float64]:
    """Turn network outputs into one score a class, the log-odds of the class against the rest.

    Parameters
    ----------
    logits : array of shape (n, 1) or (n, c)
        One column stands for the positive class of two (trained with binary cross entropy);
        c columns for c classes (trained with cross entropy).

    Returns
    -------
    array of shape (n, 1) for two classes, (n, c) for more
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.shape[1] == 1:
        return z
    if z.shape[1] == 2:
        return z[:, 1:] - z[:, :1]
    others = (np.delete(z, column, axis=1) for column in range(z.shape[1]))
    against = np.stack([np.logaddexp.reduce(rest, axis=1) for rest in others], axis=1)
    return np.asarray(z - against)


def class_probabilities(logits: ArrayLike) -> NDArray[np.float64]:
    """Turn network outputs into the probability of each class, (n, 2) or (n, c).

    Parameters
    ----------
    logits : array of shape (n, 1) or (n, c)
        As `class_margins` takes them.
    """
    from scipy.special import expit, softmax

    margins = class_margins(logits)
    if margins.shape[1] == 1:
        return np.concatenate([expit(-margins), expit(margins)], axis=1)
    return np.asarray(softmax(np.asarray(logits, dtype=np.float64), axis=1))


def guessed_classes(logits: ArrayLike) -> NDArray[np.int64]:
    """Return the class of the highest probability, (n,); the first of several that are equal."""
    margins = class_margins(logits)
    if margins.shape[1] == 1:
        return np.asarray(margins[:, 0] > 0, dtype=np.int64)
    return np.asarray(np.argmax(np.asarray(logits), axis=1), dtype=np.int64)


def classification_metrics(
    labels: ArrayLike,
    logits: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    coarse: bool = False,
    guess: NDArray[np.int64] | None = None,
) -> dict[str, Value]:
    """Measure a classifier on one hospital's rows.

    Parameters
    ----------
    labels : integer array of shape (n,)
    logits : array of shape (n, 1) or (n, c)
    patients : sequence of n hashables, optional
        The patient of each row. If None, each row is one patient.
    coarse : bool
        Whether each count must be of ten different patients or more, or of all of a class.
        `coarsened` rounds the result.
    guess : integer array of shape (n,), optional
        The class that is chosen for each row. If None, it is the likeliest.

    Returns
    -------
    dict
        ``num-examples``, ``accuracy``, ``balanced-accuracy``, ``sensitivity``, ``specificity``
        and ``auc`` (for more than two classes: the mean of one class against the rest), and the
        counts that `pool` sums. A metric that is undefined for these rows, such as the AUC of
        one class, is left out.

        If `coarse`, the AUC is also left out if a class, or its rest, has fewer than ten patients.
        The confusion matrix, with all that follows from it, is left out if a cell has fewer.

    Raises
    ------
    InputError
        If `patients` does not name one patient for each row.
    """
    from sklearn.metrics import confusion_matrix

    y = np.asarray(labels, dtype=np.int64)
    patient_of_row = range(len(y)) if patients is None else patients
    if len(patient_of_row) != len(y):
        raise InputError(
            f"patients must name one for each of {len(y)} rows, got {len(patient_of_row)}"
        )
    margins = class_margins(logits)
    num_classes = max(2, margins.shape[1])
    guess = guessed_classes(logits) if guess is None else guess
    confusion = confusion_matrix(y, guess, labels=np.arange(num_classes))
    positive = (y == 1)[:, None] if num_classes == 2 else y[:, None] == np.arange(num_classes)
    reported = not coarse or _is_coarse(y, guess, numbered(patient_of_row), num_classes)
    histograms = [
        coarse_histograms(truth, score, patient_of_row, reported and num_classes == 2)
        if coarse
        else fine_histograms(truth, score)
        for truth, score in zip(positive.T, margins.T, strict=True)
    ]
    metrics: dict[str, Value] = {
        "num-examples": len(y),
        **(rates_of(confusion) if reported else {}),
    }
    aucs = [
        auc
        for truth, ((_, _, auc), _) in zip(positive.T, histograms, strict=True)
        if truth.any() and not truth.all() and auc != UNREPORTED
    ]
    if len(aucs) == margins.shape[1]:
        metrics["auc"] = float(np.mean(aucs))
    if reported:
        metrics[CONFUSION] = confusion.ravel().tolist()
    metrics[GRID] = [value for grid, _ in histograms for value in grid]
    metrics[COUNTS] = [count for _, counts in histograms for count in counts]
    return metrics


def _is_coarse(
    labels: NDArray[np.int64], guess: NDArray[Any], codes: NDArray[np.int64], num_classes: int
) -> bool:
    """Return whether each cell of the confusion matrix is of ten different patients or more."""
    cells = [(labels == c) & (guess == g) for c in range(num_classes) for g in range(num_classes)]
    has_enough = all(different(codes[cell]) >= FEWEST for cell in cells)
    # A patient with several rows may be in several cells.
    least = FEWEST * num_classes
    return has_enough and all(different(codes[labels == c]) >= least for c in range(num_classes))


def noised_counts(
    labels: ArrayLike,
    logits: ArrayLike,
    patients: Sequence[Hashable],
    noise_multiplier: float,
    guess: NDArray[np.int64] | None = None,
) -> list[float]:
    """Count a classifier's scores and guesses, with noise that hides each patient.

    For two classes the counts are histograms of the score, one of the rows without and one of those
    with the second class. For more classes they are such histograms for each class against the
    rest, and the confusion matrix.

    Each patient's rows together have weight 1. So adding or removing a patient changes the counts
    by at most 1 (two classes) or the root of the number of classes + 1, in Euclidean length.

    Parameters
    ----------
    labels : integer array of shape (n,)
    logits : array of shape (n, 1) or (n, c)
    patients : sequence of n hashables
    noise_multiplier : float
        Standard deviation of the noise in units of that length; at least 0.
    guess : integer array of shape (n,), optional
        The class that is chosen for each row, of more than two. If None, it is the likeliest.

    Returns
    -------
    list of float
        For `noised_metrics`.
    """
    y = np.asarray(labels, dtype=np.int64)
    margins = class_margins(logits)
    num_classes = max(2, margins.shape[1])
    row_counts = Counter(patients)
    share = np.asarray([1 / row_counts[patient] for patient in patients])
    positive = (y == 1)[:, None] if num_classes == 2 else y[:, None] == np.arange(num_classes)
    indices = np.clip(margins, NOISED_EDGES[0], NOISED_EDGES[-1])
    parts = [
        np.histogram(index[truth == group], NOISED_EDGES, weights=share[truth == group])[0]
        for truth, index in zip(positive.T, indices.T, strict=True)
        for group in (False, True)
    ]
    length = 1.0
    if num_classes > 2:
        confusion = np.zeros((num_classes, num_classes))
        chosen = guessed_classes(logits) if guess is None else guess
        np.add.at(confusion, (y, chosen), share)
        parts.append(confusion.ravel())
        length = math.sqrt(num_classes + 1)
    counts = np.concatenate(parts)
    noised = noised_once(counts, noise_multiplier * length)
    return [float(count) for count in noised]


def noised_metrics(counts: ArrayLike, ordered: bool = False) -> dict[str, float]:
    """Return the metrics that follow from one hospital's noised counts, or the sum of several.

    Parameters
    ----------
    counts : array
        As `noised_counts` returns them.
    ordered : bool
        Whether the classes are ordered grades, which have the metrics of `ordered_rates` too.

    Returns
    -------
    dict
        ``num-examples`` (patients, to the nearest whole number) and, if it is above 0, the metrics
        of `classification_metrics`. The AUC is as coarse as the 32 bins it comes from.
    """
    values = np.asarray(counts, dtype=np.float64)
    num_classes = classes_of_noised(len(values))
    scores = 1 if num_classes == 2 else num_classes
    histograms = values[: 2 * scores * _NOISED_BINS].reshape(scores, 2, _NOISED_BINS)
    if num_classes == 2:
        confusion = histograms[0].reshape(2, 2, -1).sum(axis=2)
    else:
        confusion = values[histograms.size :].reshape(num_classes, num_classes)
    metrics: dict[str, float] = {"num-examples": max(0.0, float(round(confusion.sum())))}
    # Clipped at 0 only after summing, so that noise cancels out as far as it can.
    confusion = np.maximum(confusion, 0.0)
    if not metrics["num-examples"] or not confusion.any():
        return {"num-examples": 0.0}
    # Sums of fractions round to a hair below 0.
    metrics |= {name: min(1.0, max(0.0, rate)) for name, rate in rates_of(confusion).items()}
    if ordered:
        metrics |= ordered_rates(confusion)
    below = np.pad(np.cumsum(histograms, axis=2), ((0, 0), (0, 0), (1, 0)))
    totals = below[:, :, -1]
    if (totals > 0).all():
        shares = np.asarray([*map(ordered_pairs, below)]) / totals.prod(axis=1)
        metrics["auc"] = float(np.clip(shares, 0.0, 1.0).mean())
    return metrics


def classes_of_noised(length: int) -> int:
    """Return the number of classes of noised counts; 0 if no number fits their length."""
    if length == 2 * _NOISED_BINS:
        return 2
    classes = round(math.sqrt(_NOISED_BINS**2 + length)) - _NOISED_BINS
    fits = classes > 2 and classes * (2 * _NOISED_BINS + classes) == length
    return classes if fits else 0


def rates_of(confusion: NDArray[np.int64]) -> dict[str, float]:
    """Return the metrics that follow from a confusion matrix; undefined ones are left out."""
    of_class = confusion.sum(axis=1)
    found = np.diagonal(confusion)
    # Sums of the other cells alone: of fractions, a difference of sums is not 0 where it must be.
    apart = ~np.eye(len(confusion), dtype=bool)
    others = apart @ of_class
    mistaken = (confusion * apart).sum(axis=0)
    with np.errstate(invalid="ignore"):
        sensitivity = found / of_class
        specificity = (others - mistaken) / others
    concerned = slice(1, 2) if len(confusion) == 2 else slice(None)
    rates = {
        "accuracy": np.trace(confusion) / confusion.sum(),
        "balanced-accuracy": np.nanmean(sensitivity),
        "sensitivity": np.mean(sensitivity[concerned]),
        "specificity": np.mean(specificity[concerned]),
    }
    return {name: float(rate) for name, rate in rates.items() if np.isfinite(rate)}


def ordered_rates(confusion: ArrayLike) -> dict[str, float]:
    """Return what else follows from the confusion matrix of ordered grades.

    Parameters
    ----------
    confusion : array of shape (k, k)
        Rows are the true grades 0, 1, ..., columns those that were chosen; not all 0.

    Returns
    -------
    dict
        ``mae``, how many grades the chosen one is off, on average; and ``quadratic-kappa``, Cohen's
        kappa with quadratic weights: 1 is perfect, 0 is chance (Cohen, Weighted kappa,
        Psychological Bulletin 70, 1968, https://doi.org/10.1037/h0026256). Kappa is left out if all
        rows are of one grade, which is chosen for each.

    Examples
    --------
    >>> rates = ordered_rates([[3, 1, 0], [0, 2, 0], [0, 1, 3]])
    >>> {name: round(rate, 3) for name, rate in rates.items()}
    {'mae': 0.2, 'quadratic-kappa': 0.857}
    """
    counts = np.asarray(confusion, dtype=np.float64)
    total = counts.sum()
    truth, chosen = np.indices(counts.shape)
    apart = truth - chosen
    rates = {"mae": float((np.abs(apart) * counts).sum() / total)}
    by_chance = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total
    if expected := float((apart**2 * by_chance).sum()):
        rates[KAPPA] = float(1 - (apart**2 * counts).sum() / expected)
    return rates
