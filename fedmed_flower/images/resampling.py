"""A channel on the grid of another, by their positions in the patient."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from monai.data import MetaTensor
from torch.nn.functional import grid_sample

from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE, file_affine_of

# The largest part of the voxels that may lie outside of the image that is resampled.
_MOST_OUTSIDE = 0.05
# Half a voxel, and what rounding adds: the edge of a voxel on the border.
_EDGE = 0.5 + 1e-3
# Bounds the memory that coordinates take.
_AT_ONCE = 1 << 20

log = logging.getLogger("flwr.fedmed")


def resampled(image: MetaTensor, grid: MetaTensor) -> MetaTensor:
    """Return an image on the grid of another image of the same patient, by linear interpolation.

    Parameters
    ----------
    image, grid : MetaTensor
        Volumes from `read_image`, (channels, *spatial), whose positions are in one frame of
        reference.

    Returns
    -------
    MetaTensor
        The channels of ``image``, with the shape and the affine of ``grid``. A voxel outside of
        the image has the value of the nearest voxel on its border. Nothing is smoothed: an image
        with much finer voxels than the grid keeps its noise.

    Raises
    ------
    InputError
        If one of the two is no volume with a position in the patient, or more than 5% of the grid
        lies outside of the image.
    """
    if image.ndim != 4 or grid.ndim != 4:
        raise InputError("they are not both volumes, and only volumes are resampled")
    if FILE_AFFINE not in image.meta or FILE_AFFINE not in grid.meta:
        raise InputError("they do not both have a position in the patient")
    # From a voxel of the grid to one of the image.
    to_image = np.linalg.solve(
        np.asarray(image.meta[FILE_AFFINE], float), np.asarray(grid.meta[FILE_AFFINE], float)
    )
    sides = torch.tensor(image.shape[1:], dtype=torch.float64)
    values = image.as_tensor()[None].float()
    result = torch.empty((len(image), *grid.shape[1:]), dtype=torch.float32)
    outside = 0
    for start, places in _places(to_image, tuple(grid.shape[1:])):
        beyond = (places < -_EDGE) | (places > sides - 1 + _EDGE)
        outside += int(beyond.any(dim=-1).sum())
        # grid_sample counts from -1 to 1 and names the last axis first.
        scaled = (2 * places / (sides - 1).clamp(min=1) - (sides > 1).double()).flip(-1)
        part = grid_sample(
            values, scaled.float()[None], "bilinear", padding_mode="border", align_corners=True
        )
        result[:, start : start + part.shape[2]] = part[0]
    share = outside / result[0].numel()
    if share > _MOST_OUTSIDE:
        raise InputError(
            f"{share:.1%} of the voxels of the grid lie outside of it, and at most "
            f"{_MOST_OUTSIDE:.0%} may"
        )
    if outside:
        log.info("a channel does not reach over the whole image: %.2g%% of it", 100 * share)
    return MetaTensor(result, grid.affine, file_affine_of(grid))


def _places(
    to_image: np.ndarray[tuple[int, int], np.dtype[np.float64]], shape: tuple[int, ...]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield some slabs of a grid: where each starts, and its voxels' places in the image.

    The places are (rows of the slab, second side, third side, 3).
    """
    matrix = torch.from_numpy(to_image)
    thickness = max(1, _AT_ONCE // (shape[1] * shape[2]))
    others = [torch.arange(side, dtype=torch.float64) for side in shape[1:]]
    for start in range(0, shape[0], thickness):
        first = torch.arange(start, min(start + thickness, shape[0]), dtype=torch.float64)
        voxels = torch.stack(torch.meshgrid(first, *others, indexing="ij"), dim=-1)
        yield start, voxels @ matrix[:3, :3].T + matrix[:3, 3]
