"""Settings that bring images to one grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed_flower.settings.section import Section

# Voxels of a patch: one of 512 x 512 x 512 takes half a gigabyte.
MOST_VOXELS = 2**27


@dataclass(frozen=True)
class ImagingSettings(Section):
    """How images are brought to one grid, from the run config.

    Attributes
    ----------
    spacing : str
        Millimetres between voxels, one number per axis: ``"1,1,2.5"``. If empty, each image keeps
        its own.
    orientation : str
        Directions of the axes of volumes that are read from files. If empty, each volume keeps its
        own.
    patch_size : str
        Voxels of a patch on which the network is trained, one number per axis: ``"96,96,64"``.
        Smaller images are padded. In a larger image, segmentation trains on random patches and
        slides over the image at inference; classification takes the middle. If empty, images are
        taken whole; for segmentation they are padded to a multiple of 16.
    cache_gigabytes : float
        Memory for images that are ready for the network, of all sites in a process together; at
        least 0. Images that do not fit are read again each time.
    """

    spacing: str = ""
    orientation: str = "RAS"
    patch_size: str = ""
    cache_gigabytes: float = 8.0

    def __post_init__(self) -> None:
        self.numbers("spacing", 0)
        self.numbers("patch_size", 0)
        directions = ["LR", "PA", "IS"]
        known = len(self.orientation) in (0, 3) and all(
            sum(letter in pair for letter in self.orientation) == bool(self.orientation)
            for pair in directions
        )
        self.require("orientation", known, "empty or three letters such as RAS")
        self.require_at_least(0, "cache_gigabytes")

    def numbers(self, name: str, dims: int) -> tuple[float, ...]:
        """Return the numbers in a field; an empty field gives an empty tuple.

        Parameters
        ----------
        name : str
            Name of the field.
        dims : int
            How many numbers the field must have unless it is empty; 0 allows any number.

        Raises
        ------
        InputError
            If the field does not hold numbers above 0, or not `dims` of them, or if a patch is too
            large.
        """
        text = getattr(self, name).strip()
        try:
            values = tuple(float(part) for part in text.split(",")) if text else ()
        except ValueError:
            values = (math.nan,)
        whole = name != "patch_size" or all(value == int(value) for value in values if value < 1e9)
        fine = all(0 < value < 1e9 for value in values) and whole
        self.require(name, fine, "empty or numbers above 0 separated by commas")
        small = name != "patch_size" or math.prod(values) <= MOST_VOXELS
        self.require(name, small, f"of at most {MOST_VOXELS:,} pixels or voxels")
        if dims and values:
            self.require(name, len(values) == dims, f"empty or {dims} numbers, one an axis")
        return values
