"""The pixels of DICOM files as numbers in the units of the modality, such as Hounsfield units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.pixels.decoders.base import Decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import as_pixel_options, get_expected_length

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.decoders import decoder_of, require_stated_size
from fedmed_flower.images.frames import Frame, numbers
from fedmed_flower.images.headers import readable

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_COLOURS = (
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422",
)  # fmt: skip
# Colours that the decoder of JPEG 2000 turns into RGB.
_COLOURS_OF_JPEG_2000 = ("YBR_ICT", "YBR_RCT")

Array = NDArray[Any]


def frame_bytes(file: Path, part: pydicom.Dataset) -> int:
    """Return the bytes that one frame takes as float32.

    Raises
    ------
    InputError
        If its pixels take more than `bounded.MOST` bytes as they are stored.
    """
    with readable(file):
        sides = [int(part.get(name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel")]
        values = math.prod(sides)
        depth = math.ceil(int(part.get("BitsAllocated") or 8) / 8)
        what = f"{file} says that it holds"
        require_within(what, values * depth, "a picture or a DICOM file")
        # A palette gives each pixel three colours.
        colours = 3 if part.get("PhotometricInterpretation") == "PALETTE COLOR" else 1
        return 4 * values * colours


def read_frames(
    file: Path, part: pydicom.Dataset, frames: Sequence[Frame]
) -> Iterator[NDArray[np.float32]]:
    """Yield the pixels of frames, (rows, columns) or (rows, columns, colours), one after another.

    They are in the units of the modality: each frame's own slope and intercept are applied, else
    those of the file, else its table (modality LUT). An RT dose is in its DoseUnits, mostly gray.
    Real world value maps are not applied. A palette and all colour spaces become RGB.

    Parameters
    ----------
    file : Path
    part : Dataset
        Its content.
    frames : sequence of Frame
        Which frames, in this order.

    Raises
    ------
    InputError
        If the pixels are missing, cut off, or stored in a way that is not read.
    """
    with readable(file):
        _require_pixels(file, part)
        decoder, plugin = decoder_of(file, part)
        _require_known(file, part)
        require_stated_size(file, part)
        arrays = _unpacked(file, _stored(part, frames, decoder, plugin))
        for frame, array in zip(frames, arrays, strict=True):
            yield _scaled(frame, _coloured(array, part)).astype(np.float32)


def _require_pixels(file: Path, part: pydicom.Dataset) -> None:
    """Raise `InputError` if a file has no pixels, or does not say how they are stored."""
    if not any(name in part for name in _PIXELS):
        raise InputError(f"{file} holds no pixels: it is cut off, or they were left out")
    if not part.file_meta.get("TransferSyntaxUID"):
        raise InputError(f"{file} does not say how its pixels are stored (TransferSyntaxUID)")


def _require_known(file: Path, part: pydicom.Dataset) -> None:
    """Raise `InputError` if colours or bits of a file are not known, or some pixels missing."""
    colours = part.get("PhotometricInterpretation")
    known: tuple[str, ...] = _COLOURS
    if "JPEG 2000" in part.file_meta.TransferSyntaxUID.name:
        known += _COLOURS_OF_JPEG_2000
    if colours not in known:
        raise InputError(
            f"{file}: its PhotometricInterpretation must be one of {', '.join(known)}, got "
            f"{colours!r}"
        )
    if part.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    name = next(name for name in _PIXELS if name in part)
    expected = get_expected_length(part)
    if len(part[name].value) < expected:
        raise InputError(
            f"{file} is cut off: it has {len(part[name].value):,} of the {expected:,} bytes of its "
            "pixels. Copy it again"
        )
    stored = int(part.get("BitsStored") or part.get("BitsAllocated") or 8)
    highest = int(part.get("HighBit") or stored - 1)
    if highest > stored - 1:
        raise InputError(
            f"{file}: its HighBit must be {stored - 1}, one less than its BitsStored, got {highest}"
        )


def _unpacked(file: Path, arrays: Iterator[Array]) -> Iterator[Array]:
    """Yield arrays; turn what a decoder raises into an `InputError` in words."""
    try:
        yield from arrays
    except RuntimeError as error:
        # The last line has the decoder's own words.
        reason = str(error).strip().splitlines()[-1:] or [""]
        raise InputError(
            f"{file}: its compressed pixels cannot be unpacked ({shown(reason[0].strip(), 200)}): "
            "it may be cut off, so copy it again"
        ) from error


def _stored(
    part: pydicom.Dataset, frames: Sequence[Frame], decoder: Decoder, plugin: str
) -> Iterator[Array]:
    """Yield the pixels of frames as they are stored, all colour spaces but palettes as RGB."""
    options = {"decoding_plugin": plugin, **as_pixel_options(part)}
    if part.BitsAllocated == 1 and not plugin:
        # A frame need not begin with a byte, and pydicom then misses the last bits of some.
        whole, _ = decoder.as_array(part, **options)
        yield from (whole[frame.number] if whole.ndim == 3 else whole for frame in frames)
        return
    indices = [frame.number for frame in frames]
    yield from (array for array, _ in decoder.iter_array(part, indices=indices, **options))


def _coloured(array: Array, part: pydicom.Dataset) -> Array:
    """Return an array with its palette applied, if it has one: (rows, columns, 3).

    The colours have as many bits as the pixels: of a palette of 16 bits for pixels of 8, the upper
    8 are taken.
    """
    if part.PhotometricInterpretation != "PALETTE COLOR":
        return array
    count, lowest, _ = part.RedPaletteColorLookupTableDescriptor
    count = count or 1 << 16
    index = np.clip(array.astype(np.int64) - lowest, 0, count - 1)
    if "RedPaletteColorLookupTableData" in part:
        tables = [_table(part, colour, count) for colour in ("Red", "Green", "Blue")]
    else:
        # pydicom unpacks the segments; it counts pixels in the type of the table's entries.
        whole = np.arange(count).reshape(1, -1) + lowest
        tables = list(np.moveaxis(apply_color_lut(whole, part)[0, :, :3], -1, 0))
        if count > 256 and tables[0].itemsize == 1:
            raise InputError(f"its palette has {count} entries of 8 bits, which is not read")
    colours = np.stack(tables)
    if part.BitsAllocated <= 8 and colours.max() > 255:
        colours = colours >> 8
    return np.moveaxis(colours[:, index], 0, -1)


def _table(part: pydicom.Dataset, colour: str, count: int) -> Array:
    """Return the entries of one colour of a palette, (count,)."""
    content = part[f"{colour}PaletteColorLookupTableData"].value
    little = part.file_meta.TransferSyntaxUID.is_little_endian
    words = np.frombuffer(content, "<u2" if little else ">u2")
    # Entries of 8 bits are stored in pairs, or each in a word of its own.
    entries = words if len(words) >= count else words.astype("<u2").view(np.uint8)
    if len(entries) < count:
        raise InputError(f"its palette states {count} entries and has {len(entries)}")
    return entries[:count]


def _scaled(frame: Frame, array: Array) -> Array:
    """Return an array in the units of the modality."""
    header = frame.header
    if (own := frame.group("PixelValueTransformationSequence")) is not None:
        scale = numbers([own.get("RescaleSlope"), own.get("RescaleIntercept")], 2)
        if scale is None:
            raise InputError("its PixelValueTransformationSequence has no slope and intercept")
        return array * scale[0] + scale[1]
    if header.get("SOPClassUID") == uid.RTDoseStorage:
        scaling = numbers([header.get("DoseGridScaling")], 1)
        if scaling is None:
            raise InputError("it is an RT dose and has no DoseGridScaling")
        return array * scaling[0]
    if header.get("ModalityLUTSequence"):
        # pydicom counts entries in the type of the pixels.
        array = array.astype(np.int64)
    return apply_modality_lut(array, header)
