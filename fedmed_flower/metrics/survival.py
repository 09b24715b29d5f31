"""Losses and metrics of models that predict the time until an event.

A patient has a time and an event: 1 if the event happened at that time, 0 if the patient was last
seen then without it (censored). Losses: D. R. Cox, "Regression models and life-tables",
Journal of the Royal Statistical Society B 34, 1972, with the ties of B. Efron, "The efficiency of
Cox's likelihood function for censored data", JASA 72, 1977; and M. F. Gensheimer,
B. Narasimhan, "A scalable discrete-time survival model for neural networks", PeerJ 7, 2019,
https://arxiv.org/abs/1805.00917. Metrics: F. E. Harrell, R. M. Califf, D. B. Pryor, K. L. Lee,
R. A. Rosati, "Evaluating the yield of medical tests", JAMA 247, 1982; E. Graf, C. Schmoor,
W. Sauerbrei, M. Schumacher, "Assessment and comparison of prognostic classification schemes for
survival data", Statistics in Medicine 18, 1999.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.types import Numbers

# The exponential of this number is still finite.
LARGEST_LOG = 700.0


class ConcordanceCounts(NamedTuple):
    """Numbers of pairs of patients; those of several hospitals add up."""

    concordant: int
    tied: int
    comparable: int


def check_outcomes(times: ArrayLike, events: ArrayLike) -> tuple[Numbers, NDArray[np.bool_]]:
    """Return times and events as arrays of shape (n,).

    Raises
    ------
    InputError
        If a time is not finite, or below 0, or an event is not 0 or 1, with the row; or if the
        lengths differ.
    """
    when = _numbers("times", times)
    happened = _numbers("events", events)
    require_same_length(times=when.size, events=happened.size)
    for name, values, right, bound in (
        ("times", when, when >= 0, "0 or more"),
        ("events", happened, np.isin(happened, (0, 1)), "0 or 1"),
    ):
        if not right.all():
            row = int(np.argmin(right))
            raise InputError(f"{name} must be {bound}; row {row} has {values[row]:g}")
    return when, happened == 1


def followed(times: ArrayLike, patients: Sequence[Hashable], horizon: float) -> int:
    """Return the number of patients who are followed up to a horizon, or longer.

    Parameters
    ----------
    times : array_like
        (rows,) the time of the event or of censoring; NaN if it is missing.
    patients : sequence
        The patient of each row.
    horizon : float
    """
    long_enough = np.asarray(times, np.float64) >= horizon
    return len({patient for patient, reached in zip(patients, long_enough, strict=True) if reached})


def concordance(times: ArrayLike, events: ArrayLike, risks: ArrayLike) -> ConcordanceCounts:
    """Count the pairs of patients whose risks are in the order of their events, after Harrell.

    Two patients are comparable if one had the event and the other was without it at that time, or
    was last seen at that very time. They are concordant if the former has the higher risk, and tied
    if the risks are equal.

    Parameters
    ----------
    times, events, risks : array_like
        (n,); a higher risk means an earlier event.

    Raises
    ------
    InputError
        As `check_outcomes`, or if a risk is not finite.
    """
    when, happened, scores = _with_scores(times, events, "risks", risks)
    # At the same time, events come before censored patients.
    turn = 2 * np.unique(when, return_inverse=True)[1] + ~happened
    order = np.argsort(turn)
    turn = turn[order]
    scores = scores[order]
    first_after = np.searchsorted(turn, turn, side="right")
    concordant = tied = comparable = 0
    for index in np.flatnonzero(happened[order]):
        later = scores[first_after[index] :]
        concordant += int(np.count_nonzero(later < scores[index]))
        tied += int(np.count_nonzero(later == scores[index]))
        comparable += later.size
    return ConcordanceCounts(concordant, tied, comparable)


def concordance_index(times: ArrayLike, events: ArrayLike, risks: ArrayLike) -> float | None:
    """Return Harrell's index of concordance by lifelines; None if no pair is comparable.

    It is the share of concordant pairs, half of the tied ones included, that `concordance` counts
    for the same arguments.
    """
    # Imported here because lifelines takes a second or more to load.
    from lifelines.utils import concordance_index as index

    when, happened, scores = _with_scores(times, events, "risks", risks)
    try:
        return float(index(when, -scores, happened))
    except ZeroDivisionError:  # Raised by lifelines if no pair is comparable.
        return None


def kaplan_meier(times: ArrayLike, events: ArrayLike) -> tuple[Numbers, Numbers]:
    """Return the Kaplan-Meier curve: the different times, ascending, and survival from each on.

    Before the first time survival is 1. A patient censored at the time of an event was at risk of
    it.
    """
    when, died, at_risk = _life_table(*check_outcomes(times, events))
    return when, np.cumprod(1 - died / at_risk, dtype=np.float64)


def breslow(times: ArrayLike, events: ArrayLike, log_hazards: ArrayLike) -> tuple[Numbers, Numbers]:
    """Return Breslow's estimate of the cumulative hazard of a patient whose log hazard is 0.

    Parameters
    ----------
    times, events, log_hazards : array_like
        (n,), of the patients on whom the model was trained.

    Returns
    -------
    times, cumulative : ndarray
        The different times, ascending, and the cumulative hazard from each on. Before the first it
        is 0.
    """
    when, happened, scores = _with_scores(times, events, "log_hazards", log_hazards)
    distinct, died, at_risk = _life_table(when, happened)
    at_risk_log = np.logaddexp.accumulate(scores[np.argsort(-when)])[at_risk - 1]
    with np.errstate(divide="ignore"):
        steps = np.log(died) - at_risk_log
    return distinct, np.exp(np.minimum(np.logaddexp.accumulate(steps), LARGEST_LOG))


def survival_of_cox(
    baseline: tuple[Numbers, Numbers], log_hazards: ArrayLike, grid: ArrayLike
) -> Numbers:
    """Return each patient's probability of being without the event at the times of a grid.

    Parameters
    ----------
    baseline : tuple of ndarray
        Times and cumulative hazard from `breslow`. After the last time the hazard is taken as 0.
    log_hazards : array_like
        (n,)
    grid : array_like
        (times,) times at which the probability is returned.

    Returns
    -------
    ndarray of shape (n, times)
    """
    scores = _numbers("log_hazards", log_hazards)
    cumulative = _step_function(*baseline, _numbers("grid", grid), before=0.0)
    with np.errstate(divide="ignore"):
        logs = np.log(cumulative)
    return np.exp(-np.exp(np.minimum(scores[:, None] + logs, LARGEST_LOG)))


def brier_at(
    train_times: ArrayLike,
    train_events: ArrayLike,
    times: ArrayLike,
    events: ArrayLike,
    survival: ArrayLike,
    grid: ArrayLike,
) -> Numbers:
    """Return the Brier score, the mean squared error of survival probabilities, at some times.

    A patient censored before a time is left out there, and the others weigh more. Their weights
    come from the Kaplan-Meier curve of being censored among the training rows, after Graf and
    others.

    Parameters
    ----------
    train_times, train_events : array_like
        (m,) of the training rows, from which the curve of being censored is estimated.
    times, events : array_like
        (n,)
    survival : array_like
        (n, len(grid)) predicted probabilities of being without the event, 0 to 1.
    grid : array_like
        (len(grid),) times of the scores.

    Returns
    -------
    ndarray of shape (len(grid),)
        NaN at a time at which the score is not defined: from the last of `times` on, after the last
        of `train_times`, and if the curve of being censored is 0.

    Raises
    ------
    InputError
        As `check_outcomes`, or if `survival` or `grid` has another shape or is out of range.
    """
    train_when, train_happened = check_outcomes(train_times, train_events)
    when, happened = check_outcomes(times, events)
    at = _numbers("grid", grid)
    chances = np.asarray(survival, dtype=np.float64)
    if chances.shape != (when.size, at.size):
        raise InputError(
            f"survival must have the shape {(when.size, at.size)}, a row a patient and a column "
            f"a time of grid, got {chances.shape}"
        )
    right = ((chances >= 0) & (chances <= 1)).all(axis=1)
    if not right.all():
        raise InputError(f"survival must be from 0 to 1; row {int(np.argmin(right))} is not")
    distinct, died, _ = _life_table(train_when, train_happened)
    _, censored, at_risk = _life_table(train_when, ~train_happened)
    # A patient who had the event at a time could no longer be censored at it.
    seen = np.cumprod(1 - censored / np.maximum(at_risk - died, 1))
    at_grid, at_patient = (_step_function(distinct, seen, x, before=1.0) for x in (at, when))
    defined = (at < when.max(initial=0)) & (at <= train_when.max(initial=0)) & (at_grid > 0)
    scores = np.full(at.size, np.nan)
    for index in np.flatnonzero(defined):
        had = happened & (when <= at[index])
        without = when > at[index]
        errors = (chances[had, index] ** 2 / at_patient[had]).sum()
        errors += ((1 - chances[without, index]) ** 2).sum() / at_grid[index]
        scores[index] = errors / when.size
    return scores


def integrated_brier_score(
    train_times: ArrayLike,
    train_events: ArrayLike,
    times: ArrayLike,
    events: ArrayLike,
    survival: ArrayLike,
    grid: ArrayLike,
) -> float | None:
    """Return the mean of `brier_at` over time, by trapezoids.

    The arguments are those of `brier_at`, with ascending times of `grid`. Times at which the score
    is not defined are left out. If fewer than two times are left, the result is None.
    """
    scores = brier_at(train_times, train_events, times, events, survival, grid)
    at = _numbers("grid", grid)
    ascends = np.diff(at) > 0
    if not ascends.all():
        index = int(np.argmin(ascends)) + 1
        raise InputError(
            f"grid must ascend; index {index} has {at[index]:g} after {at[index - 1]:g}"
        )
    used = np.isfinite(scores)
    if used.sum() < 2:
        return None
    return float(np.trapezoid(scores[used], at[used]) / np.ptp(at[used]))


def _life_table(
    times: Numbers, happened: NDArray[np.bool_]
) -> tuple[Numbers, NDArray[np.intp], NDArray[np.intp]]:
    """Return the different times, the events at each, and how many were at risk of them."""
    distinct, group, sizes = np.unique(times, return_inverse=True, return_counts=True)
    died = np.bincount(group[happened], minlength=distinct.size)
    return distinct, died, times.size - np.cumsum(sizes) + sizes


def _step_function(times: Numbers, values: Numbers, at: Numbers, before: float) -> Numbers:
    """Return at each time the value of the last of `times` that is not later."""
    return np.append(before, values)[np.searchsorted(times, at, side="right")]


def _with_scores(
    times: ArrayLike, events: ArrayLike, name: str, scores: ArrayLike
) -> tuple[Numbers, NDArray[np.bool_], Numbers]:
    when, happened = check_outcomes(times, events)
    values = _numbers(name, scores)
    require_same_length(times=when.size, **{name: values.size})
    return when, happened, values


def require_same_length(**lengths: int) -> None:
    """Raise `InputError` unless all lengths, by name, are the same."""
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"one row a patient is needed in each, got rows of {given}")


def _numbers(name: str, values: ArrayLike) -> Numbers:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from error
    if numbers.ndim != 1:
        raise InputError(f"{name} must have shape (n,), got {numbers.shape}")
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers)))
        raise InputError(f"{name} must be finite; row {row} has {numbers[row]:g}")
    return numbers
