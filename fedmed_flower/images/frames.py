"""What a DICOM header says of each frame: its place, its spacing, and what tells it from others.

A file of many frames describes them in functional groups (DICOM PS3.3 C.7.6.16): a frame's own come
first, then those that all frames share. A file of one frame describes it at the top level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pydicom

from fedmed_flower.errors import InputError

# A functional MRI of 2,000 volumes of 60 slices.
_MOST_FRAMES = 120_000
# The last digit of a printed number counts at most this much, in mm: "2" may well be exact.
_COARSEST = 0.1

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """One frame of a file, as its header describes it.

    Attributes
    ----------
    header : Dataset
        Of the file.
    number : int
        From 0.
    groups : tuple of Dataset
        The functional groups of the frame alone, then those that all frames share.
    """

    header: pydicom.Dataset
    number: int
    groups: tuple[pydicom.Dataset, ...] = ()

    def group(self, name: str) -> pydicom.Dataset | None:
        """Return the functional group with that keyword, or None."""
        for item in self.groups:
            if found := item.get(name):
                return found[0]  # type: ignore[no-any-return]
        return None

    def value(self, group: str, name: str) -> Any:
        """Return the value of an element in a functional group, or at the top level; or None."""
        item = self.group(group) if group else None
        value = None if item is None else item.get(name)
        if value in (None, ""):
            value = self.header.get(name)
        return None if value == "" else value

    @property
    def position(self) -> Any:
        """ImagePositionPatient as it is printed, or None."""
        return self.value("PlanePositionSequence", "ImagePositionPatient")

    @property
    def orientation(self) -> Any:
        """ImageOrientationPatient as it is printed, or None."""
        return self.value("PlaneOrientationSequence", "ImageOrientationPatient")

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Millimetres between rows and between columns; None if they are not stated.

        Those of an X-ray are taken at the detector, those of a film at its scanner. A spacing of
        zero is none: some archives write it where they do not know it.
        """
        stated = self.value("PixelMeasuresSequence", "PixelSpacing")
        detector = self.header.get("ImagerPixelSpacing")
        scanner = self.header.get("NominalScannedPixelSpacing")
        for values in (stated, detector, scanner):
            spacing = numbers(values, 2)
            if spacing is not None and min(spacing) > 0:
                return spacing[0], spacing[1]
        return None


def frames_of(file: Path, header: pydicom.Dataset) -> list[Frame]:
    """Return the frames of a file.

    Raises
    ------
    InputError
        If their number is not a whole number from 1 to 120,000, or not that of the frames
        described.
    """
    stated = header.get("NumberOfFrames")
    try:
        count = 1 if stated in (None, "") else int(stated)
    except (TypeError, ValueError):
        raise InputError(f"{file}: its NumberOfFrames must be a number, got {stated!r}") from None
    if not 1 <= count <= _MOST_FRAMES:
        raise InputError(
            f"{file}: its NumberOfFrames must be from 1 to {_MOST_FRAMES:,}, got {count:,}"
        )
    own = list(header.get("PerFrameFunctionalGroupsSequence") or ())
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())[:1]
    if len(own) not in (0, count):
        raise InputError(f"{file} states {count} frames and describes {len(own)}: it is cut off")
    return [Frame(header, number, (*own[number : number + 1], *shared)) for number in range(count)]


def numbers(values: Any, count: int) -> Numbers | None:
    """Return finite numbers, or None if there are not exactly as many."""
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def digits(values: Sequence[Any]) -> Numbers:
    """Return what the last printed digit of each number counts, at most 0.1.

    Examples
    --------
    >>> digits(["12.5", "-3", "1.25e1"])
    (0.1, 0.1, 0.1)
    >>> digits(["-158.135803"])
    (1e-06,)
    """
    return tuple(min(_last_digit(value), _COARSEST) for value in values)


def _last_digit(value: Any) -> float:
    text = str(getattr(value, "original_string", None) or value).strip()
    try:
        exponent = Decimal(text).as_tuple().exponent
    except InvalidOperation:
        return 0.0
    return float(10.0**exponent) if isinstance(exponent, int) else 0.0
