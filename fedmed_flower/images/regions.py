"""Masks of regions that may overlap: each region is a union of the values of a mask.

The regions of the BraTS challenge are such: the whole tumour holds the tumour core, which holds the
enhancing tumour (U. Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 benchmark, arXiv:2107.02314).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from torch import Tensor

from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.geometry import file_affine_of
from fedmed_flower.images.masks import read_overlapping, structure_files
from fedmed_flower.images.names import listed_names, plain_name
from fedmed_flower.images.reading import as_classes, files_of, once_a_row, read_image

Regions = Mapping[str, Sequence[int]]

# `as_classes` counts values in a byte, and 0 is the background.
_MOST_VALUES = 255
# Larger whole numbers are not exact as float32, as which masks are read.
_GREATEST = 2**24


def require_regions(regions: Regions) -> None:
    """Raise `InputError` if regions cannot be told apart, or name what no mask holds.

    Parameters
    ----------
    regions : dict
        For each region, the values of a mask that belong to it.
    """
    if not isinstance(regions, Mapping):
        raise InputError(
            'regions must be a dict of names and values, such as {"WT": (1, 2, 4), "ET": (4,)}, '
            f"got {regions!r}"
        )
    for name, values in regions.items():
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        whole = listed and all(type(value) is int for value in values)
        if not whole or not len(values) or len({*values}) < len(values):
            raise InputError(
                f"region {name!r} must hold one or more different whole numbers, the values of the "
                f"mask that belong to it, got {values!r}"
            )
        if not 1 <= min(values) <= max(values) < _GREATEST:
            raise InputError(
                f"region {name!r} must hold values from 1 to {_GREATEST - 1}, since 0 is the "
                f"background, got {values!r}"
            )
    if len(values_of(regions)) - 1 > _MOST_VALUES:
        raise InputError(
            f"regions may hold {_MOST_VALUES} different values, got {len(values_of(regions)) - 1}"
        )
    # Masks of regions are files, whose names differ by more than case on every disk.
    if len({str(name).strip().casefold() for name in regions}) < len(regions):
        raise InputError(f"names of regions must differ by more than case, got {(*regions,)}")


def values_of(regions: Regions) -> tuple[int, ...]:
    """Return the values that a mask may hold, in order; the first is 0, the background."""
    return (0, *sorted({value for values in regions.values() for value in values}))


def nested(regions: Regions) -> tuple[tuple[int, int], ...]:
    """Return how one mask of values shows regions of which each holds the next.

    It can if each region has exactly one value that the next one within it has not.

    Returns
    -------
    tuple of (int, int)
        From the outermost region to the innermost, its number from 0 on and that value. Empty if
        the regions are not so.
    """
    innermost_first = sorted(enumerate(regions.values()), key=lambda one: len(one[1]))
    order: list[tuple[int, int]] = []
    within: set[int] = set()
    for number, values in innermost_first:
        own = {*values} - within
        if not within <= {*values} or len(own) != 1:
            return ()
        order.insert(0, (number, own.pop()))
        within = {*values}
    return tuple(order)


def label_map(
    masks: NDArray[np.uint8], order: Sequence[tuple[int, int]]
) -> NDArray[np.signedinteger[Any] | np.unsignedinteger[Any]]:
    """Return one mask of values: in each voxel that of the innermost region there.

    A voxel of an inner region counts as such also if the outer ones do not reach it, as in the
    label maps of nnU-Net (``regions_class_order``).

    Parameters
    ----------
    masks : ndarray
        (regions, *spatial), of 0 and 1.
    order : sequence of (int, int)
        From `nested`.

    Returns
    -------
    ndarray
        (*spatial), of the smallest of uint8, int16 and int32 that holds the values.
    """
    greatest = max(value for _, value in order)
    kinds = (np.uint8, np.int16, np.int32)
    kind = next(kind for kind in kinds if greatest <= np.iinfo(kind).max)
    mask = np.zeros(masks.shape[1:], kind)
    for number, value in order:
        mask[masks[number] > 0] = value
    return mask


def listed(regions: Regions) -> str:
    """Return regions and their values as a text."""
    parts = (f"{name} of {', '.join(map(str, values))}" for name, values in regions.items())
    return shown(f"regions: {'; '.join(parts)}", 500)


def regions_named(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the region of each mask, or volume, of a row, as its ``mask_regions`` names them."""
    try:
        return listed_names(row.get("mask_regions"))
    except InputError as error:
        raise InputError(f"mask_regions of its row: {error}") from None


