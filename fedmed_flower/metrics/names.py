"""Names of figures and of the sums behind them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Of each class a grid (centre, width, AUC of the site's own rows), and the counts on it.
GRID, COUNTS = "score-grid", "score-counts"
DICE, HD95, SURFACE = "dice", "hd95", "surface-dice"
WORST = "dice-worst"
# Sums over patients with noise: how many they are, then the Dice of each class.
NOISED_DICE = "noised-dice"
# Of each bin of the probability: rows, the sum of their probabilities, how many came true.
CALIBRATION = "calibration-sums"
# Rows, the target's mean and spread (squared differences to the mean, or null deviance), what the
# model leaves of it (squared errors, or deviance), absolute errors.
TARGET, COUNT = "target-sums", "count-sums"
# Pairs within a hospital: in the right order, tied, and all of them.
PAIRS = "concordance-pairs"
# Sums over patients with noise: how many they are, then their mean absolute errors.
NOISED_ERRORS = "noised-errors"
CALIBRATION_BINS = 10
# How many numbers each is.
SUMS = {CALIBRATION: 3 * CALIBRATION_BINS, TARGET: 5, COUNT: 5, PAIRS: 3, NOISED_ERRORS: 2}
CONFUSION = "confusion-counts"
SUMMABLE = (CONFUSION, GRID, COUNTS)
# Between which the AUC lies where a hospital tells coarsely.
LOW, HIGH = "auc-low", "auc-high"
# What follows from the confusion matrix.
RATES = ("accuracy", "balanced-accuracy", "sensitivity", "specificity")
# Under privacy the bins must not depend on the patients. Log-odds; the threshold 0 is an edge.
NOISED = "noised-counts"
# What only `pool` makes use of, also with a group in the name.
POOLED_ONLY = (*SUMMABLE, NOISED, NOISED_DICE, *SUMS)
# By which a run is judged: the first that it has.
MAIN = ("auc", "dice", "c-index", "r2", "d2", "accuracy", "mae", "loss")
# Metrics whose names start with one of these are better when lower.
_LOWER = ("loss", "hd95", "mae", "rmse", "brier", "integrated-brier", "calibration", "deviance")


def lower_is_better(name: str) -> bool:
    """Return whether a figure is an error."""
    return name.startswith(_LOWER)


def main_metric(names: Collection[str]) -> str:
    """Return the figure by which a run with such metrics is judged; the loss if none is known."""
    return next((name for name in MAIN if name in names), MAIN[-1])


def is_pooled_only(name: str) -> bool:
    """Return whether a metric, of all rows or of a group, is no figure but for `pool`."""
    return name.partition("@")[0] in POOLED_ONLY


def in_groups(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split figures by the group that their names end in: ``@column=value``, empty for all rows."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        name, _, group = key.partition("@")
        if "=" in group:
            parts.setdefault(f"@{group}", {})[name] = value
        else:
            parts.setdefault("", {})[key] = value
    return parts
