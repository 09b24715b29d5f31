"""What one hospital measures, and what several hospitals' sums give together.

A hospital never sends a list of scores. For figures over all hospitals it sends counts: the
confusion matrix, and for each class two histograms of the score (rows without and with the class)
on a grid laid around the hospital's own median. A hospital that wants to tell coarsely counts ten
patients or more at a time, and rounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.outcomes import (
    CALIBRATION,
    NOISED_ERRORS,
    SUMS,
    check_sums,
    coarse_sums,
    in_groups,
    noised_error_metrics,
    pool_outcomes,
    three_digits,
)
from fedmed_flower.overlap import DICE, NOISED_DICE, WORST, pool_masks
from fedmed_flower.privacy.noise import gaussian, secure_generator
from fedmed_flower.ranking import (
    BINS,
    COUNTS,
    EDGES,
    FEWEST,
    GRID,
    MERGED,
    UNTOLD,
    bounded_auc,
    check_histograms,
    coarse_histograms,
    different,
    fine_histograms,
    merged_auc,
    merged_precision,
    numbered,
    ordered_pairs,
)

CONFUSION = "confusion-counts"
SUMMABLE = (CONFUSION, GRID, COUNTS)
# What a run has cost a patient of a site; of several sites, the most.
EPSILON = "patient-epsilon"
# What the rounds have cost a hospital, by the server's noise.
HOSPITAL_EPSILON = "hospital-epsilon"

# Between which the AUC lies where a hospital tells coarsely.
LOW, HIGH = "auc-low", "auc-high"
# What follows from the confusion matrix.
RATES = ("accuracy", "balanced-accuracy", "sensitivity", "specificity")

# Under privacy the bins must not depend on the patients. Log-odds; the threshold 0 is an edge.
NOISED = "noised-counts"
# What only `pool` makes use of, also with a group in the name.
POOLED_ONLY = (*SUMMABLE, NOISED, NOISED_DICE, *SUMS)
_NOISED_BINS = 32
_NOISED_EDGES = np.linspace(-8.0, 8.0, _NOISED_BINS + 1)

# What `coarsened` leaves as it is, and parts of the names of what it leaves out.
_EXACT = ("num-examples", EPSILON, HOSPITAL_EPSILON, NOISED, NOISED_DICE)
_SINGLE = {"worst", "lowest", "highest", "min", "max"}

Value = float | int | list[int] | list[float]

# By which a run is judged: the first that it has.
MAIN = ("auc", "dice", "c-index", "r2", "d2", "accuracy", "mae", "loss")


# What these begin with is better where it is lower.
_LOWER = ("loss", "hd95", "mae", "rmse", "brier", "integrated-brier", "calibration", "deviance")


def lower_is_better(name: str) -> bool:
    """Return whether a figure is an error."""
    return name.startswith(_LOWER)


def main_metric(names: Collection[str]) -> str:
    """Return the figure by which a run with such metrics is judged; the loss if none is known."""
    return next((name for name in MAIN if name in names), MAIN[-1])


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


def classification_metrics(
    labels: ArrayLike,
    logits: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    coarse: bool = False,
) -> dict[str, Value]:
    """Measure a classifier on one hospital's rows.

    Parameters
    ----------
    labels : integer array of shape (n,)
    logits : array of shape (n, 1) or (n, c)
    patients : sequence of n hashables, optional
        Whose the rows are; each row is of a patient of its own where nothing is said.
    coarse : bool
        Whether each count is of ten different patients or more, or of all of a class. `coarsened`
        rounds what is left.

    Returns
    -------
    dict
        ``num-examples``, ``accuracy``, ``balanced-accuracy``, ``sensitivity``, ``specificity``
        and ``auc`` (for more than two classes: the mean of one class against the rest), and the
        counts that `pool` sums. A figure that these rows leave undefined, such as the AUC of
        one class, is left out.

        Where `coarse`, the AUC is also left out where a class, or its rest, has fewer than ten
        patients, and the confusion matrix, with all that follows from it, where a cell has.

    Raises
    ------
    InputError
        Where there is not one patient a row.
    """
    from sklearn.metrics import confusion_matrix

    y = np.asarray(labels, dtype=np.int64)
    whose = range(len(y)) if patients is None else patients
    if len(whose) != len(y):
        raise InputError(f"patients must name one for each of {len(y)} rows, got {len(whose)}")
    margins = class_margins(logits)
    num_classes = max(2, margins.shape[1])
    guess = (margins[:, 0] > 0).astype(int) if num_classes == 2 else np.argmax(logits, axis=1)
    confusion = confusion_matrix(y, guess, labels=np.arange(num_classes))
    positive = (y == 1)[:, None] if num_classes == 2 else y[:, None] == np.arange(num_classes)
    told = not coarse or _is_coarse(y, guess, numbered(whose), num_classes)
    found = [
        coarse_histograms(truth, score, whose, told and num_classes == 2)
        if coarse
        else fine_histograms(truth, score)
        for truth, score in zip(positive.T, margins.T, strict=True)
    ]
    metrics: dict[str, Value] = {"num-examples": len(y), **(_rates(confusion) if told else {})}
    aucs = [
        own
        for truth, ((_, _, own), _) in zip(positive.T, found, strict=True)
        if truth.any() and not truth.all() and own != UNTOLD
    ]
    if len(aucs) == margins.shape[1]:
        metrics["auc"] = float(np.mean(aucs))
    if told:
        metrics[CONFUSION] = confusion.ravel().tolist()
    metrics[GRID] = [value for grid, _ in found for value in grid]
    metrics[COUNTS] = [count for _, counts in found for count in counts]
    return metrics


def _is_coarse(
    labels: NDArray[np.int64], guess: NDArray[Any], codes: NDArray[np.int64], num_classes: int
) -> bool:
    """Return whether each cell of the confusion matrix is of ten different patients or more."""
    cells = [[(labels == c) & (guess == g) for g in range(num_classes)] for c in range(num_classes)]
    enough = all(different(codes[cell]) >= FEWEST for row in cells for cell in row)
    # A patient with several rows may be in several cells.
    least = FEWEST * num_classes
    return enough and all(different(codes[labels == c]) >= least for c in range(num_classes))


def noised_counts(
    labels: ArrayLike, logits: ArrayLike, patients: Sequence[Hashable], noise_multiplier: float
) -> list[float]:
    """Count what a classifier does, with noise that hides each patient.

    For two classes the counts are histograms of the score of the rows without and with the second
    class; for more, such histograms for each class against the rest, and the confusion matrix.
    Each patient's rows weigh 1 together, so that adding or removing a patient changes the counts
    by at most 1 (two classes) or the root of the number of classes + 1, in Euclidean length.

    Parameters
    ----------
    labels : integer array of shape (n,)
    logits : array of shape (n, 1) or (n, c)
    patients : sequence of n hashables
    noise_multiplier : float
        Standard deviation of the noise in units of that length; at least 0.

    Returns
    -------
    list of float
        For `noised_metrics`.
    """
    y, margins = np.asarray(labels, dtype=np.int64), class_margins(logits)
    num_classes = max(2, margins.shape[1])
    of = Counter(patients)
    share = np.asarray([1 / of[patient] for patient in patients])
    positive = (y == 1)[:, None] if num_classes == 2 else y[:, None] == np.arange(num_classes)
    places = np.clip(margins, _NOISED_EDGES[0], _NOISED_EDGES[-1])
    parts = [
        np.histogram(place[truth == group], _NOISED_EDGES, weights=share[truth == group])[0]
        for truth, place in zip(positive.T, places.T, strict=True)
        for group in (False, True)
    ]
    length = 1.0
    if num_classes > 2:
        confusion = np.zeros((num_classes, num_classes))
        np.add.at(confusion, (y, np.argmax(logits, axis=1)), share)
        parts.append(confusion.ravel())
        length = math.sqrt(num_classes + 1)
    counts = np.concatenate(parts)
    counts += gaussian(counts.size, noise_multiplier * length, secure_generator())
    return [float(count) for count in counts]


def noised_metrics(counts: ArrayLike) -> dict[str, float]:
    """Return figures from the counts of one hospital, or the sum of several hospitals' counts.

    Parameters
    ----------
    counts : array
        As `noised_counts` returns them.

    Returns
    -------
    dict
        ``num-examples`` (patients, to the nearest whole number) and, where it is above 0, the
        figures of `classification_metrics`. An AUC from 32 bins is as coarse as they are.
    """
    values = np.asarray(counts, dtype=np.float64)
    num_classes = _classes_of(len(values))
    scores = 1 if num_classes == 2 else num_classes
    histograms = values[: 2 * scores * _NOISED_BINS].reshape(scores, 2, _NOISED_BINS)
    if num_classes == 2:
        confusion = histograms[0].reshape(2, 2, -1).sum(axis=2)
    else:
        confusion = values[histograms.size :].reshape(num_classes, num_classes)
    metrics: dict[str, float] = {"num-examples": max(0.0, float(round(confusion.sum())))}
    # Cut off at 0 after adding up, so that noise cancels out as far as it can.
    confusion = np.maximum(confusion, 0.0)
    if not metrics["num-examples"] or not confusion.any():
        return {"num-examples": 0.0}
    # Sums of fractions round to a hair below 0.
    metrics |= {name: min(1.0, max(0.0, rate)) for name, rate in _rates(confusion).items()}
    below = np.pad(np.cumsum(histograms, axis=2), ((0, 0), (0, 0), (1, 0)))
    totals = below[:, :, -1]
    if (totals > 0).all():
        shares = np.asarray([*map(ordered_pairs, below)]) / totals.prod(axis=1)
        metrics["auc"] = float(np.clip(shares, 0.0, 1.0).mean())
    return metrics


def _classes_of(length: int) -> int:
    """Return the number of classes of noised counts; 0 where no number fits their length."""
    if length == 2 * _NOISED_BINS:
        return 2
    classes = round(math.sqrt(_NOISED_BINS**2 + length)) - _NOISED_BINS
    fits = classes > 2 and classes * (2 * _NOISED_BINS + classes) == length
    return classes if fits else 0


def check_counts(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the counts that a site sent for `pool`; None where nothing is."""
    most = record.get("num-examples")
    most = most if isinstance(most, int | float) else 0
    for group, part in in_groups(record).items():
        rows = part.get("num-examples", 0)
        if group and not (isinstance(rows, int | float) and 0 <= rows <= most):
            return f"num-examples{group} must be a number from 0 to num-examples = {most}"
        if (reason := _check_counts(part) or check_sums(part)) is not None:
            return f"{reason}, in {group}" if group else reason
    return None


