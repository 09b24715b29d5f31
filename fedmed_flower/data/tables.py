"""Tables that list a hospital's images: dataset.json and CSV files, line by line."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from fedmed_flower.data.bounded import LINK_OUT, leads_out, links_out, quoted, real_path
from fedmed_flower.data.nnunet import (
    has_regions,
    is_nnunet,
    numbered_classes,
    read_cases,
    read_regions_of,
)
from fedmed_flower.data.site import SPLITS
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.names import listed_names
from fedmed_flower.images.series import Series
from fedmed_flower.images.volumes import require_frames

log = logging.getLogger("flwr.fedmed")

# The name of a line in errors, and its cells by column.
Line = tuple[str, Mapping[str, Any]]
_MISSING = {"", "nan", "none", "nat", "<na>"}
# Spreadsheets and data frames write classes as 1.0 if a column has gaps.
_WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")
_DECIMAL = re.compile(r"[+-]?[0-9]{0,18}\.[0-9]{1,18}")


class _UnusableError(Exception):
    """One line of a table cannot be used."""


class Dataset(NamedTuple):
    """What a dataset.json lists.

    Attributes
    ----------
    lines : list of Line
        Its training entries.
    class_names : tuple of str
        Names of the classes 1, 2, ...; empty if it names none, or regions.
    regions : dict of str to tuple of int
        Regions that may overlap, with the values of masks that belong to each; empty if it names
        none.
    """

    lines: list[Line]
    class_names: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]


def read_dataset(file: Path, problems: list[str]) -> Dataset:
    """Return the training entries of a dataset.json, and the names of its classes or regions.

    It is the Medical Segmentation Decathlon's, or nnU-Net's, whose cases are the files of two
    folders beside it. An entry without a patient is named after its first file, or its case. If
    the file says that images are 4D, and names several modalities, so many channels are expected of
    each. An entry that cannot be used is added to ``problems``.

    Raises
    ------
    InputError
        If the file is not JSON, has neither a list "training" nor nnU-Net's "channel_names", or is
        a link out of its folder; as `nnunet.read_cases` and `nnunet.read_regions_of`.
    """
    try:
        content = json.loads(_text(file))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    lines: list[Line]
    if isinstance(content, dict) and is_nnunet(content):
        cases = read_cases(content, file, problems)
        lines = [
            (f"{file.name}, case {case}", {"patient": case, **entry})
            for case, entry in cases.items()
        ]
        _warn_of_nameless(file, len(lines))
        if has_regions(content):
            return Dataset(lines, (), read_regions_of(content, file, problems))
        labels = numbered_classes(content, file, problems)
        return Dataset(lines, _class_names(labels or {}, file, problems), {})
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise InputError(f'{file} must hold a list "training" of entries with image and label')
    lines = []
    entries = content["training"]
    _warn_of_nameless(
        file, sum(isinstance(entry, dict) and "patient" not in entry for entry in entries)
    )
    frames = _frames_of_all(content)
    for number, entry in enumerate(entries, start=1):
        where = f"{file.name}, training entry {number}"
        if isinstance(entry, dict):
            several = isinstance(entry.get("image"), list)
            said = {} if frames is None or several else {"frames": frames}
            lines.append((where, {"patient": _stem(entry.get("image")), **said, **entry}))
        else:
            problems.append(f"{where}: it must be an object with image and label")
    return Dataset(lines, _class_names(content.get("labels") or {}, file, problems), {})


def _warn_of_nameless(file: Path, count: int) -> None:
    if count:
        log.warning(
            "%s: %d entries name no patient and count as one patient each. If a patient has "
            "several images, name the patient in each entry: otherwise they may fall into "
            "different splits, and privacy protects each image instead of the patient",
            file,
            count,
        )


def _frames_of_all(content: Mapping[str, Any]) -> str | None:
    """Return what a dataset.json says of all its 4D files: how many channels they have."""
    modality = content.get("modality")
    is_4d = str(content.get("tensorImageSize", "")).upper() == "4D"
    if is_4d and isinstance(modality, dict) and len(modality) > 1:
        return f"{len(modality)} channels"
    return None


def read_csv(
    file: Path, columns: Sequence[str], problems: list[str], labels: Sequence[str] = ()
) -> Iterator[Line]:
    """Yield the lines of a CSV file that are not blank, without their empty cells.

    A line with another number of cells than the heading is added to ``problems``. Names of columns
    are in small letters.

    Raises
    ------
    InputError
        If the file is not CSV in UTF-8, lacks one of the columns or all columns of ``labels``, has
        one twice, or is a link out of its folder.
    """
    try:
        text = _text(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not in UTF-8 ({error.reason}): save it in UTF-8") from None
    heading = next((line for line in text.splitlines() if line.strip(" ,;\t")), "")
    # If a comma is the decimal mark, spreadsheets separate columns by semicolons.
    separator = max(",;\t", key=heading.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    try:
        for line in reader:
            cells = [cell.strip() for cell in line]
            where = f"{file.name}, line {reader.line_num}"
            if not any(cells):
                continue
            if not names:
                names = [cell.lower() for cell in cells]
                _require_columns(file, names, columns)
                _require_labels(file, names, labels)
            elif len(cells) != len(names):
                problems.append(f"{where}: it has {len(cells)} cells, the heading {len(names)}")
            else:
                filled = zip(names, cells, strict=True)
                yield where, {name: cell for name, cell in filled if cell.lower() not in _MISSING}
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}") from None
    if not names:
        raise InputError(f"{file} is empty: it needs the columns {', '.join((*columns, *labels))}")


def rows_of(
    lines: Iterable[Line],
    folder: Path,
    needed: Sequence[str],
    problems: list[str],
    labels: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return a row for each line: ``image``, ``patient`` and what else of a row is given.

    That is ``label``, ``split``, ``frames`` and ``mask_regions``.

    With ``labels``, names of columns, the label is a dict by name of numbers, None where a cell is
    empty. A line that cannot be used is added to ``problems``, such as one whose files lie outside
    of the folder or are links out of it.
    """
    root = real_path(folder)
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for where, line in lines:
        try:
            row = _row(line, folder, root, needed, labels)
            image = f"{row['image']} {row.get('frames', '')}"
            if image in seen:
                raise _UnusableError(f"its image was named before, in {seen[image]}")
        except _UnusableError as error:
            problems.append(f"{where}: {error}")
            continue
        seen[image] = where
        rows.append(row)
    return rows


