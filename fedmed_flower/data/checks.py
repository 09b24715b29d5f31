"""What is wrong with a hospital's files: each image and mask is read once, completely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.datalist import read_folder
from fedmed_flower.data.dicom import one_line
from fedmed_flower.data.images import files_of, orientation_of, read_image, read_label, spacing_of
from fedmed_flower.data.site import Row
from fedmed_flower.data.splits import split_patients
from fedmed_flower.errors import InputError, shown


@dataclass(frozen=True)
class Finding:
    """What was found in one row, or, where ``image`` is empty, in a folder as a whole.

    Attributes
    ----------
    patient, image : str
        ``image`` is a path, several paths joined by "; ", or "array".
    shape : tuple of int
        (channels, *spatial); empty if the image cannot be read, as the next four.
    spacing : tuple of float
        Millimetres between voxels, one number an axis.
    orientation : str
        Such as RAS; empty for a 2D image.
    low, high : float or None
        Least and greatest value of the image.
    label : int, tuple of int or None
        The class, or the classes that the mask holds.
    problem : str or None
        Why the row cannot be used.
    split : str
        As the row names it; else empty.
    """

    patient: str
    image: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    low: float | None = None
    high: float | None = None
    label: int | tuple[int, ...] | None = None
    problem: str | None = None
    split: str = ""


def check_row(
    row: Row,
    spatial_dims: int | None,
    num_classes: int | None = None,
    label_values: Sequence[int] = (),
    empty_masks: bool = False,
) -> Finding:
    """Read what a row names and return what is there; a bad file is a finding, not an error.

    Whatever the row holds, or is, no error is raised.

    Parameters
    ----------
    row : dict
        ``image``, ``patient`` and ``label``: a class number, or a mask (path or array).
    spatial_dims : int or None
        As `read_image` takes it.
    num_classes : int or None
        For masks with the background. None lets all whole numbers from 0 on pass.
    label_values : sequence of int
        What stands in masks for class 0, 1, ...; empty if it is the class number.
    empty_masks : bool
        Let masks pass that hold the background alone.
    """
    found = Finding("", "array")
    try:
        found = replace(found, image=_name(row.get("image")))
        found = replace(found, patient=str(row.get("patient", "")), split=str(row.get("split", "")))
        for name in ("image", "label", "patient"):
            if name not in row:
                raise InputError(f"the row has no {name}")
        image = read_image(row["image"], spatial_dims)
        values = image.as_tensor()
        found = replace(
            found,
            shape=tuple(image.shape),
            spacing=spacing_of(image),
            orientation=orientation_of(image),
            low=float(values.min()),
            high=float(values.max()),
        )
        if _is_mask(row["label"]):
            dims = image.ndim - 1
            label: Any = _classes(row["label"], dims, num_classes, label_values, image)
            if label == (0,) and not empty_masks:
                raise InputError(
                    f"its mask {_name(row['label'])} is empty: it holds only the background"
                )
        else:
            label = _class_number(row["label"], num_classes)
        return replace(found, label=label)
    except InputError as error:
        return replace(found, problem=str(error))
    except Exception as error:  # Whatever else a file or a row can do.
        text = f"{found.image}: {type(error).__name__}: {one_line(error)}"
        return replace(found, problem=shown(text))


def check_folder(
    folder: str | Path, spatial_dims: int | None = None, num_classes: int | None = None
) -> list[Finding]:
    """Check each row of a folder that `read_folder` understands.

    Parameters
    ----------
    folder : str or Path
    spatial_dims : int or None
        None takes each image as its file is.
    num_classes : int or None
        None takes what dataset.json names; where it names none, all whole numbers pass.

    Returns
    -------
    list of Finding
        One a row; after them one, without an image, for each problem of the folder as a whole: what
        `read_folder` could not use, a patient in two splits, and images of different dimensions or
        channels.

    Raises
    ------
    InputError
        As `read_folder`.
    """
    listing = read_folder(folder)
    if num_classes is None and listing.class_names:
        num_classes = 1 + len(listing.class_names)
    findings = [check_row(row, spatial_dims, num_classes) for row in listing.rows]
    problems = list(listing.problems)
    try:
        split_patients(listing.rows, 0, (1.0, 0.0, 0.0))
    except InputError as error:
        problems.append(str(error))
    kinds = Counter((one.shape[0], len(one.shape) - 1) for one in findings if one.shape)
    if len(kinds) > 1:
        listed = (
            f"{count} with {channels} channel{'s' * (channels > 1)} in {dims}D"
            for (channels, dims), count in kinds.most_common()
        )
        problems.append(f"one network cannot take all images: there are {', '.join(listed)}")
    return findings + [Finding("", "", problem=problem) for problem in problems]


def _classes(
    source: Any, dims: int, num_classes: int | None, values: Sequence[int], image: Any
) -> tuple[int, ...]:
    """Return the classes that a mask holds."""
    name = _name(source)
    try:
        mask = read_label(source, dims, num_classes, values, image)
    except InputError as error:
        raise InputError(f"its mask {_with(shown(name), str(error))}") from None
    return tuple(torch.unique(mask.as_tensor()).tolist())


def _class_number(label: Any, num_classes: int | None) -> int:
    label = label.item() if isinstance(label, np.generic) else label
    whole = isinstance(label, int) and not isinstance(label, bool)
    if num_classes is not None and not (whole and 0 <= label < num_classes):
        raise InputError(
            f"label {quoted(label)} is out of range: labels must be integers from 0 to "
            f"{num_classes - 1} (num_classes - 1)"
        )
    if not (whole and label >= 0):
        raise InputError(
            f"label {quoted(label)} is out of range: labels must be integers from 0 on"
        )
    return int(label)


def _is_mask(label: Any) -> bool:
    return any(files_of(label)) or np.ndim(label) > 0


def _name(source: Any) -> str:
    return "; ".join(map(str, files_of(source))) or "array"


def _with(name: str, text: str) -> str:
    return text if name in text else f"{name}: {text}"
