"""A hospital's folder as rows: dataset.json of the Medical Segmentation Decathlon, CSV or DICOM."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom

from fedmed_flower.data.bounded import links_out, real_path
from fedmed_flower.data.dicom import HEADER, dicom_files, is_dicom, is_placed, open_dicom
from fedmed_flower.data.site import SPLITS, SiteData
from fedmed_flower.data.splits import split_patients as split_patients
from fedmed_flower.data.tables import LINK_OUT, Line, read_csv, read_dataset, rows_of
from fedmed_flower.errors import InputError, shown

DATASET, DATALIST, LABELS = "dataset.json", "datalist.csv", "labels.csv"
_LOOKED_FOR = f"{DATASET}, {DATALIST} (or one other .csv file), or DICOM files"
_COLUMNS = ("image", "label", "patient")

log = logging.getLogger("flwr.fedmed")


@dataclass(frozen=True)
class Listing:
    """What a hospital's folder holds.

    Attributes
    ----------
    rows : tuple of dict
        One an image: ``image`` (path, or list of paths that are its channels), ``patient`` (text)
        and, where the folder tells them, ``label`` (class number, or path of a mask) and ``split``.
        Paths are texts.
    layout : str
        What the rows were read from: the name of a table, or ``DICOM``.
    class_names : tuple of str
        Names of the classes 1, 2, ... from dataset.json; class 0, the background, is left out.
    problems : tuple of str
        What cannot be used, by file or line, and why, in one line each; it is not among the rows.
    """

    rows: tuple[dict[str, Any], ...]
    layout: str
    class_names: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def read_folder(folder: str | Path) -> Listing:
    """Find what a folder holds, in the first of three layouts that is there.

    1. ``dataset.json`` of the Medical Segmentation Decathlon: of the entries in "training", "image"
       is a path or a list of paths (channels), "label" a path or a class number, and "patient" and
       "split" may be given; a patient's name is otherwise that of the file.
    2. ``datalist.csv``, or the only .csv file where there is no DICOM: columns image, label,
       patient and, if wanted, split. Several paths separated by ";" are channels.
    3. DICOM files, in the folder and all below; patients are their PatientID. Slices that share a
       SeriesInstanceUID are one image and have a folder for themselves. Files that are the only one
       of their series, or that have no place in the patient (X-rays), are an image each and may
       share one. A table ``labels.csv``, if there, has the columns label and series
       (SeriesInstanceUID) or patient, and, if wanted, split; what it does not name is a problem.

    Paths are relative to the folder and do not leave it, nor do links lead out of it: what one that
    does leads to is a problem, and is not read. The folder itself may be reached through a link.
    Files are looked for but not read, save the headers of DICOM.

    Raises
    ------
    InputError
        If the folder has none of the layouts, a table as a whole cannot be read, or no row can
        be used.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    try:
        listing = _read(folder)
    except OSError as error:  # A disk or a permission.
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    if not listing.rows:
        count = len(listing.problems)
        why = f": {listing.problems[0]} (the first of {count} problems)" if count else ""
        raise InputError(f"{folder} ({listing.layout}) holds no row that can be used{why}")
    return listing


def load_folder(
    folder: str | Path, seed: int, shares: Sequence[float] = (0.7, 0.1, 0.2)
) -> SiteData:
    """Return what a hospital's folder holds, split as `split_patients` does.

    Each problem of `read_folder` is a warning in the log. Parameters and errors are those of the
    two.
    """
    listing = read_folder(folder)
    for problem in listing.problems:
        log.warning("%s", problem)
    name = Path(folder).expanduser().resolve().name
    parts = split_patients(listing.rows, seed, shares)
    train, val, test = (parts[split] for split in SPLITS)
    return SiteData(
        train,
        val,
        test,
        source=shown(f"folder {name}, {listing.layout}"),
        class_names=listing.class_names,
        turned_away=len(listing.problems),
    )


