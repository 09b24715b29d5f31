"""Bags of patches, such as those of a slide: a folder, a list of files, or an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedmed_flower.data.bounded import links_out, real_path
from fedmed_flower.errors import InputError
from fedmed_flower.images.photographs import PICTURES

# What a patch in a folder may be; other files, such as a table of positions, are no patches.
_ENDINGS = (*PICTURES, ".npy", ".nii", ".nii.gz")
# Patches of a bag.
_MOST = 100_000


def patches_of(source: Any, spatial_dims: int) -> list[Any]:
    """Return the patches of a bag, each as `read_image` takes it.

    Parameters
    ----------
    source : str, Path, sequence of paths, ndarray or Tensor
        A folder whose pictures (and .npy or NIfTI files) are the patches, by name; files; or an
        array of shape (patches, channels, *spatial). Hidden files of a folder, and those below it,
        are no patches.
    spatial_dims : int
        Of a patch.

    Raises
    ------
    InputError
        If there are no patches or too many, a link leads out of the folder, or an array has another
        number of dimensions.
    """
    if isinstance(source, str | Path):
        patches: list[Any] = _files_in(Path(source))
    elif isinstance(source, list | tuple) and all(isinstance(one, str | Path) for one in source):
        patches = list(source)
    else:
        array = np.asarray(source)
        if array.ndim != spatial_dims + 2:
            raise InputError(
                f"a bag has the shape {array.shape}; spatial_dims = {spatial_dims} asks for "
                f"{spatial_dims + 2} dimensions, (patches, channels, *spatial)"
            )
        patches = list(array)
    if not 0 < len(patches) <= _MOST:
        name = f"{source}: " if isinstance(source, str | Path) else ""
        raise InputError(f"{name}a bag must have 1 to {_MOST} patches, got {len(patches)}")
    return patches


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "is not there"
        raise InputError(f"{folder} {what}: a bag is a folder of patches, or a list of files")
    leading = links_out(folder, real_path(folder))
    if leading:
        raise InputError(f"{leading[0]} is a link that leads out of its folder: copy the file")
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(_ENDINGS) and not path.name.startswith(".") and path.is_file()
    )
