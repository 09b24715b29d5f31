"""Prepared rows as bytes, without pickle: the layout of safetensors, and JSON for all the rest.

What a row had before its transforms, such as its patient, is not written: the bytes name the entry,
and the row that is given when they are read supplies the value. MONAI's record of the transforms
that were applied names the transform objects of one process; it is written by their place in the
chain, so that another process can invert them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import monai.utils.enums
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils.enums import TraceKeys
from numpy.typing import NDArray

from fedmed_flower.clients.fingerprints import Unreadable
from fedmed_flower.data.site import Row

# The names of safetensors.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES = {numpy: name for name, numpy in _DTYPES.items()}
# Arrays begin at a multiple of this many bytes.
_ALIGNED = 64
_HEAD = 8

Bytes = NDArray[np.uint8]


def packed_row(
    result: Any, row: Row, steps: Sequence[Any], files: Sequence[str] = ()
) -> list[bytes | memoryview]:
    """Return a row after some transforms as bytes, in parts that are written one after the other.

    Parameters
    ----------
    result : dict, or list of dict
        The row after the transforms.
    row : dict
        The row before.
    steps : sequence of transforms
        Those of the chain, in order.
    files : sequence of str
        Paths that are written as well, under ``files`` of the text.

    Raises
    ------
    Unreadable
        If it holds something that cannot be written, such as an object.
    """
    writer = _Writer({id(step): place for place, step in _places(steps)})
    several = isinstance(result, list)
    rows = [writer.row(part, row) for part in (result if several else [result])]
    text = json.dumps({"files": list(files), "several": several, "rows": rows})
    return packed(text, writer.arrays)


def unpacked_row(content: Bytes, row: Row, steps: Sequence[Any]) -> Any:
    """Return the row that `packed_row` wrote; its arrays lie in ``content``.

    Raises
    ------
    ValueError, KeyError, TypeError, LookupError
        If the bytes are no row.
    """
    text, arrays = unpacked(content)
    reader = _Reader(arrays, {place: id(step) for place, step in _places(steps)})
    read = json.loads(text)
    rows = [
        {name: row[part] if source == "row" else reader.value(part) for name, source, part in entry}
        for entry in read["rows"]
    ]
    return rows if read["several"] else rows[0]


def packed(text: str, arrays: Sequence[NDArray[Any]] = ()) -> list[bytes | memoryview]:
    """Return a text and arrays in the layout of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"text": text}}
    parts: list[bytes | memoryview] = []
    size = 0
    for number, array in enumerate(arrays):
        if array.dtype.str not in _NAMES:
            raise Unreadable(f"an array of {array.dtype}")
        # A safetensors file has no gaps, so an array's padding is an array of its own.
        offsets = [size, size + array.nbytes]
        name = _NAMES[array.dtype.str]
        header[str(number)] = {"dtype": name, "shape": array.shape, "data_offsets": offsets}
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        size = offsets[1]
        if gap := -size % _ALIGNED:
            offsets = [size, size + gap]
            header[f"gap {number}"] = {"dtype": "U8", "shape": [gap], "data_offsets": offsets}
            parts.append(bytes(gap))
            size = offsets[1]
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 2 * _HEAD) % _ALIGNED)
    return [len(line).to_bytes(_HEAD, "little") + line, *parts]


def unpacked(content: Bytes) -> tuple[str, list[NDArray[Any]]]:
    """Return text and arrays of what `packed` wrote; the arrays are views of ``content``."""
    header, start = _header(content)
    text = header.pop("__metadata__")["text"]
    arrays = []
    for number in range(sum(not name.startswith("gap") for name in header)):
        entry = header[str(number)]
        first, last = (start + offset for offset in entry["data_offsets"])
        values = content[first:last].view(_DTYPES[entry["dtype"]])
        arrays.append(values.reshape(entry["shape"]))
    return text, arrays


def unpacked_text(content: Bytes) -> str:
    """Return the text of what `packed` wrote, of whose arrays ``content`` may lack a part."""
    text: str = _header(content)[0]["__metadata__"]["text"]
    return text


def _header(content: Bytes) -> tuple[dict[str, Any], int]:
    """Return the header, and where the first array begins."""
    start = _HEAD + int.from_bytes(content[:_HEAD].tobytes(), "little")
    return json.loads(content[_HEAD:start].tobytes()), start


