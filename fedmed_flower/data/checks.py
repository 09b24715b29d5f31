"""What is wrong with a hospital's files: each image and mask is read once, completely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.datalist import read_folder
from fedmed_flower.data.site import Row
from fedmed_flower.data.splits import split_patients
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.geometry import orientation_of, spacing_of
from fedmed_flower.images.headers import one_line
from fedmed_flower.images.reading import classes_in, files_of, read_image, read_label


@dataclass(frozen=True)
class Finding:
    """What was found in one row, or in a folder as a whole if ``image`` is empty.

    Attributes
    ----------
    patient, image : str
        ``image`` is a path, several paths joined by "; ", or "array".
    shape : tuple of int
        (channels, *spatial); empty if the image cannot be read. The next four fields are then
        empty or None as well.
    spacing : tuple of float
        Millimetres between voxels, one number an axis.
    orientation : str
        Directions of the axes, such as RAS; empty for a 2D image.
    low, high : float or None
        Least and greatest value of the image.
    label : int, tuple of int or None
        The class, or the classes that the mask holds.
    problem : str or None
        Why the row cannot be used.
    split : str
        The split that the row names; empty if it names none.
    mislabelled : bool
        Whether the problem is a label that is no class.
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
    mislabelled: bool = False


def check_row(
    row: Row,
    spatial_dims: int | None,
    num_classes: int | None = None,
    label_values: Sequence[int] = (),
    empty_masks: bool = False,
    masks: bool = True,
) -> Finding:
    """Read the image and the mask of a row and describe them; a problem is part of the finding.

    No error is raised, whatever the row holds or is.

    Parameters
    ----------
    row : dict
        ``image``, ``patient`` and ``label``: a class number, or a mask (path or array).
    spatial_dims : int or None
        As in `read_image`.
    num_classes : int or None
        Number of classes, in masks with the background. None accepts all whole numbers from 0 on.
    label_values : sequence of int
        The values of masks for class 0, 1, ...; empty if masks hold the class numbers.
    empty_masks : bool
        Whether a mask may hold the background alone.
    masks : bool
        Whether a label that is a text is the path of a mask; else it is no class.
    """
    finding = Finding("", "array")
    try:
        finding = replace(finding, image=_name(row.get("image")))
        patient = str(row.get("patient", ""))
        split = str(row.get("split", ""))
        finding = replace(finding, patient=patient, split=split)
        for name in ("image", "label", "patient"):
            if name not in row:
                raise InputError(f"the row has no {name}")
        image = read_image(row["image"], spatial_dims)
        values = image.as_tensor()
        finding = replace(
            finding,
            shape=tuple(image.shape),
            spacing=spacing_of(image),
            orientation=orientation_of(image),
            low=float(values.min()),
            high=float(values.max()),
        )
        is_text = isinstance(row["label"], str | Path)
        if _is_mask(row["label"]) and (masks or not is_text):
            dims = image.ndim - 1
            label: Any = _classes(row["label"], dims, num_classes, label_values, image)
            if label == (0,) and not empty_masks:
                raise InputError(
                    f"its mask {_name(row['label'])} is empty: it holds only the background"
                )
        else:
            finding = replace(finding, mislabelled=True)
            label = _class_number(row["label"], num_classes)
        return replace(finding, label=label, mislabelled=False)
    except InputError as error:
        return replace(finding, problem=str(error))
    except Exception as error:  # A file or a row can raise anything.
        text = f"{finding.image}: {type(error).__name__}: {one_line(error)}"
        return replace(finding, problem=shown(text))


def check_folder(
    folder: str | Path, spatial_dims: int | None = None, num_classes: int | None = None
) -> list[Finding]:
    """Check each row of a folder that `read_folder` understands.

    Parameters
    ----------
    folder : str or Path
    spatial_dims : int or None
        None takes the dimensions of each file.
    num_classes : int or None
        None takes the classes that dataset.json names; if it names none, all whole numbers from 0
        on are accepted.

    Returns
    -------
    list of Finding
        One a row, then one without an image for each problem of the folder as a whole: files that
        `read_folder` could not use, a patient in two splits, and images that differ in dimensions
        or channels.

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
    shapes = [finding.shape for finding in findings if finding.shape]
    kinds = Counter((shape[0], len(shape) - 1) for shape in shapes)
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
        raise InputError(f"its mask {_prefixed(shown(name), str(error))}") from None
    return classes_in(mask)


def _class_number(label: Any, num_classes: int | None) -> int:
    label = label.item() if isinstance(label, np.generic) else label
    if isinstance(label, str | Path):
        raise InputError(
            f"label {quoted(str(label))} is a text: labels must be integers from 0 on, so number "
            "the classes"
        )
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


def _prefixed(name: str, text: str) -> str:
    return text if name in text else f"{name}: {text}"
