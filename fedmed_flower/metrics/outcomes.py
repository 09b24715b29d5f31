"""Metrics of predicted numbers and classes in a table, for all patients and for groups of them.

A metric of a group has the group in its name: ``auc@sex=1``. A hospital also sends the sums from
which metrics over several hospitals' rows follow. Spreads are combined as in Chan, Golub and
LeVeque (Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, COMPSTAT 1982,
https://doi.org/10.1007/978-3-642-51461-6_3).
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.data.site import patient_text
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.names import (
    CALIBRATION,
    CALIBRATION_BINS,
    CONFUSION,
    COUNT,
    TARGET,
    in_groups,
)
from fedmed_flower.metrics.types import Floats
from fedmed_flower.privacy.noise import noised_once

# The fewest and the most columns of outputs.
_COLUMNS = {"binary": (1, 2), "multi-class": (2, math.inf), "continuous": (1, 1), "count": (1, 1)}
# No patient's rate is beyond e^50. An infinite rate would make the sums infinite.
_MOST_LOG_RATE = 50.0


def expected_counts(log_rates: ArrayLike) -> Floats:
    """Return the counts that a network expects, from its outputs, which are clipped to +-50."""
    clipped = np.clip(np.asarray(log_rates, np.float64), -_MOST_LOG_RATE, _MOST_LOG_RATE)
    return np.asarray(np.exp(clipped))


def outcome_metrics(
    task: str,
    target: ArrayLike,
    outputs: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    coarse: bool = False,
) -> dict[str, Any]:
    """Measure predictions on one hospital's rows.

    Parameters
    ----------
    task : {"binary", "multi-class", "continuous", "count"}
    target : array of shape (n,)
        Class numbers, numbers or counts; n at least 1.
    outputs : array of shape (n, c) or (n,)
        Logits as `classification_metrics` takes them; the predicted number; or the log of the
        expected count (clipped to -50 and 50).
    patients, coarse
        For classes only, as `classification_metrics` takes them. If `coarse`, the average
        precision is left out, because it rests on the few highest scores. The calibration is then
        that of two bins, on either side of one half, or of one bin if the confusion matrix is left
        out. For more than two classes it is that of one bin, or is left out as the confusion
        matrix is.

    Returns
    -------
    dict
        ``num-examples``, the sums that `pool` adds up, and metrics. A metric that is undefined for
        these rows is left out.

        - classes: those of `classification_metrics`; ``average-precision`` (for more than two
          classes, the mean of one against the rest); ``brier``, the squared error of the
          probability of class 1 (for more than two classes, summed over them);
          ``calibration-error``, the distance of probability and frequency, a mean over ten bins of
          the probability of class 1 (for more than two classes, of the likeliest class);
        - numbers: ``r2``, ``mae``, ``rmse``;
        - counts: ``mae`` of the expected count, ``deviance`` (the mean of Poisson's) and ``d2``,
          the share of the deviance that the model explains.

    Raises
    ------
    InputError
        If the task is unknown, the shapes do not fit, a target is out of range, or an output is
        not finite.
    """
    y, z = _checked(task, target, outputs)
    if task in ("binary", "multi-class"):
        return _classified(y.astype(np.int64), z, patients, coarse)
    if task == "continuous":
        key = TARGET
        guess = z[:, 0]
        spread = np.square(y - y.mean())
        error = np.square(y - guess)
    else:
        from scipy.special import kl_div, rel_entr

        key = COUNT
        guess = expected_counts(z[:, 0])
        spread = 2 * rel_entr(y, y.mean())
        error = 2 * kl_div(y, guess)
    # A deviance of 0 can round to a hair below.
    parts = (max(0.0, float(part.sum())) for part in (spread, error, np.abs(y - guess)))
    sums = [float(len(y)), float(y.mean()), *parts]
    return {"num-examples": len(y), **explained(key, [sums]), key: sums}


def _checked(task: str, target: ArrayLike, outputs: ArrayLike) -> tuple[Floats, Floats]:
    if task not in _COLUMNS:
        raise InputError(f"task must be one of {', '.join(_COLUMNS)}, got {task!r}")
    y = np.asarray(target, dtype=np.float64)
    z = np.asarray(outputs, dtype=np.float64)
    z = z[:, None] if z.ndim == 1 else z
    if y.ndim != 1 or z.ndim != 2 or not 0 < len(y) == len(z):
        raise InputError(
            "target and outputs must be of the same rows, one or more: they have the shapes "
            f"{y.shape} and {z.shape}"
        )
    columns = z.shape[1]
    least, most = _COLUMNS[task]
    if not least <= columns <= most:
        wanted = str(least)
        if most > least:
            wanted += " or 2" if most == 2 else " or more"
        raise InputError(f"outputs for the task {task!r} must have {wanted} columns, got {columns}")
    if odd := int((~np.isfinite(z).all(axis=1)).sum()):
        raise InputError(
            f"outputs of {odd} of {len(z)} rows are not finite: the model has diverged; "
            "a lower learning-rate may help"
        )
    _check_target(task, y, max(2, columns))
    return y, z


def _check_target(task: str, y: Floats, num_classes: int) -> None:
    sound = np.isfinite(y)
    if task == "continuous":
        wanted = "a finite number"
    elif task == "count":
        wanted = "a whole number of at least 0"
        sound &= (y >= 0) & (np.floor(y) == y)
    else:
        wanted = f"a class from 0 to {num_classes - 1}"
        sound &= (y >= 0) & (y < num_classes) & (np.floor(y) == y)
    if not sound.all():
        index = int(np.argmin(sound))
        raise InputError(f"target of row {index} must be {wanted}, got {y[index]:g}")


def _classified(
    labels: NDArray[np.int64], logits: Floats, patients: Sequence[Hashable] | None, coarse: bool
) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score

    from fedmed_flower.metrics.classification import (
        class_margins,
        class_probabilities,
        classification_metrics,
    )

    metrics: dict[str, Any] = classification_metrics(labels, logits, patients, coarse)
    margins = class_margins(logits)
    shares = class_probabilities(logits)
    is_binary = margins.shape[1] == 1
    if is_binary:
        truth = (labels == 1)[:, None]
        shares = shares[:, 1:]
        chosen = shares[:, 0]
        right = truth[:, 0]
    else:
        truth = labels[:, None] == np.arange(margins.shape[1])
        chosen = shares.max(axis=1)
        right = logits.argmax(axis=1) == labels
    is_one_sided = truth.all(axis=0) | ~truth.any(axis=0)
    if not coarse and not is_one_sided.any():
        pairs = zip(truth.T, margins.T, strict=True)
        precisions = [average_precision_score(is_class, score) for is_class, score in pairs]
        metrics["average-precision"] = float(np.mean(precisions))
    metrics["brier"] = float(np.square(shares - truth).sum(axis=1).mean())
    bins = np.minimum((chosen * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    if coarse and not is_binary and CONFUSION not in metrics:
        return metrics
    if coarse:
        # Only bins whose counts follow from the confusion matrix anyway.
        is_cut = is_binary and CONFUSION in metrics
        bins = np.where(is_cut & (margins[:, 0] > 0), CALIBRATION_BINS // 2, 0)
    sums = np.zeros((CALIBRATION_BINS, 3))
    np.add.at(sums, bins, np.stack([np.ones(len(bins)), chosen, right], axis=1))
    metrics["calibration-error"] = calibration_error(sums)
    return metrics | {CALIBRATION: [float(value) for value in sums.ravel()]}


def calibration_error(sums: Floats) -> float:
    """Return the mean distance of probability and frequency in the bins, weighted by their rows.

    Parameters
    ----------
    sums : array of shape (bins, 3)
        Rows, the sum of their probabilities, how many came true.
    """
    return float(np.abs(sums[:, 1] - sums[:, 2]).sum() / sums[:, 0].sum())


def explained(key: str, sums: ArrayLike) -> dict[str, float]:
    """Return the metrics of numbers or counts that follow from sums of shape (hospitals, 5)."""
    rows, mean, spread, error, absolute = np.asarray(sums, dtype=np.float64).T
    total = rows.sum()
    centre = rows @ mean / total
    mean_error = float(error.sum() / total)
    rounding = 8 * np.finfo(float).eps * centre
    metrics = {"mae": float(absolute.sum() / total)}
    if key == COUNT:
        from scipy.special import rel_entr

        metrics["deviance"] = mean_error
        between = 2 * rel_entr(mean, centre)
    else:
        metrics["rmse"] = math.sqrt(mean_error)
        between = np.square(mean - centre)
        rounding = np.square(rounding)
    all_spread = spread.sum() + rows @ between
    # A target that is the same in every row has a spread by rounding alone.
    if all_spread > total * rounding:
        metrics["d2" if key == COUNT else "r2"] = float(1 - error.sum() / all_spread)
    return metrics


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def by_group(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    minimum: int,
    measure: Callable[[list[int]], Mapping[str, Any]],
) -> dict[str, Any]:
    """Measure each group of patients separately.

    Parameters
    ----------
    rows : sequence of dict
        Each has ``patient`` and, in `columns`, a text or None.
    columns : sequence of str
    minimum : int
        As `reported_groups` takes it.
    measure : callable
        Maps the indices of a group's rows to its metrics.

    Returns
    -------
    dict
        Metrics by ``NAME@column=value``, with ``num-examples``.

    Raises
    ------
    InputError
        If no row has one of the columns, or a column holds something other than texts.
    """
    metrics: dict[str, Any] = {}
    for column in columns:
        for value, indices in reported_groups(rows, column, minimum).items():
            group = {"num-examples": len(indices)} | dict(measure(indices))
            metrics |= {f"{name}@{column}={value}": metric for name, metric in group.items()}
    return metrics


def reported_groups(
    rows: Sequence[Mapping[str, Any]], column: str, minimum: int
) -> dict[str, list[int]]:
    """Return the indices of the rows of each reported group, by the group's text in a column.

    Parameters
    ----------
    rows : sequence of dict
        As `by_group` takes them.
    column : str
    minimum : int
        The fewest patients of a group that is reported. The patients outside the reported groups
        must also be at least as many, or none. Otherwise the smallest reported group is left out
        too, until this holds.

    Raises
    ------
    InputError
        If no row has the column, or it holds something other than texts.
    """
    if not rows:
        return {}
    groups: dict[str | None, list[int]] = {}
    for index, value in enumerate(_texts(rows, column)):
        groups.setdefault(value, []).append(index)
    patients = {
        value: {patient_text(rows[index]["patient"]) for index in indices}
        for value, indices in groups.items()
    }
    reported = [value for value in groups if value is not None and len(patients[value]) >= minimum]
    reported.sort(key=lambda value: (-len(patients[value]), value))
    while reported:
        hidden = set().union(*(patients[value] for value in groups if value not in reported))
        if not 0 < len(hidden) < minimum:
            break
        reported.pop()
    return {value: groups[value] for value in sorted(reported)}


def _texts(rows: Sequence[Mapping[str, Any]], column: str) -> list[str | None]:
    if not any(column in row for row in rows):
        texts = [name for name, cell in rows[0].items() if cell is None or isinstance(cell, str)]
        known = sorted({*texts} - {"patient"})
        near = difflib.get_close_matches(column, known, n=1)
        raise InputError(
            f"the rows have no column {column!r}: groups can be made of "
            f"{', '.join(known) or 'no column'}" + (f"; did you mean {near[0]}?" if near else "")
        )
    # A value that is not equal to itself is NaN, a missing text in a data frame.
    values = [value if value == value else None for value in (row.get(column) for row in rows)]
    if odd := [value for value in values if not (value is None or isinstance(value, str))]:
        raise InputError(
            f"the column {column!r} holds {odd[0]!r}, which is no text: groups are made of "
            "categories, or of the bands into which the schema cuts a number"
        )
    return values


def gaps(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the difference between a column's best and worst group, by ``NAME@column``."""
    values: dict[str, list[float]] = {}
    for group, part in in_groups(metrics).items():
        column = group.partition("=")[0]
        for name, value in part.items() if group else ():
            if name != "num-examples" and is_number(value):
                values.setdefault(name + column, []).append(value)
    return {name: max(group) - min(group) for name, group in values.items() if len(group) > 1}


def noised_errors(
    task: str,
    target: ArrayLike,
    outputs: ArrayLike,
    limits: tuple[float, float],
    patients: Sequence[Hashable],
    noise: float,
) -> list[float]:
    """Add up patients and their absolute errors, with noise that hides each patient.

    Each patient's rows together have weight 1, with errors clipped to the width of `limits`. In
    units of that width, adding or removing a patient changes the two sums by at most the root of 2,
    in Euclidean length.

    Parameters
    ----------
    task : {"continuous", "count"}
    target, outputs : array of shape (n,) or (n, 1)
        As `outcome_metrics` takes them.
    limits : (float, float)
        The lowest and the highest possible target: stated beforehand, not taken from the data.
    patients : sequence of n hashables
    noise : float
        Standard deviation of the noise in units of that length; at least 0.

    Returns
    -------
    list of float
        For `noised_error_metrics`: the number of patients, and the sum of their mean errors.

    Raises
    ------
    InputError
        If the task is another one, or the limits are not two finite numbers, the lower first.
    """
    if task not in ("continuous", "count"):
        raise InputError(f"task must be one of continuous, count, got {task!r}")
    low, high = limits
    width = high - low
    if not 0 < width < math.inf:
        raise InputError(f"limits must be two finite numbers, the lower first, got {low}, {high}")
    y, z = (np.asarray(part, dtype=np.float64).ravel() for part in (target, outputs))
    if task == "count":
        z = expected_counts(z)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(y - z)
    # Count NaN as the largest possible error; otherwise one NaN makes the sum NaN.
    errors = np.clip(np.nan_to_num(errors, nan=width), 0.0, width) / width
    row_counts = Counter(patients)
    share = np.asarray([1 / row_counts[patient] for patient in patients])
    sums: Floats = np.asarray([share.sum(), share @ errors])
    sums = noised_once(sums, noise * math.sqrt(sums.size))
    return [float(sums[0]), float(sums[1]) * width]


def noised_error_metrics(sums: ArrayLike) -> dict[str, float]:
    """Return the metrics that follow from `noised_errors` of one hospital, or the sum of several.

    Returns
    -------
    dict
        ``num-examples`` (patients, to the nearest whole number) and, if it is above 0, ``mae``.
    """
    count, total = np.asarray(sums, dtype=np.float64)
    if not math.isfinite(count) or round(count) < 1:
        return {"num-examples": 0.0}
    return {"num-examples": float(round(count)), "mae": max(0.0, float(total / count))}
