"""How images are brought to one grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed_flower.settings.section import Section

# Of a patch: that of 512 x 512 x 512 takes half a gigabyte.
MOST_VOXELS = 2**27


@dataclass(frozen=True)
class ImagingSettings(Section):
    """How images are brought to one grid, from the run config.

    Attributes
    ----------
    spacing : str
        Millimetres between voxels, one number an axis: ``"1,1,2.5"``. Empty leaves each image at
        its own.
    orientation : str
        If the axes of volumes from files point to. Empty leaves each as it is.
    patch_size : str
        Voxels of what a network is trained on, one number an axis: ``"96,96,64"``. Smaller images
        are padded. To segment a larger one, training takes a random part of it and inference slides
        over it; to classify it, its middle is taken. Empty takes images whole; to segment them,
        they are padded to a multiple of 16.
    cache_gigabytes : float
        Memory for images that are ready for the network, all sites of a process together; those
        beyond it are read again each time. At least 0.
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
        """Return a field's numbers, as many as `dims` unless that is 0; none if it is empty.

        Raises
        ------
        InputError
            If they are no numbers above 0, or not so many.
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
