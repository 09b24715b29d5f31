"""Figures over all hospitals' rows, from what each hospital counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmed_flower.metrics.auc import (
    BINS,
    EDGES,
    MERGED,
    UNTOLD,
    bounded_auc,
    merged_auc,
    merged_precision,
)
from fedmed_flower.metrics.classification import Value, classes_of_noised, noised_metrics, rates_of
from fedmed_flower.metrics.names import (
    CALIBRATION,
    CALIBRATION_BINS,
    CONFUSION,
    COUNT,
    COUNTS,
    DICE,
    GRID,
    HIGH,
    LOW,
    NOISED,
    NOISED_DICE,
    NOISED_ERRORS,
    PAIRS,
    RATES,
    SUMMABLE,
    SUMS,
    TARGET,
    WORST,
    in_groups,
)
from fedmed_flower.metrics.outcomes import (
    calibration_error,
    explained,
    is_number,
    noised_error_metrics,
)
from fedmed_flower.metrics.segmentation import dice_of

# Figures of which the mean over rows is that over all hospitals' rows.
_MEANS = ("brier", "integrated-brier")
# Squares of larger sums, added up, are beyond all floats.
_MOST = 1e100


def check_counts(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the counts that a site sent for `pool`; None if nothing is."""
    most = record.get("num-examples")
    most = most if isinstance(most, int | float) else 0
    for group, part in in_groups(record).items():
        rows = part.get("num-examples", 0)
        if group and not (isinstance(rows, int | float) and 0 <= rows <= most):
            return f"num-examples{group} must be a number from 0 to num-examples = {most}"
        if (reason := _check_counts(part) or check_sums(part)) is not None:
            return f"{reason}, in {group}" if group else reason
    return None


def _check_counts(record: Mapping[str, Any]) -> str | None:
    return _check_noised(record) or _check_classes(record)


def _check_noised(record: Mapping[str, Any]) -> str | None:
    counts, dice = record.get(NOISED), record.get(NOISED_DICE)
    if counts is not None and not (_are_counts(counts) and classes_of_noised(len(counts))):
        return f"{NOISED} must be a list of finite numbers of a length that {NOISED} can have"
    if dice is not None and not (_are_counts(dice) and len(dice) > 1):
        return f"{NOISED_DICE} must be a list of two or more finite numbers"
    return None


