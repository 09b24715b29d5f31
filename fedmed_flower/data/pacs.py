"""Rows from a folder of DICOM files as a PACS exports them: which series, and which label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed_flower.data.tables import Line, read_csv, rows_of
from fedmed_flower.errors import InputError
from fedmed_flower.images.listing import DicomImage, DicomMask, read_headers
from fedmed_flower.images.rules import Rule, UnmatchedError, chosen, listed, rule_of_cells, rules_of

LABELS = "labels.csv"
RULES = "series.csv"
# What a line of labels.csv may name, the narrowest first.
_NAMED = ("series", "study", "patient")

Row = dict[str, Any]


@dataclass(frozen=True)
class _Choice:
    """What becomes one row: an image, or the channels of one."""

    channels: tuple[DicomImage, ...]

    @property
    def name(self) -> str:
        """The first file, for errors."""
        return str(self.channels[0].source)

    def line(self) -> Row:
        """Return ``image`` and ``patient`` of the row."""
        sources = [image.source for image in self.channels]
        image = sources if len(sources) > 1 else sources[0]
        return {"image": image, "patient": self.channels[0].patient}

    def names(self, kind: str) -> list[str]:
        """Return its series, its study or its patient, as labels.csv may name it."""
        return list(dict.fromkeys(getattr(image, kind) for image in self.channels))


def dicom_rows(
    folder: Path,
    series: str,
    problems: list[str],
    notes: list[str],
    labels: Sequence[str] = (),
) -> list[Row]:
    """Return the rows of a folder of DICOM files.

    Parameters
    ----------
    folder : Path
    series : str
        Rules that choose series, as `rules_of` reads them. ``series.csv`` in the folder comes
        first. Without rules each image is a row.
    problems, notes : list of str
        What cannot be used, and what was left out on purpose, is added.
    labels : sequence of str
        Columns of ``labels.csv`` in place of its column label, as `rows_of` takes them.

    Raises
    ------
    InputError
        If the rules or ``labels.csv`` cannot be read.
    """
    rules = _rules(folder, series)
    found = read_headers(folder)
    problems += found.problems
    notes += found.notes
    if rules:
        choices = _by_rules(found.images, rules, problems, notes)
    else:
        choices = [_Choice((image,)) for image in found.images]
        _tell_of_several(found.images, notes)
    if (table := folder / LABELS).is_file():
        lines = _by_table(choices, table, found.images, problems, labels)
        columns = ("image", "patient") if labels else ("image", "label", "patient")
        return rows_of(lines, folder, columns, problems, labels)
    if found.masks and not labels:
        there = {image.series for image in found.images}
        lines = _by_masks(choices, found.masks, there, problems, notes)
    else:
        lines = [(choice.name, choice.line()) for choice in choices]
        return rows_of(lines, folder, ("image", "patient"), problems)
    return rows_of(lines, folder, ("image", "label", "patient"), problems)


def _rules(folder: Path, text: str) -> tuple[Rule, ...]:
    """Return the rules of the hospital, or else those of the run config."""
    if not (file := folder / RULES).is_file():
        return rules_of(text)
    problems: list[str] = []
    rules = tuple(rule_of_cells(where, cells) for where, cells in read_csv(file, (), problems))
    if problems:  # Without its line, a channel would be missing.
        raise InputError(f"{file.parent}/{problems[0]}")
    if not rules:
        raise InputError(f"{file} holds no rule: it needs a line for each channel")
    return rules


def _by_rules(
    images: Sequence[DicomImage], rules: Sequence[Rule], problems: list[str], notes: list[str]
) -> list[_Choice]:
    """Return the channels that the rules choose in each study."""
    visits: dict[tuple[str, str], list[DicomImage]] = defaultdict(list)
    for image in images:
        visits[image.visit].append(image)
    choices: list[_Choice] = []
    unmatched: dict[str, list[list[DicomImage]]] = defaultdict(list)
    tried: set[str] = set()
    for (patient, _), there in visits.items():
        try:
            channels = chosen(rules, there)
        except UnmatchedError as error:
            problems.append(f"patient {patient}: {error}")
            tried.add(patient)
            continue
        if channels and (problem := _apart(channels)):
            problems.append(f"patient {patient}: {problem}")
            tried.add(patient)
        elif channels:
            choices.append(_Choice(channels))
            tried.add(patient)
        else:
            unmatched[patient].append(there)
    others = 0
    for patient, studies in unmatched.items():
        if patient in tried:
            others += len(studies)
            continue
        there = [image for study in studies for image in study]
        wanted = "; ".join(map(str, rules))
        problems.append(f"patient {patient}: no series matches {wanted}; there is {listed(there)}")
    if others:
        studies_are = "studies" if others > 1 else "study"
        notes.append(f"left out: {others} further {studies_are} in which no series matches")
    taken = {image.series for choice in choices for image in choice.channels}
    left = len({image.series for image in images} - taken)
    if left:
        notes.append(f"left out: {left} series that the rules do not take")
    return choices


def _apart(channels: Sequence[DicomImage]) -> str:
    """Return why channels cannot be laid upon each other, if their headers say so."""
    frames = {image.frame for image in channels if image.frame and image.orientation}
    if len(frames) < 2:
        return ""
    return (
        f"the series {listed(channels)} have different FrameOfReferenceUID: their positions cannot "
        "be compared. Register them, and list the results in a datalist.csv"
    )


def _tell_of_several(images: Sequence[DicomImage], notes: list[str]) -> None:
    """Note how series are chosen if patients have several images."""
    count: dict[str, int] = defaultdict(int)
    for image in images:
        count[image.patient] += 1
    several = [patient for patient, images_of in count.items() if images_of > 1]
    if several:
        some = next(image for image in images if image.patient == several[0])
        there = [image for image in images if image.patient == some.patient]
        notes.append(
            f"{len(several)} patient{'s have' if len(several) > 1 else ' has'} several images, and "
            "each is a row of its own. To choose among them, or to make them channels, give rules "
            f"by series in the run config or in {RULES}. One patient has {listed(there)}"
        )


def _by_table(
    choices: Sequence[_Choice],
    table: Path,
    images: Sequence[DicomImage],
    problems: list[str],
    labels: Sequence[str],
) -> list[Line]:
    """Return image, patient, label and split of each image that the table names."""
    reported: dict[tuple[str, str], Line] = {}
    told = [name.strip().lower() for name in labels] or ["label"]
    for where, line in read_csv(table, () if labels else told, problems, labels):
        kind = next((kind for kind in _NAMED if kind in line), "patient")
        key = (kind, line.get(kind, ""))
        if not key[1] or key in reported:
            again = f"{kind} {key[1]} was named before"
            problems.append(f"{where}: {again if key[1] else 'it has no series, study or patient'}")
        else:
            reported[key] = (where, line)
    lines: list[Line] = []
    for choice in choices:
        keys = [
            (kind, name)
            for kind in _NAMED
            for name in choice.names(kind)
            if (kind, name) in reported
        ]
        if keys:
            cells = {name: reported[keys[0]][1].get(name) for name in (*told, "split")}
            lines.append((choice.name, choice.line() | cells))
        else:
            problems.append(f"{choice.name}: {LABELS} does not name it")
    there = {(kind, getattr(image, kind)) for image in images for kind in _NAMED}
    for (kind, name), (where, _) in reported.items():
        if (kind, name) not in there:
            problems.append(f"{where}: there is no image of {kind} {name}")
    return lines


def _by_masks(
    choices: Sequence[_Choice],
    masks: Sequence[DicomMask],
    there: set[str],
    problems: list[str],
    notes: list[str],
) -> list[Line]:
    """Return image, patient and label of each image on which a mask was drawn."""
    drawn: dict[str, list[DicomMask]] = defaultdict(list)
    for mask in masks:
        for series in mask.series:
            drawn[series].append(mask)
        if not there & {*mask.series}:
            problems.append(f"{mask.file}: no series on which this {mask.kind} was drawn is here")
    lines: list[Line] = []
    without = 0
    for choice in choices:
        own = next((drawn[name] for name in choice.names("series") if name in drawn), [])
        if not own:
            without += 1
        elif len(own) > 1 and (problem := _contradiction(own)):
            problems.append(f"{choice.name}: {problem}")
        else:
            files = [mask.file for mask in own]
            label: Any = files if len(files) > 1 else files[0]
            lines.append((choice.name, choice.line() | {"label": label}))
    if without:
        some = "images" if without > 1 else "image"
        notes.append(f"left out: {without} {some} without a SEG or RTSTRUCT")
    return lines


def _contradiction(masks: Sequence[DicomMask]) -> str:
    """Return why several masks of one series are not parts of one; empty if they are."""
    files = ", ".join(str(mask.file) for mask in masks)
    structures = [name.lower() for mask in masks for name in mask.structures]
    if all(mask.kind == "SEG" for mask in masks) and len({*structures}) == len(structures):
        return ""
    return (
        f"several masks were drawn on it ({files}), and only SEGs with different structures are "
        f"parts of one: leave one of them here, or name it in {LABELS}"
    )
