"""Where an image lies in the patient: spacing, orientation, and whether a mask lies on an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from numpy.typing import NDArray

from fedmed_flower.errors import InputError

# How far a mask's corners may lie from its image's, in voxels.
_NEAR = 0.1
# MONAI's key for the affine of the file; here only images with a position in the patient have it.
FILE_AFFINE = "original_affine"
# The key for the FrameOfReferenceUID of an image from DICOM files.
FRAME_OF_REFERENCE = "frame_of_reference"

Array = NDArray[Any]


def mismatch(label: MetaTensor, image: MetaTensor) -> str | None:
    """Return how the grid of a mask, or of a channel, differs from its image's; None if it fits.

    Both are as `read_image` returned them. If one of the two has no position in the patient, as
    pictures and arrays have none, only the shapes are compared.
    """
    shape = tuple(image.shape[1:])
    if tuple(label.shape[1:]) != shape:
        return f"its shape is {tuple(label.shape[1:])}, the image's {shape}"
    if FILE_AFFINE not in label.meta or FILE_AFFINE not in image.meta:
        return None
    label_affine = np.asarray(label.meta[FILE_AFFINE], float)
    image_affine = np.asarray(image.meta[FILE_AFFINE], float)
    sides = [(0, side - 1) for side in (*shape, 1)[:3]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*sides)], float).T
    offsets = (label_affine - image_affine) @ corners
    if np.abs(np.linalg.solve(image_affine, offsets)[:3]).max() <= _NEAR:
        return None
    distance = np.linalg.norm(offsets[:3], axis=0).max()
    return (
        f"it lies up to {distance:.3g} mm away from the image: {_grid(label, label_affine)}; "
        f"the image: {_grid(image, image_affine)}"
    )


def brought_to(label: MetaTensor, image: MetaTensor) -> MetaTensor:
    """Return a mask, or a channel, on the grid of its image; no value is interpolated.

    Programs store one volume with its axes in different orders and directions. If both have a
    position in the patient, the axes are put in order first.

    Parameters
    ----------
    label, image
        As `read_image` returned them.

    Returns
    -------
    MetaTensor
        The values of ``label``, (channels, *spatial), with the place of ``image``.

    Raises
    ------
    InputError
        If the voxels of ``label`` are not those of ``image`` in any order of axes; the text is that
        of `mismatch`.
    """
    problem = mismatch(label, image)
    if problem is not None and FILE_AFFINE in label.meta and FILE_AFFINE in image.meta:
        turned = _turned(label, image)
        if turned is not None and mismatch(turned, image) is None:
            label = turned
            problem = None
    if problem is not None:
        raise InputError(problem)
    return MetaTensor(label.as_tensor(), image.affine, file_affine_of(image))


def _turned(label: MetaTensor, image: MetaTensor) -> MetaTensor | None:
    """Return a mask with axes in the order and the directions of an image's.

    None if the axes of the two are not parallel.
    """
    dims = image.ndim - 1
    affine = np.asarray(label.meta[FILE_AFFINE], float)
    # How far one step along each axis of the mask leads along each axis of the image, in voxels.
    steps = np.linalg.solve(np.asarray(image.meta[FILE_AFFINE], float), affine)[:dims, :dims]
    signs = np.rint(steps)
    if label.ndim != image.ndim or not np.array_equal(np.abs(signs @ signs.T), np.eye(dims)):
        return None
    order = np.abs(signs).argmax(axis=1)
    directions = signs[range(dims), order]
    spatial = tuple(label.shape[1:])
    backwards = [axis for axis in range(dims) if directions[axis] < 0]
    values = label.as_tensor().permute(0, *(int(axis) + 1 for axis in order))
    values = values.flip([axis + 1 for axis in backwards])
    turned = affine.copy()
    turned[:, :dims] = affine[:, order] * directions
    for axis in backwards:
        # The first voxel is now the one that was the last.
        turned[:, 3] += affine[:, order[axis]] * (spatial[order[axis]] - 1)
    return MetaTensor(values.contiguous(), label.affine, {FILE_AFFINE: torch.from_numpy(turned)})


def _grid(image: MetaTensor, affine: Array) -> str:
    """Return spacing, orientation and origin of an image as a text."""
    return (
        f"spacing {_numbers(spacing_of(image))}, orientation {_codes(affine)}, "
        f"origin {_numbers(affine[:3, 3])}"
    )


def spacing_of(image: MetaTensor) -> tuple[float, ...]:
    """Return the distances between voxels in millimetres, one an axis."""
    spacing = affine_to_spacing(image.affine, r=image.ndim - 1)
    return tuple(float(f"{float(value):.6g}") for value in spacing)


def orientation_of(image: MetaTensor) -> str:
    """Return the directions in which a volume's axes point, such as RAS; empty for a 2D image."""
    return _codes(np.asarray(image.affine, float)) if image.ndim == 4 else ""


def file_affine_of(image: MetaTensor) -> dict[str, Any]:
    """Return the entries of an image's meta data that state its position in the patient, if any."""
    keys = (FILE_AFFINE, FRAME_OF_REFERENCE)
    return {key: value for key, value in image.meta.items() if key in keys}


def _codes(affine: Array) -> str:
    codes: Sequence[str | None] = nibabel.orientations.aff2axcodes(affine)  # type: ignore[no-untyped-call]
    return "".join(code or "?" for code in codes)


def _numbers(values: Sequence[float] | Array) -> str:
    return "x".join(f"{float(value):g}" for value in values)
