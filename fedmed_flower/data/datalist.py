"""Rows from a hospital's folder: dataset.json of the Decathlon, a CSV file, or DICOM files."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom

from fedmed_flower.data.bounded import links_out, real_path
from fedmed_flower.data.site import MARK, NO_FOLDER, SPLITS, SiteData
from fedmed_flower.data.splits import split_patients as split_patients
from fedmed_flower.data.tables import LINK_OUT, Line, read_csv, read_dataset, rows_of
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.headers import HEADER, dicom_files, is_dicom, is_placed, open_dicom

DATASET = "dataset.json"
DATALIST = "datalist.csv"
LABELS = "labels.csv"
_LOOKED_FOR = f"{DATASET}, {DATALIST} (or one other .csv file), or DICOM files"
_COLUMNS = ("image", "label", "patient")
# The images of one directory: slices by series, and each file that is an image alone by itself.
_Images = dict[tuple[str, Path | None], dict[Path, pydicom.Dataset]]

log = logging.getLogger("flwr.fedmed")


@dataclass(frozen=True)
class Listing:
    """What a hospital's folder holds.

    Attributes
    ----------
    rows : tuple of dict
        One dict an image: ``image`` (path, or list of paths that are its channels), ``patient``
        (text) and, if the folder names them, ``label`` (class number, or path of a mask) and
        ``split``. Paths are texts.
    layout : str
        Source of the rows: the name of a table, or ``DICOM``.
    class_names : tuple of str
        Names of the classes 1, 2, ... from dataset.json; class 0, the background, is left out.
    problems : tuple of str
        One line for each file or line of a table that cannot be used, and why. These give no row.
    """

    rows: tuple[dict[str, Any], ...]
    layout: str
    class_names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def read_folder(folder: str | Path, labels: Sequence[str] = ()) -> Listing:
    """List the images of a folder, in the first of three layouts that it has.

    1. ``dataset.json`` of the Medical Segmentation Decathlon. In each entry of "training", "image"
       is a path or a list of paths (channels), "label" a path or a class number; "patient" and
       "split" are optional. An entry without a patient is named after its file.
    2. ``datalist.csv``, or the only .csv file if there are no DICOM files: columns image, label,
       patient and, optionally, split. Several paths separated by ";" are channels.
    3. DICOM files, in the folder and all folders below; the patient is the PatientID. Slices that
       share a SeriesInstanceUID are one image and need a folder of their own. A file that is the
       only one of its series, or has no position in the patient (X-rays), is an image by itself;
       several such files may share a folder. An optional table ``labels.csv`` has the columns label
       and series (SeriesInstanceUID) or patient, and, optionally, split; an image that it does not
       name is a problem.

    Paths are relative to the folder and stay in it. A link that leads out of the folder is a
    problem, and its target is not read; the folder itself may be reached through a link. Of all
    files only tables and the headers of DICOM files are read.

    Parameters
    ----------
    folder : str or Path
    labels : sequence of str
        Columns that hold numbers, such as one for each finding: they stand in place of the column
        label, and ``label`` of a row is a dict of them, None where a cell is empty. Small and
        capital letters are the same. In dataset.json, "label" is then such an object. At least one
        of the columns must be there.

    Raises
    ------
    InputError
        If the folder has none of the layouts, a table as a whole cannot be read, or no row can
        be used.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    try:
        listing = _read(folder, tuple(labels))
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
    labels: Sequence[str] = (),
) -> SiteData:
    """Read a hospital's folder with `read_folder` and divide its rows with `split_patients`.

    Each problem of `read_folder` is a warning in the log. A file ``GENERATED`` in the folder marks
    its images as those of no patient. Parameters and errors are those of these
    two functions; None, which a hospital without a folder has as `data_dir`, is an error too.
    """
    if folder is None:
        raise InputError(NO_FOLDER.format("this hospital"))
    listing = read_folder(folder, labels)
    for problem in listing.problems:
        log.warning("%s", problem)
    path = Path(folder).expanduser()
    parts = split_patients(listing.rows, seed, shares)
    train, val, test = (parts[split] for split in SPLITS)
    return SiteData(
        train,
        val,
        test,
        source=shown(f"folder {path.resolve().name}, {listing.layout}"),
        generated=(path / MARK).exists(),
        class_names=listing.class_names,
        rejected=len(listing.problems),
    )


def _read(folder: Path, labels: tuple[str, ...]) -> Listing:
    problems: list[str] = []
    names: tuple[str, ...] = ()
    if (file := folder / DATASET).is_file():
        layout = DATASET
        lines, names = read_dataset(file, problems)
        rows = rows_of(lines, folder, _COLUMNS, problems, labels)
    elif table := _find_table(folder):
        layout = table.name
        columns = ("image", "patient") if labels else _COLUMNS
        lines = [*_channels(table, problems, columns, labels)]
        rows = rows_of(lines, folder, columns, problems, labels)
    elif any(map(is_dicom, _folders(folder))):
        layout = "DICOM"
        rows = _dicom_rows(folder, problems, labels)
    else:
        raise InputError(f"{folder} holds no data: looked for {_LOOKED_FOR}")
    return Listing(tuple(rows), layout, names, tuple(map(shown, problems)))


