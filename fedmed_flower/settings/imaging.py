"""Settings that bring images to one grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed_flower.settings.allowed import Matching, Numbers, OneOf, Within
from fedmed_flower.settings.section import Section, setting

# Voxels of an image or a patch: one of 512 x 512 x 512 takes half a gigabyte.
MOST_VOXELS = 2**27
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
# What rules that choose DICOM series can look at, and one condition: key, comparison, value.
SERIES_KEYS = (
    "modality",
    "description",
    "protocol",
    "orientation",
    "slices",
    "part",
    "number",
    "kernel",
)
SERIES_CONDITION = rf"""({"|".join(SERIES_KEYS)})(>=|<=|=)((?:"[^"]*"|'[^']*'|[^\s;"'])+)"""
_RULE = rf"\s*{SERIES_CONDITION}(\s+{SERIES_CONDITION})*\s*"


def _orientations() -> tuple[str, ...]:
    """Return all ways to name three axes, such as RAS, and the empty text."""
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    named = [
        "".join(_LETTERS[axis][sides >> axis & 1] for axis in order)
        for order in orders
        for sides in range(8)
    ]
    return ("", *named)


@dataclass(frozen=True)
class ImagingSettings(Section):
    """How images are brought to one grid."""

    spacing: str = setting(
        "",
        'Distance between voxels, one number per axis: "1,1,2.5". Empty: each image keeps its own.',
        Numbers(),
        "millimetres",
    )
    orientation: str = setting(
        "RAS",
        "Directions of the axes of volumes that are read from files. Empty: each keeps its own.",
        OneOf(_orientations(), "empty or three letters such as RAS"),
    )
    image_size: str = setting(
        "",
        "Size into which each image is fitted, whole and with its proportions kept, one number per "
        'axis: "224,224". What is left of that size is padded. It comes before patch-size, and in '
        "place of spacing. Empty: images keep their sizes.",
        Numbers(whole=True),
        "pixels or voxels",
    )
    patch_size: str = setting(
        "",
        'Size of a patch on which the network is trained, one number per axis: "96,96,64". Smaller '
        "images are padded. In a larger image, segmentation trains on random patches and slides "
        "over the image at inference; classification takes the middle. Empty: images are taken "
        "whole; for segmentation they are padded to a multiple of 16.",
        Numbers(whole=True),
        "pixels or voxels",
    )
    series: str = setting(
        "",
        "Which series are taken from a folder of DICOM files, one rule a channel: "
        '"modality=CT description=*thorax* slices>=40; modality=PT". A rule must match one series '
        "of each patient's study. A hospital's own series.csv comes first. Empty: every series is "
        "an image.",
        Matching(
            rf"(?=(?s:.{{0,2000}})$)(?:\s*|{_RULE}(;{_RULE})*)",
            "empty or rules such as modality=CT description=*thorax* slices>=40, with a "
            f"semicolon between channels; the keys are {', '.join(SERIES_KEYS)}",
            ("CT", "modality", "mode=CT", "slices > 40", "slices>40", "modality=CT;", 'part="a'),
        ),
    )
    cache_gigabytes: float = setting(
        8.0,
        "Memory for images that are ready for the network, of all sites in a process together. "
        "Images that do not fit are read again each time.",
        Within(0.0),
        "gigabytes",
    )

    def check(self) -> None:
        """Refuse a size that no hospital could hold, and two ways to scale an image."""
        for name in ("image_size", "patch_size"):
            small = math.prod(self.numbers(name, 0)) <= MOST_VOXELS
            self.require(name, small, f"of at most {MOST_VOXELS:,} pixels or voxels")
        both = bool(self.image_size.strip() and self.spacing.strip())
        self.require("image_size", not both, "empty if spacing is set: each scales the images")

    def numbers(self, name: str, dims: int) -> tuple[float, ...]:
        """Return a field's numbers; an empty text has none.

        Raises
        ------
        InputError
            If there are some, and not `dims` of them; 0 allows any count.
        """
        text = getattr(self, name).strip()
        values = tuple(float(part) for part in text.split(",")) if text else ()
        if dims and values:
            self.require(name, len(values) == dims, f"empty or {dims} numbers, one an axis")
        return values