def _class_names(labels: Any, file: Path, problems: list[str]) -> tuple[str, ...]:
    names = {}
    if isinstance(labels, dict):
        numbers = {str(number): number for number in range(len(labels) + 1)}
        for key, value in labels.items():
            # {"1": "liver"} as in the Decathlon, or {"liver": 1}.
            number, name = (key, value) if isinstance(value, str) else (value, key)
            if str(number) in numbers:
                names[numbers[str(number)]] = str(name)
    classes = sorted({0, *names})
    complete = isinstance(labels, dict) and len(names) >= len(labels)
    if not complete or classes != list(range(len(classes))):
        problems.append(f'{file.name}: "labels" must number the classes 0, 1, 2, ... once each')
        return ()
    return tuple(names[number] for number in classes if number > 0)


def _row(
    line: Mapping[str, Any],
    folder: Path,
    root: Path,
    needed: Sequence[str],
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    for name in needed:
        if line.get(name) in (None, "", []):
            raise _UnusableError(f"it has no {name}")
    image = line["image"]
    patient = line["patient"]
    if not isinstance(patient, str | int):
        raise _UnusableError(f"a patient must be a text, got {quoted(patient)}")
    several = isinstance(image, list)
    paths = [_source(part, folder, root) for part in (image if several else [image])]
    row: dict[str, Any] = {"image": paths if several else paths[0], "patient": str(patient).strip()}
    if labels:
        row["label"] = _numbers(line, labels)
    elif "label" in line:
        row["label"] = _label(line["label"], folder, root)
    if line.get("frames") not in (None, ""):
        row["frames"] = _frames(line["frames"])
    if line.get("mask_regions") not in (None, ""):
        row["mask_regions"] = _names(line["mask_regions"])
    if line.get("split") is not None:
        row["split"] = str(line["split"]).strip().lower()
        if row["split"] not in SPLITS:
            raise _UnusableError(
                f"its split {quoted(line['split'])} is not one of {', '.join(SPLITS)}"
            )
    return row


def _frames(frames: Any) -> int | str:
    """Return which volumes of a 4D file are taken, from a cell or an entry."""
    if isinstance(frames, str):
        frames = frames.strip().lower()
        number = _WHOLE.fullmatch(frames)
        frames = int(number[1]) if number else frames
    try:
        return require_frames(frames)
    except InputError as error:
        raise _UnusableError(str(error)) from None


def _names(value: Any) -> tuple[str, ...]:
    """Return the regions of a mask's volumes, from a cell or an entry."""
    try:
        return listed_names(value)
    except InputError as error:
        raise _UnusableError(f"its mask_regions: {error}") from None


def _label(label: Any, folder: Path, root: Path) -> int | float | str | list[str]:
    """Return a number, the path of a mask, or the paths of several whose structures count."""
    if isinstance(label, str) and ";" in label:
        label = [part for part in map(str.strip, label.split(";")) if part]
    if isinstance(label, list):
        return [_path(part, folder, root) for part in label]
    number = _number(label)
    return _path(label, folder, root) if number is None else number


def _numbers(line: Mapping[str, Any], labels: Sequence[str]) -> dict[str, int | float | None]:
    """Return the numbers of a line by the names of their columns."""
    # Entries of dataset.json hold them in an object.
    entries = line.get("label")
    cells = line
    if isinstance(entries, Mapping):
        cells = {str(name).strip().lower(): value for name, value in entries.items()}
    numbers: dict[str, int | float | None] = {}
    for name in labels:
        cell = cells.get(name.strip().lower())
        numbers[name] = _number(cell)
        if cell is not None and numbers[name] is None:
            raise _UnusableError(f"its {name} is {quoted(cell)}: it must be a number or empty")
    return numbers


def _number(cell: Any) -> int | float | None:
    """Return a finite number, whole if it is; None for anything else."""
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, str):
        text = cell.strip()
        if whole := _WHOLE.fullmatch(text):
            return int(whole[1])
        if _DECIMAL.fullmatch(text):
            return float(text)
    return None


