"""Which decoder unpacks which compressed DICOM pixels, chosen so that the values are right.

Of the decoders that pydicom knows, several do one syntax, and it takes the first that raises no
error. Here each syntax has its own: Pillow for baseline JPEG, GDCM for lossless JPEG and for JPEG
of 12 bits, CharLS for JPEG-LS, OpenJPEG for JPEG 2000 and its high-throughput form, and pydicom for
RLE. This module is also the plugin through which pydicom calls GDCM for 12 bits, and OpenJPEG.
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pydicom
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import Decoder, DecodeRunner, get_decoder

from fedmed_flower.errors import InputError, shown

_OWN = "fedmed"
_JPEG_2000 = (
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.HTJ2K,
)
_PACKAGES = {
    uid.JPEGExtended12Bit: ("gdcm",),
    **dict.fromkeys(_JPEG_2000, ("openjpeg",)),
}
# The decoders of each syntax, the best first; those of the extra may be missing.
_PLUGINS: dict[str, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("pillow",),
    uid.JPEGExtended12Bit: (_OWN,),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: ("pyjpegls",),
    uid.JPEGLSNearLossless: ("pyjpegls",),
    uid.JPEG2000Lossless: (_OWN, "pillow"),
    uid.JPEG2000: (_OWN, "pillow"),
    uid.HTJ2KLossless: (_OWN,),
    uid.HTJ2KLosslessRPCL: (_OWN,),
    uid.HTJ2K: (_OWN,),
    uid.RLELossless: ("pydicom",),
}
_FILMS = ("MPEG", "HEVC")
# The names and functions that pydicom asks a plugin for.
DECODER_DEPENDENCIES = _PACKAGES


def decoder_of(file: Path, part: pydicom.Dataset) -> tuple[Decoder, str]:
    """Return the decoder of a file's pixels and the name of its plugin, empty if none is needed.

    Raises
    ------
    InputError
        If pixels in this syntax cannot be read, or not without the extra ``imaging``.
    """
    syntax = part.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        what = "is a film" if any(word in syntax.name for word in _FILMS) else "is compressed"
        raise InputError(
            f"{file} {what} by {shown(syntax.name, 80)}, which is not read: export it uncompressed"
        ) from None
    if not syntax.is_encapsulated:
        return decoder, ""
    for plugin in _plugins(syntax, part):
        if plugin in decoder.available_plugins:
            return decoder, plugin
    raise InputError(f"{file} is compressed by {syntax.name}: pip install 'fedmed-flower[imaging]'")


def require_stated_size(file: Path, part: pydicom.Dataset) -> None:
    """Raise `InputError` if a compressed frame says that it is larger than the header says.

    A decoder takes memory for the size that stands in the frame.
    """
    if not part.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    header = (int(part.Rows), int(part.Columns), int(part.SamplesPerPixel))
    frames = generate_frames(part.PixelData, number_of_frames=int(part.get("NumberOfFrames") or 1))
    for number, frame in enumerate(frames):
        stated = _stated_size(frame)
        if stated is not None and stated != header:
            raise InputError(
                f"{file}: its header says {_sides(header)}, and its compressed frame {number} says "
                f"{_sides(stated)}"
            )


def _sides(size: tuple[int, int, int]) -> str:
    rows, columns, colours = size
    return f"{rows} x {columns} pixels of {colours} colour{'s' * (colours > 1)}"


def _plugins(syntax: uid.UID, part: pydicom.Dataset) -> tuple[str, ...]:
    if syntax == uid.JPEGExtended12Bit and part.get("BitsStored") == 8:
        return ("pillow",)
    return _PLUGINS.get(syntax, ())


def _stated_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and colours that stand in a frame of a JPEG kind, or None."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 256)  # JPEG 2000, maybe behind a JP2 header.
    if start >= 0 and len(frame) >= start + 42:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        (colours,) = struct.unpack_from(">H", frame, start + 40)
        return bottom - top, right - left, colours
    if not frame.startswith(b"\xff\xd8"):
        return None
    place = 2
    while place + 10 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF:  # A filling byte.
            place += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, colours = struct.unpack_from(">HHB", frame, place + 5)
            return rows, columns, colours
        else:
            place += 2 + struct.unpack_from(">H", frame, place + 2)[0]
    return None


def is_available(syntax: str) -> bool:
    """Return whether this module, as a plugin of pydicom, can decode a syntax."""
    return syntax in _PACKAGES and all(map(find_spec, _PACKAGES[uid.UID(syntax)]))


def _decode_frame(source: bytes, runner: DecodeRunner) -> bytes | bytearray:
    """Return the pixels of a frame, as pydicom asks a plugin for them."""
    if runner.transfer_syntax == uid.JPEGExtended12Bit:
        return _jpeg_of_12_bits(source, runner)
    return _jpeg_2000(source, runner)


def _jpeg_2000(source: bytes, runner: DecodeRunner) -> bytearray:
    from openjpeg.utils import decode_pixel_data

    pixels = cast(bytearray, decode_pixel_data(source, version=2))
    # The pixels have as many bytes as the precision in the frame needs.
    precision = runner.get_option("j2k_precision", runner.bits_stored)
    runner.set_option("bits_allocated", next(bits for bits in (8, 16, 32) if precision <= bits))
    runner.set_option("planar_configuration", 0)
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")
    return pixels


def _jpeg_of_12_bits(source: bytes, runner: DecodeRunner) -> bytes:
    import gdcm  # type: ignore[import-untyped]

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(str(runner.photometric_interpretation))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    kind = gdcm.TransferSyntax.GetTSType(str(runner.transfer_syntax))
    image.SetTransferSyntax(gdcm.TransferSyntax(kind))
    stored = runner.bits_stored
    image.SetPixelFormat(gdcm.PixelFormat(runner.samples_per_pixel, 16, stored, stored - 1, 0))
    pixels: Any = image.GetBuffer()
    if pixels is None:
        raise ValueError("GDCM cannot decode the frame")
    # GDCM gives bytes as a text.
    return bytes(pixels.encode("utf-8", "surrogateescape"))


def _join_pydicom() -> None:
    for syntax in _PACKAGES:
        get_decoder(syntax).add_plugin(_OWN, (__name__, "_decode_frame"))


_join_pydicom()
