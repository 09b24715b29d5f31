"""Pictures of test cases: outlines of masks, and maps of the parts that a score rests on."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from fedmed_flower.data.pictures import PALETTE, Picture
from fedmed_flower.errors import InputError

_MOST_BYTES = 60_000
# Pixels: the width of a picture, the bounds of its height, and the height of a legend's line.
_WIDTH = 320
_LOWEST = 120
_HIGHEST = 480
_LINE = 14
_DPI = 100
# Names in a legend, and letters in a name.
_MOST_NAMES = 12
_MOST_LETTERS = 20
_DASHES = (0, (2.0, 1.6))
_FOR = "#d55e00"
_AGAINST = "#0072b2"


def outlined(
    image: ArrayLike,
    truth: ArrayLike | None,
    guess: ArrayLike | None,
    classes: Sequence[str],
    title: str,
    spacing: Sequence[float] = (),
) -> Picture:
    """Draw the outlines of masks over their image: the truth solid, the prediction dashed.

    Parameters
    ----------
    image : array of shape (channels, *spatial)
        2D, rows first, shown as it is; or 3D with axes to the right, anterior and superior (RAS),
        shown as a radiologist sees it: anterior up, the patient's right on the left. The first
        channel is drawn, between the 1st and 99th percentile of the slice.
    truth, guess : integer array of shape (*spatial) or (classes, *spatial), or None
        Class numbers; 0 is the background. With the classes first, 0 or 1 for each of them, which
        may overlap. Of a volume, the slice along the last axis is shown in
        which the truth covers most. If the truth is empty or None, the guess decides; if that is
        too, the middle slice is shown. (If the guess decided first, whoever makes the model could
        choose the slice.)
    classes : sequence of str
        Names of the classes 1, 2, ...
    title : str
    spacing : sequence of float
        Millimetres between voxels, one number for each spatial axis; left out, all are equal.

    Returns
    -------
    Picture
        320 pixels wide and below 60 kB. Equal input gives equal bytes.

    Raises
    ------
    InputError
        If shapes do not fit, or a mask holds a value that is no class number.
    """
    pixels = _first_channel(image)
    masks = {
        name: _mask(name, mask, pixels.shape, len(classes))
        for name, mask in (("truth", truth), ("guess", guess))
        if mask is not None
    }
    covering = [_covered(mask, pixels.ndim) for mask in masks.values() if mask.any()]
    covered = covering[0] if covering else np.zeros(pixels.shape, bool)
    index = _fullest(covered)
    figure, axes = _canvas(pixels, index, _spaces(spacing, pixels.ndim))
    keys: list[tuple[str, Any, float, str]] = []
    drawn = set[int]()
    for name, dashes, words in (("truth", "-", "truth"), ("guess", _DASHES, "prediction")):
        if name not in masks:
            continue
        keys.append(("white", dashes, 1.2, words))
        stacked = masks[name].ndim > pixels.ndim
        for number, inside in _outlines(masks[name], pixels.ndim, index):
            # A border of background closes the outline of what touches the image's edge.
            padded = np.pad(inside, 1)
            rows, columns = (np.arange(-1, size - 1) for size in padded.shape)
            # Where outlines of overlapping masks coincide, those below must stick out.
            width = 1.5 + 1.4 * min(len(masks[name]) - number, 2) * stacked
            style = {"colors": [_colour(number)], "linestyles": [dashes], "linewidths": width}
            axes.contour(columns, rows, padded, [0.5], **style)
            drawn.add(number)
    names = [(_colour(number), "-", 4.0, _short(classes[number - 1])) for number in sorted(drawn)]
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES:] = [("none", "-", 0.0, f"and {len(names) - _MOST_NAMES} more")]
    return Picture(title, _png(figure, keys + names))


def heatmap(image: ArrayLike, map: ArrayLike, title: str, spacing: Sequence[float] = ()) -> Picture:
    """Lay a transparent map over its image: orange for values above 0, blue for those below.

    Parameters
    ----------
    image, title, spacing
        As in `outlined`.
    map : array of shape (*spatial)
        The weight of each voxel, such as a class activation map. The largest absolute value is
        drawn strongest, and decides which slice of a volume is shown.

    Returns
    -------
    Picture
        As `outlined` returns it.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    pixels = _first_channel(image)
    values = np.nan_to_num(np.asarray(map, dtype=np.float64))
    if values.shape != pixels.shape:
        raise InputError(
            f"map has the shape {values.shape}, the image {pixels.shape}: give one value a pixel"
        )
    strength = np.abs(values) / (np.abs(values).max() or 1.0)
    if values.ndim == 3:
        index = int(strength.max(axis=(0, 1)).argmax()) if values.any() else values.shape[2] // 2
    else:
        index = 0
    figure, axes = _canvas(pixels, index, _spaces(spacing, pixels.ndim))
    above = _shown(values, index)[..., None] > 0
    colours = np.where(above, to_rgb(_FOR), to_rgb(_AGAINST))
    over = np.dstack([colours, 0.75 * _shown(strength, index)])
    axes.imshow(over, aspect=axes.get_aspect(), interpolation="nearest")
    return Picture(title, _png(figure, []))


