"""Masks of regions that may overlap: each region is a union of the values of a mask.

The regions of the BraTS challenge are such: the whole tumour holds the tumour core, which holds the
enhancing tumour (U. Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 benchmark, arXiv:2107.02314).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import file_affine_of
from fedmed_flower.images.reading import files_of, read_label

Regions = Mapping[str, Sequence[int]]

# `read_label` counts values in a byte, and 0 is the background.
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


def read_regions(
    source: Any, spatial_dims: int, regions: Regions, image: MetaTensor | None = None
) -> MetaTensor:
    """Read a mask as one channel a region.

    Parameters
    ----------
    source : str, Path, ndarray, Tensor, or sequence of paths
        A mask of values, as `read_label` takes it; or one mask of 0 and 1 for each region, in the
        order of `regions`: a list of files, or an array of shape (regions, *spatial). A list of one
        file, and an array with one channel, are a mask of values.
    spatial_dims : int
        2 or 3.
    regions : dict
        For each region, the values of the mask that belong to it. A value may belong to several.
    image : MetaTensor, optional
        As in `read_label`.

    Returns
    -------
    MetaTensor
        uint8 of 0 and 1, (regions, *spatial).

    Raises
    ------
    InputError
        As `read_label`. Also if a mask holds a value of no region, or if there is not one mask for
        each region.
    """
    masks = _masks_of(source, spatial_dims)
    if len(masks) == 1:
        known = values_of(regions)
        try:
            mask = read_label(masks[0], spatial_dims, len(known), known, image)
        except InputError as error:
            raise InputError(f"{error} ({_listed(regions)})") from None
        members = [[value in values for value in known] for values in regions.values()]
        # A row of `members` for each region, a column for each value that a mask may hold.
        table = torch.tensor(members, dtype=torch.uint8)
        channels = table[:, mask.as_tensor()[0].long()]
        return MetaTensor(channels, mask.affine, file_affine_of(mask))
    if len(masks) != len(regions):
        raise InputError(
            f"there are {len(masks)} masks: one for each of the regions {', '.join(regions)} is "
            "needed, in this order, or one mask of values"
        )
    parts = []
    for name, one in zip(regions, masks, strict=True):
        try:
            parts.append(read_label(one, spatial_dims, 2, (), image))
        except InputError as error:
            raise InputError(f"mask of the region {name}: {error}") from None
    channels = torch.cat([part.as_tensor() for part in parts])
    return MetaTensor(channels, parts[0].affine, file_affine_of(parts[0]))


def _masks_of(source: Any, spatial_dims: int) -> list[Any]:
    """Return one mask of values, or the masks of the regions."""
    if any(files_of(source)):
        return list(source) if isinstance(source, list | tuple) else [source]
    has_channels = np.ndim(source) == spatial_dims + 1 and len(source) > 1
    return list(np.asarray(source)) if has_channels else [source]


def _listed(regions: Regions) -> str:
    parts = (f"{name} of {', '.join(map(str, values))}" for name, values in regions.items())
    return f"regions: {'; '.join(parts)}"
