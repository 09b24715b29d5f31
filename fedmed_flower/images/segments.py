"""DICOM segmentations (SEG): the pixels of each structure, plane by plane.

DICOM PS3.3 A.51 and C.8.20, https://dicom.nema.org/medical/dicom/current/output/html/part03.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.pixels.utils import iter_pixels

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError
from fedmed_flower.images.headers import open_dicom, readable
from fedmed_flower.images.structures import Array, Claims, Grid, Marked, Structure

# How far voxels of the mask may lie from those of the image, in voxels.
_NEAR = 0.1
# Planes of a coarser grid are at least this many of the image's planes apart.
_COARSE = 1.5


@dataclass(frozen=True, eq=False)
class _Frame:
    """One plane of the file.

    Attributes
    ----------
    index : int
        Its place in the file.
    segment : int or None
        The structure it shows; None if the pixels are the numbers of structures.
    pixels : ndarray or None
        (3, 3): where its first pixel lies, the one below and the one to the right, in DICOM's
        millimetres; None if the file states no position.
    between : float
        Millimetres from one plane of the file to the next as it states them; else 0.
    """

    index: int
    segment: int | None
    pixels: Array | None
    between: float


class Segments:
    """A DICOM SEG file: BINARY, FRACTIONAL (from half of the maximum on) or LABELMAP.

    Raises
    ------
    InputError
        If the file cannot be read, or is larger than `bounded.MOST` allows.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        require_within(f"{file} has", file.stat().st_size, "an image")
        self._part = open_dicom(file)
        with readable(file):
            self._kind = str(self._part.SegmentationType)
            self._sides = (int(self._part.Rows), int(self._part.Columns))
            frame_bytes = self._sides[0] * self._sides[1] * int(self._part.BitsAllocated) // 8
        require_within(f"{file} says that a frame holds", frame_bytes, "a picture or a DICOM file")

    def listed(self) -> list[Structure]:
        """Return the segments, named by label, then description, then code."""
        with readable(self.file):
            return [
                Structure(
                    int(item.SegmentNumber),
                    (
                        (str(item.get("SegmentLabel") or ""),),
                        (str(item.get("SegmentDescription") or ""),),
                        _meanings(item),
                    ),
                )
                for item in self._part.SegmentSequence
            ]

    def claim(self, numbers: Mapping[int, int], claims: Claims) -> None:
        """Mark the pixels of segments on the image's grid.

        Within a plane, what lies beyond the image's edges is left out.

        Raises
        ------
        InputError
            If a plane lies beside those of the image; if the grid differs within the planes, unless
            the frame of reference is known to be the image's: then the nearest pixel counts.
        """
        with readable(self.file):
            claims.grid.require_frame(str(self._part.get("FrameOfReferenceUID") or ""))
            planes = _Planes(claims.grid, self._is_in_frame_of(claims.grid))
            self._require_all_planes(planes)
            wanted = [part for part in self._frames if part.segment in (None, *numbers)]
            seen = False
            within = False
            for frame, pixels in zip(wanted, self._pixels(wanted), strict=True):
                for segment, marked in self._marked(frame, pixels, numbers):
                    found = planes.of(frame, marked)
                    if found is None:
                        continue
                    axis, plane, voxels = found
                    claims.claim(numbers[segment], axis, plane, voxels)
                    seen = True
                    within = within or bool(voxels.any())
            if seen and not within:
                raise InputError("it outlines nothing within the image: give the mask of this one")

    @cached_property
    def _frames(self) -> list[_Frame]:
        shared = (self._part.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        groups = self._part.PerFrameFunctionalGroupsSequence
        count = int(self._part.get("NumberOfFrames") or 1)
        if len(groups) != count:
            raise InputError(f"it describes {len(groups)} of its {count} frames")
        return [self._frame(index, own, shared) for index, own in enumerate(groups)]

    def _frame(self, index: int, own: Dataset, shared: Dataset) -> _Frame:
        def group(name: str) -> Dataset:
            items = own.get(name) or shared.get(name) or [Dataset()]
            found: Dataset = items[0]
            return found

        segment: int | None = None
        if self._kind != "LABELMAP":
            segment = int(group("SegmentIdentificationSequence").ReferencedSegmentNumber)
        position = group("PlanePositionSequence").get("ImagePositionPatient")
        if position is None:
            return _Frame(index, segment, None, 0.0)
        directions = group("PlaneOrientationSequence").ImageOrientationPatient
        measures = group("PixelMeasuresSequence")
        between_rows, between_columns = map(float, measures.PixelSpacing)
        along_row, along_column = np.reshape(np.asarray(directions, float), (2, 3))
        first = np.asarray(position, float)
        pixels = [first, first + along_column * between_rows, first + along_row * between_columns]
        between = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0
        return _Frame(index, segment, np.array(pixels), abs(float(between)))

    def _pixels(self, frames: list[_Frame]) -> Iterator[Array]:
        if frames:
            yield from iter_pixels(self._part, indices=[frame.index for frame in frames], raw=True)

    def _marked(
        self, frame: _Frame, pixels: Array, numbers: Mapping[int, int]
    ) -> Iterator[tuple[int, Marked]]:
        """Yield the segments of a frame that mark pixels, and these."""
        if frame.segment is None:
            for segment in numbers:
                marked = pixels == segment
                if marked.any():
                    yield segment, marked
            return
        least = 1.0
        if self._kind == "FRACTIONAL":
            least = int(self._part.MaximumFractionalValue) / 2
        marked = pixels >= least
        if marked.any():
            yield frame.segment, marked

    def _is_in_frame_of(self, grid: Grid) -> bool:
        return bool(grid.frame) and self._part.get("FrameOfReferenceUID") == grid.frame

    def _require_all_planes(self, planes: _Planes) -> None:
        """Raise `InputError` if the file has planes further apart than those of the image.

        A file may leave out planes without a structure, so both what it states and what it has
        must say so.
        """
        placed = [frame for frame in self._frames if frame.pixels is not None]
        if planes.grid.flat or not placed:
            return
        axis = planes.axis(placed[0])
        positions = {round(float(planes.indices(frame)[0, axis]), 2) for frame in placed}
        gaps = np.diff(sorted(positions))
        step = planes.grid.step(axis)
        between = placed[0].between
        if gaps.size and gaps.min() >= _COARSE and between >= _COARSE * step:
            raise InputError(
                f"its planes are {between:.3g} mm apart and those of the image {step:.3g}: save it "
                "as NIfTI on the image's grid"
            )


class _Planes:
    """Where the frames of a file lie on the grid of an image."""

    def __init__(self, grid: Grid, same_frame: bool) -> None:
        self.grid = grid
        self._same_frame = same_frame
        self._nearest: dict[bytes, tuple[Array, Array, Array]] = {}

    def of(self, frame: _Frame, marked: Marked) -> tuple[int, int, Marked] | None:
        """Return axis, plane and marked voxels; None if a 2D image is another slice."""
        if frame.pixels is None:
            return self._without_position(marked)
        axis = self.axis(frame)
        first, below, right = self.indices(frame)
        rows, columns = marked.shape
        # The four corners.
        down = (below - first) * (rows - 1)
        across = (right - first) * (columns - 1)
        corners = np.array([first, first + down, first + across, first + down + across])
        plane = self.grid.plane(axis, corners[:, axis])
        if plane is None:
            return None
        within = np.delete([first, below - first, right - first], axis, 1)
        found_rows, found_columns, inside = self._pixels_of(within, axis, marked.shape)
        return axis, plane, marked[found_rows, found_columns] & inside

    def indices(self, frame: _Frame) -> Array:
        """Return `_Frame.pixels` as indices of voxels."""
        if frame.pixels is None:
            raise InputError("its frames have no position in the patient, and the image has one")
        return self.grid.indices(frame.pixels)

    def axis(self, frame: _Frame) -> int:
        """Return the axis of the image that a frame lies across."""
        first, below, right = self.indices(frame)
        return 2 if self.grid.flat else int(np.abs([below - first, right - first]).max(0).argmin())

    def _without_position(self, marked: Marked) -> tuple[int, int, Marked]:
        """Place the frame of an X-ray's mask, which has no position either."""
        if not self.grid.flat or self.grid.affine is not None:
            raise InputError("its frames have no position in the patient, and the image has one")
        if marked.shape != self.grid.shape[:2]:
            raise InputError(f"its shape is {marked.shape}, the image's {self.grid.shape[:2]}")
        return 2, 0, marked

    def _pixels_of(
        self, within: Array, axis: int, sides: tuple[int, ...]
    ) -> tuple[Array, Array, Array]:
        """Return row and column of the pixel nearest to each voxel of a plane, and where it is one.

        ``within`` is the first pixel, one step down and one to the right, (3, 2), in voxels.
        """
        key = np.round(within, 6).tobytes() + bytes([axis])
        if key not in self._nearest:
            if not self._same_frame and not _on_lattice(within, sides):
                raise InputError(
                    "its grid differs from the image's, and the two do not name one frame of "
                    "reference: save it as NIfTI on the image's grid"
                )
            self._nearest[key] = _nearest(within, np.delete(self.grid.shape, axis), sides)
        return self._nearest[key]


def _on_lattice(within: Array, sides: tuple[int, ...]) -> bool:
    """Return whether the pixels of a frame are voxels of the image, as far as they overlap."""
    whole = np.rint(within)
    far = np.abs(within - whole) * [[1], [sides[0] - 1], [sides[1] - 1]]
    is_turn = np.array_equal(np.abs(whole[1:] @ whole[1:].T), np.eye(2))
    return is_turn and float(far.sum(axis=0).max()) <= _NEAR


def _nearest(within: Array, plane: Array, sides: tuple[int, ...]) -> tuple[Array, Array, Array]:
    voxels = np.stack(np.meshgrid(*map(np.arange, plane), indexing="ij"), axis=-1)
    places = np.round((voxels - within[0]) @ np.linalg.inv(within[1:]), 6)
    # Between two pixels the second counts everywhere, which rounding to even would not do.
    places = np.floor(places + 0.5).astype(np.int64)
    inside = ((places >= 0) & (places < sides)).all(axis=-1)
    rows, columns = np.moveaxis(np.where(inside[..., None], places, 0), -1, 0)
    return rows, columns, inside


def _meanings(item: Dataset) -> tuple[str, ...]:
    """Return what a segment's codes mean: with left or right first, then without."""
    types = item.get("SegmentedPropertyTypeCodeSequence") or []
    meanings = []
    for code in types:
        meaning = str(code.get("CodeMeaning") or "")
        for modifier in code.get("SegmentedPropertyTypeModifierCodeSequence") or []:
            side = str(modifier.get("CodeMeaning") or "")
            meanings += [f"{side} {meaning}", f"{meaning} {side}"]
        meanings.append(meaning)
    return tuple(meanings)