def _read(folder: Path) -> Listing:
    problems: list[str] = []
    names: tuple[str, ...] = ()
    if (file := folder / DATASET).is_file():
        lines, names = read_dataset(file, problems)
        rows, layout = rows_of(lines, folder, _COLUMNS, problems), DATASET
    elif table := _find_table(folder):
        rows, layout = rows_of(_channels(table, problems), folder, _COLUMNS, problems), table.name
    elif any(map(is_dicom, _folders(folder))):
        rows, layout = _of_dicom(folder, problems), "DICOM"
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


def _channels(table: Path, problems: list[str]) -> Iterator[Line]:
    """Return the lines of a table with images of several channels as lists."""
    for where, line in read_csv(table, _COLUMNS, problems):
        paths = [path for part in line.get("image", "").split(";") if (path := part.strip())]
        yield where, {**line, "image": paths if len(paths) > 1 else "".join(paths)}


def _of_dicom(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    images = list(_dicom_images(folder, problems))
    if not (table := folder / LABELS).is_file():
        unlabelled = [(str(folder / line["image"]), line) for _, line in images]
        return rows_of(unlabelled, folder, ("image", "patient"), problems)
    reported: dict[tuple[str, str], Line] = {}
    for where, line in read_csv(table, ("label",), problems):
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
            labels = {name: reported[keys[0]][1].get(name) for name in ("label", "split")}
            lines.append((where, image | labels))
        else:
            problems.append(f"{where}: {LABELS} does not name it")
    for (kind, name), (where, _) in reported.items():
        if (kind, name) not in used:
            problems.append(f"{where}: there is no image of {kind} {name}")
    return rows_of(lines, folder, _COLUMNS, problems)


def _dicom_images(folder: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return SeriesInstanceUID, path and patient of each image in a folder and all below."""
    indices: dict[str, list[Path]] = defaultdict(list)
    found, root = [], real_path(folder)
    for index in _folders(folder):
        # Slices by series; an image without a place in the patient is no slice.
        images: dict[tuple[str, Path | None], dict[Path, pydicom.Dataset]] = defaultdict(dict)
        links = links_out(index, root)
        problems += [f"{link} {LINK_OUT}" for link in links]
        complete = all(link.is_dir() for link in links)
        for file in dicom_files(index):
            if file in links:
                continue
            try:
                header = open_dicom(file, stop_before_pixels=True, specific_tags=list(HEADER))
            except InputError as error:
                problems.append(str(error))
                complete = False
                continue
            series = str(header.get("SeriesInstanceUID", ""))
            images[series, None if is_placed(header) else file][file] = header
        most = max(map(len, images.values()), default=0)
        if most > 1 and len(images) > 1:
            names = ", ".join(sorted({series for series, _ in images}))
            problems.append(
                f"{index} holds {len(images)} series, one of them of {most} slices ({names}): "
                "give each a folder of its own"
            )
            continue
        if not complete and any(alone is None for _, alone in images):
            problems.append(f"{index}: a slice is missing where a file cannot be used")
            images = {key: slices for key, slices in images.items() if key[1] is not None}
        for (series, alone), slices in images.items():
            patients = sorted({str(part.get("PatientID", "")).strip() for part in slices.values()})
            if len(patients) > 1:
                problems.append(f"{index}: its series has several patients: {', '.join(patients)}")
                continue
            if series and alone is None:
                indices[series].append(index)
            found.append((series, index if most > 1 else next(iter(slices)), patients[0]))
    for series, path, patient in found:
        if len(indices[series]) > 1:
            listed = ", ".join(map(str, indices[series]))
            problems.append(f"{path}: slices of its series are in several folders: {listed}")
        else:
            image = path.relative_to(folder).as_posix()
            yield series, {"image": image, "patient": patient}


def _folders(folder: Path) -> Iterator[Path]:
    """Return a folder and all in it that are not hidden, each once, though links may lead there."""
    root = real_path(folder)
    seen, waiting = set[Path](), [(folder, root)]
    while waiting:
        index, there = waiting.pop()
        if there in seen or not there.is_relative_to(root):
            continue
        seen.add(there)
        yield index
        waiting += [
            (child, real_path(child) if child.is_symlink() else there / child.name)
            for child in reversed(_visible(index))
            if child.is_dir()
        ]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
