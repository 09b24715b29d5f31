"""Structures that a DICOM file outlines, brought to the grid of an image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from monai.data import MetaTensor
from numpy.typing import NDArray

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE, FRAME_OF_REFERENCE

# How far a plane may lie from a plane of the image, as a part of the distance of two. Slices whose
# distances differ slightly lie a little off the planes of their affine.
_OFF_PLANE = 0.25

Array = NDArray[Any]
Marked = NDArray[np.bool_]


@dataclass(frozen=True)
class Structure:
    """One structure of a file.

    Attributes
    ----------
    number : int
        Its number in the file.
    names : tuple of tuple of str
        What it is called: the name that somebody gave it comes before descriptions and codes.
    """

    number: int
    names: tuple[tuple[str, ...], ...]


class Structures(Protocol):
    """A file that outlines structures."""

    def listed(self) -> list[Structure]:
        """Return all structures of the file."""

    def claim(self, numbers: Mapping[int, int], claims: Claims) -> None:
        """Mark the voxels of some structures, whose classes are given by number in the file."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxels of an image; a 2D image has one plane.

    Attributes
    ----------
    shape : tuple of int
        Three sides.
    affine : ndarray or None
        (4, 4), maps voxels to millimetres (right, anterior, superior); None if the image has no
        position in the patient.
    frame : str
        FrameOfReferenceUID; empty if it is not known.
    flat : bool
        Whether the image is 2D.
    """

    shape: tuple[int, ...]
    affine: Array | None
    frame: str
    flat: bool

    @classmethod
    def of(cls, image: MetaTensor) -> Grid:
        """Return the grid of an image from `read_image`."""
        affine = image.meta.get(FILE_AFFINE)
        return cls(
            (*image.shape[1:], 1)[:3],
            None if affine is None else np.asarray(affine, float),
            str(image.meta.get(FRAME_OF_REFERENCE, "")),
            image.ndim == 3,
        )

    def require_frame(self, frame: str) -> None:
        """Raise `InputError` if another frame of reference than the image's is named."""
        if frame and self.frame and frame != self.frame:
            raise InputError(
                "it lies in another frame of reference than the image (FrameOfReferenceUID): "
                "give the mask of this scan, or register it and save it as NIfTI"
            )

    def indices(self, points: Array) -> Array:
        """Return points of a DICOM file, (n, 3), millimetres, as indices of voxels.

        Raises
        ------
        InputError
            If the image has no position in the patient.
        """
        if self.affine is None:
            raise InputError(
                "the image has no position in the patient, which a DICOM mask needs: give the "
                "image as DICOM or NIfTI"
            )
        # DICOM's axes lead to the left and to the back.
        turned = points * (-1, -1, 1)
        found: Array = np.linalg.solve(self.affine[:3, :3], (turned - self.affine[:3, 3]).T).T
        return found

    def plane(self, axis: int, positions: Array) -> int | None:
        """Return the plane on which points lie, by their indices along one axis.

        None if the image is a single slice and the points are not on it.

        Raises
        ------
        InputError
            If they lie on no plane of the image.
        """
        middle = float(positions.mean())
        plane = round(middle)
        off = float(np.abs(positions - plane).max())
        if self.flat:
            return plane if plane == 0 and off <= _OFF_PLANE else None
        if np.ptp(positions) > 2 * _OFF_PLANE:
            raise InputError(
                "its planes are tilted against those of the image, and nothing is resampled: "
                "save it as NIfTI on the image's grid"
            )
        step = self.step(axis)
        if not 0 <= plane < self.shape[axis]:
            beyond = max(-middle, middle - self.shape[axis] + 1) * step
            raise InputError(
                f"it outlines a plane {beyond:.3g} mm outside of the image: give the whole "
                "series, or the mask of this one"
            )
        if off > _OFF_PLANE:
            raise InputError(
                f"it outlines a plane {off * step:.3g} mm beside the nearest of the image, whose "
                f"planes are {step:.3g} mm apart, and nothing is interpolated: save it as NIfTI on "
                "the image's grid"
            )
        return plane

    def step(self, axis: int) -> float:
        """Return the millimetres from plane to plane along an axis."""
        if self.affine is None:
            return 1.0
        return float(np.linalg.norm(self.affine[:3, axis]))


class Claims(ABC):
    """The voxels of a grid that structures mark.

    Attributes
    ----------
    grid : Grid
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @abstractmethod
    def claim(self, number: int, axis: int, plane: int, marked: Marked) -> None:
        """Mark voxels of one plane, across an axis, for the structure of a number from 1 on."""


class ClassClaims(Claims):
    """The voxels of a grid by the class that claims them.

    Attributes
    ----------
    mask : ndarray
        uint8, of the shape of the grid: the class of each voxel, or 0.
    """

    def __init__(self, classes: Sequence[str], grid: Grid) -> None:
        super().__init__(grid)
        self.mask = np.zeros(grid.shape, np.uint8)
        self._classes = classes
        self._doubled: Counter[tuple[int, int]] = Counter()

    def claim(self, number: int, axis: int, plane: int, marked: Marked) -> None:
        """Give voxels of one plane, across an axis, to a class."""
        voxels = np.moveaxis(self.mask, axis, 0)[plane]
        doubled = marked & (voxels != 0) & (voxels != number)
        for other in np.unique(voxels[doubled]):
            pair = (min(number, int(other)), max(number, int(other)))
            self._doubled[pair] += int((voxels[doubled] == other).sum())
        voxels[marked] = number

    def require_single(self) -> None:
        """Raise `InputError` if two classes claim a voxel."""
        if self._doubled:
            pairs = (
                f"{self._classes[first - 1]} and {self._classes[second - 1]} both claim {count} "
                f"voxel{'s' * (count > 1)}"
                for (first, second), count in sorted(self._doubled.items())
            )
            raise InputError(
                f"its structures overlap: {'; '.join(pairs)}. A mask has one class a voxel: "
                "correct the outlines, or leave a class out"
            )


class RegionClaims(Claims):
    """The voxels of a grid by the regions that claim them, which may be several.

    Attributes
    ----------
    masks : ndarray
        uint8 of 0 and 1, (regions, *grid.shape).
    """

    def __init__(self, count: int, grid: Grid) -> None:
        super().__init__(grid)
        require_within("its regions have", count * math.prod(grid.shape), "an image")
        self.masks = np.zeros((count, *grid.shape), np.uint8)

    def claim(self, number: int, axis: int, plane: int, marked: Marked) -> None:
        """Add voxels of one plane, across an axis, to a region."""
        np.moveaxis(self.masks[number - 1], axis, 0)[plane][marked] = 1