def require_no_regions(row: Mapping[str, Any]) -> None:
    """Raise `InputError` if a row says that its mask is one of regions, and classes are read."""
    if names := regions_named(row):
        raise InputError(
            f"mask_regions of its row names the regions {shown(', '.join(names), 200)}, and the "
            "masks are read as classes: declare regions, or give a mask of classes"
        )


@once_a_row
def read_regions(
    source: Any,
    spatial_dims: int,
    regions: Regions,
    image: MetaTensor | None = None,
    order: Sequence[str] = (),
) -> MetaTensor:
    """Read a mask as one channel a region.

    Parameters
    ----------
    source : str, Path, ndarray, Tensor, or sequence of paths
        A mask of values, as `read_label` takes it; or one mask of 0 and 1 for each region: a list
        of files, an array of shape (regions, *spatial), or one file of several volumes (4D). A list
        of one file, and an array with one channel, are a mask of values. Or DICOM SEG or RTSTRUCT,
        a path or several, whose structures are found by the names of the regions and may overlap.
    spatial_dims : int
        2 or 3.
    regions : dict
        For each region, the values of the mask that belong to it. A value may belong to several.
    image : MetaTensor, optional
        As in `read_label`.
    order : sequence of str
        The region of each mask, or of each volume of one file. Left out, it is that of `regions`,
        and a file of several volumes is refused.

    Returns
    -------
    MetaTensor
        uint8 of 0 and 1, (regions, *spatial).

    Raises
    ------
    InputError
        As `read_label`. Also if a mask holds a value of no region, if there is not one mask for
        each region, or if regions meet in a voxel that no value has in common: such as an inner
        region beyond the outer one, if masks are in another order.
    """
    if files := structure_files(source):
        channels = _of_structures(files, regions, image, order)
    else:
        masks = _masks_of(source, spatial_dims)
        if len(masks) == 1 and not order:
            return _of_values(read_image(masks[0], spatial_dims, mask=True), regions, image)
        channels = _of_masks(masks, spatial_dims, regions, image, order)
    _require_combinations(channels.as_tensor(), regions)
    return channels


def _masks_of(source: Any, spatial_dims: int) -> list[Any]:
    """Return one mask of values, or the masks of the regions."""
    if any(files_of(source)):
        return list(source) if isinstance(source, list | tuple) else [source]
    has_channels = np.ndim(source) == spatial_dims + 1 and len(source) > 1
    return list(np.asarray(source)) if has_channels else [source]


def _of_values(mask: MetaTensor, regions: Regions, image: MetaTensor | None) -> MetaTensor:
    """Return the regions of a mask of values."""
    if len(mask) > 1:
        raise InputError(
            f"it holds {len(mask)} volumes (4D): say which region each of them is by mask_regions "
            f'in its row, such as "{";".join(regions)}", or give one mask of values'
        )
    known = values_of(regions)
    try:
        numbers = as_classes(mask, len(known), known, image)
    except InputError as error:
        raise InputError(f"{error} ({listed(regions)})") from None
    members = [[value in values for value in known] for values in regions.values()]
    # A row of `members` for each region, a column for each value that a mask may hold.
    table = torch.tensor(members, dtype=torch.uint8)
    channels = table[:, numbers.as_tensor()[0].long()]
    return MetaTensor(channels, numbers.affine, file_affine_of(numbers))


