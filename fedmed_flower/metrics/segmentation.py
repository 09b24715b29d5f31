"""Metrics of masks: Dice, 95% Hausdorff distance and surface Dice, for a patient and for a site.

Every patient counts in every metric. If a structure is neither in the truth nor in the guess, Dice
and surface Dice are 1 and the distance is 0. If it is missed or invented, Dice and surface Dice are
0 and the distance is the image's diagonal, the largest possible.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.names import DICE, HD95, SURFACE, WORST
from fedmed_flower.privacy.noise import noised_once


def mask_scores(
    truth: ArrayLike,
    guess: ArrayLike,
    classes: Sequence[str],
    spacing: Sequence[float],
    tolerance: float = 1.0,
) -> dict[str, float]:
    """Compare one patient's mask with the truth.

    Parameters
    ----------
    truth, guess : integer array of shape (*spatial)
        2D or 3D; 0 is the background.
    classes : sequence of str
        Names of the classes 1, 2, ...
    spacing : sequence of float
        Millimetres between voxels, one number an axis.
    tolerance : float
        Largest distance in millimetres at which an outline counts as right; at least 0.

    Returns
    -------
    dict
        ``dice-NAME``, ``hd95-NAME`` (millimetres) and ``surface-dice-NAME`` of each class. MONAI
        computes them if truth and guess both have the class.

    Raises
    ------
    InputError
        If the shapes of the masks differ, or there is not one spacing an axis.
    """
    first = np.asarray(truth)
    second = np.asarray(guess)
    if first.shape != second.shape or first.ndim != len(spacing):
        raise InputError(
            f"truth has the shape {first.shape} and guess {second.shape}, with {len(spacing)} "
            "spacings: the shapes must be the same, and each axis has one spacing"
        )
    numbers = range(1, 1 + len(classes))
    pairs = ((first == number, second == number) for number in numbers)
    return _scores(classes, pairs, spacing, tolerance)


def region_scores(
    truth: ArrayLike,
    guess: ArrayLike,
    regions: Sequence[str],
    spacing: Sequence[float],
    tolerance: float = 1.0,
) -> dict[str, float]:
    """Compare one patient's regions, which may overlap, with the truth.

    Parameters
    ----------
    truth, guess : integer array of shape (regions, *spatial)
        2D or 3D; 1 inside a region, 0 outside.
    regions : sequence of str
        Names of the regions.
    spacing, tolerance
        As in `mask_scores`.

    Returns
    -------
    dict
        As `mask_scores`, of each region.

    Raises
    ------
    InputError
        If the shapes of the masks differ, or there is not one channel a region and one spacing an
        axis.
    """
    first = np.asarray(truth) > 0
    second = np.asarray(guess) > 0
    wanted = (len(regions), 1 + len(spacing))
    if first.shape != second.shape or (len(first), first.ndim) != wanted:
        raise InputError(
            f"truth has the shape {first.shape} and guess {second.shape}, with {len(spacing)} "
            f"spacings: both must have {len(regions)} channels, one for each of "
            f"{', '.join(regions)}, and the same shape, and each axis has one spacing"
        )
    return _scores(regions, zip(first, second, strict=True), spacing, tolerance)


def _scores(
    names: Sequence[str],
    pairs: Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    spacing: Sequence[float],
    tolerance: float,
) -> dict[str, float]:
    """Return the metrics of each structure from its masks, the truth and the guess."""
    scores: dict[str, float] = {}
    for name, pair in zip(names, pairs, strict=True):
        length = math.hypot(*np.multiply(pair[0].shape, spacing))
        in_truth, in_guess = (bool(mask.any()) for mask in pair)
        if in_truth and in_guess:
            dice, distance, surface = _compare(*pair, spacing, tolerance)
        elif in_truth or in_guess:
            dice, distance, surface = 0.0, length, 0.0
        else:
            dice, distance, surface = 1.0, 0.0, 1.0
        scores |= {
            f"{DICE}-{name}": dice,
            f"{HD95}-{name}": distance,
            f"{SURFACE}-{name}": surface,
        }
    return scores


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the patients."""
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def site_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means over a site's patients, overall and for each class, and the worst patient.

    Parameters
    ----------
    scores : sequence of dict
        As `mask_scores` returns them; at least one.

    Returns
    -------
    dict
        ``num-examples``, ``dice``, ``hd95``, ``surface-dice`` (means over classes and patients),
        ``dice-worst`` (the lowest mean over classes of a patient), and each class's means.
    """
    means = mean_scores(scores)
    overall = {
        kind: float(
            np.mean([value for name, value in means.items() if name.startswith(f"{kind}-")])
        )
        for kind in (DICE, HD95, SURFACE)
    }
    return {"num-examples": len(scores), **overall, WORST: min(map(patient_dice, scores)), **means}


def patient_dice(scores: Mapping[str, float]) -> float:
    """Return the mean Dice over the classes of one patient."""
    return float(np.mean([value for name, value in scores.items() if name.startswith(f"{DICE}-")]))


def noised_dice(
    scores: Sequence[Mapping[str, float]],
    patients: Sequence[Hashable],
    noise_multiplier: float,
    classes: Sequence[str],
) -> list[float]:
    """Add up patients and their Dice, with noise that hides each patient.

    Each patient's records together have weight 1. So adding or removing a patient changes the sums
    by at most the root of the number of classes + 1, in Euclidean length.

    Parameters
    ----------
    scores : sequence of n dicts
        As `mask_scores` returns them.
    patients : sequence of n hashables
    noise_multiplier : float
        Standard deviation of the noise in units of that length; at least 0.
    classes : sequence of str
        As in `mask_scores`.

    Returns
    -------
    list of float
        For `dice_of`: the number of patients, then each class's sum.
    """
    names = [f"{DICE}-{name}" for name in classes]
    rows = np.asarray([[1.0, *(one[name] for name in names)] for one in scores])
    rows = rows.reshape(len(scores), 1 + len(names))
    row_counts = Counter(patients)
    share = np.asarray([1 / row_counts[patient] for patient in patients])
    sums: NDArray[np.float64] = share @ np.clip(rows, 0.0, 1.0)
    noised = noised_once(sums, noise_multiplier * math.sqrt(sums.size))
    return [float(value) for value in noised]


def dice_of(sums: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """Return the metrics that follow from `noised_dice` of one hospital, or the sum of several."""
    count, *totals = np.asarray(sums, dtype=np.float64)
    if not math.isfinite(count) or round(count) < 1:
        return {"num-examples": 0.0}
    means = [float(np.clip(total / count, 0.0, 1.0)) for total in totals]
    named = {f"{DICE}-{name}": mean for name, mean in zip(classes, means, strict=True)}
    overall = {DICE: float(np.mean(means))} if means else {}
    return {"num-examples": float(round(count)), **overall, **named}


def _compare(
    truth: NDArray[np.bool_], guess: NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> tuple[float, float, float]:
    """Return Dice, 95% Hausdorff distance and surface Dice of two masks that are not empty."""
    # Imported here because they take seconds to load, and a server does not need them.
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    pair = {"y": torch.from_numpy(truth)[None, None].float()}
    pair["y_pred"] = torch.from_numpy(guess)[None, None].float()
    grid: Any = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        # MONAI warns of arguments that it passes to itself.
        warnings.simplefilter("ignore", FutureWarning)
        return (
            float(compute_dice(**pair, include_background=True)),
            float(compute_hausdorff_distance(**pair, **grid, percentile=95)),
            float(compute_surface_dice(**pair, **grid, class_thresholds=[tolerance])),
        )
