"""Images with their position in the patient: NIfTI, DICOM, pictures and arrays."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from nibabel.openers import ImageOpener
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedmed_flower.data.bounded import array_bytes, real_path, require_within, unpacked
from fedmed_flower.data.dicom import is_dicom, one_line, read_dicom
from fedmed_flower.errors import InputError

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_PACKED = (".nii.gz", ".nii.bz2", ".nii.zst", ".mgz")
# How far a mask's corners may lie from its image's, in voxels.
_NEAR = 0.1
# MONAI's key for the affine of the file; here only images with a position in the patient have it.
_FILE_AFFINE = "original_affine"

Array = NDArray[Any]


def read_image(source: Any, spatial_dims: int | None) -> MetaTensor:
    """Read an image with its geometry.

    Parameters
    ----------
    source : str, Path, ndarray, Tensor, or sequence of paths
        A NIfTI file (or another that nibabel reads), a picture, a .npy file, a DICOM file, a
        folder with one DICOM series, or an array of shape (*spatial) or (channels, *spatial).
        Several paths are the channels of one image.
    spatial_dims : int or None
        2 or 3. None takes the dimensions of the file: 2 for pictures and single slices, else 3.

    Returns
    -------
    MetaTensor
        float32, (channels, *spatial). A volume keeps the axes of its file, a DICOM series has
        (columns, rows, slices), and ``affine`` maps voxels to millimetres (right, anterior,
        superior). A 2D image has (rows, columns) whatever its file, and its ``affine`` holds the
        spacing alone. The ``affine`` of arrays and pictures is the identity. DICOM values are in
        the units of the modality, and MONOCHROME1 is inverted so that bright is dense. The values
        of a picture with a palette are the palette's indices.

    Raises
    ------
    InputError
        If the file cannot be read, has another number of dimensions, holds NaN or infinite
        values, or has or unpacks to more than `bounded.MOST` bytes; the text names the file.
    """
    if _are_paths(source):
        parts: list[MetaTensor] = []
        size = 0
        for path in source:
            parts.append(read_image(path, spatial_dims))
            if (problem := mismatch(parts[-1], parts[0])) is not None:
                raise InputError(f"{path} does not fit {source[0]}: {problem}")
            size += parts[-1].nbytes
            require_within(f"{source[0]} and its other channels have at least", size, "an image")
        channels = torch.cat([part.as_tensor() for part in parts])
        return MetaTensor(channels, parts[0].affine, _file_affine_of(parts[0]))
    array, affine, placed = _read(source, spatial_dims)
    try:
        return _fit(array, affine, placed, spatial_dims)
    except InputError as error:
        where = f"{source}: " if isinstance(source, str | Path) else ""
        raise InputError(f"{where}{error}") from None


def read_label(
    source: Any,
    spatial_dims: int | None,
    num_classes: int | None,
    values: Sequence[int] = (),
    image: MetaTensor | None = None,
) -> MetaTensor:
    """Read a mask with one class number for each voxel.

    Parameters
    ----------
    source, spatial_dims
        As in `read_image`; the mask must have one channel.
    num_classes : int or None
        Number of classes with the background, which is 0; at most 256. None accepts any whole
        numbers from 0 on.
    values : sequence of int
        The values in the file for class 0, 1, ...; if left out, the file holds the class numbers.
    image : MetaTensor, optional
        The image that the mask belongs to, from `read_image`. The mask is then given the image's
        affine, as a mask from a picture or an array has none of its own.

    Returns
    -------
    MetaTensor
        uint8, or int64 if neither ``num_classes`` nor ``values`` is given; (1, *spatial).

    Raises
    ------
    InputError
        As in `read_image`; if a value is not a class; if the mask does not fit ``image``.
    """
    mask = read_image(source, spatial_dims)
    if len(mask) != 1:
        raise InputError(f"a mask must have one channel, got {len(mask)}")
    if image is not None and (problem := mismatch(mask, image)) is not None:
        raise InputError(problem)
    geometry = mask if image is None else image
    voxels = mask.as_tensor()
    if num_classes is None and not values:
        whole = voxels.to(torch.int64)
        _require_classes(voxels, (whole == voxels) & (whole >= 0), "whole numbers from 0 on")
        return MetaTensor(whole, geometry.affine, _file_affine_of(geometry))
    known = torch.tensor(tuple(values) or tuple(range(num_classes or 0)), dtype=voxels.dtype)
    count = len(known) if num_classes is None else num_classes
    if len(known) != count or len(torch.unique(known)) != count or not 1 <= count <= 256:
        raise InputError(
            f"label_values must name {count} different values, one a class with the background "
            f"and at most 256, got {tuple(values)}"
        )
    known, order = known.sort()
    indices = torch.bucketize(voxels, known, out_int32=True).clamp(max=count - 1)
    listed = ", ".join(f"{value:g}" for value in known)
    _require_classes(voxels, known[indices] == voxels, listed)
    classes = order.to(torch.uint8)[indices]
    return MetaTensor(classes, geometry.affine, _file_affine_of(geometry))


def mismatch(label: MetaTensor, image: MetaTensor) -> str | None:
    """Return how the grid of a mask, or of a channel, differs from its image's; None if it fits.

    Both are as `read_image` returned them. If one of the two has no position in the patient, as
    pictures and arrays have none, only the shapes are compared.
    """
    shape = tuple(image.shape[1:])
    if tuple(label.shape[1:]) != shape:
        return f"its shape is {tuple(label.shape[1:])}, the image's {shape}"
    if _FILE_AFFINE not in label.meta or _FILE_AFFINE not in image.meta:
        return None
    label_affine = np.asarray(label.meta[_FILE_AFFINE], float)
    image_affine = np.asarray(image.meta[_FILE_AFFINE], float)
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


def files_of(source: Any) -> Iterator[Path]:
    """Yield the paths that an image or a mask is read from; an array has no path."""
    if isinstance(source, str | Path):
        yield Path(source)
    elif _are_paths(source):
        yield from map(Path, source)


def _read(source: Any, spatial_dims: int | None) -> tuple[Array, Array | None, bool]:
    """Return values with the channel first, their affine or None, and whether it is meaningful.

    It is if it states a position in the patient.
    """
    if not isinstance(source, str | Path):
        return _with_channel(np.asarray(source), spatial_dims), None, False
    path = Path(source)
    try:
        if not path.exists():
            raise InputError(f"{path} is not there")
        if not (path.is_file() or path.is_dir()):  # Reading a pipe would block.
            raise InputError(f"{path} is neither a file nor a folder")
        with warnings.catch_warnings():
            # What the readers warn of is checked below.
            warnings.simplefilter("ignore")
            # In a DICOM file, a JPEG may be larger than the header says.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if is_dicom(path):
                return read_dicom(path)
            if path.is_dir():
                raise InputError(f"{path} is a folder without DICOM files")
            if path.suffix.lower() in _PICTURES:
                return _read_picture(path), None, False
            if path.suffix.lower() == ".npy":
                return _with_channel(_read_array(path), spatial_dims), None, False
            return *_read_volume(path), True
    except InputError:
        raise
    except Exception as error:  # The readers fail in a dozen ways.
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def _with_channel(array: Array, spatial_dims: int | None) -> Array:
    return array[None] if spatial_dims in (None, array.ndim) else array


def _read_array(path: Path) -> Array:
    with path.open("rb") as file:
        require_within(f"{path} says that it holds", array_bytes(file), "an image")
    array: Array = np.load(path, allow_pickle=False)
    return array


def _read_picture(path: Path) -> Array:
    # Some of Pillow's other formats start programs or unpack without a bound.
    with Image.open(path, formats=_FORMATS) as picture:
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise InputError(f"{path} holds {frames} pictures: give each a file of its own")
        depth = {"I": 4, "F": 4}.get(picture.mode, 2 if picture.mode.startswith("I;") else 1)
        size = picture.width * picture.height * len(picture.getbands()) * depth
        require_within(f"{path} says that it holds", size, "a picture or a DICOM file")
        array = np.asarray(picture)
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]


def _read_volume(path: Path) -> tuple[Array, Array]:
    if ".gii" in map(str.lower, path.suffixes):
        raise InputError(f"{path} holds a surface, not a volume")
    content = None
    if path.name.lower().endswith(_PACKED):
        # Unpacked here: nibabel allocates what the header states and never verifies the checksum.
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


def _fit(array: Array, affine: Array | None, placed: bool, spatial_dims: int | None) -> MetaTensor:
    """Return an image of the wanted number of dimensions from values and affine of a file."""
    dims = _dims_of(array, spatial_dims)
    if dims == 3 and affine is not None and not placed:
        raise InputError(
            "it has no position in the patient (ImagePositionPatient), like an X-ray: read it with "
            "spatial_dims = 2"
        )
    if array.size == 0:
        raise InputError(f"its shape is {array.shape}: it is empty")
    require_within("as float32 it has", 4 * array.size, "an image")
    if dims == 2 and array.ndim == 4:
        array, affine = _slice_of(array, affine)
    if dims == 2 and affine is not None:
        array = array.swapaxes(1, 2)
        affine = _affine_of_slice(affine)
    meta = {}
    if affine is None:
        affine = np.eye(4)
    else:
        sides = _voxel_sides(affine)
        if placed:
            meta[_FILE_AFFINE] = torch.from_numpy(affine)
        if dims == 2:
            affine = np.diag([*sides[:2], 1.0, 1.0])
    with np.errstate(over="ignore"):
        values = torch.from_numpy(np.array(array, np.float32, order="C"))
    if not bool(torch.isfinite(values).all()):
        raise InputError("it holds NaN or infinite values")
    return MetaTensor(values, torch.from_numpy(affine.copy()), meta)


def _voxel_sides(affine: Array) -> Array:
    """Return the sides of a voxel, (3,), in millimetres; raise if the affine has no inverse."""
    sides: Array = np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-9)
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3] / sides)) > 1e-3):
        raise InputError(f"its affine must be finite and invertible, got {affine[:3].tolist()}")
    return sides


def _dims_of(array: Array, spatial_dims: int | None) -> int:
    """Return the number of spatial dimensions; raise if the values do not have that number."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"it holds {array.dtype}, not numbers")
    is_flat = array.ndim == 3 or (array.ndim == 4 and bool(_flat_axes(array)))
    dims = spatial_dims or (2 if is_flat else 3)
    if array.ndim != dims + 1 and not (dims == 2 and is_flat):
        raise InputError(
            f"its shape is {array.shape}; spatial_dims = {dims} asks for {dims} dimensions, or "
            "one more with the channel first"
        )
    return dims


