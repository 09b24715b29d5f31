"""Public datasets: a copy in a folder that the user names, or a download with a checked checksum.

MedMNIST v2: J. Yang et al., "MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D
biomedical image classification", Scientific Data 10:41, 2023, https://medmnist.com, CC BY 4.0.
Heart Disease: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano, UCI Machine Learning
Repository, 1989, https://doi.org/10.24432/C52P4X, CC BY 4.0.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed_flower.data.bounded import array_bytes, require_within
from fedmed_flower.data.download import (
    AS_IT_IS,
    Copy,
    ImageSplits,
    PublicFile,
    content_of,
    local_copy,
    obtain,
    require,
)
from fedmed_flower.data.site import GENERATED, SPLITS
from fedmed_flower.errors import InputError

DATASETS = ("pneumoniamnist", "breastmnist", "phantoms")
HEART_FEATURES = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal"),
)


@dataclass(frozen=True)
class HeartTable:
    """One hospital of the UCI Heart Disease data, one row a patient; the arrays are read-only.

    ``features`` is (n, 13) float64 in the order of `HEART_FEATURES`, NaN if the file has "?".
    ``target`` is (n,) int64: 1 if the patient has a heart disease (num > 0), else 0.
    """

    hospital: str
    features: NDArray[np.float64]
    target: NDArray[np.int64]
    source: str


_ZENODO = "https://zenodo.org/records/10519652/files"
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease"
MEDMNIST = {
    name: PublicFile(
        f"{title} (MedMNIST v2)",
        Path(f"medmnist/{name}.npz"),
        f"{_ZENODO}/{name}.npz?download=1",
        md5,
    )
    for name, title, md5 in (
        ("pneumoniamnist", "PneumoniaMNIST", "28209eda62fecd6e6a2d98b1501bb15f"),
        ("breastmnist", "BreastMNIST", "750601b1f35ba3300ea97c75c52ff8f6"),
    )
}
HEART = {
    name: PublicFile(
        f"UCI Heart Disease, {name}",
        Path(f"heart-disease/processed.{name}.data"),
        f"{_UCI}/processed.{name}.data",
        md5,
    )
    for name, md5 in (
        ("cleveland", "2d91a8ff69cfd9616aa47b59d6f843db"),
        ("hungarian", "22e96bee155b5973568101c93b3705f6"),
        ("switzerland", "9a87f7577310b3917730d06ba9349e20"),
        ("va", "4249d03ca7711e84f4444768c9426170"),
    )
}


def load_dataset(
    name: str,
    path: str | Path | None = None,
    timeout: float = 10,
    sizes: tuple[int, int, int] = (2000, 250, 600),
    seed: int = 0,
) -> ImageSplits:
    """Load one of `DATASETS`, or a hospital's own file.

    Parameters
    ----------
    name, path, timeout
        As in `load_medmnist`; "phantoms" need no time-out, and a path must not be given.
    sizes, seed
        The numbers of "phantoms" in train, val and test, and their seed, as in `chest_xrays`.

    Raises
    ------
    InputError
        As in `load_medmnist` and `chest_xrays`; if a path is given with "phantoms".
    """
    if path is None:
        _check_name(name, DATASETS)
    if name != "phantoms":
        return load_medmnist(name, path, timeout)
    require(path is None, f'path must be left out with dataset="phantoms", got {path}')
    from fedmed_flower.data.phantoms import chest_xrays

    return chest_xrays(*sizes, seed=seed)


def load_medmnist(name: str, path: str | Path | None = None, timeout: float = 10) -> ImageSplits:
    """Load a MedMNIST dataset, or a file in its layout.

    A local copy is used first, without a check of its checksum: ``medmnist/<name>.npz`` or
    ``<name>.npz`` in the folder that the environment variable ``FEDMED_DATA`` names. Otherwise the
    file is downloaded once into the folder ``FEDMED_CACHE`` (default: the user's cache folder).

    Parameters
    ----------
    name : str
        "pneumoniamnist" or "breastmnist"; with `path`, any name, which `ImageSplits.source` shows.
    path : str or Path, optional
        An npz file with the arrays ``{train,val,test}_{images,labels}``.
    timeout : float
        Seconds to wait for the first data and then for more, greater than 0.

    Raises
    ------
    InputError
        If name, file, folder or checksum is wrong, or the arrays would take more than
        `bounded.MOST` bytes.
    SourceUnavailable
        If the publisher cannot be reached.
    """
    if path is not None:
        file = Path(path).expanduser()
        return _read_medmnist(local_copy(file, f"{name} ({file.name})", AS_IT_IS))
    _check_name(name, MEDMNIST)
    return _read_medmnist(obtain(MEDMNIST[name], timeout, ', or choose dataset="phantoms"'))


def load_heart_disease(timeout: float = 10) -> dict[str, HeartTable]:
    """Load the UCI Heart Disease data by hospital: cleveland, hungarian, switzerland and va.

    They have 303, 294, 123 and 200 patients. Local copies are looked for in ``FEDMED_DATA`` and its
    folder ``heart-disease``; parameters and errors are those of `load_medmnist`.
    """
    return {name: _read_heart(obtain(file, timeout), name) for name, file in HEART.items()}


def _check_name(name: str, known: Collection[str]) -> None:
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    require(name in known, f'dataset must be one of {", ".join(known)}, got "{name}"{hint}')


@lru_cache(maxsize=2)
def _read_medmnist(copy: Copy) -> ImageSplits:
    content, source = content_of(copy)
    wanted = {f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as npz:
            names = set(npz.files)
            size = sum(_array_bytes(npz.zip, name) for name in wanted & names)
            require_within(f"{copy.path} says that it holds", size, "a data set")
            arrays = {name: npz[name] for name in wanted & names}
            generated = "generated" in names
    except InputError:
        raise
    except Exception as error:  # A broken file makes the decoders fail in a dozen ways.
        raise InputError(
            f"{copy.path}: not a complete npz file without pickled objects "
            f"({type(error).__name__}); copy or download it again"
        ) from error
    missing = ", ".join(sorted(wanted - names))
    listed = ", ".join(sorted(names)) or "nothing"
    require(not missing, f"{copy.path}: lacks {missing}; it holds {listed}")
    images = {split: arrays[f"{split}_images"] for split in SPLITS}
    labels = {split: _labels(arrays[f"{split}_labels"], copy.path, split) for split in SPLITS}
    for split, array in images.items():
        name = f"{copy.path}: {split}_images"
        layout = images["train"]
        require(
            array.ndim in (3, 4) and 0 not in array.shape[1:],
            f"{name} must have shape (n, H, W) or (n, H, W, C), got {array.shape}",
        )
        require(array.dtype.kind in "uif", f"{name} must hold numbers, got {array.dtype}")
        require(
            (array.shape[1:], array.dtype) == (layout.shape[1:], layout.dtype),
            f"{name} must be {layout.dtype} {layout.shape[1:]} an image, as train_images, "
            f"got {array.dtype} {array.shape[1:]}",
        )
        require(bool(np.isfinite(array).all()), f"{name} holds NaN or infinite values")
        rows = len(labels[split])
        require(len(array) == rows, f"{name} has {len(array)} rows, {split}_labels has {rows}")
        array.flags.writeable = labels[split].flags.writeable = False
    require(len(images["train"]) > 0, f"{copy.path}: train_images must hold at least 1 image")
    return ImageSplits(images, labels, GENERATED if generated else source, generated)


def _array_bytes(archive: Any, name: str) -> int:
    """Return how many bytes of values the header of an array in a zip file states."""
    with archive.open(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name) as file:
        return array_bytes(file)


def _labels(labels: NDArray[Any], path: Path, split: str) -> NDArray[np.int64]:
    name = f"{path}: {split}_labels"
    require(
        labels.ndim == 1 or labels.shape[1:] == (1,),
        f"{name} must have shape (n,) or (n, 1), got {labels.shape}",
    )
    require(labels.dtype.kind in "ui", f"{name} must be integers, got {labels.dtype}")
    flat = labels.reshape(-1).astype(np.int64)
    lowest = flat.min(initial=0)
    require(lowest >= 0, f"{name} must be 0 or greater, got {lowest}")
    return flat


@lru_cache(maxsize=len(HEART))
def _read_heart(copy: Copy, hospital: str) -> HeartTable:
    content, source = content_of(copy)
    rows = []
    for number, line in enumerate(content.decode("latin-1").splitlines(), start=1):
        try:
            row = [math.nan if cell.strip() == "?" else float(cell) for cell in line.split(",")]
        except ValueError as error:
            raise InputError(f"{copy.path}: line {number}: {error}") from error
        require(
            len(row) == len(HEART_FEATURES) + 1 and row[-1] in range(5),
            f"{copy.path}: line {number} must hold 14 values, the last a whole number from 0 to 4, "
            f"got {len(row)}, the last {row[-1]:g}",
        )
        rows.append(row)
    require(bool(rows), f"{copy.path}: holds no rows")
    table = np.array(rows)
    features = table[:, :-1].copy()
    target = (table[:, -1] > 0).astype(np.int64)
    features.flags.writeable = target.flags.writeable = False
    return HeartTable(hospital, features, target, source)
