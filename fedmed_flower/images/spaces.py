"""Whether the positions that two files state can be compared, before one is resampled.

NIfTI-1, https://nifti.nimh.nih.gov/nifti-1: ``sform_code`` and ``qform_code`` say to which space
positions belong. FrameOfReferenceUID says so in DICOM files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.data import MetaTensor

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE, FRAME_OF_REFERENCE
from fedmed_flower.images.headers import is_dicom
from fedmed_flower.images.itk import ITK
from fedmed_flower.images.series import Series

_DICOM = "DICOM"
_SPACES = {
    1: "that of the scanner",
    2: "that of another file",
    3: "that of Talairach",
    4: "that of MNI",
    5: "that of a template",
}


def require_one_space(
    one: tuple[str | Path | Series, MetaTensor], other: tuple[str | Path | Series, MetaTensor]
) -> None:
    """Raise `InputError` if the positions of two volumes cannot be compared.

    Parameters
    ----------
    one, other : tuple
        A file, or a series, and what `read_image` returned for it.
    """
    frames = {image.meta.get(FRAME_OF_REFERENCE) for _, image in (one, other)} - {None, ""}
    if len(frames) > 1:
        raise InputError("their frames of reference (FrameOfReferenceUID) differ")
    spaces = [_space_of(source, image) for source, image in (one, other)]
    if spaces[0] != spaces[1]:
        raise InputError(
            "their headers name different spaces of positions: "
            f"{spaces[0]}, and {spaces[1]} of the first channel"
        )


def _space_of(source: str | Path | Series, image: MetaTensor) -> str:
    """Return the space to which the positions of a file belong; equal texts are one space."""
    if isinstance(source, Series) or is_dicom(Path(source)):
        return _DICOM
    affine = image.meta.get(FILE_AFFINE)
    if affine is None:
        raise InputError("they do not both have a position in the patient")
    if not np.asarray(affine, float)[:3, 3].any():
        # Programs that know of no position write this one.
        raise InputError(f"{source} has its origin at 0, 0, 0, which states no position")
    path = Path(source)
    if path.suffix.lower() in ITK:
        return "NRRD or MetaImage"
    volume: Any = nibabel.load(path)
    if isinstance(volume, nibabel.Nifti1Pair):
        header: Any = volume.header
        code = int(header["sform_code"]) or int(header["qform_code"])
        if code not in _SPACES:
            raise InputError(f"{source} states no position (sform_code and qform_code are 0)")
        return f"NIfTI, {_SPACES[code]}"
    return type(volume).__name__
