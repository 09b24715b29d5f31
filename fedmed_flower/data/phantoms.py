"""Generated images that look like small chest X-rays, for tests and demonstrations offline.

No patient stands behind them and nothing that is learned from them is a medical finding. They
stand in for PneumoniaMNIST (https://medmnist.com), whose share of label 1 in train they have.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.site import GENERATED, SPLITS
from fedmed_flower.data.sources import ImageSplits
from fedmed_flower.errors import InputError

_SHARE_OPACITIES = 0.74
_BLOCK_PIXELS = 2**20

Images = NDArray[np.float32]


@lru_cache(maxsize=2)
def chest_xrays(
    num_train: int, num_val: int, num_test: int, seed: int = 0, size: int = 28
) -> ImageSplits:
    """Generate grey images with dark lung fields between a bright mediastinum and bright ribs.

    Label 1 stands for opacities in the lungs: one to three blurred patches, from hardly seen
    to dense. Exposure, contrast, position, size and noise differ from image to image. 74 % of
    each split have label 1. The pneumonia example reaches a test AUC of about 0.97 with 2000
    images in ten rounds.

    Parameters
    ----------
    num_train : int
        1 or greater.
    num_val, num_test : int
        0 or greater. What one split holds does not depend on the size of another.
    seed : int
        0 or greater; the same seed gives the same images.
    size : int
        Height and width in pixels, 16 to 1024.

    Returns
    -------
    ImageSplits
        Images (n, size, size) uint8 and labels (n,) int64, read-only; ``generated`` is True.

    Raises
    ------
    InputError
        Where an argument is out of its range.
    """
    bounds = {
        "num_train": (num_train, 1, 10**7),
        "num_val": (num_val, 0, 10**7),
        "num_test": (num_test, 0, 10**7),
        "seed": (seed, 0, 2**63),
        "size": (size, 16, 1024),
    }
    for name, (value, low, high) in bounds.items():
        if not isinstance(value, int | np.integer) or not low <= value <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    images, labels = {}, {}
    for number, (split, rows) in enumerate(
        zip(SPLITS, (num_train, num_val, num_test), strict=True)
    ):
        rng = np.random.default_rng([seed, number])
        truth = rng.permutation(np.arange(rows) < round(_SHARE_OPACITIES * rows))
        drawn = np.empty((rows, size, size), np.uint8)
        step = max(1, _BLOCK_PIXELS // size**2)
        for start in range(0, rows, step):
            drawn[start : start + step] = _draw(truth[start : start + step], size, rng)
        images[split], labels[split] = drawn, truth.astype(np.int64)
        drawn.flags.writeable = labels[split].flags.writeable = False
    return ImageSplits(images, labels, GENERATED, generated=True)


def _draw(opaque: NDArray[np.bool_], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image for each entry of ``opaque``; lengths are halves of the image's width."""
    n = len(opaque)

    def vary(mean: float, spread: float) -> Images:
        return rng.normal(mean, spread, (n, 1, 1)).astype(np.float32)

    grid = np.linspace(-1, 1, size, dtype=np.float32)
    zoom = vary(1, 0.05)
    x = (grid[None, None, :] - vary(0, 0.05)) / zoom
    y = (grid[None, :, None] - vary(0, 0.05)) / zoom

    base = vary(0.62, 0.05) + 0.1 * (np.abs(x) - 0.44)
    lungs = sum(
        _ellipse(
            (x - side * vary(0.47, 0.02)) / (1 + 0.3 * y), y, vary(0.36, 0.02), vary(0.88, 0.04)
        )
        for side in (-1, 1)
    ) * _sigmoid(25 * (base - y))
    heart = _ellipse(x - vary(0.15, 0.04), y - 0.4, vary(0.34, 0.04), vary(0.38, 0.04))
    ribs = np.cos((y + vary(0.35, 0.05) * x**2) * vary(19, 1.0) + vary(0, 2))
    density = _patches(rng, x, y, 6, 0.10) * vary(0.12, 0.03)
    number = rng.integers(1, 4, n)
    strength = rng.gamma(1.5, 1.0, (n, 1, 1)).astype(np.float32)
    for k in range(3):
        shown = (opaque & (number > k))[:, None, None]
        density += _patches(rng, x, y, 1, 0.22) * strength * shown

    air = np.clip(lungs, 0, 1) * (1 - 0.8 * heart) * np.exp(-density)
    body = _ellipse(x, y - 0.8, vary(1.1, 0.05), vary(1.95, 0.05))
    grey = 0.72 * body - 0.42 * air + 0.08 * heart + 0.03 * ribs * body
    grey += 0.1 * np.exp(-((x / 0.12) ** 2))
    exposed = np.clip(grey * vary(1, 0.1) + vary(0, 0.06), 0, 1) ** np.exp(vary(0, 0.15))
    exposed += rng.standard_normal(exposed.shape, np.float32) * np.abs(vary(0.025, 0.01))
    drawn: NDArray[np.uint8] = (np.clip(exposed, 0, 1) * 255).astype(np.uint8)
    return drawn


def _sigmoid(values: Images) -> Images:
    soft: Images = 0.5 + 0.5 * np.tanh(0.5 * values)
    return soft


def _ellipse(x: Images, y: Images, width: Images, height: Images) -> Images:
    """1 inside the ellipse and 0 outside, with a soft edge."""
    return _sigmoid(12 * (1 - (x / width) ** 2 - (y / height) ** 2))


def _patches(rng: np.random.Generator, x: Images, y: Images, count: int, radius: float) -> Images:
    """``count`` blurred spots an image, at random places in either lung."""
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for _ in range(count):
        side, across, down, scale = rng.uniform(-1, 1, (4, len(x), 1, 1)).astype(np.float32)
        spread = radius * (1 + 0.4 * scale)
        dx, dy = x - np.sign(side) * 0.44 - 0.18 * across, y + 0.05 - 0.5 * down
        total += np.exp(-(dx**2 + dy**2) / (2 * spread**2))
    return total
