"""DICOM files as volumes: one file, or the files of one series, in the order of their slices."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError
from fedmed_flower.images.frames import frames_of, numbers
from fedmed_flower.images.headers import dicom_files, open_dicom
from fedmed_flower.images.pixels import frame_bytes, read_frames
from fedmed_flower.images.series import Series
from fedmed_flower.images.stacks import Plane, missing_of, planes_of, stacks_of

# How far a slice may lie from its even place, and a step differ, as a fraction of a step.
_GAP = 0.1
# How far directions may be from length 1 and right angles: some scanners print two digits.
_SKEW = 0.02
# How many stacks an error names.
_MOST_NAMED = 12
_MASKS = (uid.SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"

Array = NDArray[Any]
Parts = Mapping[Path, pydicom.Dataset]
Planes = Sequence[Plane]

log = logging.getLogger("flwr.fedmed")


def read_dicom(path: Path | Series, frame: int | None = None) -> tuple[Array, Array, bool]:
    """Read one DICOM file, a folder with one series, or a series, its slices in order of position.

    A file may hold one slice or many (enhanced CT and MR, RT dose). Of a series with several stacks
    of slices, such as b-values, a `Series` names one by its ``part``.

    Parameters
    ----------
    path : Path or Series
    frame : int, optional
        Of a file of many frames, the number of the one that is taken, from 0. A film (ultrasound,
        angiography) needs it, as its frames are no slices.

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
        If a file cannot be read; if the files are not one series of evenly spaced slices, or the
        header says that there are more; if a file or all of them have, or unpack to, more than
        `bounded.MOST` bytes.
    """
    if isinstance(path, Series):
        files = [Path(file) for file in path.files]
    else:
        files = dicom_files(path) if path.is_dir() else [path]
    parts, planes = _opened(files, path)
    _require_one_series(parts, path)
    planes = _stack(planes, parts, path) if frame is None else [_frame(planes, frame, path)]
    sizes = {file: frame_bytes(file, part) for file, part in parts.items()}
    size = sum(sizes[plane.file] for plane in planes)
    require_within(f"{path} has at least", size, "an image")
    affine = _affine(planes, path)
    return _values(planes, parts, path), affine, planes[0].position is not None


def _opened(
    files: Sequence[Path], path: Path | Series
) -> tuple[dict[Path, pydicom.Dataset], list[Plane]]:
    """Return the content of files, and their planes; raise if they are too large or no images."""
    parts: dict[Path, pydicom.Dataset] = {}
    planes = []
    size = 0
    for file in files:
        stored = file.stat().st_size
        require_within(f"{path} has at least", size + stored, "an image")
        part = open_dicom(file)
        frame_bytes(file, part)
        _require_image(file, part)
        # pydicom keeps inflated content in a buffer.
        size += part.buffer.seek(0, io.SEEK_END) if part.buffer else stored
        require_within(f"{path} has at least", size, "an image")
        parts[file] = part
        planes += planes_of(file, part)
    return parts, planes


def _require_image(file: Path, part: pydicom.Dataset) -> None:
    """Raise `InputError` if a file holds a mask, or tiles instead of a slice."""
    kind = part.get("SOPClassUID")
    if kind in _MASKS:
        raise InputError(
            f"{file} holds a segmentation, which is a mask and no image: it can be the label of a "
            "row"
        )
    if "MOSAIC" in (part.get("ImageType") or ()):
        raise InputError(
            f"{file} is a mosaic, whose slices are tiles of one picture: export it with one slice "
            "a file or frame"
        )
    if kind == _SLIDE:
        raise InputError(
            f"{file} holds tiles of a slide of tissue (whole slide microscopy), which are not "
            "read: export the region as a picture"
        )


def _frame(planes: Planes, frame: int, path: Path | Series) -> Plane:
    """Return the plane of one frame of the only file."""
    if len({plane.file for plane in planes}) > 1:
        raise InputError(f"{path}: a number of a frame ({frame}) needs one file of many frames")
    if not 0 <= frame < len(planes):
        raise InputError(
            f"{path}: the number of the frame must be from 0 to {len(planes) - 1}, got {frame}"
        )
    return planes[frame]


def _stack(planes: Planes, parts: Parts, path: Path | Series) -> list[Plane]:
    """Return the planes of the one stack that is meant, in order of position, after checks."""
    if len(planes) == 1:
        return list(planes)
    _require_placed(planes, parts, path)
    stacks = stacks_of(planes)
    if len(stacks) == len(parts) == 1 and len({plane.position for plane in planes}) == 1:
        raise _film(planes, parts, path, "one position")
    part = path.part if isinstance(path, Series) else ""
    if len(stacks) > 1 and part not in stacks:
        named = [f"{name} ({_slices(len(stack))})" for name, stack in stacks.items()]
        listed = ", ".join(named[:_MOST_NAMED])
        if len(named) > _MOST_NAMED:
            listed += f" and {len(named) - _MOST_NAMED} more"
        example = next(iter(stacks))
        raise InputError(
            f"{path} holds {len(stacks)} stacks of slices: {listed}. Choose one by a rule such as "
            f'part="{example}", or give each a folder of its own'
        )
    stack = stacks[part] if part in stacks else next(iter(stacks.values()))
    if len(stack) > 1:
        _require_same_geometry(stack, path)
        _require_even_steps(stack, path)
    # The files of a part are not all files of its series, whose images the header counts.
    if (len(stacks) > 1 or not part) and (missing := missing_of(stacks, part)) is not None:
        raise InputError(f"{path}: {missing}: slices are missing, perhaps at an end. Copy it again")
    return stack


def _slices(count: int) -> str:
    return f"{count} slice{'s' * (count > 1)}"


def _require_one_series(parts: Parts, path: Path | Series) -> None:
    for name, what in (("SeriesInstanceUID", "series"), ("PatientID", "patients")):
        values = sorted({str(part.get(name, "")) for part in parts.values()})
        if len(values) > 1:
            raise InputError(
                f"{path} holds {len(values)} {what} ({', '.join(values)}): give each a folder of "
                "its own"
            )


def _require_placed(planes: Planes, parts: Parts, path: Path | Series) -> None:
    """Raise `InputError` if some planes have no position: X-rays, and the frames of a film."""
    unplaced = [plane for plane in planes if plane.position is None]
    if unplaced and len(parts) == 1:
        raise _film(planes, parts, path, "no position")
    if unplaced:
        raise InputError(
            f"{path}: {len(unplaced)} of {len(planes)} slices, such as {unplaced[0]}, have no "
            "ImagePositionPatient or ImageOrientationPatient"
        )


def _film(planes: Planes, parts: Parts, path: Path | Series, place: str) -> InputError:
    """Return the error for the frames of a file that are no slices."""
    (part,) = parts.values()
    way = f"take one by `frames` of its row, from 0 to {len(planes) - 1}"
    if part.get("Modality") == "NM":
        return InputError(
            f"{path} holds {len(planes)} frames of nuclear medicine, whose positions are not read: "
            f"export it as one file a slice, or {way}"
        )
    return InputError(
        f"{path} holds {_frames_over_time(planes, part)} with {place} in the patient: they are no "
        f"slices, so {way}"
    )


def _frames_over_time(planes: Planes, part: pydicom.Dataset) -> str:
    """Return how many frames a film has, and how long it is if it says so."""
    count = f"{len(planes)} frames"
    times = part.get("FrameTimeVector")
    step = numbers([part.get("FrameTime")], 1)
    rate = numbers([part.get("CineRate") or part.get("RecommendedDisplayFrameRate")], 1)
    if times is not None and (steps := numbers(times, len(planes))) is not None:
        seconds = sum(steps) / 1000
    elif step is not None:
        seconds = step[0] * len(planes) / 1000
    elif rate is not None and rate[0] > 0:
        seconds = len(planes) / rate[0]
    else:
        return count
    return f"a film of {count} over {seconds:.3g} s"


def _require_same_geometry(stack: Planes, path: Path | Series) -> None:
    for plane in stack:
        if plane.spacing is None:
            raise InputError(f"{path}: its slices have no PixelSpacing")
        if not np.allclose(plane.spacing, stack[0].spacing or (), rtol=0, atol=1e-3):
            pair = (stack[0].spacing or (), plane.spacing)
            texts = ("x".join(f"{number:g}" for number in spacing) for spacing in pair)
            raise InputError(
                f"{path}: its slices have different pixel spacings, such as {' and '.join(texts)}"
            )


def _require_even_steps(stack: Planes, path: Path | Series) -> None:
    """Raise `InputError` if a slice is missing, doubled or out of line.

    A position is printed with few digits by some scanners: a step may then differ by the last.
    """
    corners = np.array([plane.position for plane in stack], float)
    steps = np.diff(corners, axis=0)
    usual = np.median(steps, axis=0)
    spacing = float(np.linalg.norm(usual))
    rounded = np.min([plane.digits for plane in stack], axis=0) + 1e-6
    allowed = np.maximum(_GAP * spacing, rounded)
    for (before, after), step in zip(pairwise(stack), steps, strict=True):
        gap = float(np.linalg.norm(step))
        where = f"{before} and {after}"
        if gap < _GAP * max(spacing, 1e-6):
            raise InputError(f"{path}: two slices at one position, {where}")
        if (np.abs(step - usual) > allowed).any():
            raise InputError(
                f"{path}: a slice is missing or out of place between {where}: they are {gap:.4g} "
                f"mm apart, the others {spacing:.4g}"
            )
    even = np.linspace(corners[0], corners[-1], len(corners))
    away = np.linalg.norm(np.where(np.abs(corners - even) > allowed, corners - even, 0), axis=1)
    worst = int(np.argmax(away))
    if away[worst] > 0:
        raise InputError(
            f"{path}: its slices are not evenly spaced: {stack[worst]} lies {away[worst]:.3g} mm "
            f"from its place, with {spacing:.4g} mm from slice to slice"
        )


def _affine(stack: Planes, path: Path | Series) -> Array:
    """Return the affine of planes in order, (4, 4); that of an X-ray holds its spacing alone."""
    first = stack[0]
    if first.spacing is None:
        _say_no_spacing()
    between_rows, between_columns = first.spacing or (1.0, 1.0)
    affine = np.diag([between_columns, between_rows, 1.0, 1.0])
    if first.position is None:
        return affine
    # The formula of DICOM PS3.3 C.7.6.2.1.1, with axes to the left and to the back.
    directions = np.reshape(np.asarray(first.orientation), (2, 3))
    skew = np.abs(directions @ directions.T - np.eye(2)).max()
    if skew > _SKEW:
        raise InputError(
            f"{path}: its ImageOrientationPatient must be two directions of length 1 at right "
            f"angles, got {directions.ravel().tolist()}"
        )
    corners = np.array([first.position, stack[-1].position], float)
    steps = len(stack) - 1
    affine[:3, 0] = directions[0] * between_columns
    affine[:3, 1] = directions[1] * between_rows
    affine[:3, 2] = (corners[1] - corners[0]) / steps if steps else np.cross(*directions)
    affine[:3, 3] = corners[0]
    affine[:2] *= -1
    return affine


@cache
def _say_no_spacing() -> None:
    """Say, once for all files, what is taken where no spacing is stated."""
    log.warning("some DICOM images state no spacing between pixels: 1 mm is taken")


def _values(stack: Planes, parts: Parts, path: Path | Series) -> Array:
    """Return the values of planes in order, (channels, columns, rows, slices)."""
    kinds = {parts[plane.file].get("PhotometricInterpretation") for plane in stack}
    if "MONOCHROME1" in kinds and len(kinds) > 1:
        raise InputError(f"{path}: in some of its slices bright is dense, in others dark is")
    values = np.empty(0, np.float32)  # (slices, rows, columns, [colours])
    for place, pixels in _pixels(stack, parts):
        if not values.size:
            values = np.empty((len(stack), *pixels.shape), np.float32)
        if pixels.shape != values.shape[1:]:
            raise InputError(f"{path}: some of its slices have colours, others not")
        values[place] = pixels
    if "MONOCHROME1" in kinds:
        values = values.max() + values.min() - values
    values = np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None]
    return values.transpose(0, 3, 2, 1)


def _pixels(stack: Planes, parts: Parts) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the place in a stack and the pixels of each plane, file by file, as they are stored."""
    places: dict[Path, list[tuple[int, int]]] = {}
    for place, plane in enumerate(stack):
        places.setdefault(plane.file, []).append((plane.frame, place))
    for file, wanted in places.items():
        wanted.sort()
        frames = frames_of(file, parts[file])
        arrays = read_frames(file, parts[file], [frames[number] for number, _ in wanted])
        for (_, place), array in zip(wanted, arrays, strict=True):
            yield place, array
