"""Pictures of test cases that a hospital may disclose, and the check of a site's pictures."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Hashable
from dataclasses import dataclass

COLOURS = "#0072b2 #d55e00 #009e73 #c066a0 #d99000 #3fa7dc #7a68b3 #a8743a #7f8c1d #c23b4e #1c9c9c"
PALETTE = (*COLOURS.split(), "#808080")

# Bounds on a picture in a report: pixels of a side, bytes of the file.
MOST_PIXELS = 1024
MOST_BYTES = 512_000
_START = b"\x89PNG\r\n\x1a\n"
# Values a pixel, by PNG's colour type.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Chunks that a PNG may have: the picture, its colours, its size in print, short texts. Animations,
# compressed profiles or texts, and chunks that only browsers know are not allowed.
_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"sBIT", b"bKGD"}
_CHUNKS |= {b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"tIME"}


@dataclass(frozen=True)
class Picture:
    """A picture of one test case; its title and pixels leave the hospital unchanged.

    `patient` does not leave. With it the hospital records whose pictures it disclosed.
    """

    title: str
    png: bytes
    patient: Hashable = None


def sound(png: bytes) -> str | None:
    """Return why a picture from a site must not be shown; None if it may be.

    It must be one PNG with nothing behind it, of at most 1024 x 1024 pixels and 512 kB, neither
    interlaced nor animated. Its data must be exactly its pixels, and Pillow must decode it.
    """
    if len(png) > MOST_BYTES:
        return f"it has {len(png):,} bytes, more than {MOST_BYTES:,}"
    if not png.startswith(_START):
        return "it is not a PNG"
    packed = b""
    kinds: list[bytes] = []
    at = len(_START)
    while at < len(png) and kinds[-1:] != [b"IEND"]:
        length, kind = struct.unpack(">I4s", png[at : at + 8].ljust(8, b"\0"))
        content = png[at + 8 : at + 8 + length]
        check = png[at + 8 + length : at + 12 + length]
        if len(check) != 4 or struct.unpack(">I", check)[0] != zlib.crc32(kind + content):
            return "it is damaged or cut short"
        if kind not in _CHUNKS:
            return f"it holds more than one still picture ({kind.decode('ascii', 'replace')!r})"
        if kind == b"IDAT":
            packed += content
        kinds.append(kind)
        at += 12 + length
    if kinds[:1] != [b"IHDR"] or kinds.count(b"IHDR") != 1 or kinds[-1] != b"IEND":
        return "it is damaged or cut short"
    if at != len(png):
        return f"{len(png) - at:,} bytes follow its end"
    return _pixels_fit(png, packed)


def _pixels_fit(png: bytes, packed: bytes) -> str | None:
    from PIL import Image

    header = png[len(_START) + 8 : len(_START) + 21]
    if png[len(_START) : len(_START) + 4] != struct.pack(">I", len(header)):
        return "it is damaged or cut short"
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if not (1 <= width <= MOST_PIXELS and 1 <= height <= MOST_PIXELS):
        return f"it has {width} x {height} pixels, more than {MOST_PIXELS} x {MOST_PIXELS} or none"
    if interlaced:
        return "it is interlaced"
    # A row is one byte for the filter and its pixels.
    size = height * (1 + math.ceil(width * depth * _CHANNELS.get(colour, 1) / 8))
    unpacking = zlib.decompressobj()
    try:
        unpacked = len(unpacking.decompress(packed, size + 1))
        if unpacked != size or not unpacking.eof or unpacking.unused_data:
            return f"its data are not those of {width} x {height} pixels"
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            picture.load()
    except Exception as error:  # Pillow fails in a dozen ways.
        return f"it cannot be decoded ({type(error).__name__})"
    return None
