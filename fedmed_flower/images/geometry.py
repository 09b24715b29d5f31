"""Where an image lies in the patient: spacing, orientation, and whether a mask lies on an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import nibabel
import numpy as np
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from numpy.typing import NDArray

# How far a mask's corners may lie from its image's, in voxels.
_NEAR = 0.1
# MONAI's key for the affine of the file; here only images with a position in the patient have it.
FILE_AFFINE = "original_affine"

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
    """Return the entry of an image's meta data that states its position in the patient, if any."""
    return {key: value for key, value in image.meta.items() if key == FILE_AFFINE}


def _codes(affine: Array) -> str:
    codes: Sequence[str | None] = nibabel.orientations.aff2axcodes(affine)  # type: ignore[no-untyped-call]
    return "".join(code or "?" for code in codes)


def _numbers(values: Sequence[float] | Array) -> str:
    return "x".join(f"{float(value):g}" for value in values)
