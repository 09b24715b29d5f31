"""Generated images for tests and demonstrations offline: X-rays, hippocampi, tumours, slides.

They show no patients, and nothing that is learned from them is a medical finding. The X-rays stand
in for PneumoniaMNIST (https://medmnist.com) and have the share of label 1 of its train split; the
hippocampi stand in for those of the Medical Segmentation Decathlon (http://medicaldecathlon.com).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fedmed_flower.data.download import ImageSplits, Volumes
from fedmed_flower.data.site import GENERATED, SPLITS, Row
from fedmed_flower.errors import InputError

_SHARE_OPACITIES = 0.74
# By grade: the fewest haemorrhages of an eye, and one more than the most.
_SPOTS = ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15))
_BLOCK_PIXELS = 2**20

Images = NDArray[np.float32]


@lru_cache(maxsize=2)
def chest_xrays(
    num_train: int, num_val: int, num_test: int, seed: int = 0, size: int = 28
) -> ImageSplits:
    """Generate grey images with dark lung fields between a bright mediastinum and bright ribs.

    Label 1 stands for opacities in the lungs: one to three blurred patches, from hardly visible
    to dense. Exposure, contrast, position, size and noise differ from image to image. 74 % of
    each split have label 1. The pneumonia example reaches a test AUC of about 0.97 with 2000
    images in ten rounds.

    Parameters
    ----------
    num_train : int
        1 or greater.
    num_val, num_test : int
        0 or greater. The images of a split do not depend on the size of another.
    seed : int
        0 or greater; the same seed gives the same images.
    size : int
        Height and width in pixels, 16 to 1024.

    Returns
    -------
    ImageSplits
        Images (n, size, size) uint8 and labels (n,) int64, read-only; ``generated`` is True. With
        different seeds the patients have different names.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    bounds = {
        "num_train": (num_train, 1, 10**7),
        "num_val": (num_val, 0, 10**7),
        "num_test": (num_test, 0, 10**7),
        "seed": (seed, 0, 2**63),
        "size": (size, 16, 1024),
    }
    require_whole(bounds)
    images = {}
    labels = {}
    for number, (split, rows) in enumerate(
        zip(SPLITS, (num_train, num_val, num_test), strict=True)
    ):
        rng = np.random.default_rng([seed, number])
        truth = rng.permutation(np.arange(rows) < round(_SHARE_OPACITIES * rows))
        drawn = np.empty((rows, size, size), np.uint8)
        step = max(1, _BLOCK_PIXELS // size**2)
        for start in range(0, rows, step):
            drawn[start : start + step] = _draw(truth[start : start + step], size, rng)
        images[split] = drawn
        labels[split] = truth.astype(np.int64)
        drawn.flags.writeable = labels[split].flags.writeable = False
    return ImageSplits(images, labels, GENERATED, True, f"phantom-{seed}-" if seed else "")


def hippocampi(count: int, seed: int = 0, size: int = 24) -> Volumes:
    """Generate volumes with a curved, bright body that has an anterior and a posterior part.

    Class 1 is the anterior, thicker third and class 2 the rest, as in the hippocampus set of the
    Medical Segmentation Decathlon. Position, length, thickness, bend, contrast, sharpness and noise
    differ from volume to volume, and so does the shape, by a voxel or two.

    Parameters
    ----------
    count : int
        1 or greater; the first volumes of a larger count are the same.
    seed : int
        0 or greater; the same seed gives the same volumes.
    size : int
        Approximate number of voxels along each side, 12 to 128.

    Returns
    -------
    Volumes
        Rows with ``image`` (x, y, z) float32, ``label`` (x, y, z) uint8 and ``patient``;
        ``generated`` is True. With different seeds the patients have different names.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    require_whole({"count": (count, 1, 10**6), "seed": (seed, 0, 2**63), "size": (size, 12, 128)})
    prefix = f"phantom-{seed}-" if seed else "phantom-"
    rows = [
        {**_hippocampus(np.random.default_rng([seed, 3, k]), size), "patient": f"{prefix}{k}"}
        for k in range(count)
    ]
    return Volumes(tuple(rows), GENERATED, generated=True)


def brain_tumours(count: int, seed: int = 0, size: int = 24) -> Volumes:
    """Generate head scans of four sequences with a tumour of nested parts, as BraTS has them.

    The label holds 1 in the necrotic core, 4 in the enhancing rim around it, and 2 in the oedema
    around both. So the whole tumour is the union of 1, 2 and 4, the tumour core that of 1 and 4,
    and the enhancing tumour is 4. One tumour in five has no enhancing rim. No sequence shows all
    three regions.

    Parameters
    ----------
    count : int
        1 or greater; the first volumes of a larger count are the same.
    seed : int
        0 or greater; the same seed gives the same volumes.
    size : int
        Number of voxels along each side, 12 to 128.

    Returns
    -------
    Volumes
        Rows with ``image`` (4, x, y, z) float32 (T1, T1 with contrast, T2, FLAIR), ``label``
        (x, y, z) uint8 and ``patient``; ``generated`` is True. With different seeds the patients
        have different names.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    require_whole({"count": (count, 1, 10**6), "seed": (seed, 0, 2**63), "size": (size, 12, 128)})
    rows = [
        {
            **_tumour(np.random.default_rng([seed, 4, k]), size, rim=k % 5 != 4),
            "patient": f"tumour-{seed}-{k}",
        }
        for k in range(count)
    ]
    return Volumes(tuple(rows), GENERATED, generated=True)


def slides(count: int, seed: int = 0, size: int = 16) -> tuple[Row, ...]:
    """Generate bags of patches of stained tissue; a positive bag holds a few patches with a lesion.

    Every patch has pale and dark spots, and a lesion is a larger, darker one. Half of the bags are
    positive (label 1), with lesions in one to three of their 5 to 20 patches.

    Parameters
    ----------
    count : int
        1 or greater; the first bags of a larger count are the same.
    seed : int
        0 or greater; the same seed gives the same bags.
    size : int
        Height and width of a patch in pixels, 12 to 1024.

    Returns
    -------
    tuple of dict
        Rows with ``image`` (patches, 3, size, size) uint8, ``label`` and ``patient``, and
        ``lesions``, the sorted indices of the patches with a lesion. With different seeds the
        patients have different names.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    require_whole({"count": (count, 1, 10**6), "seed": (seed, 0, 2**63), "size": (size, 12, 1024)})
    return tuple(
        {
            **_slide(np.random.default_rng([seed, 5, k]), size, label=k % 2),
            "patient": f"slide-{seed}-{k}",
        }
        for k in range(count)
    )


def eyes(count: int, seed: int = 0, size: int = 32) -> tuple[Row, ...]:
    """Generate grey images of the back of an eye, with findings, a grade and a number.

    A bright disc is where the optic nerve begins, with a brighter cup in its middle. The retina
    around it may have dark spots (haemorrhages) and small bright ones (exudates). Brightness,
    noise, size and places differ from image to image.

    Parameters
    ----------
    count : int
        1 or greater; the first images of a larger count are the same.
    seed : int
        0 or greater; the same seed gives the same images.
    size : int
        Height and width in pixels, 24 to 512.

    Returns
    -------
    tuple of dict
        Rows with ``image`` (size, size) float32 from 0 to about 1, ``patient`` and

        - ``findings``: a dict of 0 or 1: ``haemorrhages``, ``exudates``, ``large cup``;
        - ``grade``: 0 to 4, by the number of haemorrhages: 0, 1 or 2, 3 to 5, 6 to 9, 10 to 14;
        - ``cup``: the diameter of the cup in that of the disc, 0.2 to 0.9; it is large above 0.6.

    Raises
    ------
    InputError
        If an argument is out of its range.
    """
    require_whole({"count": (count, 1, 10**6), "seed": (seed, 0, 2**63), "size": (size, 24, 512)})
    prefix = f"eye-{seed}-" if seed else "eye-"
    return tuple(
        {**_eye(np.random.default_rng([seed, 5, k]), size), "patient": f"{prefix}{k}"}
        for k in range(count)
    )


def require_whole(bounds: Mapping[str, tuple[int, int, int]]) -> None:
    """Raise `InputError` if an argument is no whole number within its bounds."""
    for name, (value, low, high) in bounds.items():
        if not isinstance(value, int | np.integer) or not low <= value <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _tumour(rng: np.random.Generator, size: int, rim: bool) -> Row:
    """Draw one head; the unit of length is half of the volume's side."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    head = (grid**2).sum(axis=0) < 0.9
    centre = rng.uniform(-0.25, 0.25, (3, 1, 1, 1))
    stretch = rng.uniform(0.8, 1.2, (3, 1, 1, 1))
    away = np.sqrt((((grid - centre) / stretch) ** 2).sum(axis=0))
    away = away + 0.06 * gaussian_filter(rng.standard_normal(away.shape), 1.5) * 8
    outer = rng.uniform(0.5, 0.6)
    middle = outer * rng.uniform(0.6, 0.7)
    inner = middle * rng.uniform(0.45, 0.6)
    label = np.zeros(away.shape, np.uint8)
    label[away < outer] = 2
    label[away < middle] = 4 if rim else 1
    label[away < inner] = 1
    label[~head] = 0
    # Brightness of the head, and of each part beside it.
    shades = {
        "t1": {1: -0.4, 2: -0.2, 4: -0.1},
        "t1 with contrast": {1: -0.5, 2: -0.1, 4: 0.9},
        "t2": {1: 0.9, 2: 0.5, 4: 0.3},
        "flair": {1: 0.2, 2: 0.8, 4: 0.7},
    }
    channels = []
    for parts in shades.values():
        values = head.astype(np.float32)
        for number, shade in parts.items():
            values[label == number] += shade
        values = gaussian_filter(values, 0.5) + rng.normal(0, 0.1, values.shape) * head
        channels.append(rng.uniform(0.8, 1.2) * 100 * values)
    return {"image": np.stack(channels).astype(np.float32), "label": label}


def _slide(rng: np.random.Generator, size: int, label: int) -> Row:
    count = int(rng.integers(5, 21))
    lesions = np.sort(rng.permutation(count)[: rng.integers(1, 4)]) if label else np.zeros(0, int)
    y, x = np.mgrid[:size, :size] / size
    stain = np.asarray([0.45, 0.75, 0.35])
    patches = np.empty((count, 3, size, size), np.uint8)
    for number in range(count):
        density = np.full((size, size), 0.1)
        spots = [(0.06, depth) for depth in rng.uniform(0.1, 0.5, 6)]
        spots += [(0.16, 0.9)] if number in lesions else []
        for radius, depth in spots:
            across, down = rng.uniform(0.2, 0.8, 2)
            density += depth * np.exp(-((x - across) ** 2 + (y - down) ** 2) / (2 * radius**2))
        tinted = np.exp(-density[None] * (stain + rng.normal(0, 0.05, 3))[:, None, None])
        tinted += rng.normal(0, 0.02, tinted.shape)
        patches[number] = (np.clip(tinted, 0, 1) * 255).astype(np.uint8)
    return {"image": patches, "label": label, "lesions": lesions.tolist()}


def _hippocampus(rng: np.random.Generator, size: int) -> Row:
    """Draw the image and label of one volume; the unit of length is half of the volume's side."""
    shape = size + rng.integers(-2, 3, 3)
    x, y, z = np.meshgrid(
        *(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij"
    )
    cx, cy, cz = rng.normal(0, 0.08, 3)
    bend = rng.uniform(0.1, 0.35)
    half = rng.uniform(0.6, 0.75)
    along = (y - cy) / half
    thick = rng.uniform(0.22, 0.3) * (1 + 0.35 * np.clip(along, -1, 1))
    away = np.hypot(x - cx - bend * (along**2 - 0.4), (z - cz - 0.5 * bend * along) * 1.2)
    inside = (away / thick) ** 2 + along**4 < 1
    label = np.where(inside, np.where(along > 0.33, 1, 2), 0).astype(np.uint8)
    soft = gaussian_filter(inside.astype(np.float32), rng.uniform(0.6, 1.1))
    texture = gaussian_filter(rng.standard_normal(shape), 2.0) * 1.5
    image = rng.uniform(0.7, 1.3) * (1 + 0.8 * soft + 0.3 * soft * (along > 0.33) + 0.3 * texture)
    image += rng.normal(0, 0.12, shape)
    return {"image": (100 * image).astype(np.float32), "label": label}


def _eye(rng: np.random.Generator, size: int) -> Row:
    """Draw an image and say what is in it; the unit of length is half of its width."""
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    grade = int(rng.integers(5))
    spots = int(rng.integers(*_SPOTS[grade]))
    has_exudates = bool(rng.integers(2))
    cup = float(rng.uniform(0.2, 0.9))

    def spot(radius: float) -> Images:
        # On the retina, left of the disc.
        across, down = rng.uniform((-0.85, -0.8), (0.1, 0.8))
        away = np.hypot(x - across, y - down)
        return np.asarray(np.exp(-((away / radius) ** 2)), np.float32)

    centre = 0.55 + rng.normal(0, 0.03)
    away = np.hypot(x - centre, y - rng.normal(0, 0.05))
    radius = rng.uniform(0.32, 0.38)
    image = 0.4 + 0.2 * _sigmoid(40 * (radius - away)) + 0.6 * _sigmoid(40 * (cup * radius - away))
    for _ in range(spots):
        image -= 0.3 * spot(0.1)
    for _ in range(int(rng.integers(6, 12)) * has_exudates):
        image += 0.35 * spot(0.06)
    image += rng.normal(0, 0.02) + rng.normal(0, 0.02, image.shape)
    findings = {
        "haemorrhages": int(grade > 0),
        "exudates": int(has_exudates),
        "large cup": int(cup > 0.6),
    }
    drawn = np.clip(image, 0, None).astype(np.float32)
    return {"image": drawn, "findings": findings, "grade": grade, "cup": cup}


def _draw(opaque: NDArray[np.bool_], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image for each entry of ``opaque``; the unit of length is half of its width."""
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
    """Return 1 inside the ellipse and 0 outside, with a soft edge."""
    return _sigmoid(12 * (1 - (x / width) ** 2 - (y / height) ** 2))


def _patches(rng: np.random.Generator, x: Images, y: Images, count: int, radius: float) -> Images:
    """Return ``count`` blurred spots an image, at random positions in either lung."""
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for _ in range(count):
        side, across, down, scale = rng.uniform(-1, 1, (4, len(x), 1, 1)).astype(np.float32)
        spread = radius * (1 + 0.4 * scale)
        dx = x - np.sign(side) * 0.44 - 0.18 * across
        dy = y + 0.05 - 0.5 * down
        total += np.exp(-(dx**2 + dy**2) / (2 * spread**2))
    return total
