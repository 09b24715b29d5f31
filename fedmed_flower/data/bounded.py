"""Bounds on what a file may bring: bytes once unpacked, places that links lead to, quoted letters.

A small file can unpack to more than a hospital's memory: 285 kB of deflate to 290 MB, a header of
348 bytes to petabytes. What such a file says is held against `MOST` before memory is taken for it,
and what it unpacks to is counted while it is unpacked.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np

from fedmed_flower.errors import InputError, shown

Kind = Literal[
    "an image", "a picture or a DICOM file", "a table", "a file of weights", "a data set"
]
MOST: dict[Kind, int] = {
    # A CT of 1,000 slices of 1024 x 1024 as float32, as the finest scanners write it.
    "an image": 4 << 30,
    # Pillow's own limit, 89 million pixels of three colours; an X-ray has at most half of it.
    "a picture or a DICOM file": 256 << 20,
    # A million rows of 30 columns; as cells they take ten times as much.
    "a table": 256 << 20,
    # Ten million variants.
    "a file of weights": 512 << 20,
    # MedMNIST's largest set, PathMNIST at 224 x 224, has 15 GiB.
    "a data set": 16 << 30,
}
_PART = 1 << 20
_PACKED_PART = 1 << 16


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def require_within(what: str, size: int, kind: Kind) -> None:
    """Raise `InputError` where more bytes than `MOST` come, or are said to come.

    Parameters
    ----------
    what : str
        The beginning of the error, before the number of bytes: "x.nii says that it holds".
    size : int
        Bytes.
    kind : str
        A key of `MOST`.
    """
    if size > MOST[kind]:
        raise InputError(
            f"{what} {size:,} bytes, and {kind} may have {MOST[kind]:,}: make it smaller, or "
            "divide it"
        )


def unpacked(packed: _Readable, name: object, kind: Kind) -> bytes:
    """Return all that a compressed file holds, read to its end, where its checksum stands.

    Parameters
    ----------
    packed : file
        What unpacks while it is read, as `gzip.open` returns.
    name : object
        How errors call it.
    kind : str
        A key of `MOST`.

    Raises
    ------
    InputError
        If it unpacks to more than it may; no more than that was unpacked. Whatever else
        `packed` raises is not caught.
    """
    content, size = io.BytesIO(), 0
    while part := packed.read(_PART):
        size += len(part)
        require_within(f"{name} unpacks to at least", size, kind)
        content.write(part)
    return content.getvalue()


def require_deflated(packed: bytes, name: object, kind: Kind) -> None:
    """Raise `InputError` where raw deflate unpacks to more than it may; nothing is kept of it.

    Raises
    ------
    zlib.error
        If it is no deflate.
    """
    stream, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for start in range(0, len(packed), _PACKED_PART):
        rest = packed[start : start + _PACKED_PART]
        while rest and not stream.eof:
            size += len(stream.decompress(rest, _PART))
            require_within(f"{name} unpacks to at least", size, kind)
            rest = stream.unconsumed_tail


def array_bytes(file: BinaryIO) -> int:
    """Return how many bytes of values a .npy file says that it holds, from its header alone.

    Raises
    ------
    ValueError
        If it has no such header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return math.prod(shape) * dtype.itemsize


def real_path(path: Path) -> Path:
    """Return where a path leads in the end; links that lead in a circle are left as they are."""
    return Path(os.path.realpath(path))


def leads_out(path: Path, root: Path) -> bool:
    """Return whether a path leads, by links, out of the folder ``root``, a `real_path`."""
    return not real_path(path).is_relative_to(root)


def links_out(folder: Path, root: Path) -> list[Path]:
    """Return what lies directly in a folder, is not hidden and leads out of ``root``, by name."""
    with os.scandir(folder) as entries:
        links = [entry.name for entry in entries if entry.is_symlink()]
    found = (folder / name for name in sorted(links) if not name.startswith("."))
    return [link for link in found if leads_out(link, root)]


def quoted(value: object, most: int = 80) -> str:
    """Return a value as Python writes it, cut in its middle; of what cannot be written, the type.

    Cells and rows may hold a million letters, or an object whose text raises an error.
    """
    try:
        return shown(repr(value), most)
    except Exception:  # Whatever an object's own method does.
        return f"a {type(value).__name__}"
