"""The cells of a table, chosen so that each has no patient or at least the minimum."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from fedmed_flower.statistics.fewest import class_codes, fewest, patients_of
from fedmed_flower.statistics.types import Codes, Floats

# From here on, floats cannot distinguish a multiple of a width from the next.
_MOST_STEPS = 2.0**53


def grid(values: Floats, width: float) -> tuple[Codes, float]:
    """Return for each value the k with ``k * width <= value < (k + 1) * width``, and the width.

    The width is doubled if values lie so far from 0 that floats cannot distinguish the edges.
    """
    most = float(np.abs(values).max(initial=0.0))
    while most / width >= _MOST_STEPS:
        width *= 2
    steps = np.floor(values / width)
    # The division may have rounded to the neighbouring step.
    steps -= steps * width > values
    steps += (steps + 1) * width <= values
    return steps.astype(np.int64), width


def coarse_enough(cells: Codes, patient_of_row: Codes, minimum: int) -> bool:
    """Return whether half of the rows lie in cells of at least `minimum` patients.

    On a finer grid the edges between merged cells would be the values of single patients.
    """
    classes = class_codes(cells)
    rows = np.bincount(classes)
    patients = patients_of(classes, patient_of_row)
    return bool(2 * rows[patients >= minimum].sum() >= cells.size)


def merge_neighbours(
    steps: Codes, constraints: Sequence[Codes], patient_of_row: Codes, minimum: int
) -> list[tuple[int, int]] | None:
    """Merge neighbouring bins until each has enough patients of each class that is in it.

    A bin ends as soon as it has enough patients and the rows behind it can still fill a bin.

    Parameters
    ----------
    steps : ndarray
        (rows,) the bin of each row.
    constraints : sequence of ndarray
        (rows,) classes. A bin has no patient of a class, or at least the minimum.
    patient_of_row : ndarray
        (rows,) the patient of each row.
    minimum : int
        The fewest patients of a class in a bin.

    Returns
    -------
    list of (int, int) or None
        First and last step of each bin, in ascending order; no row lies between two bins. None if
        even all steps together have too few patients.
    """
    order = np.argsort(steps, kind="stable")
    ends = np.flatnonzero(np.diff(steps[order], append=np.nan)).tolist()
    patients = patient_of_row[order].tolist()
    classes = [
        [(number, code) for code in codes[order].tolist()]
        for number, codes in enumerate(constraints)
    ]
    # The last row of a patient in a class: behind it, the class has one patient fewer left.
    last = {
        pair: index
        for codes in classes
        for index, pair in enumerate(zip(codes, patients, strict=True))
    }
    left = Counter(key for key, _ in last)
    small_left = {key for key, count in left.items() if count < minimum}
    held: dict[tuple[int, int], set[int]] = defaultdict(set)
    merged: list[tuple[int, int]] = []
    first = 0
    start = 0
    for end in ends:
        for codes in classes:
            for index in range(start, end + 1):
                key = codes[index]
                patient = patients[index]
                held[key].add(patient)
                if last[key, patient] == index:
                    left[key] -= 1
                    if 0 < left[key] < minimum:
                        small_left.add(key)
                    else:
                        small_left.discard(key)
        start = end + 1
        if not small_left and all(len(members) >= minimum for members in held.values()):
            merged.append((int(steps[order[first]]), int(steps[order[end]])))
            first = start
            held = defaultdict(set)
    return None if held else merged


def pool_small(cells: Codes, labels: Codes, patient_of_row: Codes, minimum: int) -> Codes | None:
    """Pool small cells into one, the smallest first, until it has enough patients.

    Parameters
    ----------
    cells : ndarray
        (rows,) 0 or greater.
    labels : ndarray
        (rows,) classes. A cell has no patient of a class, or at least the minimum.
    patient_of_row : ndarray
        (rows,) the patient of each row.
    minimum : int
        The fewest patients of a class in a cell.

    Returns
    -------
    ndarray or None
        (rows,) the cells, -1 for the pooled ones. None if even all cells pooled have too few
        patients.
    """
    cells = cells.copy()
    classes = class_codes(cells, labels)
    small = patients_of(classes, patient_of_row)[classes] < minimum
    cells[np.isin(cells, cells[small])] = -1
    while True:
        pooled = cells == -1
        if fewest(class_codes(labels[pooled]), patient_of_row[pooled]) >= minimum:
            return cells
        left = np.unique(cells[~pooled])
        if not left.size:
            return None
        counts = patients_of(cells[~pooled], patient_of_row[~pooled])
        cells[cells == left[np.argmin(counts[left])]] = -1
