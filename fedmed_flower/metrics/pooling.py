"""Metrics over all hospitals' rows, from the counts and sums of each hospital."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmed_flower.metrics.auc import (
    BINS,
    EDGES,
    MERGED,
    UNREPORTED,
    bounded_auc,
    merged_auc,
    merged_precision,
)
from fedmed_flower.metrics.classification import (
    Value,
    classes_of_noised,
    noised_metrics,
    ordered_rates,
    rates_of,
)
from fedmed_flower.metrics.findings import mean_over_findings
from fedmed_flower.metrics.names import (
    CALIBRATION,
    CALIBRATION_BINS,
    CONFUSION,
    COUNT,
    COUNTS,
    DICE,
    GRID,
    HIGH,
    KAPPA,
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
    is_pooled_only,
)
from fedmed_flower.metrics.outcomes import (
    calibration_error,
    explained,
    is_number,
    noised_error_metrics,
)
from fedmed_flower.metrics.segmentation import dice_of

# Metrics that are means over rows: the mean of the hospitals' values, by rows, is exact.
_MEANS = ("brier", "integrated-brier")
# Sums of squares of larger numbers overflow a float.
_MOST = 1e100


def check_counts(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the counts that a site sent for `pool`; None if nothing is."""
    most = record.get("num-examples")
    most = most if isinstance(most, int | float) else 0
    for group, part in in_groups(record).items():
        rows = part.get("num-examples", 0)
        if group and not (isinstance(rows, int | float) and 0 <= rows <= most):
            return f"num-examples{group} must be a number from 0 to num-examples = {most}"
        reason = _check_counts(part) or check_sums(part)
        if reason is not None:
            return f"{reason}, in {group}" if group else reason
    return None


def _check_counts(record: Mapping[str, Any]) -> str | None:
    return _check_noised(record) or _check_classes(record)


def _check_noised(record: Mapping[str, Any]) -> str | None:
    counts = record.get(NOISED)
    dice = record.get(NOISED_DICE)
    if counts is not None and not (_are_counts(counts) and classes_of_noised(len(counts))):
        return f"{NOISED} must be a list of finite numbers whose length fits a number of classes"
    if dice is not None and not (_are_counts(dice) and len(dice) > 1):
        return f"{NOISED_DICE} must be a list of two or more finite numbers"
    return None


