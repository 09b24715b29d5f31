"""Flower arrays as NumPy views, read and written without copies."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays import kernels

# Shape and dtype of an array, and those of all arrays of a record by key.
Form = tuple[tuple[int, ...], np.dtype[Any]]
Forms = Mapping[str, Form]

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)

_NUMPY = "numpy.ndarray"
# Elements that are checked at a time, so that temporary arrays stay small.
_PART = 65536
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def view(array: Array) -> NDArray[Any]:
    """Return the values of a Flower array without copying them.

    Parameters
    ----------
    array : Array
        Its ``data``, bytes or a part of a memory map, is read as the bytes of a ``.npy`` file. The
        shape and dtype that it states beside them are not trusted, except ``bfloat16``, which a
        ``.npy`` file cannot express.

    Returns
    -------
    ndarray
        Read-only, of the shape and dtype in the bytes; of dtype ``V2`` for bfloat16.

    Raises
    ------
    ValueError
        If the bytes are not a well-formed array of plain numbers.
    """
    if array.stype != _NUMPY:
        raise ValueError(f"unknown serialisation {array.stype!r}")
    shape, fortran_order, dtype, offset = _header(bytes(array.data[: _head_length(array.data)]))
    is_number = dtype.kind in "biufc" and dtype.fields is None
    if not is_number and not (array.dtype == "bfloat16" and dtype == kernels.BFLOAT16):
        raise ValueError(f"dtype {dtype} is not a plain number")
    if offset + math.prod(shape) * dtype.itemsize != len(array.data):
        raise ValueError(f"{len(array.data)} bytes do not hold an array of shape {shape}")
    flat = np.frombuffer(array.data, dtype, offset=offset)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def form_of(array: Array) -> Form:
    """Return shape and dtype of a Flower array's values.

    Raises
    ------
    ValueError
        As `view`.
    """
    values = view(array)
    return values.shape, values.dtype


def _head_length(data: bytes) -> int:
    """Return how many bytes come before the values, as the file states; at most 65,536."""
    size = 2 if data[6:7] == b"\x01" else 4
    return min(8 + size + int.from_bytes(data[8 : 8 + size], "little"), 65536)


@functools.lru_cache(maxsize=4096)
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return a header's shape, order, dtype and length; cached, as reading one takes 20 us."""
    file = BytesIO(head)
    try:
        shape, fortran_order, dtype = _READERS[np.lib.format.read_magic(file)](file)
        sound = all(type(side) is int and side >= 0 for side in shape)
    except Exception as error:  # A malformed header makes NumPy's parser fail in a dozen ways.
        raise ValueError(f"no well-formed .npy header ({type(error).__name__})") from error
    if not sound:
        raise ValueError(f"no array has the shape {shape}")
    return shape, fortran_order, dtype, file.tell()


def array_of(values: NDArray[Any]) -> Array:
    """Return values as a Flower array that holds the same bytes as ``Array(values)``.

    It copies them once, which takes half the time.

    Parameters
    ----------
    values : ndarray
        Contiguous in C order.
    """
    data = b"".join([_head_of(values), values.data])
    return Array(_name(values.dtype), values.shape, _NUMPY, data)


def _head_of(values: NDArray[Any]) -> bytes:
    """Return what stands before the values in a ``.npy`` file, in C order."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(
        head,
        {
            "descr": np.lib.format.dtype_to_descr(values.dtype),
            "fortran_order": False,
            "shape": values.shape,
        },
    )
    return head.getvalue()


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return the records of a kind in a content, by name.

    Flower's own properties, such as ``array_records``, leave a cycle of references at each call, so
    that a content stays in memory until Python's collector of cycles runs, however large it is.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def record_of(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Return a record of these very arrays, whose bytes may lie in a file.

    ``ArrayRecord(arrays)`` would make each anew, of bytes in memory alone.
    """
    record = ArrayRecord()
    record.update(arrays)
    return record


class Draft:
    """Arrays to be filled in place: the values are written directly into the bytes for Flower.

    Parameters
    ----------
    layout : ArrayRecord
        Gives keys, shapes and dtypes.

    Attributes
    ----------
    row : list of ndarray
        A flat, writable array for each entry.
    """

    def __init__(self, layout: ArrayRecord) -> None:
        self._files: dict[str, BytesIO] = {}
        self._layout = layout
        self.row: list[NDArray[Any]] = []
        for key, array in layout.items():
            values = view(array)
            head = _head_of(values)
            start = len(head)
            # The system provides zeros without cost until they are written to.
            file = BytesIO(bytes(start + values.nbytes))
            file.write(head)
            self._files[key] = file
            self.row.append(np.frombuffer(file.getbuffer(), values.dtype, offset=start))

    def finish(self) -> ArrayRecord:
        """Return the arrays as a record; the draft cannot be written to afterwards."""
        self.row.clear()
        return ArrayRecord(
            {
                key: Array(_name(values.dtype), values.shape, _NUMPY, self._files[key].getvalue())
                for key, values in ((key, view(array)) for key, array in self._layout.items())
            }
        )


def flat(record: ArrayRecord, layout: ArrayRecord) -> list[NDArray[Any]]:
    """Return the views of a record's arrays, flattened, in the order of another record's keys.

    Matrices in Fortran order are copied.
    """
    return [view(record[key]).reshape(-1) for key in layout]


def not_finite(record: ArrayRecord) -> str | None:
    """Return an error that names an entry with NaN or infinite values; None if there is none."""
    for key, array in record.items():
        if not is_finite(view(array)):
            return f"{key} holds NaN or infinite values"
    return None


def is_finite(values: NDArray[Any]) -> bool:
    """Return whether an array holds neither NaN nor infinite values."""
    if values.dtype.kind in "biu":
        return True
    flat_values = values.ravel("K")
    starts = range(0, flat_values.size, _PART)
    parts = (flat_values[start : start + _PART] for start in starts)
    return all(np.isfinite(kernels.widen(part)).all() for part in parts)


def keep_dtypes(arrays: ArrayRecord, layout: ArrayRecord) -> ArrayRecord:
    """Return averaged entries in the dtypes of a layout.

    A mean of integers, such as BatchNorm's ``num_batches_tracked``, is float64. It is rounded to
    the nearest value of the dtype that the entry has in `layout`. Entries that have that dtype
    already are returned unchanged.
    """
    record = ArrayRecord()
    for key, array in arrays.items():
        dtype = view(layout[key]).dtype
        values = view(array)
        if values.dtype != dtype:
            array = Array(np.asarray(kernels.narrow(values, dtype)))
            array.dtype = _name(dtype)
        record[key] = array
    return record


def _name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == kernels.BFLOAT16 else str(dtype)


def own_content(content: RecordDict) -> RecordDict:
    """Return a message's content with records of its own and the same arrays.

    What is set in its records is set in no other message. Arrays, which may be large, are shared.
    """
    own = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            # Flower hashes an array once for all messages only if it is the same object in them.
            own[name] = record_of(record)
        else:
            own[name] = copy.deepcopy(record)
    return own
