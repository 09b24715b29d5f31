"""Generated pictures of stained cells with masks of their nuclei, of hospitals whose stains differ.

They show no patients, and nothing that is learned from them is a medical finding. They stand in for
collections such as that of the 2018 Data Science Bowl (Caicedo et al., Nature Methods 2019), in
which most pictures are fluorescence, and few come from each of several stains of tissue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fedmed_flower.data.download import Volumes
from fedmed_flower.data.phantoms import require_whole
from fedmed_flower.data.site import GENERATED, Row

Picture = NDArray[np.float32]
Colour = Sequence[float]


@dataclass(frozen=True)
class Stain:
    """How pictures of one stain look; colours are (red, green, blue) from 0 to 1.

    Attributes
    ----------
    name : str
    ground, nucleus : tuple of float
        Colours of what lies between cells, and of nuclei.
    body : tuple of float
        Colour of the tissue around nuclei.
    tissue : float
        How much of the ground is tissue.
    other : tuple of float or None
        Colour of the nuclei that the stain does not mark, about half of them; they count too.
    blur, noise : float
        Of the picture: pixels, and standard deviation.
    """

    name: str
    ground: Colour
    nucleus: Colour
    body: Colour
    tissue: float
    other: Colour | None = None
    blur: float = 0.6
    noise: float = 0.02


STAINS = (
    Stain("fluorescence", (0.04, 0.04, 0.04), (0.5, 0.5, 0.5), (0.08, 0.08, 0.08), 0.2),
    Stain("haematoxylin", (0.93, 0.86, 0.92), (0.42, 0.3, 0.6), (0.85, 0.62, 0.78), 0.8),
    Stain(
        "immunohistochemistry",
        (0.92, 0.92, 0.9),
        (0.5, 0.33, 0.2),
        (0.82, 0.82, 0.86),
        0.6,
        other=(0.55, 0.62, 0.78),
    ),
    Stain("bright field", (0.7, 0.7, 0.7), (0.56, 0.56, 0.56), (0.66, 0.66, 0.66), 0.5, blur=1.0),
    Stain("dark field", (0.12, 0.07, 0.2), (0.3, 0.5, 0.36), (0.25, 0.14, 0.34), 0.6, noise=0.05),
)
"""The stains of five hospitals."""


def nuclei(count: int, stain: Stain, seed: int = 0, size: int = 64) -> Volumes:
    """Generate pictures of cells with masks of their nuclei.

    Number, size, shape and shade of nuclei, tissue, exposure and tint differ from picture to
    picture; in tissue there are smears as dark as nuclei, and as long as three of them.

    Parameters
    ----------
    count : int
        1 or greater; the first pictures of a larger count are the same.
    stain : Stain
        One of `STAINS`, or another.
    seed : int
        0 or greater; the same seed gives the same pictures.
    size : int
        Height and width in pixels, 32 to 1024.

    Returns
    -------
    Volumes
        Rows with ``image`` (3, size, size) float32 in 0 to 255, ``label`` (size, size) uint8, 1 in
        nuclei, and ``patient``; ``generated`` is True.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    require_whole({"count": (count, 1, 10**6), "seed": (seed, 0, 2**63), "size": (size, 32, 1024)})
    key = sum(map(ord, stain.name))
    rows = [
        {
            **_picture(np.random.default_rng([seed, key, k]), stain, size),
            "patient": f"{stain.name}-{seed}-{k}",
        }
        for k in range(count)
    ]
    return Volumes(tuple(rows), GENERATED, generated=True)


def _picture(rng: np.random.Generator, stain: Stain, size: int) -> Row:
    """Draw one picture; lengths are in pixels."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    smooth = gaussian_filter(rng.standard_normal((size, size)), size / 10)
    tissue = smooth > np.quantile(smooth, 1 - stain.tissue * rng.uniform(0.7, 1.2))
    colours = np.empty((3, size, size), np.float32)
    for channel in range(3):
        colours[channel] = np.where(tissue, stain.body[channel], stain.ground[channel])
    texture = gaussian_filter(rng.standard_normal((size, size)), 1.5)
    colours += 0.12 * np.float32(stain.tissue) * texture * tissue
    label = np.zeros((size, size), np.uint8)
    # Smears: as dark as nuclei, and no nuclei.
    for _ in range(rng.integers(0, 3) if stain.tissue > 0.4 else 0):
        inside = _ellipse(rng, rows, columns, size, (1.0, 1.8), (8.0, 14.0))
        _mix(colours, inside, stain.nucleus, 0.7)
    for _ in range(rng.integers(5, 14) * size * size // 4096):
        inside = _ellipse(rng, rows, columns, size, (2.5, 4.5), (3.0, 6.0))
        marked = stain.other is None or rng.random() < 0.5
        colour = stain.nucleus if marked else stain.other or stain.nucleus
        _mix(colours, inside, colour, rng.uniform(0.55, 1.0))
        label[inside > 0.5] = 1
    tint = rng.normal(1, 0.06, (3, 1, 1)) * rng.normal(1, 0.1)
    blurred = np.stack([gaussian_filter(channel, stain.blur) for channel in colours])
    image = blurred * tint + rng.normal(0, stain.noise, blurred.shape)
    return {"image": (255 * np.clip(image, 0, 1)).astype(np.float32), "label": label}


def _ellipse(
    rng: np.random.Generator,
    rows: Picture,
    columns: Picture,
    size: int,
    short: tuple[float, float],
    long: tuple[float, float],
) -> Picture:
    """Return an ellipse at a random place, 1 inside and 0 outside, with a soft edge."""
    y, x = rng.uniform(0, size, 2)
    angle = rng.uniform(0, np.pi)
    along = (rows - y) * np.sin(angle) + (columns - x) * np.cos(angle)
    across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    away = np.hypot(along / rng.uniform(*long), across / rng.uniform(*short))
    edge: Picture = np.clip(1 + 4 * (1 - away), 0, 1).astype(np.float32)
    return edge


def _mix(colours: Picture, inside: Picture, colour: Colour, strength: float) -> None:
    """Lay a colour over a picture in place."""
    part = np.float32(strength) * inside
    for channel, value in enumerate(colour):
        colours[channel] += part * (value - colours[channel])
