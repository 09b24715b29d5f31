"""DICOM files and their headers: which files are DICOM, and opening one within bounds."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_partial
from pydicom.misc import is_dicom as looks_like_dicom
from pydicom.tag import Tag

from fedmed_flower.data.bounded import require_deflated
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.series import Series

# A file with such a name that is not DICOM was cut off: without an error a slice would be lost.
_SUFFIXES = (".dcm", ".dicom", ".ima")
_MOST_LETTERS = 300
_SERIES = Tag("SeriesInstanceUID")
# What a file without preamble begins with: the types of elements of group 2 or 8, the last element
# that comes before SOPClassUID or is it, and the classes of images.
_FIRST_TYPES = (b"UL", b"OB", b"UI", b"CS", b"SH", b"LO", b"DA", b"TM", b"DT")
_FIRST_ELEMENTS = 0x0018
_IMAGE_CLASSES = "1.2.840.10008.5.1.4.1.1."
_PREAMBLE = 132  # Bytes before the first element, with the letters DICM at the end.
# Group, creator and element of b-values that are not at their standard place.
PRIVATE_B_VALUES = (
    (0x0019, "SIEMENS MR HEADER", 0x0C),
    (0x0043, "GEMS_PARM_01", 0x39),
    (0x2001, "Philips Imaging DD 001", 0x03),
)
# Elements without which a file cannot be used: what it is, and where its frames lie.
_NEEDED = (
    "PatientID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "GridFrameOffsetVector",
)
# What tells the stacks of a series apart, and how many slices they have.
_TELLING: tuple[str | int, ...] = (
    "ImageType",
    "AcquisitionNumber",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "EchoNumbers",
    "EchoTime",
    "InversionTime",
    "FlipAngle",
    "TriggerTime",
    "KVP",
    "ConvolutionKernel",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "TemporalPositionIdentifier",
    "ComplexImageComponent",
    "DimensionIndexSequence",
    "ImageIndex",
    "NumberOfSlices",
    "NumberOfTimeSlices",
    "ImagesInAcquisition",
    *(group * 0x10000 + 0x10 for group, _, _ in PRIVATE_B_VALUES),
    *(group * 0x10000 + 0x1000 + element for group, _, element in PRIVATE_B_VALUES),
)
HEADER: tuple[str | int, ...] = (*_NEEDED, *_TELLING)


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, or a folder directly holds DICOM files."""
    if path.is_dir():
        return any(map(is_dicom, _files_in(path)))
    # Files of the kernel, such as in /proc, have no size, and reading one may block for ever.
    if not path.is_file() or path.stat().st_size < _PREAMBLE:
        return False
    return looks_like_dicom(path) or _is_without_preamble(path)


def dicom_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are DICOM or have such a suffix, by name.

    A DICOMDIR is left out.
    """
    files = _files_in(folder)
    return [path for path in files if path.suffix.lower() in _SUFFIXES or is_dicom(path)]


def open_dicom(file: Path, **options: Any) -> pydicom.Dataset:
    """Read a DICOM file with pydicom's options; the elements in `HEADER` can be decoded.

    Those that only tell stacks apart are left out if they cannot be. A file without preamble is
    read if it says that it holds an image.

    Raises
    ------
    InputError
        If the file is not DICOM, holds no image, a needed element cannot be decoded, or the
        file unpacks to more than `bounded.MOST` bytes.
    """
    part = open_object(file, **options)
    if "Rows" not in part:
        raise InputError(f"{file} holds no image: it is cut off, or a document")
    return part


def open_document(file: Path) -> pydicom.Dataset:
    """Read a DICOM file without an image.

    Raises
    ------
    InputError
        As `open_dicom`; if the file is cut off, which no pixels would show.
    """
    part = open_object(file)
    for tag in part.keys():  # noqa: SIM118
        element = part.get_item(tag)
        if isinstance(element, RawDataElement) and len(element.value or b"") < element.length:
            raise InputError(f"{file} is cut off")
    return part


def open_object(file: Path, **options: Any) -> pydicom.Dataset:
    """Read a DICOM file as `open_dicom` does, whether it holds an image or something else."""
    with readable(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = _begins_with_element(file)
        with _Deflatable(io.FileIO(os.fspath(file))) as stream:
            part = pydicom.dcmread(stream, force=bare, **options)
        if bare:
            _require_image_class(file, part)
        for name in _NEEDED:  # pydicom decodes an element when it is first read.
            part.get(name)
        _drop_unreadable(part)
        _state_syntax(part)
    return part


def kind_of(file: Path) -> str:
    """Return the SOP class of a DICOM file, such as that of SEG; empty if its head names none."""
    with readable(file):
        head = pydicom.filereader.read_file_meta_info(file)
        return str(head.get("MediaStorageSOPClassUID", ""))


def frame_of_reference(source: Path | Series) -> str:
    """Return the FrameOfReferenceUID of an image's first file; empty if there is none."""
    if isinstance(source, Series):
        files = [Path(source.files[0])]
    else:
        files = _files_in(source) if source.is_dir() else [source]
    first = next(filter(is_dicom, files), None)
    if first is None:
        return ""
    tags = ["FrameOfReferenceUID", *HEADER]
    header = open_object(first, stop_before_pixels=True, specific_tags=tags)
    return str(header.get("FrameOfReferenceUID") or "")


