"""Split a dataset among hospitals: by whole patients, and the same for the same seed.

Drawing each label's shares from a Dirichlet distribution is the method of M. Yurochkin et al.,
"Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019,
https://arxiv.org/abs/1905.12022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmed_flower.errors import InputError

Rows = NDArray[np.intp]
_MISSING = {"", "nan", "none", "nat", "<na>"}


def dirichlet_shares(
    num_classes: int, num_sites: int, alpha: float, seed: int
) -> NDArray[np.float64]:
    """Draw how each label is spread over the sites.

    Use the same shares for train, val and test, so that a site is tested on the mix of labels that
    it trains on.

    Parameters
    ----------
    num_classes, num_sites : int
        1 or greater.
    alpha : float
        Above 0, finite: 0.1 gives sites of mostly one label, 100 gives similar sites.
    seed : int
        0 or greater.

    Returns
    -------
    ndarray
        (num_classes, num_sites), each row at least 0 with sum 1.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    _at_least("num_classes", num_classes, 1)
    _at_least("num_sites", num_sites, 1)
    _at_least("seed", seed, 0)
    if not (isinstance(alpha, Real) and 0 < alpha < math.inf):
        raise InputError(f"alpha must be a finite number above 0, got {alpha!r}")
    # Above 1e12 all shares are equal, and far above it their sum overflows.
    spread = np.full(num_sites, min(alpha, 1e12))
    return np.random.default_rng(seed).dirichlet(spread, num_classes)


def split_by_shares(
    labels: ArrayLike,
    shares: ArrayLike,
    seed: int,
    patients: ArrayLike | None = None,
    min_patients: int = 1,
) -> list[Rows]:
    """Give each site its share of the patients of each class.

    A patient's class is the most frequent label of the patient's rows, the smaller one in a tie.
    Shares are rounded to whole patients by largest remainders. A site that then has too few
    patients is given patients of the largest site, drawn at random.

    Parameters
    ----------
    labels : array_like
        (n,) integers from 0 to num_classes - 1.
    shares : array_like
        (num_classes, num_sites), 0 or greater, each row with sum 1, as from `dirichlet_shares`.
    seed : int
        0 or greater; decides which patients a site is given.
    patients : array_like, optional
        (n,) the patient of each row; if left out, each row is a patient.
    min_patients : int
        The fewest patients of a site, 0 or greater.

    Returns
    -------
    list of ndarray
        One array of row numbers a site, ascending; each row is in exactly one of them.

    Raises
    ------
    InputError
        If an argument is out of its range, lengths differ, a patient is missing or there are fewer
        than `min_patients` patients for each site.
    """
    values = _labels(labels)
    matrix = _numbers("shares", shares)
    _at_least("seed", seed, 0)
    _at_least("min_patients", min_patients, 0)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"shares must have shape (num_classes, num_sites), got {matrix.shape}")
    if not (np.all(matrix >= 0) and np.allclose(matrix.sum(axis=1), 1)):
        raise InputError("shares must be 0 or greater with sum 1 in each row")
    num_classes, num_sites = matrix.shape
    if values.size and values.max() >= num_classes:
        raise InputError(
            f"labels must be at most {num_classes - 1}, the last row of shares; got {values.max()}"
        )
    patient_of_row = _patient_numbers(patients, values.size)
    num_patients = int(patient_of_row.max(initial=-1)) + 1
    if num_sites * min_patients > num_patients:
        divisor = "" if min_patients == 1 else f" over {min_patients} (min_patients)"
        raise InputError(
            f"num_sites must be at most {num_patients // min_patients}, the number of patients"
            f"{divisor}; got {num_sites}"
        )
    tally = np.bincount(patient_of_row * num_classes + values, minlength=num_patients * num_classes)
    patient_class = tally.reshape(num_patients, num_classes).argmax(axis=1)
    rng = np.random.default_rng(seed)
    site_of = np.empty(num_patients, np.intp)
    for label, row in enumerate(matrix):
        members = rng.permutation(np.flatnonzero(patient_class == label))
        site_of[members] = np.repeat(np.arange(num_sites), _whole(row, members.size))
    for site in range(num_sites):
        while np.count_nonzero(site_of == site) < min_patients:
            largest = np.bincount(site_of, minlength=num_sites).argmax()
            site_of[rng.choice(np.flatnonzero(site_of == largest))] = site
    return [np.flatnonzero(site_of[patient_of_row] == site) for site in range(num_sites)]


