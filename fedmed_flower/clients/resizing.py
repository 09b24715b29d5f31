"""Images of any size brought into one, whole and with their proportions kept."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import Resized
from monai.utils import TraceKeys

# torch's names of linear interpolation, by the number of axes.
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class FitIntod(Resized):  # type: ignore[misc]
    """Scale images, each by one factor for all of its axes, to the largest size that fits.

    An image that shrinks takes the mean over the area of each new pixel, so that fine patterns
    leave no false ones. An image that grows is interpolated linearly. Masks take the nearest class.
    The inverse brings an image, or a network's output, back to the size that it had.

    Parameters
    ----------
    keys : sequence of str
        Entries of a row, of shape (channels, *spatial); ``label`` is a mask. All of a row have the
        same size.
    size : sequence of int
        The largest side along each axis, in pixels or voxels.
    """

    def __init__(self, keys: Sequence[str], size: Sequence[int]) -> None:
        super().__init__(keys, tuple(size))
        self.size = tuple(size)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Any, Any]:
        """Return the row with its images scaled."""
        row = dict(data)
        sides = row[self.keys[0]].shape[1:]
        factor = min(most / side for most, side in zip(self.size, sides, strict=True))
        self.resizer.spatial_size = tuple(max(1, round(side * factor)) for side in sides)
        smooth = "area" if factor < 1 else _LINEAR[len(sides)]
        for key in self.keys:
            mode = "nearest-exact" if key == "label" else smooth
            row[key] = self.resizer(row[key], mode=mode)
        return row

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Any, Any]:
        """Return the row with its images in the sizes that they had."""
        row = dict(data)
        for key in self.key_iterator(row):
            applied = self.resizer.pop_transform(row[key])
            extra = applied[TraceKeys.EXTRA_INFO]
            if extra["mode"] == "area":
                # Of an image that grows it would repeat each pixel.
                extra["mode"] = _LINEAR[row[key].ndim - 1]
            row[key] = self.resizer.inverse_transform(row[key], applied)
        return row
