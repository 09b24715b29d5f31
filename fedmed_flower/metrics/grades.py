"""Metrics of ordered grades: how far off a grade is, and how well each step up is recognised."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.metrics.classification import classification_metrics, ordered_rates
from fedmed_flower.metrics.names import CONFUSION, GRADE
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.types import Floats

# Of a grade that the model rules out; its logarithm is finite.
_LEAST = 1e-12


def grade_shares(above: ArrayLike) -> Floats:
    """Return the probability of each grade, (n, k), which is at least 1e-12 before scaling.

    Parameters
    ----------
    above : array of shape (n, k - 1)
        The log-odds that the grade is above 0, 1, ..., none higher than the one before.
    """
    from scipy.special import expit

    logits = np.asarray(above, dtype=np.float64)
    ends = np.full((len(logits), 1), np.inf)
    passed = np.concatenate([ends, logits, -ends], axis=1)
    # Each difference in the tail in which it loses fewer digits.
    upper = expit(passed[:, :-1]) - expit(passed[:, 1:])
    lower = expit(-passed[:, 1:]) - expit(-passed[:, :-1])
    shares = np.maximum(np.where(passed[:, 1:] > 0, lower, upper), _LEAST)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def guessed_grades(above: ArrayLike) -> NDArray[np.int64]:
    """Return the median grade, (n,): how many grades are passed with more than one half."""
    return np.asarray((np.asarray(above) > 0).sum(axis=1), dtype=np.int64)


def grade_metrics(
    grades: Sequence[str],
    truth: ArrayLike,
    above: ArrayLike,
    patients: Sequence[Hashable],
    coarse: bool = False,
) -> dict[str, Any]:
    """Measure grades on one hospital's rows.

    Parameters
    ----------
    grades : sequence of k texts
        Three or more, the lowest first.
    truth : integer array of shape (n,)
    above : array of shape (n, k - 1)
        As `grade_shares` takes it.
    patients, coarse
        As `classification_metrics` takes them.

    Returns
    -------
    dict
        Those of `classification_metrics` and `ordered_rates`, for the median grade. Unless
        `coarse`, for each grade but the lowest also the `outcome_metrics` of "this grade or above":
        ``auc@grade=severe or above``.
    """
    labels = np.asarray(truth, dtype=np.int64)
    passed = np.asarray(above, dtype=np.float64)
    logits = np.log(grade_shares(passed))
    guess = guessed_grades(passed)
    metrics: dict[str, Any] = {}
    metrics |= classification_metrics(labels, logits, patients, coarse, guess)
    if CONFUSION in metrics:
        size = len(grades)
        metrics |= ordered_rates(np.reshape(metrics[CONFUSION], (size, size)))
    if coarse:
        # The counts of two steps differ by those of one grade, which may be of few patients.
        return metrics
    for number, name in enumerate(grades[1:], start=1):
        measured = outcome_metrics("binary", labels >= number, passed[:, number - 1], patients)
        step = f"@{GRADE}={name} or above"
        metrics |= {f"{key}{step}": value for key, value in measured.items()}
    return metrics