class _Writer:
    """Turns values into JSON, and arrays into their number in `arrays`.

    Parameters
    ----------
    places : dict of int to str
        The place of each transform in its chain, by the object's id.
    """

    def __init__(self, places: Mapping[int, str]) -> None:
        self.arrays: list[NDArray[Any]] = []
        self._places = places

    def row(self, entries: Mapping[str, Any], row: Row) -> list[Any]:
        """Return JSON of a row; an entry that is one of ``row`` is written as its name."""
        written = []
        for name, value in entries.items():
            if not isinstance(name, str):
                raise Unreadable(f"a row's entry that is named {type(name).__name__}")
            same = [other for other in (name, *row) if other in row and row[other] is value]
            source = "row" if same else "value"
            written.append([name, source, same[0] if same else self.value(value)])
        return written

    def value(self, value: Any) -> Any:
        """Return JSON of a value: a list of its kind and content."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return ["plain", value]
        if kind is float:
            # JSON has no infinity and only one NaN.
            finite = math.isfinite(value)
            return ["plain", value] if finite else ["float", struct.pack("<d", value).hex()]
        if isinstance(value, Enum):
            if kind is not getattr(monai.utils.enums, kind.__name__, None):
                raise Unreadable(f"a value of {kind.__name__}")
            return ["enum", [kind.__name__, value.name]]
        if kind in (list, tuple):
            return [kind.__name__, [self.value(part) for part in value]]
        if kind is dict:
            return ["dict", [self._entry(key, part) for key, part in value.items()]]
        if kind is MetaTensor:
            return ["image", self._image(value)]
        if kind is torch.Tensor:
            return ["tensor", self._array(_numpy(value))]
        if kind is np.ndarray:
            return ["array", self._array(value)]
        if isinstance(value, np.generic):
            return ["number", self._array(np.asarray(value))]
        if kind in (torch.dtype, np.dtype) or isinstance(value, np.dtype):
            name = str(value).removeprefix("torch.")
            return ["torch dtype" if kind is torch.dtype else "numpy dtype", name]
        raise Unreadable(f"a value of {kind.__module__}.{kind.__qualname__}")

    def _entry(self, key: Any, value: Any) -> list[Any]:
        if key == TraceKeys.ID and isinstance(value, int):
            if value not in self._places:
                raise Unreadable("the record of a transform that is not in the chain")
            return [self.value(key), ["id", self._places[value]]]
        return [self.value(key), self.value(value)]

    def _image(self, image: MetaTensor) -> dict[str, Any]:
        known = {"_meta", "_applied_operations", "_pending_operations"}
        rest = {name: value for name, value in vars(image).items() if name not in known}
        return {
            "values": self._array(_numpy(image.as_tensor())),
            "meta": self.value(dict(image.meta)),
            "applied": self.value(list(image.applied_operations)),
            "pending": self.value(list(image.pending_operations)),
            "rest": self.value(rest),
        }

    def _array(self, array: NDArray[Any]) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1


class _Reader:
    """Turns what `_Writer` wrote into values."""

    def __init__(self, arrays: Sequence[NDArray[Any]], ids: Mapping[str, int]) -> None:
        self._arrays = arrays
        self._ids = ids

    def value(self, written: Sequence[Any]) -> Any:
        """Return a value."""
        kind, content = written
        match kind:
            case "plain":
                return content
            case "float":
                return struct.unpack("<d", bytes.fromhex(content))[0]
            case "enum":
                return getattr(monai.utils.enums, content[0])[content[1]]
            case "list":
                return [self.value(part) for part in content]
            case "tuple":
                return tuple(self.value(part) for part in content)
            case "dict":
                return {self.value(key): self.value(part) for key, part in content}
            case "id":
                return self._ids[content]
            case "image":
                return self._image(content)
            case "tensor":
                return torch.from_numpy(self._arrays[content])
            case "array":
                return self._arrays[content]
            case "number":
                return self._arrays[content][()]
            case "torch dtype":
                return getattr(torch, content)
            case "numpy dtype":
                return np.dtype(content)
        raise ValueError(f"unknown kind {kind}")

    def _image(self, content: Mapping[str, Any]) -> MetaTensor:
        image = MetaTensor(torch.from_numpy(self._arrays[content["values"]]))
        image.meta = self.value(content["meta"])
        image.applied_operations = self.value(content["applied"])
        vars(image)["_pending_operations"] = self.value(content["pending"])
        vars(image).update(self.value(content["rest"]))
        return image


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    if tensor.device.type != "cpu" or tensor.dtype is torch.bfloat16:
        raise Unreadable(f"a tensor of {tensor.dtype} on {tensor.device.type}")
    array: NDArray[Any] = tensor.detach().numpy()
    return array


def _places(steps: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each transform of a chain, and those in its attributes, with its place."""
    for number, step in enumerate(steps):
        yield from _places_in(str(number), step)


def _places_in(place: str, step: Any) -> Iterator[tuple[str, Any]]:
    if Transform not in type(step).__mro__:
        return
    yield place, step
    for name, value in vars(step).items():
        yield from _places_in(f"{place}.{name}", value)
