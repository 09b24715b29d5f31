"""Flower arrays as NumPy views."""

from __future__ import annotations

import math
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
    try:
        shape, fortran_order, dtype = _READERS[np.lib.format.read_magic(head)](head)
        sound = all(type(side) is int and side >= 0 for side in shape)
    except Exception as error:  # A malformed header makes NumPy's parser fail in a dozen ways.
        raise ValueError(f"no well-formed .npy header ({type(error).__name__})") from error
    if dtype.kind not in "biufc":
        raise ValueError(f"dtype {dtype} is not a plain number")
    if not sound:
        raise ValueError(f"no array has the shape {shape}")
    if head.tell() + math.prod(shape) * dtype.itemsize != len(array.data):
        raise ValueError(f"{len(array.data)} bytes do not hold an array of shape {shape}")
    flat = np.frombuffer(array.data, dtype, offset=head.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def keep_dtypes(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """Give averaged entries their dtype back.

    A mean of integers, such as BatchNorm's ``num_batches_tracked``, comes out as float64. It is
    rounded to the nearest value of the dtype that the entry has in `like`; entries that have their
    dtype already are passed through.
    """
    record = ArrayRecord()
    for key, array in arrays.items():
        dtype, values = view(like[key]).dtype, view(array)
        if values.dtype != dtype:
            if dtype.kind in "biu":
                values = np.rint(values)
            if dtype.kind in "iu":
                info = np.iinfo(dtype)
                # float(max) may round to a value above max, which would overflow in the cast.
                low, high = float(info.min), np.nextafter(float(info.max), 0)
                cast = np.clip(values, low, high).astype(dtype)
                values = np.where(values > high, dtype.type(info.max), cast)
            array = Array(np.asarray(values, dtype=dtype))
        record[key] = array
    return record