def is_pooled_only(name: str) -> bool:
    """Return whether a metric, of all rows or of a group, is no figure but for `pool`."""
    return name.partition("@")[0] in POOLED_ONLY


def _check_counts(record: Mapping[str, Any]) -> str | None:
    if (noised := record.get(NOISED)) is not None and not (
        _are_counts(noised) and _classes_of(len(noised))
    ):
        return f"{NOISED} must be a list of finite numbers of a length that {NOISED} can have"
    if (sums := record.get(NOISED_DICE)) is not None and not (_are_counts(sums) and len(sums) > 1):
        return f"{NOISED_DICE} must be a list of two or more finite numbers"
    found: list[Any] = [record.get(key) for key in SUMMABLE]
    confusion, grid, counts = found
    if found == [None] * 3:
        return None
    # A hospital that tells coarsely may keep the confusion matrix back.
    is_kept = confusion is None and isinstance(counts, list) and MERGED in counts
    if not all(isinstance(part, list) for part in found[is_kept:]):
        return f"{', '.join(SUMMABLE)} must be lists, and all or none of them sent"
    rows = record.get("num-examples")
    if is_kept:
        return check_histograms(grid, counts, len(grid) // 3, rows)
    num_classes = math.isqrt(len(confusion))
    if num_classes < 2 or num_classes**2 != len(confusion):
        return f"{CONFUSION} has {len(confusion)} entries, which is no square of 2 or more classes"
    if not all(type(count) is int and count >= 0 for count in confusion):
        return f"{CONFUSION} must be whole numbers of at least 0"
    if sum(confusion) != rows:
        return f"{CONFUSION} do not add up to num-examples = {rows}"
    return check_histograms(grid, counts, 1 if num_classes == 2 else num_classes, rows)


def coarsened(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a hospital that tells coarsely may send of any client's metrics.

    Parameters
    ----------
    metrics : dict
        Numbers and lists of numbers by name, of all rows or of a group of patients.

    Returns
    -------
    dict
        Numbers that are not integers by their type have three significant digits, in lists too;
        so have the sums that `pool` adds up, but for numbers of rows. Left out are figures of
        single patients (with worst, lowest, highest, min or max in the name) and counts of a
        classifier that are not coarse. ``num-examples``, what a run has cost and what carries noise
        stay as they are.
    """
    return {
        name + group: value
        for group, part in in_groups(metrics).items()
        for name, value in _coarsened(part).items()
    }


def _coarsened(part: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in part.items() if _SINGLE.isdisjoint(name.split("-"))}
    if MERGED not in part.get(COUNTS, ()):
        told = {name: told[name] for name in told if name not in (*SUMMABLE, CALIBRATION)}
    for name, value in told.items():
        if name in SUMS:
            told[name] = coarse_sums(name, value)
        elif name not in _EXACT:
            told[name] = [*map(_rounded, value)] if isinstance(value, list) else _rounded(value)
    return told


def _rounded(value: Any) -> Any:
    is_fraction = isinstance(value, Real) and not isinstance(value, Integral)
    return three_digits(float(value)) if is_fraction else value


def _are_counts(values: Any) -> bool:
    """Return whether these are numbers that can be added up: nobody counts beyond 1e12."""
    return isinstance(values, list) and all(abs(value) <= 1e12 for value in values)


def pool(records: Sequence[dict[str, Value]]) -> dict[str, float]:
    """Return the figures over all hospitals' rows together from what each hospital counted.

    Parameters
    ----------
    records : sequence of dict
        As `classification_metrics` or `fedmed_flower.outcomes` return them, all of one number of
        classes; or all with noised counts or errors; or as `fedmed_flower.overlap` makes them.

    Returns
    -------
    dict
        The same figures as one hospital's, and the total ``num-examples``, from those that have
        the counts; of masks only what is no weighted mean of the hospitals' figures; nothing for
        other records, or where only some are noised. The AUC is exact for pairs of rows of one
        hospital and comes from the histograms for pairs of rows of two. It is right to 0.001 for
        scores with one hump, heavy tails and skew included; where a network crowds its scores into
        two humps a hundred times narrower than their distance, it can be off by some thousandths.
        The average precision comes from the histograms alone: right to 0.002 for such scores, and
        for few distinct ones, with some hundred rows of each class at several hospitals. With fewer
        than 500 rows of the class in all, two rows at the top whose bins overlap may move it by
        half of one over their number.

        Where a hospital tells coarsely, the AUC of all rows lies between ``auc-low`` and
        ``auc-high`` (to three digits, rounded outwards), whatever the order of rows that share a
        bin; ``auc`` is an estimate. Left out then are the average precision, and what follows from
        counts that one of the hospitals keeps back.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for group, part in in_groups(record).items():
            groups.setdefault(group, []).append(part)
    return {
        name + group: value
        for group, parts in groups.items()
        for name, value in _pool(parts, every=bool(group)).items()
    }


def _pool(records: list[dict[str, Any]], every: bool) -> dict[str, float]:
    for key in (NOISED, NOISED_ERRORS, NOISED_DICE):
        if any(key in record for record in records):
            if len(_holding(records, key)) < len(records):
                return {}
            if key == NOISED_DICE:
                return pool_masks(records)
            total = np.sum([np.asarray(record[key]) for record in records], axis=0)
            return noised_metrics(total) if key == NOISED else noised_error_metrics(total)
    if masks := [record for record in records if isinstance(record.get(WORST), int | float)]:
        # A hospital that tells coarsely has a worst patient, too.
        silent = any(DICE in record and WORST not in record for record in records)
        return {} if silent else pool_masks(masks)
    figures = pool_outcomes(records, every)
    if found := _holding(records, GRID, COUNTS):
        figures = {name: value for name, value in figures.items() if name not in _untold(found)}
        figures |= _pool_classes(found)
    rows = [record.get("num-examples") for record in records]
    total = float(sum(count for count in rows if isinstance(count, int | float)))
    return {"num-examples": total} | figures if figures else {}


def _holding(records: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Return the records with these lists; none where their lengths differ."""
    found = [record for record in records if all(key in record for key in keys)]
    return found if len({tuple(len(one[key]) for key in keys) for one in found}) == 1 else []


def _untold(records: list[dict[str, Any]]) -> set[str]:
    """Return the figures over all rows of which one of these hospitals keeps its part back."""
    if not any(MERGED in record[COUNTS] for record in records):
        return set()
    without = {
        name for record in records for name in (CONFUSION, CALIBRATION) if name not in record
    }
    untold = {"average-precision"} | ({*RATES} if CONFUSION in without else set())
    return untold | ({"calibration-error"} if CALIBRATION in without else set())


def _pool_classes(records: list[dict[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if len(told := _holding(records, CONFUSION)) == len(records):
        total = np.sum([np.asarray(record[CONFUSION]) for record in told], axis=0)
        num_classes = round(len(total) ** 0.5)
        metrics = _rates(total.reshape(num_classes, num_classes))
    grids = np.asarray([record[GRID] for record in records]).reshape(len(records), -1, 3)
    counts = np.asarray([record[COUNTS] for record in records], dtype=np.float64)
    counts = counts.reshape(len(records), -1, 2, BINS)
    edges = grids[..., :1] + grids[..., 1:2] * EDGES
    classes = range(grids.shape[1])
    # What is told of one hospital alone is its own figure.
    alone = records[0] if len(records) == 1 else {}
    if (counts < 0).any():
        bounds = bounded_auc(edges, counts, grids[..., 2], alone.get("auc"))
        return metrics | (dict(zip(("auc", LOW, HIGH), bounds, strict=True)) if bounds else {})
    found = {"auc": [merged_auc(edges[:, c], counts[:, c], grids[:, c, 2]) for c in classes]}
    if any(CALIBRATION in record for record in records):
        found["average-precision"] = [merged_precision(edges[:, c], counts[:, c]) for c in classes]
    for name, values in found.items():
        own = alone.get(name)
        if not np.isnan(values).any():
            metrics[name] = float(own if isinstance(own, int | float) else np.mean(values))
    return metrics


def _rates(confusion: NDArray[np.int64]) -> dict[str, float]:
    # Loading scikit-learn takes a second, which a server that only averages need not wait for.
    from sklearn.metrics import multilabel_confusion_matrix

    truth, guess = np.indices(confusion.shape)
    per_class = multilabel_confusion_matrix(
        truth.ravel(), guess.ravel(), sample_weight=confusion.ravel()
    )
    with np.errstate(invalid="ignore"):
        specificity, sensitivity = (per_class[:, i, i] / per_class[:, i].sum(1) for i in (0, 1))
    concerned = slice(1, 2) if len(confusion) == 2 else slice(None)
    rates = {
        "accuracy": np.trace(confusion) / confusion.sum(),
        "balanced-accuracy": np.nanmean(sensitivity),
        "sensitivity": np.mean(sensitivity[concerned]),
        "specificity": np.mean(specificity[concerned]),
    }
    return {name: float(rate) for name, rate in rates.items() if np.isfinite(rate)}