def series_of(file: Path) -> str:
    """Return the SeriesInstanceUID of a damaged file, if it comes before the damage; else empty."""
    try:
        with warnings.catch_warnings(), _Deflatable(io.FileIO(file)) as stream:
            warnings.simplefilter("ignore")
            part = read_partial(
                stream,
                stop_when=lambda tag, _vr, _length: tag > _SERIES,
                force=_begins_with_element(file),
                specific_tags=[_SERIES],
            )
        return str(part.get("SeriesInstanceUID", ""))
    except Exception:  # Damage can raise anything; then nobody knows the series.
        return ""


def _is_without_preamble(file: Path) -> bool:
    """Return whether a file is an image in DICOM that lacks the preamble."""
    if not _begins_with_element(file):
        return False
    try:
        open_dicom(file, stop_before_pixels=True, specific_tags=list(HEADER))
    except InputError:
        return False
    return True


def _begins_with_element(file: Path) -> bool:
    """Return whether a file begins with an element of the groups 2 or 8 of DICOM."""
    with file.open("rb") as stream:
        start = stream.read(_PREAMBLE)
    if len(start) < _PREAMBLE or start.endswith(b"DICM"):
        return False
    explicit = start[4:6] in _FIRST_TYPES
    for order in "<>" if explicit else "<":
        group, element, length = struct.unpack_from(f"{order}HHI", start)
        if group in (2, 8) and element <= _FIRST_ELEMENTS and (explicit or length <= 64):
            return True
    return False


def _require_image_class(file: Path, part: pydicom.Dataset) -> None:
    """Raise `InputError` if a file without preamble does not say that it is an image."""
    if not str(part.get("SOPClassUID", "")).startswith(_IMAGE_CLASSES) or "Rows" not in part:
        raise InputError(f"{file} has no DICOM preamble and does not say that it holds an image")


def _drop_unreadable(part: pydicom.Dataset) -> None:
    """Remove the elements that only tell stacks apart and cannot be decoded."""
    for name in _TELLING:
        try:
            part.get(name)
        except Exception:  # pydicom fails in a dozen ways.
            part.pop(pydicom.tag.Tag(name))


def _state_syntax(part: pydicom.Dataset) -> None:
    """State the transfer syntax as which a file was read, if it does not state it itself.

    Compressed pixels are left as they are: how they were is not known.
    """
    if part.file_meta.get("TransferSyntaxUID"):
        return
    if "PixelData" in part and part["PixelData"].is_undefined_length:
        return
    implicit, little = part.original_encoding
    if implicit:
        part.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    elif little:
        part.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    else:
        part.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian


class _Deflatable(io.BufferedReader):
    """A file that bounds deflated content: pydicom reads all the rest at once to inflate it."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if size is None or size < 0:
            require_deflated(content, self.name, "a picture or a DICOM file")
        return content


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn whatever pydicom raises into an `InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return the text of another library's error in one line of at most 300 letters.

    If the text cannot be made, return the name of the error's class.
    """
    try:
        return shown(error, _MOST_LETTERS)
    except Exception:  # An error's own __str__ can raise one.
        return type(error).__name__


def is_placed(part: pydicom.Dataset) -> bool:
    """Return whether an image states its position and orientation in the patient."""
    return all(part.get(name) for name in ("ImagePositionPatient", "ImageOrientationPatient"))


def _files_in(folder: Path) -> list[Path]:
    """Return the files of a folder by name; hidden files and a DICOMDIR are left out."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.name.upper() != "DICOMDIR"
    ]
