"""Pictures: PNG, JPEG, BMP and TIFF files, with the values that a viewer would show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedmed_flower.data.bounded import require_within
from fedmed_flower.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "I;16", "I;16L", "I;16B", "F")
_PHOTOMETRIC = 262  # The TIFF tag that says whether 0 is white, as it is if the tag is 0.

Array = NDArray[Any]


def read_picture(path: Path, indices: bool = False) -> Array:
    """Return the values of a picture, (channels, rows, columns), the right way up.

    It is turned as its EXIF orientation says. A palette becomes colours, or one channel if all its
    colours are grey. An alpha channel that hides nothing is dropped. A picture of one bit has the
    values 0 and 1, and 16 bits stay 16 bits.

    Parameters
    ----------
    path : Path
    indices : bool
        Return the indices of a palette instead of its colours: in a mask they are the classes.
        Whether a colour of the palette is transparent is then no matter.

    Raises
    ------
    InputError
        If the file holds several pictures, or takes more than `bounded.MOST` bytes; if it is
        transparent somewhere, its colours are not RGB, or have 16 bits each, of which Pillow reads
        8. Pillow's own errors are not caught.
    """
    # Some of Pillow's other formats start programs or unpack without a bound. An open file is not
    # mapped into memory, in which Pillow scrambles a TIFF file that is to be turned by 90 degrees.
    with path.open("rb") as file, Image.open(file, formats=_FORMATS) as picture:
        _require_readable(path, picture)
        ImageOps.exif_transpose(picture, in_place=True)
        is_white = getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        keeps_indices = indices and picture.mode == "P"
        array = np.asarray(picture if keeps_indices else _opaque(path, _coloured(picture)))
        # Pillow turns pictures of 8 bits itself.
        if is_white and array.dtype.itemsize == 2:
            array = 65535 - array
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]


def _require_readable(path: Path, picture: Any) -> None:
    """Raise `InputError` if a picture is too large, or Pillow would change its values."""
    if (frames := getattr(picture, "n_frames", 1)) > 1:
        raise InputError(f"{path} holds {frames} pictures: give each a file of its own")
    if picture.mode not in _MODES:
        raise InputError(f"{path} has {picture.mode} colours: save it as RGB or as grey")
    tiles = "".join(str(tile[3]) for tile in picture.tile)
    if ";16" in tiles and not picture.mode.startswith("I"):
        raise InputError(
            f"{path} has several channels of 16 bits, of which 8 would be read: save it with 8 "
            "bits, or each channel as a grey picture of its own"
        )
    depth = {"I": 4, "F": 4}.get(picture.mode, 2 if picture.mode.startswith("I;") else 1)
    # What has a palette, or a transparent colour, becomes RGBA on the way.
    channels = 4 if picture.mode == "P" or _may_hide(picture) else len(picture.getbands())
    size = picture.width * picture.height * channels * depth
    require_within(f"{path} says that it holds", size, "a picture or a DICOM file")


def _coloured(picture: Any) -> Any:
    """Return a picture with colours, or shades of grey, in place of a palette."""
    if picture.mode not in ("P", "PA"):
        return picture
    coloured = picture.convert("RGBA" if _may_hide(picture) else "RGB")
    colours = np.reshape(picture.getpalette(), (-1, 3))
    if (colours != colours[:, :1]).any():
        return coloured
    return coloured.convert("LA" if coloured.mode == "RGBA" else "L")


def _opaque(path: Path, picture: Any) -> Any:
    """Return a picture without its alpha channel, or transparent colour, if that hides nothing."""
    if not _may_hide(picture):
        return picture
    has_channel = picture.mode in ("LA", "RGBA")
    alpha = (picture if has_channel else picture.convert("RGBA")).getchannel("A")
    if alpha.getextrema() != (255, 255):
        raise InputError(
            f"{path} is transparent in places, and what is seen there depends on the program: save "
            "it without transparency (an alpha channel)"
        )
    return picture.convert(picture.mode.removesuffix("A")) if has_channel else picture


def _may_hide(picture: Any) -> bool:
    """Return whether a picture has an alpha channel or a transparent colour."""
    return picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