def _first_channel(image: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(image)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(
            f"image has the shape {array.shape}: give (channels, rows, columns) or "
            "(channels, x, y, z)"
        )
    return np.nan_to_num(np.asarray(array[0], dtype=np.float64))


def _mask(
    name: str, mask: ArrayLike, shape: tuple[int, ...], num_classes: int
) -> NDArray[np.int64]:
    values = np.asarray(mask)
    stacked = values.shape == (num_classes, *shape)
    if values.shape != shape and not stacked:
        raise InputError(
            f"{name} has the shape {values.shape}, the image {shape}: give one class a pixel, or a "
            "mask of each class"
        )
    unknown = ~np.isin(values, np.arange(2 if stacked else num_classes + 1))
    if unknown.any():
        allowed = "0 and 1" if stacked else f"0 and the numbers of the {num_classes} classes"
        raise InputError(f"{name} holds {values[unknown][0]}: it must hold {allowed}")
    return values.astype(np.int64)


def _covered(mask: NDArray[np.int64], dims: int) -> NDArray[np.bool_]:
    """Return where a mask is not background."""
    covered: NDArray[np.bool_] = (mask.max(axis=0) if mask.ndim > dims else mask) > 0
    return covered


def _outlines(
    mask: NDArray[np.int64], dims: int, index: int
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the number of each class in a slice of a mask, and where it is, as it is shown."""
    if mask.ndim > dims:
        layers = (_shown(layer, index) > 0 for layer in mask)
        yield from ((number, inside) for number, inside in enumerate(layers, 1) if inside.any())
    else:
        seen = _shown(mask, index)
        yield from ((number, seen == number) for number in np.unique(seen[seen > 0]).tolist())


def _spaces(spacing: Sequence[float], dims: int) -> tuple[float, ...]:
    spaces = tuple(float(space) for space in spacing) or (1.0,) * dims
    if len(spaces) != dims or not all(0 < space < np.inf for space in spaces):
        raise InputError(f"spacing must be {dims} numbers above 0, got {spaces}")
    return spaces


def _fullest(covered: NDArray[np.bool_]) -> int:
    if covered.ndim == 2:
        return 0
    counts = covered.sum(axis=(0, 1))
    return int(counts.argmax()) if counts.any() else covered.shape[2] // 2


def _shown(array: NDArray[Any], index: int) -> NDArray[Any]:
    """Return a slice with anterior up and the patient's right on the left; a 2D image as it is."""
    return array if array.ndim == 2 else array[:, :, index].T[::-1, ::-1]


def _colour(number: int) -> str:
    return PALETTE[(number - 1) % len(PALETTE)]


def _canvas(
    pixels: NDArray[np.float64], index: int, spacing: Sequence[float]
) -> tuple[Figure, Any]:
    """Return a figure of the image's size, and its axes with the image in grey."""
    grey = _shown(pixels, index)
    down, across = spacing if pixels.ndim == 2 else (spacing[1], spacing[0])
    height = _WIDTH * (grey.shape[0] * down) / (grey.shape[1] * across)
    height = min(max(round(height), _LOWEST), _HIGHEST)
    figure = Figure((_WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor="black")
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    low, high = np.percentile(grey, [1, 99])
    style: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": high if high > low else low + 1}
    axes.imshow(grey, aspect=down / across, interpolation="antialiased", **style)
    # Outlines and maps must not move the view.
    axes.autoscale(False)
    return figure, axes


def _png(figure: Figure, keys: Sequence[tuple[str, Any, float, str]]) -> bytes:
    """Draw a figure with a legend below it, in as many colours as a small file allows."""
    (axes,) = figure.axes
    _, high = figure.get_size_inches() * _DPI
    below = _LINE * math.ceil(len(keys) / 2) + (6 if keys else 0)
    # A little more than whole pixels, since the canvas rounds down.
    figure.set_size_inches((_WIDTH + 0.01) / _DPI, (high + below + 0.01) / _DPI)
    axes.set_position((0, below / (high + below), 1, high / (high + below)))
    pixels = IdentityTransform()
    for number, (colour, dashes, width, words) in enumerate(keys):
        x = 6 + number % 2 * _WIDTH / 2
        y = below - 3 - _LINE * (number // 2 + 0.5)
        style: dict[str, Any] = {"color": colour, "ls": dashes, "lw": width, "transform": pixels}
        figure.add_artist(Line2D([x, x + 16], [y, y], solid_capstyle="butt", **style))
        font: dict[str, Any] = {
            "color": "white",
            "size": 7,
            "family": "DejaVu Sans",
            "parse_math": False,
        }
        figure.add_artist(Text(x + 21, y - 1, words, va="center", transform=pixels, **font))
    canvas: Any = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas.draw()
    drawn = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    for colours in (256, 64, 16, 8):
        file = io.BytesIO()
        _reduced(drawn, colours).save(file, "PNG", optimize=True)
        if file.tell() < _MOST_BYTES:
            break
    return file.getvalue()


def _reduced(drawn: NDArray[np.uint8], colours: int) -> Image.Image:
    """Return a picture in few colours, at least half of them greys, so that no grey gets a tint."""
    tinted = (drawn != drawn[..., :1]).any(axis=-1)
    others = colours // 2 if tinted.any() else 0
    greys = colours - others
    indices = (drawn[..., 0].astype(int) * (greys - 1) + 127) // 255
    palette = np.linspace(0, 255, greys).round().astype(np.uint8).repeat(3).tobytes()
    if others:
        # This method keeps rare colours, such as those of a thin line.
        image = Image.fromarray(drawn[tinted][None])
        quantized = image.quantize(others, Image.Quantize.MAXCOVERAGE)
        indices[tinted] = greys + np.asarray(quantized)[0]
        palette += bytes(quantized.getpalette() or [])[: 3 * others]
    reduced = Image.fromarray(indices.astype(np.uint8))
    reduced.putpalette(palette)
    return reduced


def _short(name: str) -> str:
    clean = "".join(letter if letter.isprintable() else " " for letter in name)
    return clean if len(clean) <= _MOST_LETTERS else clean[: _MOST_LETTERS - 1] + "…"
