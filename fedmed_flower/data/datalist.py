"""Rows from a hospital's folder: dataset.json of the Decathlon, a CSV file, or DICOM files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed_flower.data.pacs import dicom_rows
from fedmed_flower.data.site import MARK, NO_FOLDER, SPLITS, SiteData
from fedmed_flower.data.splits import split_patients as split_patients
from fedmed_flower.data.tables import Line, read_csv, read_dataset, rows_of
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.headers import is_dicom
from fedmed_flower.images.listing import folders, visible

DATASET = "dataset.json"
DATALIST = "datalist.csv"
_LOOKED_FOR = f"{DATASET}, {DATALIST} (or one other .csv file), or DICOM files"
_COLUMNS = ("image", "label", "patient")

log = logging.getLogger("flwr.fedmed")


@dataclass(frozen=True)
class Listing:
    """What a hospital's folder holds.

    Attributes
    ----------
    rows : tuple of dict
        One dict an image: ``image`` (path, `Series`, or list of them that are its channels),
        ``patient`` (text) and, if the folder names them, ``label`` (class number, or path of a
        mask, or list of the paths of its parts) and ``split``. Paths are texts.
    layout : str
        Source of the rows: the name of a table, or ``DICOM``.
    class_names : tuple of str
        Names of the classes 1, 2, ... from dataset.json; class 0, the background, is left out.
    problems : tuple of str
        One line for each file or line of a table that cannot be used, and why. These give no row.
    notes : tuple of str
        What else is worth knowing: what was left out on purpose, and what can be chosen.
    regions : dict of str to tuple of int
        Regions that may overlap from nnU-Net's dataset.json, with the values of masks that belong
        to each.
    """

    rows: tuple[dict[str, Any], ...]
    layout: str
    class_names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_folder(folder: str | Path, series: str = "", labels: Sequence[str] = ()) -> Listing:
    """List the images of a folder, in the first of three layouts that it has.

    1. ``dataset.json`` of the Medical Segmentation Decathlon. In each entry of "training", "image"
       is a path or a list of paths (channels), "label" a path or a class number; "patient" and
       "split" are optional, and so are "frames", as `frames_of` reads it, and "mask_regions", the
       region of each volume of a mask. An entry without a patient is named after its file. That
       of nnU-Net is read too: a case is a patient.
    2. ``datalist.csv``, or the only .csv file if there are no DICOM files: columns image, label,
       patient and, optionally, split, frames and mask_regions. Several paths separated by ";" are
       channels.
    3. DICOM files, in the folder and all folders below, in whatever folders a PACS has put them;
       the patient is the PatientID. Slices that share a SeriesInstanceUID are a series, and each
       of its stacks an image; a file without a position in the patient (X-rays) is an image by
       itself. `read_headers` says what is left out. Rules in ``series`` or in a table
       ``series.csv`` choose which series are images or channels. An optional table ``labels.csv``
       has the columns label and series (SeriesInstanceUID), study (StudyInstanceUID) or patient,
       and, optionally, split; an image that it does not name is a problem. Without it, a SEG or
       an RTSTRUCT is the label of the series on which it was drawn.

    Paths are relative to the folder and stay in it. A link that leads out of the folder is a
    problem, and its target is not read; the folder itself may be reached through a link. Of all
    files only tables and the headers of DICOM files are read.

    Parameters
    ----------
    folder : str or Path
    series : str
        Rules for DICOM files as the run config has them, see `rules_of`; empty takes every image.
    labels : sequence of str
        Columns that hold numbers, such as one for each finding: they stand in place of the column
        label, and ``label`` of a row is a dict of them, None where a cell is empty. Small and
        capital letters are the same. In dataset.json, "label" is then such an object. At least one
        of the columns must be there.

    Raises
    ------
    InputError
        If the folder has none of the layouts, a table or a rule cannot be read, or no row can be
        used.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    try:
        listing = _read(folder, series, tuple(labels))
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    if not listing.rows:
        count = len(listing.problems)
        why = f": {listing.problems[0]} (the first of {count} problems)" if count else ""
        raise InputError(f"{folder} ({listing.layout}) holds no row that can be used{why}")
    return listing


def load_folder(
    folder: str | Path | None,
    seed: int,
    shares: Sequence[float] = (0.7, 0.1, 0.2),
    series: str = "",
    labels: Sequence[str] = (),
) -> SiteData:
    """Read a hospital's folder with `read_folder` and divide its rows with `split_patients`.

    Each problem of `read_folder` is a warning in the log, each note a line of it. A file
    ``GENERATED`` in the folder marks its images as those of no patient. Parameters and errors are
    those of these two functions; None, which a hospital without a folder has as `data_dir`, is an
    error too.
    """
    if folder is None:
        raise InputError(NO_FOLDER.format("this hospital"))
    listing = read_folder(folder, series, labels)
    path = Path(folder).expanduser()
    for note in listing.notes:
        log.info("%s: %s", path.resolve().name, note)
    for problem in listing.problems:
        log.warning("%s", problem)
    parts = split_patients(listing.rows, seed, shares)
    train, val, test = (parts[split] for split in SPLITS)
    return SiteData(
        train,
        val,
        test,
        source=shown(f"folder {path.resolve().name}, {listing.layout}"),
        generated=(path / MARK).exists(),
        class_names=listing.class_names,
        regions=listing.regions,
        rejected=len(listing.problems),
        notes=listing.notes,
    )


def _read(folder: Path, series: str, labels: tuple[str, ...]) -> Listing:
    problems: list[str] = []
    notes: list[str] = []
    names: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = {}
    if (file := folder / DATASET).is_file():
        layout = DATASET
        lines, names, regions = read_dataset(file, problems)
        rows = rows_of(lines, folder, _COLUMNS, problems, labels)
    elif table := _find_table(folder):
        layout = table.name
        columns = ("image", "patient") if labels else _COLUMNS
        lines = [*_channels(table, problems, columns, labels)]
        rows = rows_of(lines, folder, columns, problems, labels)
    elif any(map(is_dicom, folders(folder))):
        layout = "DICOM"
        rows = dicom_rows(folder, series, problems, notes, labels)
    else:
        raise InputError(f"{folder} holds no data: looked for {_LOOKED_FOR}")
    texts = tuple(map(shown, problems))
    return Listing(tuple(rows), layout, names, texts, tuple(map(shown, notes)), regions)


def _find_table(folder: Path) -> Path | None:
    if (named := folder / DATALIST).is_file():
        return named
    tables = [path for path in visible(folder) if path.suffix.lower() == ".csv" and path.is_file()]
    if not tables or any(map(is_dicom, folders(folder))):
        return None
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise InputError(f"{folder} holds several tables ({names}): call one {DATALIST}")
    return tables[0]


def _channels(
    table: Path, problems: list[str], columns: Sequence[str], labels: Sequence[str]
) -> Iterator[Line]:
    """Yield the lines of a table; an image of several channels is a list of paths."""
    for where, line in read_csv(table, columns, problems, labels):
        paths = [path for part in line.get("image", "").split(";") if (path := part.strip())]
        yield where, {**line, "image": paths if len(paths) > 1 else "".join(paths)}
