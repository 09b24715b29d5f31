"""Masks in DICOM files, SEG and RTSTRUCT, whose structures are found by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.contours import Contours
from fedmed_flower.images.geometry import file_affine_of
from fedmed_flower.images.headers import dicom_files, is_dicom, kind_of
from fedmed_flower.images.names import plain_name
from fedmed_flower.images.segments import Segments
from fedmed_flower.images.series import Series
from fedmed_flower.images.structures import (
    Array,
    Claims,
    ClassClaims,
    Grid,
    RegionClaims,
    Structure,
    Structures,
)

_LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
_KINDS: dict[str, type[Segments] | type[Contours]] = {
    str(SegmentationStorage): Segments,
    _LABEL_MAP: Segments,
    str(RTStructureSetStorage): Contours,
}
_MOST_NAMES = 20


def structure_files(source: Any) -> list[Path]:
    """Return the SEG and RTSTRUCT files that a row's ``label`` names; none for another mask.

    Raises
    ------
    InputError
        If some of its files are of these kinds and others are not.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        candidates = dicom_files(path) if path.is_dir() else [path]
    elif isinstance(source, Series):
        candidates = [Path(file) for file in source.files]
    elif isinstance(source, list | tuple) and all(isinstance(one, str | Path) for one in source):
        candidates = [Path(one) for one in source]
    else:
        return []
    files = [file for file in candidates if is_dicom(file) and kind_of(file) in _KINDS]
    if files and len(files) < len(candidates):
        other = next(file for file in candidates if file not in files)
        raise InputError(f"{other} is neither DICOM SEG nor RTSTRUCT, as {files[0]} is")
    return files


def read_structures(files: Sequence[Path], names: Sequence[str], image: MetaTensor) -> MetaTensor:
    """Return a mask from SEG and RTSTRUCT files, whose structures are joined.

    Structures that ``names`` does not name are left out, and a name that no file has marks no
    voxel. A segment counts by its label; if no label is that name, by description, then by code.

    Parameters
    ----------
    files : sequence of Path
        From `structure_files`.
    names : sequence of str
        Names of the classes 1, 2, ..., at most 255; compared by `plain_name`.
    image : MetaTensor
        From `read_image`.

    Returns
    -------
    MetaTensor
        uint8, (1, *spatial), at the place of ``image``.

    Raises
    ------
    InputError
        If a file cannot be read or has none of the names, if two classes claim a voxel, or if a
        plane lies beside those of the image.
    """
    claims = ClassClaims(names, Grid.of(image))
    _claim(files, names, claims)
    claims.require_single()
    return _on(image, claims.mask)


def read_overlapping(files: Sequence[Path], names: Sequence[str], image: MetaTensor) -> MetaTensor:
    """Return one mask a region from SEG and RTSTRUCT files, whose structures may overlap.

    Parameters
    ----------
    files, image
        As `read_structures` takes them.
    names : sequence of str
        Names of the regions; compared by `plain_name`.

    Returns
    -------
    MetaTensor
        uint8 of 0 and 1, (regions, *spatial), at the place of ``image``.

    Raises
    ------
    InputError
        As `read_structures`, but not of structures that overlap.
    """
    claims = RegionClaims(len(names), Grid.of(image))
    _claim(files, names, claims)
    return _on(image, claims.masks)


def _claim(files: Sequence[Path], names: Sequence[str], claims: Claims) -> None:
    """Mark the voxels of all structures that have one of the names."""
    parts: list[Structures] = [_KINDS[kind_of(file)](file) for file in files]
    listed = [part.listed() for part in parts]
    numbers = _classes_of(listed, names)
    if not any(numbers):
        raise InputError(
            f"it has none of the structures {', '.join(names)}, but {_listed_names(listed)}: name "
            "the classes so, or rename its structures"
        )
    for part, own in zip(parts, numbers, strict=True):
        if own:
            part.claim(own, claims)


def _on(image: MetaTensor, voxels: Array) -> MetaTensor:
    """Return masks of an image's grid, at its place."""
    masks = torch.from_numpy(voxels.reshape(-1, *image.shape[1:]))
    return MetaTensor(masks, image.affine, file_affine_of(image))


def _classes_of(
    listed: Sequence[Sequence[Structure]], names: Sequence[str]
) -> list[dict[int, int]]:
    """Return for each file the class of each of its structures that has one, by number."""
    classes = {plain_name(name): number for number, name in enumerate(names, start=1)}
    found: list[dict[int, int]] = [{} for _ in listed]
    depth = max((len(one.names) for structures in listed for one in structures), default=0)
    for level in range(depth):
        # A name that somebody gave a structure counts more than a description or a code.
        named = {number for numbers in found for number in numbers.values()}
        for numbers, structures in zip(found, listed, strict=True):
            for one in structures:
                if one.number in numbers or level >= len(one.names):
                    continue
                matches = [classes.get(plain_name(name), 0) for name in one.names[level]]
                fitting = [number for number in matches if number and number not in named]
                if fitting:
                    numbers[one.number] = fitting[0]
    return found


def _listed_names(listed: Sequence[Sequence[Structure]]) -> str:
    names = [
        shown(next((name.strip() for level in one.names for name in level if name), "?"), 64)
        for structures in listed
        for one in structures
    ]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "no structure") + more
