"""Sums of records with factors, entry by entry."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import Draft, view


def linear(
    terms: Sequence[tuple[float, ArrayRecord]], keys: Collection[str] | None = None
) -> ArrayRecord:
    """Return the sum of records, each times a factor, computed in float64.

    Parameters
    ----------
    terms : sequence of (float, ArrayRecord)
        At least one. Keys, shapes and dtypes of the result are those of the first record.
    keys : collection of str, optional
        The keys to add up; other entries are those of the first record. None adds up all.
    """
    first = terms[0][1]
    draft = Draft(first)
    for key, out in zip(first, draft.row, strict=True):
        if keys is not None and key not in keys:
            out[...] = view(first[key]).reshape(-1)
            continue
        total = np.zeros(out.shape)
        for factor, record in terms:
            if factor:
                total += factor * kernels.widen(view(record[key]).reshape(-1))
        out[...] = kernels.narrow(total, out.dtype)
    return draft.finish()


def zeros_like(record: ArrayRecord, keys: Collection[str]) -> ArrayRecord:
    """Return zeros of the shapes and dtypes of some entries of a record."""
    layout = ArrayRecord({key: record[key] for key in record if key in keys})
    return Draft(layout).finish()


def single(name: str, value: float) -> ArrayRecord:
    """Return a record of one float64 number."""
    return ArrayRecord({name: Array(np.array([value]))})
