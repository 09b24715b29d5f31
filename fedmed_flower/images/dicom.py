"""DICOM files as volumes: one file, or a folder with one series in the order of its slices."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError
from fedmed_flower.images.headers import dicom_files, is_placed, open_dicom, readable
from fedmed_flower.images.series import Series

# How far a step from slice to slice may differ from the median step, as a fraction of it.
_GAP = 0.1

Array = NDArray[Any]
Slices = Mapping[Path, pydicom.Dataset]


def read_dicom(path: Path | Series) -> tuple[Array, Array, bool]:
    """Read one DICOM file, a folder with one series, or a series, its slices in order of position.

    Returns
    -------
    values : ndarray
        float32, (channels, columns, rows, slices), in the units of the modality; MONOCHROME1 is
        inverted so that bright is dense.
    affine : ndarray
        (4, 4), maps voxels to millimetres (right, anterior, superior).
    placed : bool
        Whether the file states its position in the patient. An X-ray does not: then ``affine``
        holds the spacing alone.

    Raises
    ------
    InputError
        If a file cannot be read; if the files are not one series of evenly spaced slices; if a file
        or all of them have, or unpack to, more than `bounded.MOST` bytes.
    """
    if isinstance(path, Series):
        files = [Path(file) for file in path.files]
    else:
        files = dicom_files(path) if path.is_dir() else [path]
    slices: dict[Path, pydicom.Dataset] = {}
    size = 0
    for file in files:
        slices[file] = open_dicom(file)
        size += _bytes(file, slices[file])
        require_within(f"{path} has at least", size, "an image")
    if len(slices) > 1:
        slices = dict(_in_order(slices, path))
    pixels = [_pixels(file, part) for file, part in slices.items()]
    values = np.stack(pixels, axis=-1)  # (rows, columns, [colours,] slices)
    values = np.moveaxis(values, 2, 0) if values.ndim == 4 else values[None]
    parts = list(slices.values())
    first = parts[0]
    last = parts[-1]
    if first.get("PhotometricInterpretation") == "MONOCHROME1":
        values = values.max() + values.min() - values
    between_rows, between_columns = _spacing(first)
    affine = np.diag([between_columns, between_rows, 1.0, 1.0])
    if placed := is_placed(first):
        # The formula of DICOM PS3.3 C.7.6.2.1.1, with axes to the left and to the back.
        directions = np.reshape(np.asarray(first.ImageOrientationPatient, float), (2, 3))
        corners = np.array([first.ImagePositionPatient, last.ImagePositionPatient], float)
        steps = len(slices) - 1
        affine[:3, 0] = directions[0] * between_columns
        affine[:3, 1] = directions[1] * between_rows
        affine[:3, 2] = (corners[1] - corners[0]) / steps if steps else np.cross(*directions)
        affine[:3, 3] = corners[0]
        affine[:2] *= -1
    return values.swapaxes(1, 2), affine, placed


def _spacing(part: pydicom.Dataset) -> tuple[float, float]:
    """Return the millimetres between rows and between columns; for an X-ray, at the detector."""
    rows, columns = part.get("PixelSpacing") or part.get("ImagerPixelSpacing") or (1, 1)
    return float(rows), float(columns)


def _bytes(file: Path, part: pydicom.Dataset) -> int:
    """Return the bytes that a file takes in memory: its content, or more if float32 pixels do.

    Raises
    ------
    InputError
        If the file holds several frames, or states pixels that take more than `bounded.MOST` bytes.
    """
    with readable(file):
        if int(part.get("NumberOfFrames") or 1) > 1:
            raise InputError(f"{file} holds several frames: convert it to NIfTI")
        sides = [int(part.get(name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel")]
        values = math.prod(sides)
        depth = math.ceil(int(part.get("BitsAllocated") or 8) / 8)
        what = f"{file} says that it holds"
        require_within(what, values * depth, "a picture or a DICOM file")
        # pydicom keeps inflated content in a buffer.
        length = part.buffer.seek(0, io.SEEK_END) if part.buffer else file.stat().st_size
        return max(4 * values, length)


def _pixels(file: Path, part: pydicom.Dataset) -> NDArray[np.float32]:
    """Return pixels, (rows, columns) or (rows, columns, colours), in units of the modality."""
    with readable(file):
        array = part.pixel_array
        if part.get("PhotometricInterpretation") == "PALETTE COLOR":
            array = apply_color_lut(array, part)
        return apply_modality_lut(array, part).astype(np.float32)


def _in_order(slices: Slices, path: Path | Series) -> Slices:
    """Check that the slices are one evenly spaced series, and return them in order of position."""
    _require_one_series(slices, path)
    _require_placed(slices, path)
    _require_same_geometry(slices, path)
    ordered, corners = _along_normal(slices)
    _require_even_steps(ordered, corners, path)
    return ordered


def _require_one_series(slices: Slices, path: Path | Series) -> None:
    parts = slices.values()
    for name, what in (("SeriesInstanceUID", "series"), ("PatientID", "patients")):
        values = sorted({str(part.get(name, "")) for part in parts})
        if len(values) > 1:
            raise InputError(
                f"{path} holds {len(values)} {what} ({', '.join(values)}): give each a folder of "
                "its own"
            )


def _require_placed(slices: Slices, path: Path | Series) -> None:
    if without := [file.name for file, part in slices.items() if not is_placed(part)]:
        raise InputError(
            f"{path}: {len(without)} of {len(slices)} slices, such as {without[0]}, have no "
            "ImagePositionPatient or ImageOrientationPatient"
        )


def _require_same_geometry(slices: Slices, path: Path | Series) -> None:
    parts = slices.values()
    for name, what in (
        ("ImageOrientationPatient", "orientations"),
        ("PixelSpacing", "pixel spacings"),
        ("Rows", "numbers of rows"),
        ("Columns", "numbers of columns"),
    ):
        values = [np.atleast_1d(np.asarray(part.get(name), float)) for part in parts]
        if not np.isfinite(values).all():
            raise InputError(f"{path}: its slices have no {name}")
        for value in values:
            if not np.allclose(value, values[0], rtol=0, atol=1e-3):
                texts = ("x".join(f"{number:g}" for number in one) for one in (values[0], value))
                raise InputError(
                    f"{path}: its slices have different {what}, such as {' and '.join(texts)}"
                )


def _along_normal(slices: Slices) -> tuple[Slices, NDArray[np.float64]]:
    """Return the slices in order of position, and the corner of each, (slices, 3)."""
    files = list(slices)
    parts = list(slices.values())
    directions = np.reshape(np.asarray(parts[0].ImageOrientationPatient, float), (2, 3))
    corners = np.array([part.ImagePositionPatient for part in parts], float)
    order = np.argsort(corners @ np.cross(*directions), kind="stable")
    return {files[index]: parts[index] for index in order}, corners[order]


def _require_even_steps(slices: Slices, corners: NDArray[np.float64], path: Path | Series) -> None:
    """Raise `InputError` if a slice is missing, doubled or out of line."""
    steps = np.diff(corners, axis=0)
    usual = np.median(steps, axis=0)
    spacing = float(np.linalg.norm(usual))
    for (before, after), step in zip(pairwise(slices), steps, strict=True):
        gap = float(np.linalg.norm(step))
        where = f"{before.name} and {after.name}"
        if gap < _GAP * max(spacing, 1e-6):
            raise InputError(f"{path}: two slices at one position, {where}")
        if np.linalg.norm(step - usual) > _GAP * spacing:
            raise InputError(
                f"{path}: a slice is missing or out of place between {where}: they are {gap:.4g} "
                f"mm apart, the others {spacing:.4g}"
            )
