"""Pictures: PNG, JPEG, BMP and TIFF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")


def read_picture(path: Path) -> NDArray[Any]:
    """Return the values of a picture, (channels, rows, columns)."""
    # Some of Pillow's other formats start programs or unpack without a bound.
    with Image.open(path, formats=_FORMATS) as picture:
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise InputError(f"{path} holds {frames} pictures: give each a file of its own")
        depth = {"I": 4, "F": 4}.get(picture.mode, 2 if picture.mode.startswith("I;") else 1)
        size = picture.width * picture.height * len(picture.getbands()) * depth
        require_within(f"{path} says that it holds", size, "a picture or a DICOM file")
        array = np.asarray(picture)
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