def _flat_axes(array: Array) -> list[int]:
    return [axis for axis in range(1, array.ndim) if array.shape[axis] == 1]


def _slice_of(array: Array, affine: Array | None) -> tuple[Array, Array | None]:
    """Return a picture, or a slice, that was stored as a volume of one slice."""
    axis = _flat_axes(array)[-1]
    if affine is not None:
        affine = np.insert(np.delete(affine, axis - 1, 1), 2, affine[:, axis - 1], 1)
    return np.moveaxis(array, axis, -1)[..., 0], affine


def _affine_of_slice(affine: Array) -> Array:
    """Return the affine of a slice after its two axes were swapped."""
    affine = affine[:, [1, 0, 2, 3]]
    # Files of one slice do not always state its thickness.
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    affine[:3, 2] = normal / max(np.linalg.norm(normal) ** 0.5, 1e-9)
    return affine


def _file_affine_of(image: MetaTensor) -> dict[str, Any]:
    return {key: value for key, value in image.meta.items() if key == _FILE_AFFINE}


def _require_classes(voxels: Tensor, valid: Tensor, classes: str) -> None:
    if not bool(valid.all()):
        odd = sorted({round(float(value), 3) for value in torch.unique(voxels[~valid])[:5]})
        listed = ", ".join(f"{value:g}" for value in odd)
        raise InputError(
            f"it holds the values {listed}, which are not classes: a mask holds {classes}"
        )


def _are_paths(source: Any) -> bool:
    return (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(part, str | Path) for part in source)
    )


def _codes(affine: Array) -> str:
    codes: Sequence[str | None] = nibabel.orientations.aff2axcodes(affine)  # type: ignore[no-untyped-call]
    return "".join(code or "?" for code in codes)


def _numbers(values: Sequence[float] | Array) -> str:
    return "x".join(f"{float(value):g}" for value in values)
