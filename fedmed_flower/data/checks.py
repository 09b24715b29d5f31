"""What is wrong with a hospital's files: each image and mask is read once, completely."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.site import Row, patient_text
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.geometry import orientation_of, spacing_of
from fedmed_flower.images.headers import one_line
from fedmed_flower.images.reading import classes_in, files_of, read_image, read_label
from fedmed_flower.images.regions import Regions, read_regions, regions_named, require_no_regions
from fedmed_flower.images.series import Series
from fedmed_flower.images.volumes import frames_of


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
    note : str
        What is worth knowing of the folder as a whole, without being a problem.
    digest : str
        The same for images of the same shape and values; empty if the image cannot be read.
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
    note: str = ""
    digest: str = field(default="", compare=False)


@dataclass(frozen=True)
class Shared:
    """An image that several patients have.

    Attributes
    ----------
    findings : tuple of Finding
        The first one of each of these patients.
    splits : tuple of str
        The splits of all rows with this image.
    """

    findings: tuple[Finding, ...]
    splits: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The `Finding.digest` of the image."""
        return self.findings[0].digest

    def __str__(self) -> str:
        """Name two of the patients."""
        first, second = self.findings[:2]
        more = f", and {len(self.findings) - 2} more" if len(self.findings) > 2 else ""
        return (
            f"patients {first.patient} and {second.patient}{more} have the same image, value for "
            f"value: {first.image} and {second.image}"
        )


def check_row(
    row: Row,
    spatial_dims: int | None,
    num_classes: int | None = None,
    label_values: Sequence[int] = (),
    empty_masks: bool = False,
    masks: bool = True,
    names: Sequence[str] = (),
    channels: int = 1,
    regions: Regions | None = None,
) -> Finding:
    """Read the image and the mask of a row and describe them; a problem is part of the finding.

    No error is raised, whatever the row holds or is.

    Parameters
    ----------
    row : dict
        ``image``, ``patient`` and ``label``: a class number, or a mask (path or array);
        optionally ``split``, ``frames`` and ``mask_regions``.
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
    names : sequence of str
        Names of the classes 1, 2, ... of masks, by which those in DICOM files are read.
    channels : int
        The channels of a 4D file whose row does not say what its volumes are, see `frames_of`.
    regions : dict, optional
        As in `read_regions`, if masks are of regions that may overlap.
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
        image = read_image(row["image"], spatial_dims, frames_of(row, channels))
        values = image.as_tensor()
        low, high = torch.aminmax(values)
        finding = replace(
            finding,
            shape=tuple(image.shape),
            spacing=spacing_of(image),
            orientation=orientation_of(image),
            low=float(low),
            high=float(high),
            digest=_digest(values),
        )
        is_text = any(files_of(row["label"]))
        if _is_mask(row["label"]) and (masks or not is_text):
            dims = image.ndim - 1
            options = (num_classes, label_values, image, names, regions)
            label: Any = _classes(row, dims, *options)
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


def without_constant(finding: Finding) -> Finding:
    """Return a finding in which an image of one value is a problem, if it has no other."""
    if finding.problem is None and finding.low is not None and finding.low == finding.high:
        text = f"{finding.image} has the value {finding.low:g} everywhere: it shows nothing"
        return replace(finding, problem=shown(text))
    return finding


def shared_images(findings: Iterable[tuple[str, Finding]]) -> Iterator[Shared]:
    """Yield the images that several patients have.

    An image of one value is left out: it is a picture of nothing.

    Parameters
    ----------
    findings : iterable of (str, Finding)
        Each with the split of its row.
    """
    groups: dict[str, list[tuple[str, Finding]]] = defaultdict(list)
    for split, finding in findings:
        if finding.digest and finding.low != finding.high:
            groups[finding.digest].append((split, finding))
    for group in groups.values():
        first_of: dict[str, Finding] = {}
        for _, finding in group:
            first_of.setdefault(patient_text(finding.patient), finding)
        if len(first_of) > 1:
            yield Shared(tuple(first_of.values()), tuple({split: None for split, _ in group}))


def _digest(values: torch.Tensor) -> str:
    # Processors have an instruction for it: half of the time of others.
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def _classes(
    row: Row,
    dims: int,
    num_classes: int | None,
    values: Sequence[int],
    image: Any,
    names: Sequence[str],
    regions: Regions | None,
) -> tuple[int, ...]:
    """Return the classes that a mask holds; of regions 0, and the numbers from 1 on."""
    source = row["label"]
    name = _name(source)
    try:
        if regions:
            order = regions_named(row)
            channels = read_regions(source, dims, regions, image, order).as_tensor()
            return (0, *(n for n, channel in enumerate(channels, start=1) if channel.any()))
        require_no_regions(row)
        mask = read_label(source, dims, num_classes, values, image, names)
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
    parts = source if isinstance(source, list | tuple) else [source]
    named = [
        part if isinstance(part, Series) else "; ".join(map(str, files_of(part))) for part in parts
    ]
    return "; ".join(filter(None, map(str, named))) or "array"


def _prefixed(name: str, text: str) -> str:
    return text if name in text else f"{name}: {text}"
