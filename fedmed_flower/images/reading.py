"""Images with their position in the patient: NIfTI, NRRD, MetaImage, DICOM, pictures, arrays."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedmed_flower.data.bounded import array_bytes, require_within
from fedmed_flower.errors import InputError
from fedmed_flower.images.dicom import read_dicom
from fedmed_flower.images.geometry import (
    FILE_AFFINE,
    FRAME_OF_REFERENCE,
    brought_to,
    file_affine_of,
)
from fedmed_flower.images.headers import frame_of_reference, is_dicom, one_line
from fedmed_flower.images.itk import ITK, read_itk
from fedmed_flower.images.masks import read_structures, structure_files
from fedmed_flower.images.photographs import PICTURES, read_picture
from fedmed_flower.images.resampling import resampled
from fedmed_flower.images.series import Series
from fedmed_flower.images.spaces import require_one_space
from fedmed_flower.images.volumes import read_volume, require_frames, taken

log = logging.getLogger("flwr.fedmed")

# How far a value of a mask may lie from its class: resampling leaves 1.0000001 for 1.
_NEAR = 1e-3

# Slices of which a copy fits into the processor's own memory.
_SLICES = 8

Array = NDArray[Any]
# Values with the channel first, their affine, and whether it states a position in the patient.
_Read = tuple[Array, Array | None, bool]

P = ParamSpec("P")
R = TypeVar("R")

# What was read of the present row: (function, arguments, result).
_Before = list[tuple[Callable[..., Any], Mapping[str, Any], Any]]
_read_before: ContextVar[_Before | None] = ContextVar("read_before", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Let what is `once_a_row` return the same object if it is asked the same again.

    For one row at a time: all that is read stays in memory until the context is left.
    """
    token = _read_before.set([])
    try:
        yield
    finally:
        _read_before.reset(token)


