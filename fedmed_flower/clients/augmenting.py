"""Random changes of a whole training batch, each image by itself, on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fedmed_flower.errors import InputError


def random_affine(
    images: Tensor,
    masks: Tensor | None = None,
    turn: float = 0.2,
    scale: float = 0.1,
    shift: float = 0.1,
) -> tuple[Tensor, Tensor | None]:
    """Turn, scale and shift each image at random, and its mask in the same way.

    This takes a fraction of the time of a transform that handles one image after the other. All
    axes count as equally long: a picture twice as wide as high is turned as if it were a square.

    Parameters
    ----------
    images : Tensor
        (batch, channels, *spatial), 2D or 3D. Values between voxels are interpolated; a value
        beyond the border is that of the nearest border voxel.
    masks : Tensor, optional
        (batch, channels, *spatial): class numbers, or 0 and 1 of regions. Each voxel takes the
        nearest one; beyond the border it takes 0.
    turn : float
        Largest angle about each axis, in radians; 0 to pi.
    scale : float
        Largest change of size, as a part of the size; at least 0, below 1.
    shift : float
        Largest shift along each axis, as a part of the axis's length; 0 to 9.

    Returns
    -------
    tuple of (Tensor, Tensor or None)
        Images and masks in the dtypes that they had.

    Raises
    ------
    InputError
        If `turn`, `scale` or `shift` is out of its range.
    """
    for name, value, most in (
        ("turn", turn, math.pi),
        ("scale", scale, 0.999),
        ("shift", shift, 9),
    ):
        if not 0 <= value <= most:
            raise InputError(f"{name} must lie in 0 to {most:.4g}, got {value}")
    count = len(images)
    dims = images.ndim - 2
    draws = torch.rand(count, 7, device=images.device) * 2 - 1
    turned = _rotations(draws[:, :3] * turn, dims)
    sized = turned * (1 + scale * draws[:, 3]).view(-1, 1, 1)
    matrices = torch.cat([sized, 2 * shift * draws[:, 4 : 4 + dims, None]], dim=2)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    moved = (moved if images.is_floating_point() else moved.round()).to(images.dtype)
    if masks is None:
        return moved, None
    nearest = functional.grid_sample(masks.float(), grid, mode="nearest", align_corners=False)
    return moved, nearest.to(masks.dtype)


def random_intensity(
    images: Tensor, gain: float = 0.2, offset: float = 0.2, noise: float = 0.05
) -> Tensor:
    """Scale the values of each image at random, and add an offset and noise.

    Parameters
    ----------
    images : Tensor
        (batch, channels, *spatial), floating point, with a standard deviation near 1.
    gain : float
        Largest change of scale, as a part of the values; at least 0.
    offset : float
        Largest offset that is added to an image; at least 0.
    noise : float
        Standard deviation of the noise that is added to each voxel; at least 0.

    Raises
    ------
    InputError
        If `gain`, `offset` or `noise` is negative or not finite.
    """
    for name, value in (("gain", gain), ("offset", offset), ("noise", noise)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be at least 0 and finite, got {value}")
    shape = (2, len(images), *[1] * (images.ndim - 1))
    draws = torch.rand(shape, device=images.device) * 2 - 1
    gains = (1 + gain * draws[0]).to(images)
    offsets = (offset * draws[1]).to(images)
    changed = images * gains + offsets
    return changed + noise * torch.randn_like(images) if noise else changed


def _rotations(angles: Tensor, dims: int) -> Tensor:
    """Return rotation matrices (n, dims, dims) for angles (n, 3); in 2D only the first is used."""
    cos = torch.cos(angles)
    sin = torch.sin(angles)
    if dims == 2:
        rows = torch.stack([cos[:, 0], -sin[:, 0], sin[:, 0], cos[:, 0]], dim=1)
        return rows.view(-1, 2, 2)
    total = torch.eye(3, device=angles.device).expand(len(angles), 3, 3)
    for axis in range(3):
        first = (axis + 1) % 3
        second = (axis + 2) % 3
        about_axis = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
        about_axis[:, first, first] = cos[:, axis]
        about_axis[:, first, second] = -sin[:, axis]
        about_axis[:, second, first] = sin[:, axis]
        about_axis[:, second, second] = cos[:, axis]
        total = total @ about_axis
    return total