def _find_table(folder: Path) -> Path | None:
    if (named := folder / DATALIST).is_file():
        return named
    tables = [path for path in _visible(folder) if path.suffix.lower() == ".csv" and path.is_file()]
    if not tables or any(map(is_dicom, _folders(folder))):
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


def _dicom_rows(folder: Path, problems: list[str], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    images = list(_dicom_images(folder, problems))
    if not (table := folder / LABELS).is_file():
        unlabelled = [(str(folder / line["image"]), line) for _, line in images]
        return rows_of(unlabelled, folder, ("image", "patient"), problems)
    reported: dict[tuple[str, str], Line] = {}
    for where, line in read_csv(table, () if labels else ("label",), problems, labels):
        kind = "series" if "series" in line else "patient"
        key = (kind, line.get(kind, ""))
        if not key[1] or key in reported:
            what = f"{kind} {key[1]} was named before" if key[1] else "it has no series or patient"
            problems.append(f"{where}: {what}")
        else:
            reported[key] = (where, line)
    lines: list[Line] = []
    used = set()
    for series, image in images:
        where = str(folder / image["image"])
        keys = [
            key for key in (("series", series), ("patient", image["patient"])) if key in reported
        ]
        if keys:
            used.add(keys[0])
            line = reported[keys[0]][1]
            told = (name.strip().lower() for name in labels) if labels else ("label",)
            lines.append((where, image | {name: line.get(name) for name in (*told, "split")}))
        else:
            problems.append(f"{where}: {LABELS} does not name it")
    for (kind, name), (where, _) in reported.items():
        if (kind, name) not in used:
            problems.append(f"{where}: there is no image of {kind} {name}")
    columns = ("image", "patient") if labels else _COLUMNS
    return rows_of(lines, folder, columns, problems, labels)


def _dicom_images(folder: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield SeriesInstanceUID, path and patient of each image in a folder and all below."""
    root = real_path(folder)
    listing: list[tuple[str, Path, str]] = []
    directories_of: dict[str, list[Path]] = defaultdict(list)
    for directory in _folders(folder):
        images, complete = _dicom_headers(directory, root, problems)
        most = max(map(len, images.values()), default=0)
        if most > 1 and len(images) > 1:
            names = ", ".join(sorted({series for series, _ in images}))
            problems.append(
                f"{directory} holds {len(images)} series, one of them of {most} slices ({names}): "
                "give each a folder of its own"
            )
            continue
        if not complete and any(alone is None for _, alone in images):
            problems.append(f"{directory}: a slice may be missing, as a file cannot be used")
            images = {key: slices for key, slices in images.items() if key[1] is not None}
        for (series, alone), slices in images.items():
            patients = sorted({str(part.get("PatientID", "")).strip() for part in slices.values()})
            if len(patients) > 1:
                names = ", ".join(patients)
                problems.append(f"{directory}: its series has several patients: {names}")
                continue
            if series and alone is None:
                directories_of[series].append(directory)
            path = directory if most > 1 else next(iter(slices))
            listing.append((series, path, patients[0]))
    for series, path, patient in listing:
        if len(directories_of[series]) > 1:
            listed = ", ".join(map(str, directories_of[series]))
            problems.append(f"{path}: slices of its series are in several folders: {listed}")
        else:
            image = path.relative_to(folder).as_posix()
            yield series, {"image": image, "patient": patient}


def _dicom_headers(directory: Path, root: Path, problems: list[str]) -> tuple[_Images, bool]:
    """Return the headers of a directory's images, and whether all of its files could be used."""
    images: _Images = defaultdict(dict)
    links = links_out(directory, root)
    problems += [f"{link} {LINK_OUT}" for link in links]
    complete = all(link.is_dir() for link in links)
    for file in dicom_files(directory):
        if file in links:
            continue
        try:
            header = open_dicom(file, stop_before_pixels=True, specific_tags=list(HEADER))
        except InputError as error:
            problems.append(str(error))
            complete = False
            continue
        series = str(header.get("SeriesInstanceUID", ""))
        # An image without a position in the patient is not a slice.
        alone = None if is_placed(header) else file
        images[series, alone][file] = header
    return images, complete


def _folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and all folders below, but no hidden ones; each once, even if linked twice."""
    root = real_path(folder)
    seen: set[Path] = set()
    waiting = [(folder, root)]
    while waiting:
        path, real = waiting.pop()
        if real in seen or not real.is_relative_to(root):
            continue
        seen.add(real)
        yield path
        waiting += [
            (child, real_path(child) if child.is_symlink() else real / child.name)
            for child in reversed(_visible(path))
            if child.is_dir()
        ]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
