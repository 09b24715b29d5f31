"""Outlines of radiotherapy (RTSTRUCT), filled on the planes of an image.

DICOM PS3.3 A.19 and C.8.8.5 to C.8.8.6, https://dicom.nema.org/medical/dicom/current/output/html/part03.html.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataelem import RawDataElement

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.headers import open_document, readable
from fedmed_flower.images.structures import Array, Claims, Grid, Marked, Structure

log = logging.getLogger("flwr.fedmed")

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
# Decimals of a voxel that count: a point on a voxel's centre is not moved off it by rounding.
_DECIMALS = 6


class Contours:
    """A DICOM RTSTRUCT file.

    Raises
    ------
    InputError
        If the file cannot be read, or is larger than `bounded.MOST` allows.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        require_within(f"{file} has", file.stat().st_size, "a picture or a DICOM file")
        self._part = open_document(file)

    def listed(self) -> list[Structure]:
        """Return the regions of interest, by name."""
        with readable(self.file):
            return [
                Structure(int(item.ROINumber), ((str(item.get("ROIName") or ""),),))
                for item in self._part.StructureSetROISequence
            ]

    def claim(self, numbers: Mapping[int, int], claims: Claims) -> None:
        """Fill the closed contours of regions; the log names contours of other types.

        Raises
        ------
        InputError
            If a contour lies beside the planes of the image or outside of it, if contours skip
            planes, or if a region has no closed contour.
        """
        with readable(self.file):
            items = {int(item.ROINumber): item for item in self._part.StructureSetROISequence}
            for region in self._part.ROIContourSequence:
                number = int(region.ReferencedROINumber)
                if number in numbers:
                    frame = items[number].get("ReferencedFrameOfReferenceUID")
                    claims.grid.require_frame(str(frame or ""))
                    name = shown(str(items[number].get("ROIName") or number), 64)
                    rings = self._rings(region, name)
                    axis, planes = _planes_of(rings, claims.grid, name)
                    sides = np.delete(claims.grid.shape, axis)
                    for plane, outlines in planes.items():
                        marked = filled(outlines, (int(sides[0]), int(sides[1])))
                        claims.claim(numbers[number], axis, plane, marked)

    def _rings(self, region: Dataset, name: str) -> list[Array]:
        """Return the points of a region's closed contours, each (n, 3), in DICOM's millimetres."""
        contours = region.get("ContourSequence") or []
        others = Counter(
            str(contour.ContourGeometricType)
            for contour in contours
            if contour.ContourGeometricType not in _CLOSED
        )
        if others:
            listed = ", ".join(
                f"{count} of type {shown(kind, 16)}" for kind, count in sorted(others.items())
            )
            if others.total() == len(contours):
                raise InputError(f"{name} has no closed contour, but {listed}: outline it")
            log.warning(
                "%s: contours of %s that enclose nothing are left out: %s", self.file, name, listed
            )
        closed = (one for one in contours if one.ContourGeometricType in _CLOSED)
        return [_points(one) for one in closed]


def filled(outlines: Sequence[Array], sides: tuple[int, int]) -> Marked:
    """Return which voxels of a plane have their centre inside an odd number of outlines.

    So a ring within another is a hole, and a keyhole contour, which reaches its hole by a narrow
    channel, keeps it. Of a centre on an outline, one side of the outline owns it: two structures
    that share an outline share no voxel.

    Parameters
    ----------
    outlines : sequence of ndarray
        Closed polygons, each (n, 2), as indices of voxels; the last point is joined to the first.
    sides : tuple of int
        Voxels of the plane along both axes.

    Returns
    -------
    ndarray
        bool, of shape ``sides``.
    """
    rows, columns = sides
    crossings = np.zeros((rows, columns + 1), np.uint8)
    for outline in outlines:
        points = np.round(outline, _DECIMALS)
        following = np.roll(points, -1, axis=0)
        low, high = np.sort([points[:, 0], following[:, 0]], axis=0)
        # An edge crosses the rows from its lower end on, and not that of its upper end.
        first = np.clip(np.ceil(low), 0, rows).astype(np.int64)
        stop = np.clip(np.ceil(high), 0, rows).astype(np.int64)
        counts = stop - first
        edge = np.repeat(np.arange(len(points)), counts)
        row = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts) + first[edge]
        start, end = points[edge], following[edge]
        share = (row - start[:, 0]) / (end[:, 0] - start[:, 0])
        crossed = np.round(start[:, 1] + share * (end[:, 1] - start[:, 1]), _DECIMALS)
        column = np.clip(np.ceil(crossed), 0, columns).astype(np.int64)
        # Beyond a crossing, inside becomes outside; a carry out of uint8 keeps what is even.
        np.add.at(crossings, (row, column), 1)
    inside: Marked = np.bitwise_xor.accumulate(crossings & 1, axis=1)[:, :columns].astype(bool)
    return inside


def _points(contour: Dataset) -> Array:
    """Return the points of a contour, (n, 3)."""
    # pydicom would make an object of each of a hundred thousand numbers.
    element = contour.get_item("ContourData")
    raw = element.value if isinstance(element, RawDataElement) else None
    if not isinstance(raw, bytes):
        return np.asarray(contour.ContourData, float).reshape(-1, 3)
    return np.array([float(text) for text in raw.split(b"\\")]).reshape(-1, 3)


def _planes_of(rings: list[Array], grid: Grid, name: str) -> tuple[int, dict[int, list[Array]]]:
    """Return the axis across which contours lie, and by plane their points within it."""
    indices = [grid.indices(ring) for ring in rings if len(ring) > 2]
    planes: dict[int, list[Array]] = defaultdict(list)
    if not indices:
        return 2, planes
    axis = 2
    if not grid.flat:
        extents = np.max([np.ptp(points, axis=0) for points in indices], axis=0)
        axis = int(extents.argmin())
    for points in indices:
        try:
            plane = grid.plane(axis, points[:, axis])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if plane is not None:
            planes[plane].append(np.delete(points, axis, 1))
    _require_within_image(planes, np.delete(grid.shape, axis), name)
    gaps = np.diff(sorted(planes))
    every = int(np.gcd.reduce(gaps)) if len(gaps) > 1 else 1
    if every > 1 and not grid.flat:
        raise InputError(
            f"{name} is outlined on each {every}. plane alone ({every * grid.step(axis):.3g} mm), "
            "and nothing is interpolated: interpolate it in the program that it was drawn in"
        )
    return axis, planes


def _require_within_image(planes: Mapping[int, list[Array]], sides: Array, name: str) -> None:
    outlines = [points for parts in planes.values() for points in parts]
    beyond = [(points.max(0) < 0).any() or (points.min(0) > sides - 1).any() for points in outlines]
    if outlines and all(beyond):
        raise InputError(f"{name} lies outside of the image: give the outlines of this one")