def _source(part: Any, folder: Path, root: Path) -> str | Series:
    """Return what an image, or a channel of one, is read from."""
    return part if isinstance(part, Series) else _path(part, folder, root)


def _path(text: Any, folder: Path, root: Path) -> str:
    """Return the path of an existing file or folder in ``folder``, whose real path is ``root``.

    A path that is no text was found in the folder, and is taken as it is.
    """
    if isinstance(text, Path):
        return str(text)
    if not isinstance(text, str):
        raise _UnusableError(f"{quoted(text)} is not a path")
    # Tables written on Windows name folders with backslashes.
    path = PurePosixPath(text.strip().replace("\\", "/"))
    name = shown(text.strip()[:200])
    if path.is_absolute() or PureWindowsPath(path).drive or ".." in path.parts:
        raise _UnusableError(f"{name} leaves the folder: paths must be relative to it")
    full = folder / path
    try:
        exists = full.exists()
        is_folder = full.is_dir()
    except OSError:  # Such as a name that is too long.
        exists = is_folder = False
    if not exists:
        raise _UnusableError(f"{name} is not there")
    if leads_out(full, root):
        raise _UnusableError(f"{name} {LINK_OUT}")
    # A folder holds the slices of a series.
    if is_folder and (links := links_out(full, root)):
        raise _UnusableError(f"{name}/{links[0].name} {LINK_OUT}")
    return str(full)


def _text(file: Path) -> str:
    if leads_out(file, real_path(file.parent)):
        raise InputError(f"{file} {LINK_OUT}")
    return file.read_text(encoding="utf-8-sig")


def _stem(image: Any) -> str | None:
    """Return the name of an image's first file without its suffix, such as .nii.gz; else None."""
    first = image[0] if isinstance(image, list) and image else image
    if not isinstance(first, str):
        return None
    return PurePosixPath(first.replace("\\", "/").removesuffix(".gz")).stem


def _require_columns(file: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    for name in needed:
        if names.count(name) != 1:
            # A client for tables says by its schema what the columns are.
            hints = {
                "image": "; if it lists no images, name the app that reads it: "
                "fedmed data check --app APP",
                "label": "; if findings are columns, name them: fedmed data check --findings NAMES",
            }
            hint = hints.get(name, "") if name not in names else ""
            raise InputError(
                f"{file} must have one column {name!r}, got {names.count(name)}: its columns are "
                f"{', '.join(names)}{hint}"
            )


def _require_labels(file: Path, names: Sequence[str], labels: Sequence[str]) -> None:
    """Raise `InputError` if a table has none of the columns, or one twice; log which it lacks."""
    if not labels:
        return
    counts = {name: names.count(name.strip().lower()) for name in labels}
    if not any(counts.values()) or max(counts.values()) > 1:
        raise InputError(
            f"{file} must have columns of what is asked for, {', '.join(labels)}, each once: its "
            f"columns are {', '.join(names)}"
        )
    if lacking := [name for name, count in counts.items() if not count]:
        log.warning("%s has no column %s: not read in any row", file, ", ".join(lacking))
