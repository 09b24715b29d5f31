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
    """Turn, scale and shift each image at random, and its mask alike.

    Takes a fraction of the time of a transform for one image after the other. Axes are taken for
    equally long: a picture twice as wide as high is turned as if it were a square.

    Parameters
    ----------
    images : Tensor
        (batch, channels, *spatial), 2D or 3D; values between voxels are interpolated, those beyond
        the border are the border's.
    masks : Tensor, optional
        (batch, 1, *spatial) class numbers; the nearest is taken, beyond the border 0.
    turn : float
        The most that is turned, in radians, about each axis; 0 to pi.
    scale : float
        The most that is scaled, as a part of the size; at least 0, below 1.
    shift : float
        The most that is shifted along each axis, as a part of its length; 0 to 9.

    Returns
    -------
    tuple of (Tensor, Tensor or None)
        In the dtypes they had.
    """
    for name, value, most in (
        ("turn", turn, math.pi),
        ("scale", scale, 0.999),
        ("shift", shift, 9),
    ):
        if not 0 <= value <= most:
            raise InputError(f"{name} must lie in 0 to {most:.4g}, got {value}")
    count, dims = len(images), images.ndim - 2
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
    """Scale, offset and roughen the values of each image at random.

    Parameters
    ----------
    images : Tensor
        (batch, channels, *spatial), floating point, of a standard deviation near 1.
    gain : float
        The most that values are scaled, as a part of them; at least 0.
    offset : float
        The most that is added to an image; at least 0.
    noise : float
        Standard deviation of what is added to each voxel; at least 0.
    """
    for name, value in (("gain", gain), ("offset", offset), ("noise", noise)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be at least 0 and finite, got {value}")
    shape = (2, len(images), *[1] * (images.ndim - 1))
    draws = torch.rand(shape, device=images.device) * 2 - 1
    gains, offsets = (1 + gain * draws[0]).to(images), (offset * draws[1]).to(images)
    changed = images * gains + offsets
    return changed + noise * torch.randn_like(images) if noise else changed


def _rotations(angles: Tensor, dims: int) -> Tensor:
    """Return a rotation matrix (n, dims, dims) for angles (n, 3); in 2D the first counts."""
    cos, sin = torch.cos(angles), torch.sin(angles)
    if dims == 2:
        rows = torch.stack([cos[:, 0], -sin[:, 0], sin[:, 0], cos[:, 0]], dim=1)
        return rows.view(-1, 2, 2)
    total = torch.eye(3, device=angles.device).expand(len(angles), 3, 3)
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        part = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
        part[:, first, first] = part[:, second, second] = cos[:, axis]
        part[:, first, second], part[:, second, first] = -sin[:, axis], sin[:, axis]
        total = total @ part
    return total