def _of_structures(
    files: Sequence[Path], regions: Regions, image: MetaTensor | None, order: Sequence[str]
) -> MetaTensor:
    """Return the regions of DICOM files, in which each is a structure of its name."""
    if order:
        raise InputError(
            "a DICOM SEG or RTSTRUCT holds structures by name: leave out mask_regions in its row"
        )
    if image is None:
        raise InputError("a DICOM SEG or RTSTRUCT is read with the image that it belongs to")
    return read_overlapping(files, tuple(regions), image)


def _of_masks(
    masks: Sequence[Any],
    spatial_dims: int,
    regions: Regions,
    image: MetaTensor | None,
    order: Sequence[str],
) -> MetaTensor:
    """Return the regions of one mask each, or of one file whose volumes they are."""
    names = _named(order, regions) if order else tuple(regions)
    volumes = _volumes_of(masks[0], spatial_dims) if len(masks) == 1 else ()
    count = len(volumes) or len(masks)
    if count != len(names):
        other = "other names in mask_regions of its row" if order else "one mask of values"
        raise InputError(
            f"there {'are' if count > 1 else 'is'} {count} mask{'s' * (count > 1)}: one for each "
            f"of the regions {', '.join(names)} is needed, in this order, or {other}"
        )
    parts: dict[str, MetaTensor] = {}
    for number, name in enumerate(names):
        try:
            one = volumes[number] if volumes else read_image(masks[number], spatial_dims, mask=True)
            parts[name] = as_classes(one, 2, (), image)
        except InputError as error:
            raise InputError(f"mask of the region {name}: {error}") from None
    channels = torch.cat([parts[name].as_tensor() for name in regions])
    first = parts[names[0]]
    return MetaTensor(channels, first.affine, file_affine_of(first))


def _volumes_of(source: Any, spatial_dims: int) -> list[MetaTensor]:
    """Return each volume of one file or array as a mask of its own."""
    read = read_image(source, spatial_dims, mask=True)
    return [
        MetaTensor(volume[None], read.affine, file_affine_of(read)) for volume in read.as_tensor()
    ]


def _named(order: Sequence[str], regions: Regions) -> tuple[str, ...]:
    """Return the regions in the order in which a row names them."""
    own = {plain_name(name): name for name in regions}
    names = tuple(own.get(plain_name(name), "") for name in order)
    if "" in names or len({*names}) != len(names) or len(names) != len(regions):
        raise InputError(
            f"mask_regions of its row must name each of the regions {', '.join(regions)} once, got "
            f"{shown(', '.join(order), 200)}"
        )
    return names


def _require_combinations(channels: Tensor, regions: Regions) -> None:
    """Raise `InputError` if at a voxel some regions meet, and others not, as no value has it.

    A hospital whose masks hold values could not outline such a voxel, so that a region would not
    mean the same at both.
    """
    values = values_of(regions)
    known = {tuple(value in own for own in regions.values()) for value in values}
    # Eight regions are a byte.
    packed = np.packbits(channels.numpy(), axis=0).reshape(-(-len(regions) // 8), -1)
    if len(packed) == 1:
        counts = np.bincount(packed[0], minlength=256)
        present = np.flatnonzero(counts).astype(np.uint8)[None]
        counts = counts[counts > 0]
    else:
        present, counts = np.unique(packed, axis=1, return_counts=True)
    odd = []
    for number, bits in enumerate(np.unpackbits(present, axis=0, count=len(regions)).T):
        if tuple(map(bool, bits)) not in known:
            odd.append((int(counts[number]), bits))
    if not odd:
        return
    count, bits = max(odd, key=lambda one: one[0])
    inside = [name for name, bit in zip(regions, bits, strict=True) if bit]
    outside = [name for name, bit in zip(regions, bits, strict=True) if not bit]
    beyond = f" and not in {', '.join(outside)}" if outside else ""
    lie = "voxels lie" if count > 1 else "voxel lies"
    raise InputError(
        f"{count} {lie} in {', '.join(inside)}{beyond}, as no value of the regions does "
        f"({listed(regions)}): correct the masks or their order, or declare a value for it"
    )
