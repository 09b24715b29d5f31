"""Names of metrics and of the sums behind them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# For each class a grid (centre, width, AUC of the site's own rows), and the counts on it.
GRID = "score-grid"
COUNTS = "score-counts"
DICE = "dice"
HD95 = "hd95"
SURFACE = "surface-dice"
WORST = "dice-worst"
# Sums over patients with noise: the number of patients, then the Dice of each class.
NOISED_DICE = "noised-dice"
# For each bin of the probability: rows, the sum of their probabilities, how many came true.
CALIBRATION = "calibration-sums"
# Rows, the target's mean, its spread (squared differences to the mean, or null deviance), the part
# of it that the model does not explain (squared errors, or deviance), absolute errors.
TARGET = "target-sums"
COUNT = "count-sums"
# Pairs within a hospital: in the right order, tied, and all of them.
PAIRS = "concordance-pairs"
# Sums over patients with noise: the number of patients, then their mean absolute errors.
NOISED_ERRORS = "noised-errors"
CALIBRATION_BINS = 10
# How many numbers each list of sums has.
SUMS = {CALIBRATION: 3 * CALIBRATION_BINS, TARGET: 5, COUNT: 5, PAIRS: 3, NOISED_ERRORS: 2}
CONFUSION = "confusion-counts"
SUMMABLE = (CONFUSION, GRID, COUNTS)
# Bounds of the AUC if a hospital reports coarsely.
LOW = "auc-low"
HIGH = "auc-high"
# Metrics that follow from the confusion matrix.
RATES = ("accuracy", "balanced-accuracy", "sensitivity", "specificity")
# Counts with noise, in bins of log-odds that do not depend on the patients; 0 is an edge.
NOISED = "noised-counts"
# Entries that only `pool` uses, with or without a group in the name.
POOLED_ONLY = (*SUMMABLE, NOISED, NOISED_DICE, *SUMS)
# What the server adds to a round's figures: how old the model was that a reply was trained from, in
# rounds, and the time of the virtual clock.
STALENESS = "staleness"
VIRTUAL_SECONDS = "virtual-seconds"
# Of ordered grades: Cohen's kappa with quadratic weights.
KAPPA = "quadratic-kappa"
# What stands in the place of a group's column if not patients are grouped, but what is predicted:
# single findings, and whether a grade is at least the named one.
FINDING = "finding"
GRADE = "grade"
# A run is judged by the first of these that it has.
MAIN = (KAPPA, "auc", "dice", "c-index", "r2", "d2", "accuracy", "mae", "loss")
# Metrics whose names start with one of these are better when lower.
_LOWER = ("loss", "hd95", "mae", "rmse", "brier", "integrated-brier", "calibration", "deviance")


def lower_is_better(name: str) -> bool:
    """Return whether a metric is better when lower."""
    return name.startswith(_LOWER)


def main_metric(names: Collection[str]) -> str:
    """Return the metric by which a run with these metrics is judged; the loss if none is known."""
    return next((name for name in MAIN if name in names), MAIN[-1])


def is_pooled_only(name: str) -> bool:
    """Return whether an entry, of all rows or of a group, is only for `pool` and no metric."""
    return name.partition("@")[0] in POOLED_ONLY


def in_groups(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split metrics by the group in their names: ``@column=value``, or empty for all rows."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        name, _, group = key.partition("@")
        if "=" in group:
            parts.setdefault(f"@{group}", {})[name] = value
        else:
            parts.setdefault("", {})[key] = value
    return parts
