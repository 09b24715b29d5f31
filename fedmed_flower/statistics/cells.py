"""The cells of a table, chosen so that each has no patient or at least the minimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedmed_flower.statistics.fewest import class_codes, fewest, numbered, one_row_each, patients_of
from fedmed_flower.statistics.types import Codes, Floats, Mask

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

    On a finer grid the edges between merged cells would be the values of single patients. The
    fullest cell does not count: where most rows have one value, such as 0, any grid would do.
    """
    classes = class_codes(cells)
    rows = np.bincount(classes)
    if not rows.size:
        return True
    rows[rows.argmax()] = 0
    patients = patients_of(classes, patient_of_row)
    return bool(2 * rows[patients >= minimum].sum() >= rows.sum())


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
    distinct, bin_of_row = numbered(steps)
    seen = [_seen(bin_of_row, codes, patient_of_row) for codes in constraints]
    too_few_left = np.zeros(distinct.size, bool)
    for one in seen:
        too_few_left |= one.leaves_too_few(distinct.size, minimum)
    held = [np.zeros(one.classes, np.int64) for one in seen]
    merged: list[tuple[int, int]] = []
    first = 0
    for last in range(distinct.size):
        for one, patients in zip(seen, held, strict=True):
            one.add(patients, last, first)
        full = all(((counts == 0) | (counts >= minimum)).all() for counts in held)
        if full and not too_few_left[last]:
            merged.append((int(distinct[first]), int(distinct[last])))
            first = last + 1
            for counts in held:
                counts[:] = 0
    return merged if first == distinct.size else None


@dataclass(frozen=True)
class _Seen:
    """In which bins the patients of some classes are seen, ordered by bin.

    Attributes
    ----------
    bins, codes : ndarray
        A bin, and a class of which patients are seen in it.
    before : ndarray
        The bin in which they were seen before in that class; -1 if in none.
    patients : ndarray
        How many patients.
    at_last : ndarray of bool
        Whether they are not seen in a later bin.
    classes : int
        The number of classes.
    """

    bins: Codes
    codes: Codes
    before: Codes
    patients: Codes
    at_last: Mask
    classes: int

    @cached_property
    def _starts(self) -> list[int]:
        starts: list[int] = np.searchsorted(self.bins, np.arange(int(self.bins[-1]) + 2)).tolist()
        return starts

    def add(self, counts: Codes, last: int, first: int) -> None:
        """Add to the patients of each class those seen in a bin, but not from another one on."""
        part = slice(self._starts[last], self._starts[last + 1])
        new = self.before[part] < first
        np.add.at(counts, self.codes[part][new], self.patients[part][new])

    def leaves_too_few(self, count: int, minimum: int) -> Mask:
        """Return for each bin whether a class has patients behind it, but too few for a bin."""
        changes = np.zeros(count + 1, np.int64)
        order = np.lexsort((self.bins[self.at_last], self.codes[self.at_last]))
        bins = self.bins[self.at_last][order]
        codes = self.codes[self.at_last][order]
        patients = np.cumsum(self.patients[self.at_last][order])
        # For each class: where its last patients are seen, and where those begin to be too few.
        ends = np.flatnonzero(np.diff(codes, append=-1))
        before = np.concatenate(([0], patients[ends][:-1]))
        few = patients[ends] - minimum
        places = np.searchsorted(patients, few, side="right")
        np.add.at(changes, np.where(few < before, 0, bins[places]), 1)
        np.add.at(changes, bins[ends], -1)
        return np.cumsum(changes)[:count] > 0


def _seen(bin_of_row: Codes, codes: Codes, patient_of_row: Codes) -> _Seen:
    distinct, codes = numbered(codes)
    classes = distinct.size
    if one_row_each(patient_of_row):
        pairs, numbers = numbered(bin_of_row * classes + codes)
        bins, codes = np.divmod(pairs, classes)
        patients = np.bincount(numbers)
        before = np.full(bins.size, -1)
        return _Seen(bins, codes, before, patients, np.ones(bins.size, bool), classes)
    members = class_codes(codes, patient_of_row)
    width = int(bin_of_row.max()) + 1
    visits, first_rows = np.unique(members * width + bin_of_row, return_index=True)
    same = np.diff(visits // width) == 0
    bins = visits % width
    before = np.where(np.concatenate(([False], same)), np.concatenate(([-1], bins[:-1])), -1)
    at_last = ~np.concatenate((same, [False]))
    order = np.argsort(bins, kind="stable")
    return _Seen(
        bins[order],
        codes[first_rows][order],
        before[order],
        np.ones(bins.size, np.int64),
        at_last[order],
        classes,
    )


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