def _check_classes(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the confusion matrix and the histograms of the scores."""
    lists: list[Any] = [record.get(key) for key in SUMMABLE]
    if all(values is None for values in lists):
        return None
    confusion, grid, counts = lists
    # A hospital that tells coarsely may keep the confusion matrix back.
    withheld = confusion is None and isinstance(counts, list) and MERGED in counts
    if not all(isinstance(values, list) for values in (lists[1:] if withheld else lists)):
        return f"{', '.join(SUMMABLE)} must be lists, and all or none of them sent"
    rows = record.get("num-examples")
    if withheld:
        return check_histograms(grid, counts, len(grid) // 3, rows)
    num_classes = math.isqrt(len(confusion))
    if num_classes < 2 or num_classes**2 != len(confusion):
        return f"{CONFUSION} has {len(confusion)} entries, which is no square of 2 or more classes"
    if not all(type(count) is int and count >= 0 for count in confusion):
        return f"{CONFUSION} must be whole numbers of at least 0"
    if sum(confusion) != rows:
        return f"{CONFUSION} do not add up to num-examples = {rows}"
    return check_histograms(grid, counts, 1 if num_classes == 2 else num_classes, rows)


def _are_counts(values: Any) -> bool:
    """Return whether these are numbers that can be added up: nobody counts beyond 1e12."""
    return isinstance(values, list) and all(abs(value) <= 1e12 for value in values)


def pool(records: Sequence[dict[str, Value]]) -> dict[str, float]:
    """Return the figures over all hospitals' rows together from what each hospital counted.

    Parameters
    ----------
    records : sequence of dict
        As `classification_metrics`, `outcome_metrics` or `site_scores` return them, all of one
        number of classes; or all with noised counts or errors.

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

        If a hospital tells coarsely, the AUC of all rows lies between ``auc-low`` and
        ``auc-high`` (to three digits, rounded outwards), whatever the order of rows that share a
        bin; ``auc`` is an estimate. Left out then are the average precision, and what follows from
        counts that one of the hospitals keeps back.

    Examples
    --------
    Log odds of the disease, at two hospitals.

    >>> from fedmed_flower.metrics.classification import classification_metrics
    >>> north = classification_metrics([0, 0, 1, 1], [[-2.0], [1.0], [0.5], [3.0]])
    >>> south = classification_metrics([0, 1, 1], [[-1.0], [-0.5], [2.0]])
    >>> together = pool([north, south])
    >>> int(together["num-examples"]), round(together["sensitivity"], 3), round(together["auc"], 3)
    (7, 0.75, 0.833)
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
    """Return the records with these lists; none if their lengths differ."""
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
    if len(reported := _holding(records, CONFUSION)) == len(records):
        total = np.sum([np.asarray(record[CONFUSION]) for record in reported], axis=0)
        num_classes = round(len(total) ** 0.5)
        metrics = rates_of(total.reshape(num_classes, num_classes))
    grids = np.asarray([record[GRID] for record in records]).reshape(len(records), -1, 3)
    counts = np.asarray([record[COUNTS] for record in records], dtype=np.float64)
    counts = counts.reshape(len(records), -1, 2, BINS)
    edges = grids[..., :1] + grids[..., 1:2] * EDGES
    classes = range(grids.shape[1])
    # With one hospital, use the value that it computed itself.
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


def check_histograms(grid: list[Any], counts: list[Any], num_scores: int, rows: Any) -> str | None:
    """Return what is wrong with what a site sent of so many scores; None if nothing is.

    Parameters
    ----------
    grid, counts : list
        As `fine_histograms` or `coarse_histograms` return them, of one score after the other.
    num_scores : int
        At least 1.
    rows : int
        How many there are.
    """
    if (len(grid), len(counts)) != (3 * num_scores, 2 * BINS * num_scores) or num_scores == 2:
        return f"{GRID} and {COUNTS} have {len(grid)} and {len(counts)} entries"
    if not all(type(count) is int and count >= MERGED for count in counts):
        return f"{COUNTS} must be whole numbers of at least 0, or {MERGED} in a bin that is merged"
    if MERGED in counts[::BINS]:
        return f"{COUNTS} must begin each histogram with a bin of its own"
    counted = sum(count for count in counts if count != MERGED)
    if not isinstance(rows, int | float) or counted != rows * num_scores:
        return f"{COUNTS} do not add up to num-examples = {rows}"
    return _check_grid(grid, merged=MERGED in counts)


def _check_grid(grid: list[float], merged: bool) -> str | None:
    """Return what is wrong with centre, width and AUC, which follow each other for each score."""
    centres, widths, aucs = grid[0::3], grid[1::3], grid[2::3]
    farthest = float(EDGES[-1])
    ends = [abs(c) + width * farthest for c, width in zip(centres, widths, strict=True)]
    if not all(map(math.isfinite, (*grid, *ends))) or min(widths) <= 0:
        return f"{GRID} must be finite, with widths above 0"
    if not all(0 <= auc <= 1 or (auc == UNTOLD and merged) for auc in aucs):
        return f"{GRID} names an AUC outside 0 to 1"
    return None


def pool_masks(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what is no weighted mean of several hospitals' figures: empty if nothing is.

    Parameters
    ----------
    records : sequence of dict
        As `site_scores` or `dice_of` return them, those with `noised_dice`.
    """
    if NOISED_DICE in records[0]:
        names = [key for key in records[0] if key.startswith(f"{DICE}-") and key != WORST]
        sums = np.sum([np.asarray(record[NOISED_DICE]) for record in records], axis=0)
        if len(sums) != 1 + len(names):
            # One site omitted a class, so the sums can no longer be matched to classes.
            names, sums = [], sums[:1]
        return dice_of(sums, [name.removeprefix(f"{DICE}-") for name in names])
    if isinstance(records[0].get(WORST), int | float):
        return {WORST: min(float(record[WORST]) for record in records)}
    return {}


def check_sums(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the sums that a site sent of one group; None if nothing is."""
    rows = record.get("num-examples")
    for key, length in SUMS.items():
        if (values := record.get(key)) is None:
            continue
        fits = isinstance(values, list) and len(values) == length
        if not (fits and all(abs(value) <= _MOST for value in values)):
            return f"{key} must be a list of {length} finite numbers"
        if key == NOISED_ERRORS:
            continue
        # The mean of numbers may be anything.
        if min(values[:1] + values[2:] if key == TARGET else values) < 0:
            return f"{key} must hold no number below 0"
        if key == PAIRS and values[0] + values[1] > values[2]:
            return f"{key} must not count more pairs than can be compared"
        # Sums of fractions round to a hair above.
        if key == CALIBRATION and any(
            max(values[index + 1 : index + 3]) > values[index] * (1 + 1e-9)
            for index in range(0, length, 3)
        ):
            return f"{key} must hold no sum above the number of rows of its bin"
        counted = sum(values[::3]) if key == CALIBRATION else values[0]
        if key != PAIRS and not counted == rows != 0:
            return f"{key} is not of num-examples = {rows} rows"
    return None


def pool_outcomes(records: Sequence[Mapping[str, Any]], every: bool = False) -> dict[str, float]:
    """Return the figures over the rows of those hospitals that sent the sums, for one group.

    Parameters
    ----------
    records : sequence of dict
        Without the group in the names.
    every : bool
        Whether to give the mean over rows also of figures for which that is an approximation.
    """
    counted = [record for record in records if is_number(record.get("num-examples"))]
    names = {name for record in counted for name in record} if every else {*_MEANS}
    figures: dict[str, float] = {}
    for name in sorted(names - {"num-examples"}):
        kept = [record for record in counted if is_number(record.get(name))]
        if total := float(sum(record["num-examples"] for record in kept)):
            figures[name] = float(sum(one[name] * (one["num-examples"] / total) for one in kept))
    for key in (CALIBRATION, TARGET, COUNT, PAIRS):
        sums = np.asarray([record[key] for record in records if key in record], dtype=np.float64)
        total = sums.sum(axis=0)
        if len(sums) and key == CALIBRATION:
            figures["calibration-error"] = calibration_error(total.reshape(CALIBRATION_BINS, 3))
        elif len(sums) and key == PAIRS and total[2]:
            figures["c-index"] = float((total[0] + total[1] / 2) / total[2])
        elif len(sums) and key != PAIRS:
            figures |= explained(key, sums)
    return {name: value for name, value in figures.items() if math.isfinite(value)}
