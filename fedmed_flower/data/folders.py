"""What is wrong with a hospital's folder of images, before there is an app that reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed_flower.data.bags import check_bag
from fedmed_flower.data.checks import Finding, check_row, shared_images, without_constant
from fedmed_flower.data.datalist import Listing, read_folder
from fedmed_flower.data.findings import check_findings, is_unread
from fedmed_flower.data.pacs import RULES
from fedmed_flower.data.site import Row
from fedmed_flower.data.splits import split_patients
from fedmed_flower.errors import InputError
from fedmed_flower.images.names import plain_name
from fedmed_flower.images.regions import Regions, listed, require_regions


def check_folder(
    folder: str | Path,
    spatial_dims: int | None = None,
    num_classes: int | None = None,
    label_values: Sequence[int] = (),
    empty_masks: bool = False,
    *,
    series: str = "",
    findings: Sequence[str] = (),
    bags: bool = False,
    names: Sequence[str] = (),
    regions: Regions | None = None,
) -> list[Finding]:
    """Check each row of a folder that `read_folder` understands.

    Parameters
    ----------
    folder : str or Path
    spatial_dims : int or None
        None takes the dimensions of each file.
    num_classes : int or None
        None takes the classes that ``label_values``, ``names`` or dataset.json names; if none of
        them names any, all whole numbers from 0 on are accepted.
    label_values, empty_masks
        As `check_row` takes them.
    series : str
        Rules that choose DICOM series, as `read_folder` takes them.
    findings : sequence of str
        Columns of findings, as `read_folder` takes ``labels``.
    bags : bool
        Whether images are bags of patches, as `check_bag` takes them.
    names : sequence of str
        Names of the classes 1, 2, ... of masks. Empty takes those of dataset.json.
    regions : dict, optional
        Regions that may overlap, as `check_row` takes them. Left out, those of dataset.json count.

    Returns
    -------
    list of Finding
        One a row, then one without an image for each note of `read_folder` and each problem of the
        folder as a whole: files that `read_folder` could not use, a patient in two splits, an image
        that two patients have, and images that differ in dimensions or channels.

    Raises
    ------
    InputError
        As `read_folder` and `require_regions`. Also if names or regions are not those of
        dataset.json, or if rules are given for a folder that a table lists.
    """
    listing = read_folder(folder, series, findings)
    if series and listing.layout != "DICOM":
        raise InputError(
            f"series chooses among DICOM files, and {folder} is read by its {listing.layout}, "
            "which lists what is taken"
        )
    regions = _regions_of(listing, regions)
    names = _names_of(listing, names)
    if num_classes is None and names and not label_values:
        num_classes = 1 + len(names)

    def checked(row: Row) -> Finding:
        if findings:
            return check_findings(row, spatial_dims, findings)
        if bags:
            return check_bag(row, spatial_dims, num_classes)
        options: dict[str, Any] = {"names": names, "regions": regions}
        return check_row(row, spatial_dims, num_classes, label_values, empty_masks, **options)

    found = [without_constant(checked(row)) for row in listing.rows]
    notes = [*listing.notes, *_counts_of(listing.rows, findings)]
    if series and (Path(folder).expanduser() / RULES).is_file():
        notes.append(f"{RULES} of the folder is used, and the rules that were given are not")
    problems = _problems_of(listing, found)
    found += [Finding("", "", note=note) for note in notes]
    return found + [Finding("", "", problem=problem) for problem in problems]


def _regions_of(listing: Listing, regions: Regions | None) -> Regions:
    """Return the regions that are read; raise `InputError` if the folder names others."""
    if not regions:
        return listing.regions
    require_regions(regions)

    def meaning(some: Regions) -> dict[str, set[int]]:
        return {plain_name(name): {*values} for name, values in some.items()}

    if listing.class_names or (listing.regions and meaning(regions) != meaning(listing.regions)):
        own = listed(listing.regions)
        if listing.class_names:
            own = f"classes {', '.join(listing.class_names)}"
        raise InputError(f"dataset.json names the {own}, and not the {listed(regions)}")
    return regions


def _names_of(listing: Listing, names: Sequence[str]) -> Sequence[str]:
    """Return the names of classes; raise `InputError` if the folder names others."""
    own = listing.class_names
    if names and own and [*map(plain_name, names)] != [*map(plain_name, own)]:
        raise InputError(
            f"dataset.json names the classes {', '.join(own)}, and not {', '.join(names)}"
        )
    if names and listing.regions:
        raise InputError(
            f"dataset.json names the {listed(listing.regions)}, and not the classes "
            f"{', '.join(names)}"
        )
    return names or own


def _counts_of(rows: Sequence[Mapping[str, Any]], findings: Sequence[str]) -> list[str]:
    """Return how often each finding is there, is not, and was not read."""
    texts = []
    for name in findings:
        values = [row["label"].get(name) for row in rows]
        unread = sum(map(is_unread, values))
        there = sum(value == 1 for value in values)
        absent = sum(value == 0 for value in values)
        texts.append(f"{name}: there in {there} images, not in {absent}, not read in {unread}")
    return texts


def _problems_of(listing: Listing, found: Sequence[Finding]) -> list[str]:
    """Return what is wrong with a folder as a whole."""
    problems = list(listing.problems)
    try:
        split_patients(listing.rows, 0, (1.0, 0.0, 0.0))
    except InputError as error:
        problems.append(str(error))
    problems += map(str, shared_images((finding.split, finding) for finding in found))
    shapes = [finding.shape for finding in found if finding.shape]
    kinds = Counter((shape[0], len(shape) - 1) for shape in shapes)
    if len(kinds) > 1:
        counted = (
            f"{count} with {channels} channel{'s' * (channels > 1)} in {dims}D"
            for (channels, dims), count in kinds.most_common()
        )
        problems.append(f"one network cannot take all images: there are {', '.join(counted)}")
    return problems