def once_a_row(read: Callable[P, R]) -> Callable[P, R]:
    """Make a function that reads obey `reading_once`."""
    bind = signature(read).bind

    @wraps(read)
    def once(*args: P.args, **kwargs: P.kwargs) -> R:
        before = _read_before.get()
        if before is None:
            return read(*args, **kwargs)
        bound = bind(*args, **kwargs)
        bound.apply_defaults()
        for function, arguments, result in before:
            if function is read and _are_same(arguments, bound.arguments):
                found: R = result
                return found
        result = read(*args, **kwargs)
        before.append((read, bound.arguments, result))
        return result

    return once


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether arguments are the same objects, or equal numbers, texts, tuples or dicts."""

    def same(a: Any, b: Any) -> bool:
        if a is b:
            return True
        return (
            type(a) is type(b) and isinstance(a, int | str | Path | tuple | dict) and bool(a == b)
        )

    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


@once_a_row
def read_image(
    source: Any,
    spatial_dims: int | None,
    frames: int | str | None = None,
    *,
    mask: bool = False,
) -> MetaTensor:
    """Read an image with its geometry.

    Parameters
    ----------
    source : str, Path, ndarray, Tensor, or sequence of paths
        A NIfTI file (or another that nibabel reads), an NRRD or MetaImage file, a picture, a .npy
        file, a DICOM file, a folder with one DICOM series, or an array of shape (*spatial) or
        (channels, *spatial). Several paths, or `Series`, are the channels of one image. A volume on
        another grid is resampled to the first one's, see `resampled`, if their positions can be
        compared, see `require_one_space`.
    spatial_dims : int or None
        2 or 3. None takes the dimensions of the file: 2 for pictures and single slices, else 3.
    frames : int or str, optional
        What the volumes of a 4D file are, as `volumes.taken` has it. Without it such a file is
        refused, since they may be channels, times or b-values.
    mask : bool
        Whether the file is a mask: the indices of a picture's palette are then its values, the
        volumes of a 4D file its channels, and bytes stay bytes (uint8).

    Returns
    -------
    MetaTensor
        float32, (channels, *spatial). A volume keeps the axes of its file, a DICOM series has
        (columns, rows, slices), and ``affine`` maps voxels to millimetres (right, anterior,
        superior). A 2D image has (rows, columns) whatever its file, and its ``affine`` holds the
        spacing alone. The ``affine`` of arrays and pictures is the identity. DICOM values are in
        the units of the modality, and MONOCHROME1 is inverted so that bright is dense. Pictures
        are turned, and have their colours, as a viewer shows them; see `read_picture`.

    Raises
    ------
    InputError
        If the file cannot be read, has another number of dimensions, holds NaN or infinite
        values, or has or unpacks to more than `bounded.MOST` bytes; the text names the file.
    """
    frames = "channels" if mask else frames
    if frames is not None:
        frames = require_frames(frames)
    if _are_paths(source):
        parts: list[MetaTensor] = []
        size = 0
        for path in source:
            part = read_image(path, spatial_dims, frames, mask=mask)
            if parts:
                part = _beside(part, path, parts[0], source[0])
            parts.append(part)
            size += parts[-1].nbytes
            require_within(f"{source[0]} and its other channels have at least", size, "an image")
        channels = torch.cat([part.as_tensor() for part in parts])
        return MetaTensor(channels, parts[0].affine, file_affine_of(parts[0]))
    array, affine, placed = _read(source, spatial_dims, frames, mask)
    try:
        image = _fit(array, affine, placed, spatial_dims, mask)
    except InputError as error:
        where = f"{source}: " if isinstance(source, str | Path | Series) else ""
        raise InputError(f"{where}{error}") from None
    if placed and (
        frame := frame_of_reference(source if isinstance(source, Series) else Path(source))
    ):
        image.meta[FRAME_OF_REFERENCE] = frame
    return image


@once_a_row
def read_label(
    source: Any,
    spatial_dims: int | None,
    num_classes: int | None,
    values: Sequence[int] = (),
    image: MetaTensor | None = None,
    names: Sequence[str] = (),
) -> MetaTensor:
    """Read a mask with one class number for each voxel.

    Parameters
    ----------
    source, spatial_dims
        As in `read_image`; the mask must have one channel. Or DICOM SEG or RTSTRUCT: a file, a
        folder of them, or several paths, whose structures are joined; see `read_structures`.
    num_classes : int or None
        Number of classes with the background, which is 0; at most 256. None accepts any whole
        numbers from 0 on.
    values : sequence of int
        The values in the file for class 0, 1, ...; if left out, the file holds the class numbers.
    image : MetaTensor, optional
        The image that the mask belongs to, from `read_image`. The mask is then given the image's
        affine, as a mask from a picture or an array has none of its own.
    names : sequence of str, optional
        Names of the classes 1, 2, ...; SEG and RTSTRUCT need them, and ``image``.

    Returns
    -------
    MetaTensor
        uint8, or int64 if neither ``num_classes`` nor ``values`` is given; (1, *spatial).

    Raises
    ------
    InputError
        As in `read_image`; if a value is not a class; if the mask does not fit ``image``; as in
        `read_structures`.
    """
    if files := structure_files(source):
        _require_names(names, num_classes, image)
        return read_structures(files, names, image)
    return as_classes(read_image(source, spatial_dims, mask=True), num_classes, values, image)


def as_classes(
    mask: MetaTensor,
    num_classes: int | None,
    values: Sequence[int] = (),
    image: MetaTensor | None = None,
) -> MetaTensor:
    """Return a mask that `read_image` has read, with one class number for each voxel.

    Parameters, what is returned, and errors are those of `read_label`.
    """
    if len(mask) != 1:
        raise InputError(f"a mask must have one channel, got {len(mask)}")
    if image is not None:
        mask = brought_to(mask, image)
    voxels = mask.as_tensor()
    if num_classes is None and not values:
        voxels = voxels.to(torch.float32)
        whole = voxels.round()
        near = (whole - voxels).abs() <= _NEAR
        _require_classes(voxels, near & (whole >= 0), "whole numbers from 0 on")
        return MetaTensor(whole.to(torch.int64), mask.affine, file_affine_of(mask))
    known = torch.tensor(tuple(values) or tuple(range(num_classes or 0)), dtype=torch.float32)
    count = len(known) if num_classes is None else num_classes
    if len(known) != count or len(torch.unique(known)) != count or not 1 <= count <= 256:
        raise InputError(
            f"label_values must name {count} different values, one a class with the background "
            f"and at most 256, got {tuple(values)}"
        )
    known, order = known.sort()
    classes = _classes_of_bytes(voxels, known, order)
    if classes is not None:
        return MetaTensor(classes, mask.affine, file_affine_of(mask))
    voxels = voxels.to(torch.float32)
    nearest = torch.bucketize(voxels, (known[1:] + known[:-1]) / 2, out_int32=True)
    listed = ", ".join(f"{value:g}" for value in known)
    _require_classes(voxels, (known[nearest] - voxels).abs() <= _NEAR, listed)
    classes = order.to(torch.uint8)[nearest]
    return MetaTensor(classes, mask.affine, file_affine_of(mask))


def _require_names(names: Sequence[str], num_classes: int | None, image: MetaTensor | None) -> None:
    """Raise `InputError` if structures cannot be found by name, or have no image to lie on."""
    if not names:
        raise InputError(
            "a DICOM SEG or RTSTRUCT holds structures by name: name the classes, by the client's "
            'classes or by "labels" in dataset.json'
        )
    if image is None:
        raise InputError("a DICOM SEG or RTSTRUCT is read with the image that it belongs to")
    if len(names) > 255 or num_classes not in (None, 1 + len(names)):
        raise InputError(
            f"names must be one for each of the {num_classes} classes but the background, and at "
            f"most 255, got {len(names)}"
        )


def classes_in(mask: MetaTensor) -> tuple[int, ...]:
    """Return the classes that a mask of `read_label` holds, ascending."""
    voxels = mask.as_tensor()
    if voxels.dtype is torch.uint8:  # To sort all voxels takes six times as long.
        return tuple(torch.bincount(voxels.flatten()).nonzero().flatten().tolist())
    return tuple(torch.unique(voxels).tolist())


def files_of(source: Any) -> Iterator[Path]:
    """Yield the paths that an image or a mask is read from; an array has no path."""
    if isinstance(source, str | Path):
        yield Path(source)
    elif isinstance(source, Series):
        yield from map(Path, source.files)
    elif _are_paths(source):
        for part in source:
            yield from files_of(part)


def _beside(part: MetaTensor, path: Any, first: MetaTensor, first_path: Any) -> MetaTensor:
    """Return a channel on the grid of the first one."""
    try:
        return brought_to(part, first)
    except InputError as error:
        problem = str(error)
    try:
        require_one_space((path, part), (first_path, first))
    except InputError as error:
        raise InputError(
            f"{path} does not fit {first_path}: {problem}; and it cannot be brought to that grid: "
            f"{error}. Save it on the grid of the first channel"
        ) from None
    try:
        changed = resampled(part, first)
    except InputError as error:
        text = f"{path} cannot be brought to the grid of {first_path}: {error}"
        raise InputError(text) from None
    log.info("%s is brought to the grid of %s by linear interpolation", path, first_path)
    return changed


def _read(source: Any, spatial_dims: int | None, frames: int | str | None, mask: bool) -> _Read:
    """Return values with the channel first, their affine or None, and whether it is meaningful.

    It is if it states a position in the patient.
    """
    frame = frames if isinstance(frames, int) else None
    if isinstance(source, Series):
        return read_dicom(source, frame)
    if not isinstance(source, str | Path):
        array = _with_channel(np.asarray(source), spatial_dims)
        return _only((array, None, False), frames, "array")
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
                return read_dicom(path, frame)
            if path.is_dir():
                raise InputError(f"{path} is a folder without DICOM files")
            if path.suffix.lower() in PICTURES:
                return _only((read_picture(path, indices=mask), None, False), frames, path)
            if path.suffix.lower() == ".npy":
                array = _with_channel(_read_array(path), spatial_dims)
                return _only((array, None, False), frames, path)
            if path.suffix.lower() in ITK:
                return *read_itk(path, frames), True
            return *read_volume(path, frames), True
    except InputError:
        raise
    except Exception as error:  # The readers fail in a dozen ways.
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def _only(read: _Read, frames: int | str | None, source: object) -> _Read:
    """Return what was read from a source of one volume; raise if another is asked for."""
    if isinstance(frames, int):
        taken(read[0][None], frames, source)
    return read


def _with_channel(array: Array, spatial_dims: int | None) -> Array:
    return array[None] if spatial_dims in (None, array.ndim) else array


def _read_array(path: Path) -> Array:
    with path.open("rb") as file:
        require_within(f"{path} says that it holds", array_bytes(file), "an image")
    array: Array = np.load(path, allow_pickle=False)
    return array


def _fit(
    array: Array, affine: Array | None, placed: bool, spatial_dims: int | None, mask: bool
) -> MetaTensor:
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
            meta[FILE_AFFINE] = torch.from_numpy(affine)
        if dims == 2:
            affine = np.diag([*sides[:2], 1.0, 1.0])
    if mask and array.dtype == np.uint8:
        # What most masks hold: as float32 they take four times the memory and a pass more.
        codes = torch.from_numpy(_copied(array, np.uint8))
        return MetaTensor(codes, torch.from_numpy(affine.copy()), meta)
    with np.errstate(over="ignore"):
        values = torch.from_numpy(_copied(array, np.float32))
    # NaN and infinities show in the least and greatest value, which take less time to find.
    if not all(map(torch.isfinite, torch.aminmax(values))):
        raise InputError("it holds NaN or infinite values")
    return MetaTensor(values, torch.from_numpy(affine.copy()), meta)


def _copied(array: Array, kind: type[np.generic]) -> Array:
    """Return a copy of another kind of numbers, with the last axis closest together."""
    values = np.empty(array.shape, kind)
    # A NIfTI file has its first axis closest together: all of it at once takes twice as long.
    for start in range(0, array.shape[-1], _SLICES):
        part = slice(start, start + _SLICES)
        values[..., part] = array[..., part]
    return values


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


def _require_classes(voxels: Tensor, valid: Tensor, classes: str) -> None:
    if not bool(valid.all()):
        odd = sorted({round(float(value), 3) for value in torch.unique(voxels[~valid])[:5]})
        listed = ", ".join(f"{value:g}" for value in odd)
        raise InputError(
            f"it holds the values {listed}, which are not classes: a mask holds {classes}"
        )


def _classes_of_bytes(voxels: Tensor, known: Tensor, order: Tensor) -> Tensor | None:
    """Return the class of each voxel if all values are known and from 0 to 255; else None.

    Parameters
    ----------
    voxels : Tensor
    known : Tensor
        The values of the classes, ascending.
    order : Tensor
        The class of each of them.
    """
    low, high = torch.aminmax(voxels)
    if not (low >= 0 and high <= 255):
        return None
    codes = voxels.to(torch.uint8)
    if not torch.equal(codes.to(voxels.dtype), voxels):
        return None
    present = torch.bincount(codes.flatten()).nonzero().flatten()
    if not bool(torch.isin(present, known).all()):
        return None
    classes = order[torch.searchsorted(known, present.to(known.dtype))]
    if torch.equal(classes, present):
        return codes
    table = np.zeros(256, np.uint8)
    table[present.numpy()] = classes.numpy()
    return torch.from_numpy(table.take(codes.numpy()))


def _are_paths(source: Any) -> bool:
    return (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(part, str | Path | Series) for part in source)
    )
