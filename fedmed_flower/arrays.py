"""Flower arrays as NumPy views."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

_NUMPY = "numpy.ndarray"
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def view(array: Array) -> NDArray[Any]:
    """Return the values of a Flower array without copying them.

    Parameters
    ----------
    array : Array
        Its ``data`` is read as the bytes of a ``.npy`` file; the shape and dtype that it claims
        are not trusted.

    Returns
    -------
    ndarray
        Read-only, of the shape and dtype that the bytes hold.

    Raises
    ------
    ValueError
        Where the bytes are no well-formed array of plain numbers.
    """
    if array.stype != _NUMPY:
        raise ValueError(f"unknown serialisation {array.stype!r}")
    head = BytesIO(array.data[:65536])
    version = np.lib.format.read_magic(head)
    if version not in _READERS:
        raise ValueError(f"unknown .npy version {version}")
    shape, fortran_order, dtype = _READERS[version](head)
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype} is not a plain number")
    count = int(np.prod(shape, dtype=np.int64))
    flat = np.frombuffer(array.data, dtype, count, offset=head.tell())
    if head.tell() + flat.nbytes != len(array.data):
        raise ValueError(f"{len(array.data)} bytes do not hold an array of shape {shape}")
    return flat.reshape(shape, order="F" if fortran_order else "C")


def keep_dtypes(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """Give averaged entries their dtype back.

    A mean of integers, such as BatchNorm's ``num_batches_tracked``, comes out as float64. It is
    rounded to the nearest integer of the dtype that the entry has in `like`; entries that have
    their dtype already are passed through.
    """
    record = ArrayRecord()
    for key, array in arrays.items():
        dtype = view(like[key]).dtype
        values = view(array)
        if values.dtype != dtype:
            rounded = np.rint(values) if np.issubdtype(dtype, np.integer) else values
            array = Array(np.asarray(rounded, dtype=dtype))
        record[key] = array
    return record
