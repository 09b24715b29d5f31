"""Volumes as files that nibabel reads: NIfTI, MGH and others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from fedmed_flower.data.bounded import quoted, real_path, require_within, ungzipped, unpacked
from fedmed_flower.errors import InputError

_CHANNELS = re.compile(r"(?:([1-9][0-9]{0,5}) )?channels")
_GZIPPED = (".nii.gz", ".mgz")
_PACKED = (*_GZIPPED, ".nii.bz2", ".nii.zst")

Array = NDArray[Any]


def read_volume(path: Path, frames: int | str | None = None) -> tuple[Array, Array]:
    """Return the values of a volume, (channels, *spatial), and its affine, (4, 4).

    The fourth axis of a NIfTI file may be time, b-values or channels: ``frames`` says which, see
    `taken`. The fifth one holds the values of a voxel, which are channels.
    """
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
    affine = np.array(volume.affine, float)
    # NIfTI stores vectors with a time axis of length one.
    if array.ndim == 5 and array.shape[3] == 1:
        array = array[:, :, :, 0]
        frames = "channels" if frames is None else frames
    return taken(
        np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None], frames, path
    ), affine


def taken(volumes: Array, frames: int | str | None, path: object) -> Array:
    """Return the channels of an image whose file may hold several volumes.

    Parameters
    ----------
    volumes : ndarray
        (volumes, *spatial).
    frames : int, str or None
        ``"channels"`` takes all volumes as channels, and ``"4 channels"`` does if there are four.
        A number takes one volume; the first has the number 0. Of a file with one volume the texts
        and None take that volume.
    path : object
        The file's name in errors.

    Raises
    ------
    InputError
        If there are several volumes and ``frames`` is None or says another number of channels, or
        if there is no volume of that number.
    """
    count = len(volumes)
    if isinstance(frames, int):
        if frames >= count:
            raise InputError(
                f"{path} holds {count} volume{'s' * (count > 1)}, numbered from 0, and frames says "
                f"{frames}"
            )
        return volumes[frames : frames + 1]
    if count > 1 and frames is None:
        raise InputError(
            f"{path} holds {count} volumes (4D), which may be channels, times or b-values: say so "
            'by frames in its row, "channels" or the number, from 0, of the volume that is taken; '
            "or declare the channels in the client's image_shape"
        )
    said = _CHANNELS.fullmatch(frames or "")
    if count > 1 and said and said[1] and int(said[1]) != count:
        raise InputError(f"{path} holds {count} volumes (4D), and {frames} are expected")
    return volumes


def frames_of(row: Mapping[str, Any], channels: int = 1) -> int | str | None:
    """Return what a row says of the volumes of its 4D file; else the channels that are expected.

    Parameters
    ----------
    row : dict
        With or without ``frames``.
    channels : int
        The channels that a client declares. If there is more than one, and the image is one file
        that holds as many volumes, they are its channels.

    Raises
    ------
    InputError
        As `require_frames`.
    """
    frames = row.get("frames")
    if frames is None:
        several = isinstance(row.get("image"), list | tuple)
        return f"{channels} channels" if channels > 1 and not several else None
    return require_frames(frames)


def require_frames(frames: Any) -> int | str:
    """Return what is said of the volumes of a 4D file, as `taken` takes it.

    Raises
    ------
    InputError
        If it is neither ``"channels"``, with or without a number before it, nor a whole number from
        0 on.
    """
    if isinstance(frames, str) and _CHANNELS.fullmatch(frames):
        return frames
    if isinstance(frames, int | np.integer) and not isinstance(frames, bool) and frames >= 0:
        return int(frames)
    raise InputError(
        f'frames must be "channels" or a whole number from 0 on, got {quoted(frames)}: it says '
        "which volumes of a 4D file are taken"
    )


def _require_one_folder(path: Path, volume: Any) -> None:
    """Raise `InputError` if a pair of files, such as .hdr and .img, is not in one folder."""
    for part in volume.file_map.values():
        if part.filename and real_path(Path(part.filename)).parent != real_path(path).parent:
            raise InputError(
                f"{path}: {Path(part.filename).name}, which belongs to it, is a link to another "
                "folder: put both into one"
            )
