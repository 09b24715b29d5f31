"""Bounds on untrusted files: bytes once unpacked, targets of links, letters that errors quote.

A small file can unpack to more than a hospital's memory: 285 kB of deflate to 290 MB, a header of
348 bytes to petabytes. The size that a file states is compared with `MOST` before memory is
allocated for it, and bytes are counted while they are unpacked.
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
    # A million rows of 30 columns.
    "a table": 256 << 20,
    # Ten million variants.
    "a file of weights": 512 << 20,
    # MedMNIST's largest set, PathMNIST at 224 x 224, has 15 GiB.
    "a data set": 16 << 30,
}
# The end of the error for a link that leads to files outside of the hospital's folder.
LINK_OUT = "is a link out of the folder: copy its target into the folder"
_PART = 1 << 20
_PACKED_PART = 1 << 16
# zlib's number for a window of the largest size, in a stream with the header of gzip.
_GZIP = 16 + zlib.MAX_WBITS


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def require_within(what: str, size: int, kind: Kind) -> None:
    """Raise `InputError` if a size is above the bound of its kind in `MOST`.

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
    """Return the content of a compressed file, read to the end, so that its checksum is verified.

    Parameters
    ----------
    packed : file
        Unpacks while it is read, as the file that `gzip.open` returns.
    name : object
        The file's name in errors.
    kind : str
        A key of `MOST`.

    Raises
    ------
    InputError
        If the content is larger than `MOST` allows; reading stops there. Errors of `packed` itself
        are not caught.
    """
    content = io.BytesIO()
    size = 0
    while part := packed.read(_PART):
        size += len(part)
        require_within(f"{name} unpacks to at least", size, kind)
        content.write(part)
    return content.getvalue()


def ungzipped(file: BinaryIO, name: object, kind: Kind) -> bytes:
    """Return the content of a gzip file, whose checksums are verified, as `unpacked`.

    It takes two thirds of the time of `unpacked` on what `gzip.open` returns.

    Parameters
    ----------
    file : binary file
        Packed.
    name, kind
        As in `unpacked`.

    Raises
    ------
    InputError
        As `unpacked`.
    EOFError
        If the file is cut off.
    zlib.error
        If the file is damaged, or holds more than members of gzip and zeros.
    """
    content: list[bytes] = []
    size = 0
    member = zlib.decompressobj(_GZIP)
    begun = False
    while part := file.read(_PART):
        while part:
            if member.eof:
                # Zeros may fill up the file behind a member, and another member may follow.
                part = part.lstrip(b"\0")
                if not part:
                    break
                member = zlib.decompressobj(_GZIP)
            begun = True
            try:
                content.append(member.decompress(part, _PART))
            except zlib.error as error:
                if "data check" not in str(error):
                    raise
                raise zlib.error("CRC check failed: the file is damaged") from error
            size += len(content[-1])
            require_within(f"{name} unpacks to at least", size, kind)
            part = member.unused_data if member.eof else member.unconsumed_tail
    if not (begun and member.eof):
        raise EOFError("the file is cut off")
    return b"".join(content)


def require_deflated(packed: bytes, name: object, kind: Kind) -> None:
    """Raise `InputError` if raw deflate unpacks to more than `MOST` allows; discard the content.

    Raises
    ------
    zlib.error
        If the bytes are not deflate.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    for start in range(0, len(packed), _PACKED_PART):
        rest = packed[start : start + _PACKED_PART]
        while rest and not stream.eof:
            size += len(stream.decompress(rest, _PART))
            require_within(f"{name} unpacks to at least", size, kind)
            rest = stream.unconsumed_tail


def array_bytes(file: BinaryIO) -> int:
    """Return how many bytes of values the header of a .npy file states; the values are not read.

    Raises
    ------
    ValueError
        If the file has no such header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return math.prod(shape) * dtype.itemsize


def real_path(path: Path) -> Path:
    """Return a path with all links resolved; links that form a circle are left as they are."""
    return Path(os.path.realpath(path))


def leads_out(path: Path, root: Path) -> bool:
    """Return whether the links of a path lead out of the folder ``root``, a `real_path`."""
    return not real_path(path).is_relative_to(root)


def links_out(folder: Path, root: Path) -> list[Path]:
    """Return the links of a folder that lead out of ``root``, by name; hidden ones are left out."""
    with os.scandir(folder) as entries:
        links = [entry.name for entry in entries if entry.is_symlink()]
    visible = (folder / name for name in sorted(links) if not name.startswith("."))
    return [link for link in visible if leads_out(link, root)]


def quoted(value: object, most: int = 80) -> str:
    """Return a value's `repr`, shortened in its middle; if `repr` fails, the name of its type.

    Cells and rows may hold a million letters, or an object whose `repr` raises an error.
    """
    try:
        return shown(repr(value), most)
    except Exception:  # An object's __repr__ can raise anything.
        return f"a {type(value).__name__}"
