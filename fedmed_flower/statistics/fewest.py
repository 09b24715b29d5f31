"""How many patients are in classes of rows, and in linear combinations of classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.statistics.types import Codes

# Patients times classes that are searched together; a larger search is refused.
_MOST_SPREAD = 10**7
_ROUNDING = 1e-6
# Up to so many times the number of codes, a counter for each possible code is cheap.
_MOST_SPAN = 8


def numbered(codes: Codes) -> tuple[Codes, Codes]:
    """Return the distinct codes, ascending, and for each code its number among them."""
    if not codes.size:
        return codes, codes
    low = int(codes.min())
    high = int(codes.max())
    if low == high:
        return codes[:1], np.zeros(codes.size, np.int64)
    if high - low >= _MOST_SPAN * codes.size:
        # One code, such as that of missing values, may lie far above the others.
        far = codes == high
        if not far.all() and (below := int(codes[~far].max()) + 1) - low < _MOST_SPAN * codes.size:
            distinct, numbers = numbered(np.where(far, below, codes))
            return np.append(distinct[:-1], high), numbers
        distinct, numbers = np.unique(codes, return_inverse=True)
        return distinct, numbers.astype(np.int64)
    # To count is faster than to sort.
    shifted = codes - low
    occurs = np.bincount(shifted) > 0
    numbers = np.cumsum(occurs) - 1
    return np.flatnonzero(occurs) + low, numbers[shifted]


def class_codes(*labels: Codes) -> Codes:
    """Number the combinations of labels that occur."""
    codes = np.zeros(labels[0].size, np.int64)
    for label in labels:
        distinct, numbers = numbered(label)
        if distinct.size > 1:
            codes = numbered(codes * distinct.size + numbers)[1]
    return codes


def patients_of(classes: Codes, patient_of_row: Codes) -> Codes:
    """Return the number of patients in each class, from 0 to the highest."""
    if not classes.size:
        return np.zeros(0, np.int64)
    if one_row_each(patient_of_row):
        return np.bincount(classes)
    width = int(patient_of_row.max()) + 1
    return np.bincount(np.unique(classes * width + patient_of_row) // width).astype(np.int64)


def one_row_each(patient_of_row: Codes) -> bool:
    """Return whether no patient has several rows."""
    return int(np.bincount(patient_of_row).max(initial=0)) < 2


def fewest(classes: Codes, patient_of_row: Codes) -> float:
    """Return the number of patients in the smallest class; 2**62 if there is no class."""
    counts = patients_of(classes, patient_of_row)
    return float(counts[counts > 0].min(initial=2**62))


def fewest_left(classes: Codes, patient_of_row: Codes, minimum: int) -> float:
    """Search linear combinations of class counts for one that depends on few patients.

    A server that knows how many rows each class has can add and subtract the counts. A patient
    takes part in a combination if the multiples of its rows do not cancel. Three kinds of
    combinations are tried: single classes; differences of two classes; and, among classes that
    share patients, what is left when Gram-Schmidt elimination removes the most frequent pattern of
    rows per patient, again and again.

    Parameters
    ----------
    classes, patient_of_row : ndarray
        (rows,) the class and the patient of each row, from 0 on.
    minimum : int
        If a single class has fewer patients, nothing else is searched. A class in which this many
        patients have all their rows is left out of the search.

    Returns
    -------
    float
        The fewest patients of a combination that was found. If that is below `minimum`, others may
        have fewer still; if not, combinations that were not tried may. 0 if the patients with rows
        in several classes, times those classes, are more than ten million: that is not searched.

    Examples
    --------
    Three patients have a first visit (class 0), and two of them a second one (class 1). Each class
    has two patients or more, yet their difference is one patient.

    >>> import numpy as np
    >>> classes, patient_of_row = np.array([0, 1, 0, 1, 0]), np.array([0, 0, 1, 1, 2])
    >>> fewest(classes, patient_of_row), fewest_left(classes, patient_of_row, minimum=2)
    (2.0, 1.0)
    """
    smallest = fewest(classes, patient_of_row)
    if smallest < minimum or one_row_each(patient_of_row):
        return smallest
    pairs, rows = np.unique(np.stack((patient_of_row, classes)), axis=1, return_counts=True)
    alone = np.bincount(pairs[0])[pairs[0]] == 1
    # No small combination contains a class in which enough patients have all their rows.
    settled = np.bincount(pairs[1][alone], minlength=int(classes.max()) + 1) >= minimum
    unsettled = ~settled[pairs[1]]
    pairs = pairs[:, unsettled]
    rows = rows[unsettled]
    if not rows.size:
        return smallest
    from scipy.sparse.csgraph import connected_components

    patients, columns = (np.unique(part, return_inverse=True)[1] for part in pairs)
    if (patients.max() + 1) * (columns.max() + 1) > _MOST_SPREAD:
        return 0.0
    table = np.zeros((patients.max() + 1, columns.max() + 1))
    table[patients, columns] = rows
    spread, count = np.unique(table, axis=0, return_counts=True)
    for column in spread.T:
        differing = count @ (spread != column[:, None])
        smallest = min(smallest, float(differing[differing > 0].min(initial=2**62)))
    part_count, part_of_class = connected_components(spread.T @ spread > 0, directed=False)
    for number in range(part_count):
        part = spread[:, part_of_class == number]
        inside = part.any(1)
        smallest = min(smallest, _left_at_last(part[inside], count[inside]))
    return smallest


def _left_at_last(spread: NDArray[np.float64], count: Codes) -> float:
    """Return how many patients are left after eliminating pattern by pattern, most frequent first.

    Parameters
    ----------
    spread : array of shape (patterns, classes)
        How many rows a patient with the pattern has in each class.
    count : array of shape (patterns,)
        Patients with each pattern.
    """
    direction = np.random.default_rng(0).normal(size=spread.shape[1])
    while True:
        spread = spread / np.linalg.norm(spread, axis=1, keepdims=True)
        first = np.argmax(np.abs(spread) > _ROUNDING, axis=1)
        spread *= np.sign(spread[np.arange(len(spread)), first])[:, None]
        # Group equal rows by their projection on a fixed random direction.
        kinds = np.unique(np.round(spread @ direction, 6), return_inverse=True)[1]
        commonest = spread[np.argmax(kinds == np.argmax(np.bincount(kinds, count)))]
        rest = spread - np.outer(spread @ commonest, commonest)
        left = np.linalg.norm(rest, axis=1) > _ROUNDING
        if not left.any():
            return float(count.sum())
        spread, count = rest[left], count[left]
