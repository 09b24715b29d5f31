"""Metrics of several findings in one image, each for the rows in which it was read.

A metric of one finding has it in its name, as one of a group of patients has the group:
``auc@finding=edema``. So each finding is pooled, summed and made coarse like a group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.metrics.classification import noised_counts, noised_metrics
from fedmed_flower.metrics.names import FINDING, HIGH, LOW, NOISED, in_groups, is_pooled_only
from fedmed_flower.metrics.outcomes import outcome_metrics

# What has a mean over findings.
_AVERAGED = (
    "auc",
    "average-precision",
    "brier",
    "calibration-error",
    "sensitivity",
    "specificity",
)


def finding_metrics(
    findings: Sequence[str],
    truth: ArrayLike,
    logits: ArrayLike,
    patients: Sequence[Hashable],
    reported: Sequence[Collection[int]],
    coarse: bool = False,
) -> dict[str, Any]:
    """Measure each finding on the rows of one hospital in which it was read.

    Parameters
    ----------
    findings : sequence of f texts
    truth : array of shape (n, f)
        1 if the finding is there, 0 if not, NaN if it was not read.
    logits : array of shape (n, f)
        Log-odds of each finding.
    patients : sequence of n hashables
    reported : sequence of f collections of int
        The rows by which each finding may be measured; of these, those count in which it was read.
    coarse : bool
        As `outcome_metrics` takes it.

    Returns
    -------
    dict
        ``num-examples``, the `outcome_metrics` of each finding that has a row, and
        `mean_over_findings`.
    """
    labels = np.asarray(truth, dtype=np.float64)
    outputs = np.asarray(logits, dtype=np.float64)
    metrics: dict[str, Any] = {}
    for number, name in enumerate(findings):
        rows = [row for row in sorted(reported[number]) if not math.isnan(labels[row, number])]
        if not rows:
            continue
        of_rows = [patients[row] for row in rows]
        measured = outcome_metrics(
            "binary", labels[rows, number], outputs[rows, number], of_rows, coarse
        )
        metrics |= {f"{key}@{FINDING}={name}": value for key, value in measured.items()}
    return {"num-examples": len(labels)} | mean_over_findings(metrics) | metrics


def noised_findings(
    findings: Sequence[str],
    truth: NDArray[np.float32],
    logits: NDArray[np.float32],
    patients: Sequence[Hashable],
    noise_multiplier: float,
) -> dict[str, Any]:
    """Count each finding's scores, with noise that hides each patient.

    A patient changes the counts of each finding by at most 1, in Euclidean length, and those of all
    f findings together by at most the root of f. Whether a finding was read in a row is hidden too.

    Parameters
    ----------
    findings, truth, logits, patients
        As `finding_metrics` takes them.
    noise_multiplier : float
        Standard deviation of the noise in units of that length; at least 0.

    Returns
    -------
    dict
        The counts of each finding, and the metrics that follow. ``num-examples`` of all rows is
        that of the finding that was read in most.
    """
    noise = noise_multiplier * math.sqrt(len(findings))
    metrics: dict[str, Any] = {}
    for number, name in enumerate(findings):
        rows = np.flatnonzero(~np.isnan(truth[:, number])).tolist()
        of_rows = [patients[row] for row in rows]
        counts = noised_counts(truth[rows, number], logits[rows, number, None], of_rows, noise)
        measured = noised_metrics(counts) | {NOISED: counts}
        metrics |= {f"{key}@{FINDING}={name}": value for key, value in measured.items()}
    most = max(metrics[f"num-examples@{FINDING}={name}"] for name in findings)
    return {"num-examples": most} | mean_over_findings(metrics) | metrics


def mean_over_findings(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean of each metric over the findings that have it; empty without findings.

    It is empty too if all rows have counts of their own, as those of a table whose groups are
    called findings. Every finding counts the same, however often it was read. If hospitals report
    coarsely, the mean of the AUC lies between the means of the bounds.

    Examples
    --------
    >>> mean_over_findings({"auc@finding=edema": 0.75, "auc@finding=nodule": 0.5})
    {'auc': 0.625}
    """
    groups = in_groups(metrics)
    if any(map(is_pooled_only, groups.get("", ()))):
        return {}
    parts = [part for group, part in groups.items() if group.startswith(f"@{FINDING}=")]
    means: dict[str, float] = {}
    for name in _AVERAGED:
        if values := [part[name] for part in parts if name in part]:
            means[name] = float(np.mean(values))
    if any(LOW in part for part in parts):
        with_auc = [part for part in parts if "auc" in part]
        for bound in (LOW, HIGH):
            means[bound] = float(np.mean([part.get(bound, part["auc"]) for part in with_auc]))
    return means