def _check_classes(record: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the confusion matrix and the histograms of the scores."""
    lists: list[Any] = [record.get(key) for key in SUMMABLE]
    if all(values is None for values in lists):
        return None
    confusion, grid, counts = lists
    # A hospital that reports coarsely may withhold the confusion matrix.
    withheld = confusion is None and isinstance(counts, list) and MERGED in counts
    expected = lists[1:] if withheld else lists
    if not all(isinstance(values, list) for values in expected):
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
    """Return whether the values are a list of numbers that can be counts: at most 1e12 in size."""
    return isinstance(values, list) and all(abs(value) <= 1e12 for value in values)


def class_counts(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the rows of each class over all hospitals; empty if not every hospital reports them.

    Parameters
    ----------
    records : sequence of dict
        As in `pool`.
    """
    matrices = [record.get(CONFUSION) for record in records]
    sizes = {len(matrix) for matrix in matrices if matrix is not None}
    if None in matrices or len(sizes) != 1:
        return []
    num_classes = math.isqrt(sizes.pop())
    # A row of the matrix is a true class.
    total = np.sum([np.asarray(matrix) for matrix in matrices], axis=0)
    counts: list[int] = total.reshape(num_classes, num_classes).sum(axis=1).tolist()
    return counts


def pool(records: Sequence[dict[str, Value]]) -> dict[str, float]:
    """Return the metrics over all hospitals' rows together, from each hospital's counts and sums.

    Parameters
    ----------
    records : sequence of dict
        As `classification_metrics`, `outcome_metrics` or `site_scores` return them, all of one
        number of classes; or all with noised counts or errors.

    Returns
    -------
    dict
        The same metrics as one hospital's, and the total ``num-examples``, from the records that
        have the counts. For masks, only metrics that are no weighted mean of the hospitals'. Empty
        for other records, or if only some are noised.

        Of several findings (`FindingsClient`), each has its metrics over the hospitals that read
        it, and those of all rows are `mean_over_findings`.

        The AUC is exact for pairs of rows of one hospital, and comes from the histograms for pairs
        of rows of two. It is right to 0.001 for scores with one hump, heavy tails and skew
        included. It can be off by some thousandths if a network crowds its scores into two humps a
        hundred times narrower than their distance.

        The average precision comes from the histograms alone. It is right to 0.002 for scores with
        one hump, and for few distinct scores, with some hundred rows of each class at several
        hospitals. With fewer than 500 rows of the class in all, two rows at the top whose bins
        overlap may change it by 1 / (2 n), n being the number of rows of the class.

        If a hospital reports coarsely, the AUC of all rows lies between ``auc-low`` and
        ``auc-high`` (to three digits, rounded outwards), whatever the order of rows that share a
        bin; ``auc`` is an estimate. The average precision is then left out, and so are metrics that
        follow from counts that a hospital withholds.

    Examples
    --------
    Log odds of the disease at two hospitals:

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
    pooled = {
        name + group: value
        for group, parts in groups.items()
        for name, value in _pool(parts, every=bool(group)).items()
    }
    whole = groups.get("", [])
    if any(is_pooled_only(name) for record in whole for name in record):
        return pooled
    means = mean_over_findings(pooled)
    return pooled | {"num-examples": _rows_of(whole)} | means if means else pooled


def _rows_of(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the number of rows of all hospitals."""
    rows = [record.get("num-examples") for record in records]
    return float(sum(count for count in rows if isinstance(count, int | float)))


def _pool(records: list[dict[str, Any]], every: bool) -> dict[str, float]:
    for key in (NOISED, NOISED_ERRORS, NOISED_DICE):
        if any(key in record for record in records):
            if len(_holding(records, key)) < len(records):
                return {}
            if key == NOISED_DICE:
                return pool_masks(records)
            total = np.sum([np.asarray(record[key]) for record in records], axis=0)
            if key == NOISED:
                return noised_metrics(total, _are_ordered(records))
            return noised_error_metrics(total)
    if masks := [record for record in records if isinstance(record.get(WORST), int | float)]:
        # A hospital that reports coarsely has a worst patient too, but does not report it.
        is_complete = all(WORST in record for record in records if DICE in record)
        return pool_masks(masks) if is_complete else {}
    metrics = pool_outcomes(records, every)
    if counted := _holding(records, GRID, COUNTS):
        withheld = _withheld_metrics(counted)
        metrics = {name: value for name, value in metrics.items() if name not in withheld}
        metrics |= _pool_classes(counted)
    if not metrics:
        return {}
    return {"num-examples": _rows_of(records)} | metrics


def _are_ordered(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the classes of these counts are grades: of other classes none is off by 1."""
    return any("mae" in record for record in records)


def _holding(records: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Return the records that have these lists; an empty list if the lengths differ."""
    holding = [record for record in records if all(key in record for key in keys)]
    lengths = {tuple(len(record[key]) for key in keys) for record in holding}
    return holding if len(lengths) == 1 else []


def _withheld_metrics(records: list[dict[str, Any]]) -> set[str]:
    """Return the metrics for which one of these hospitals withholds its counts."""
    if not any(MERGED in record[COUNTS] for record in records):
        return set()
    withheld = {"average-precision"}
    if any(CONFUSION not in record for record in records):
        withheld.update(RATES, (KAPPA, "mae"))
    if any(CALIBRATION not in record for record in records):
        withheld.add("calibration-error")
    return withheld


def _pool_classes(records: list[dict[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    with_confusion = _holding(records, CONFUSION)
    if len(with_confusion) == len(records):
        total = np.sum([np.asarray(record[CONFUSION]) for record in with_confusion], axis=0)
        num_classes = round(len(total) ** 0.5)
        confusion = total.reshape(num_classes, num_classes)
        metrics = rates_of(confusion)
        if _are_ordered(records):
            metrics |= ordered_rates(confusion)
    grids = np.asarray([record[GRID] for record in records]).reshape(len(records), -1, 3)
    counts = np.asarray([record[COUNTS] for record in records], dtype=np.float64)
    counts = counts.reshape(len(records), -1, 2, BINS)
    edges = grids[..., :1] + grids[..., 1:2] * EDGES
    classes = range(grids.shape[1])
    # With one hospital, use the value that it computed itself.
    alone = records[0] if len(records) == 1 else {}
    if (counts < 0).any():
        bounds = bounded_auc(edges, counts, grids[..., 2], alone.get("auc"))
        if bounds is not None:
            metrics |= dict(zip(("auc", LOW, HIGH), bounds, strict=True))
        return metrics
    by_class = {"auc": [merged_auc(edges[:, c], counts[:, c], grids[:, c, 2]) for c in classes]}
    if any(CALIBRATION in record for record in records):
        precisions = [merged_precision(edges[:, c], counts[:, c]) for c in classes]
        by_class["average-precision"] = precisions
    for name, values in by_class.items():
        known = alone.get(name)
        if not np.isnan(values).any():
            metrics[name] = float(known if isinstance(known, int | float) else np.mean(values))
    return metrics


def check_histograms(grid: list[Any], counts: list[Any], num_scores: int, rows: Any) -> str | None:
    """Return what is wrong with the histograms that a site sent; None if nothing is.

    Parameters
    ----------
    grid, counts : list
        As `fine_histograms` or `coarse_histograms` return them, for one score after the other.
    num_scores : int
        How many scores a row has; at least 1.
    rows : int
        How many rows the site has.
    """
    if (len(grid), len(counts)) != (3 * num_scores, 2 * BINS * num_scores) or num_scores == 2:
        return f"{GRID} and {COUNTS} have {len(grid)} and {len(counts)} entries"
    # Lists of thousands: each pass is one of the interpreter's own functions.
    if {*map(type, counts)} != {int} or min(counts) < MERGED:
        return f"{COUNTS} must be whole numbers of at least 0, or {MERGED} in a bin that is merged"
    if MERGED in counts[::BINS]:
        return f"{COUNTS} must begin each histogram with a bin of its own"
    counted = sum(counts) - MERGED * counts.count(MERGED)
    if not isinstance(rows, int | float) or counted != rows * num_scores:
        return f"{COUNTS} do not add up to num-examples = {rows}"
    return _check_grid(grid, merged=MERGED in counts)


def _check_grid(grid: list[float], merged: bool) -> str | None:
    """Return what is wrong with a grid: centre, width and AUC for one score after the other."""
    centres = grid[0::3]
    widths = grid[1::3]
    aucs = grid[2::3]
    farthest = float(EDGES[-1])
    ends = [abs(c) + width * farthest for c, width in zip(centres, widths, strict=True)]
    if not all(map(math.isfinite, (*grid, *ends))) or min(widths) <= 0:
        return f"{GRID} must be finite, with widths above 0"
    if not all(0 <= auc <= 1 or (auc == UNREPORTED and merged) for auc in aucs):
        return f"{GRID} names an AUC outside 0 to 1"
    return None


def pool_masks(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return those pooled metrics of masks that are not weighted means of the hospitals' metrics.

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
            names = []
            sums = sums[:1]
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
        # The mean of numbers, the second value, may be below 0.
        not_negative = values[:1] + values[2:] if key == TARGET else values
        if min(not_negative) < 0:
            return f"{key} must hold no number below 0"
        if key == PAIRS and values[0] + values[1] > values[2]:
            return f"{key} must not count more pairs than can be compared"
        if key == CALIBRATION and not _is_calibration(values):
            return f"{key} must hold no sum above the number of rows of its bin"
        counted = sum(values[::3]) if key == CALIBRATION else values[0]
        if key != PAIRS and not counted == rows != 0:
            return f"{key} is not of num-examples = {rows} rows"
    return None


def _is_calibration(sums: list[float]) -> bool:
    """Return whether no bin's sum, of probabilities or of events, is above its number of rows."""
    bins = zip(sums[0::3], sums[1::3], sums[2::3], strict=True)
    # Sums of fractions round to a hair above.
    return all(max(expected, events) <= rows * (1 + 1e-9) for rows, expected, events in bins)


def pool_outcomes(records: Sequence[Mapping[str, Any]], every: bool = False) -> dict[str, float]:
    """Return the metrics of one group over the rows of the hospitals that sent the sums.

    Parameters
    ----------
    records : sequence of dict
        One hospital's metrics and sums each, without the group in the names.
    every : bool
        Whether to return the mean over rows also of metrics for which it is an approximation.
    """
    counted = [record for record in records if is_number(record.get("num-examples"))]
    names = {name for record in counted for name in record} if every else {*_MEANS}
    metrics: dict[str, float] = {}
    for name in sorted(names - {"num-examples"}):
        sent = [record for record in counted if is_number(record.get(name))]
        if total := float(sum(record["num-examples"] for record in sent)):
            metrics[name] = float(sum(one[name] * (one["num-examples"] / total) for one in sent))
    for key in (CALIBRATION, TARGET, COUNT, PAIRS):
        sums = np.asarray([record[key] for record in records if key in record], dtype=np.float64)
        total = sums.sum(axis=0)
        if len(sums) and key == CALIBRATION:
            metrics["calibration-error"] = calibration_error(total.reshape(CALIBRATION_BINS, 3))
        elif len(sums) and key == PAIRS and total[2]:
            metrics["c-index"] = float((total[0] + total[1] / 2) / total[2])
        elif len(sums) and key != PAIRS:
            metrics |= explained(key, sums)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
