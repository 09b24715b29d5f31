"""Division of a hospital's patients into those for training, for validation and for the test.

A patient's split follows from a keyed hash of that patient alone, so the others keep their splits
when a patient joins or leaves. A real hospital has a secret key that never changes, so no server
can have the patients of one run's training measured in another run's test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.site import SPLITS, Row, patient_text
from fedmed_flower.errors import InputError

# Returns the key of the hospital whose rows are being loaded.
_hospital_key: ContextVar[Callable[[], bytes] | None] = ContextVar("hospital_key", default=None)


@contextmanager
def splitting_by(key: Callable[[], bytes]) -> Iterator[None]:
    """Let `split_patients` use a hospital's key instead of a seed.

    Parameters
    ----------
    key : callable
        Returns the key, 1 to 64 bytes; called only if patients are split by it.
    """
    token = _hospital_key.set(key)
    try:
        yield
    finally:
        _hospital_key.reset(token)


def split_patients(
    rows: Sequence[Row], seed: int, shares: Sequence[float] = (0.7, 0.1, 0.2)
) -> dict[str, list[Row]]:
    """Divide rows into train, val and test.

    Parameters
    ----------
    rows : sequence of dict
        Each has ``patient``. Rows that have a ``split`` keep it. If no row has one, a keyed hash of
        the patient gives the split, so that the shares hold on average.
    seed : int
        0 or greater; gives the key in simulations and scripts. If a client loads the data of a real
        hospital, the hospital's own key is used and the seed has no effect.
    shares : sequence of float
        The shares of train, val and test: 0 or greater with sum 1, train above 0.

    Returns
    -------
    dict of str to list
        "train", "val" and "test", each with its rows in their order.

    Raises
    ------
    InputError
        If an argument is out of its range, a row has no patient, only some rows have a split, a
        patient is in two splits or no row is in train.

    Examples
    --------
    >>> rows = [{"patient": number} for number in range(100)]
    >>> {split: len(part) for split, part in split_patients(rows, seed=1).items()}
    {'train': 69, 'val': 10, 'test': 21}
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be a whole number, 0 or greater, got {seed!r}")
    sizes = np.asarray(shares, float)
    if sizes.shape != (3,) or not (np.all(sizes >= 0) and abs(sizes.sum() - 1) <= 1e-6):
        raise InputError(
            f"shares must be three numbers, 0 or greater with sum 1, for {', '.join(SPLITS)}; "
            f"got {tuple(shares)}"
        )
    if sizes[0] == 0:
        raise InputError(f"the share of train must be above 0, got {tuple(shares)}")
    if nameless := [number for number, row in enumerate(rows) if "patient" not in row]:
        raise InputError(f"row {nameless[0]} has no patient")
    patients = [patient_text(row["patient"]) for row in rows]
    given = sum("split" in row for row in rows)
    if given not in (0, len(rows)):
        raise InputError(
            f"{given} of {len(rows)} rows have a split: give one to all of them, or to none, and "
            "each patient is put into one"
        )
    split_of = _as_given(rows, patients) if given else _by_hash(patients, int(seed), sizes)
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row, patient in zip(rows, patients, strict=True):
        parts[split_of[patient]].append(row)
    if not parts["train"]:
        raise InputError(f"none of {len(rows)} rows is in the train split")
    return parts


def _as_given(rows: Sequence[Row], patients: Sequence[str]) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for row, patient in zip(rows, patients, strict=True):
        split = row["split"]
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if split_of.setdefault(patient, split) != split:
            raise InputError(
                f"patient {row['patient']} is in two splits, {split_of[patient]} and {split}: all "
                "rows of a patient belong in one"
            )
    return split_of


def _by_hash(patients: Sequence[str], seed: int, shares: NDArray[np.float64]) -> dict[str, str]:
    source = _hospital_key.get()
    key = hashlib.sha256(f"split {seed}".encode()).digest() if source is None else source()
    ends = np.cumsum(shares)[:2]
    split_of = {}
    for patient in dict.fromkeys(patients):
        digest = hashlib.blake2b(patient.encode(), key=key, digest_size=8).digest()
        fraction = int.from_bytes(digest, "big") / 2**64
        split_of[patient] = SPLITS[int(np.searchsorted(ends, fraction, side="right"))]
    return split_of