def by_quantity(
    patients: int | ArrayLike, shares: ArrayLike, seed: int, min_patients: int = 1
) -> list[Rows]:
    """Split patients at random into sites of given relative sizes.

    Parameters
    ----------
    patients : int or array_like
        The number of rows, if each is a patient; or (n,) the patient of each row.
    shares : array_like
        (num_sites,) relative sizes, 0 or greater with a sum above 0: [2, 1, 1] is half, quarter,
        quarter of the patients.
    seed, min_patients
        As in `split_by_shares`.

    Return value and errors are those of `split_by_shares`.
    """
    sizes = _numbers("shares", shares)
    if sizes.ndim != 1 or not (np.all(sizes >= 0) and 0 < sizes.sum() < math.inf):
        raise InputError(f"shares must be sizes, 0 or greater with a sum above 0, got {shares!r}")
    names = None if np.ndim(patients) == 0 else np.asarray(patients)
    num_rows = _at_least("patients", patients, 0) if names is None else len(names)
    matrix = sizes[None] / sizes.sum()
    return split_by_shares(np.zeros(num_rows, int), matrix, seed, names, min_patients)


def by_column(values: ArrayLike) -> dict[str, Rows]:
    """Split rows by the hospital that a column names.

    Parameters
    ----------
    values : array_like
        (n,) the hospital's name for each row; read as text without surrounding blanks.

    Returns
    -------
    dict of str to ndarray
        The row numbers of each name, ascending; the names are sorted as texts.

    Raises
    ------
    InputError
        If a name is missing: empty, None or NaN.

    Examples
    --------
    >>> by_column(["Ulm", "Bonn", "Ulm"])
    {'Bonn': array([1]), 'Ulm': array([0, 2])}
    """
    names, numbers = np.unique(_texts("values", values), return_inverse=True)
    return {str(name): np.flatnonzero(numbers == k) for k, name in enumerate(names)}


def counts(
    parts: Sequence[Rows] | Mapping[str, Rows],
    labels: ArrayLike,
    patients: ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """Count what each site holds.

    Parameters
    ----------
    parts : sequence or mapping of ndarray
        From one of the functions above; sites without names are called hospital-1, hospital-2, ...
    labels, patients : array_like
        As in `split_by_shares`.

    Returns
    -------
    list of dict
        A dict a site: "site", "patients", "rows", and "label 0", "label 1", ... up to the greatest
        label of all rows. `format_counts` formats it as a table.

    Raises
    ------
    InputError
        As in `split_by_shares`.
    """
    values = _labels(labels)
    patient_of_row = _patient_numbers(patients, values.size)
    named = (
        parts
        if isinstance(parts, Mapping)
        else {f"hospital-{number}": rows for number, rows in enumerate(parts, start=1)}
    )
    num_classes = int(values.max(initial=-1)) + 1
    return [
        {"site": name, "patients": np.unique(patient_of_row[rows]).size, "rows": len(rows)}
        | {f"label {k}": int(np.count_nonzero(values[rows] == k)) for k in range(num_classes)}
        for name, rows in named.items()
    ]


def format_counts(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table from `counts` as lines of aligned plain text, with a heading.

    Examples
    --------
    >>> print(format_counts(counts({"Ulm": np.array([0, 2])}, [1, 0, 1])))
    site  patients  rows  label 0  label 1
    Ulm          2     2        0        2
    """
    if not table:
        return "no sites"
    lines = [list(table[0]), *([str(cell) for cell in row.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _at_least(name: str, value: Any, bound: int) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < bound:
        raise InputError(f"{name} must be a whole number, {bound} or greater, got {value!r}")
    return int(value)


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must hold numbers, got {values!r}") from error


def _labels(labels: ArrayLike) -> NDArray[np.intp]:
    values = np.asarray(labels)
    if values.ndim != 1:
        raise InputError(f"labels must have shape (n,), got {values.shape}")
    if values.size and (values.dtype.kind not in "ui" or values.min() < 0):
        worst = values.min() if values.dtype.kind == "i" else values.dtype
        raise InputError(f"labels must be whole numbers, 0 or greater, got {worst}")
    return values.astype(np.intp)


def _texts(name: str, values: ArrayLike) -> NDArray[np.str_]:
    column = np.asarray(values)
    if column.ndim != 1:
        raise InputError(f"{name} must have shape (n,), got {column.shape}")
    texts = [str(value).strip() for value in column]
    for row, text in enumerate(texts):
        if text.lower() in _MISSING:
            raise InputError(f'{name} must not be missing in any row; row {row} has "{text}"')
    return np.array(texts, dtype=np.str_)


def _patient_numbers(patients: ArrayLike | None, num_rows: int) -> NDArray[np.intp]:
    if patients is None:
        return np.arange(num_rows)
    texts = _texts("patients", patients)
    if texts.size != num_rows:
        raise InputError(f"patients must be as long as labels, {num_rows}, got {texts.size}")
    _, numbers = np.unique(texts, return_inverse=True)
    return numbers


def _whole(shares: NDArray[np.float64], total: int) -> NDArray[np.intp]:
    """Divide a total by shares into whole numbers with that sum, by largest remainders."""
    exact = shares / shares.sum() * total
    whole: NDArray[np.intp] = np.floor(exact).astype(np.intp)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return whole
