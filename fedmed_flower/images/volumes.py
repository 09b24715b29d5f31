"""Volumes as files that nibabel reads: NIfTI, MGH and others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from fedmed_flower.data.bounded import real_path, require_within, ungzipped, unpacked
from fedmed_flower.errors import InputError

_GZIPPED = (".nii.gz", ".mgz")
_PACKED = (*_GZIPPED, ".nii.bz2", ".nii.zst")

Array = NDArray[Any]


def read_volume(path: Path) -> tuple[Array, Array]:
    """Return the values of a volume, (channels, *spatial), and its affine, (4, 4)."""
    if ".gii" in map(str.lower, path.suffixes):
        raise InputError(f"{path} holds a surface, not a volume")
    content = None
    if path.name.lower().endswith(_PACKED):
        # Unpacked here: nibabel allocates what the header states and never verifies the checksum.
        if path.name.lower().endswith(_GZIPPED):
            with path.open("rb") as file:
                content = ungzipped(file, path, "an image")
        else:
            with ImageOpener(str(path)) as packed:
                content = unpacked(packed, path, "an image")
    elif path.suffix.lower() in (".gz", ".bz2", ".zst"):
        # A pair of header and voxels: nibabel would unpack the second file without a bound.
        raise InputError(f"{path} is not a NIfTI file with both header and voxels: unpack it")
    volume: Any = nibabel.load(path)
    _require_one_folder(path, volume)
    # Scaled values, and float32 values, take four bytes a voxel or more.
    size = math.prod(volume.shape) * max(volume.get_data_dtype().itemsize, 4)
    require_within(f"{path} says that it holds", size, "an image")
    if content is not None:
        volume = type(volume).from_bytes(content)
    array = np.asanyarray(volume.dataobj)
    # NIfTI stores vectors with a time axis of length one.
    if array.ndim == 5 and array.shape[3] == 1:
        array = array[:, :, :, 0]
    array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    return array, np.array(volume.affine, float)


def _require_one_folder(path: Path, volume: Any) -> None:
    """Raise `InputError` if a pair of files, such as .hdr and .img, is not in one folder."""
    for part in volume.file_map.values():
        if part.filename and real_path(Path(part.filename)).parent != real_path(path).parent:
            raise InputError(
                f"{path}: {Path(part.filename).name}, which belongs to it, is a link to another "
                "folder: put both into one"
            )
