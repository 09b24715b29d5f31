"""What a folder of DICOM files holds: images by series, masks, and what is no image.

A PACS exports a study as it is stored: series of slices, but also localizers, reports, screens
with doses and states of a viewer, in folders of its own making or all in one. Only headers are
read, and what a file is follows from them alone, never from its name or folder.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import UID

from fedmed_flower.data.bounded import LINK_OUT, links_out, real_path
from fedmed_flower.errors import InputError
from fedmed_flower.images.headers import HEADER, dicom_files, open_object, series_of
from fedmed_flower.images.series import Series
from fedmed_flower.images.stacks import Plane, missing_of, planes_of, stacks_of

# A stack of at most so many slices beside a volume is a localizer.
_MOST_OF_LOCALIZER = 3
_LOCALIZER = re.compile(
    r"lo[ck]ali[sz](er|ador)|\bloc\b|\b3[ -]?pl(ane)?\b|scout|topogram|scanogram|surview"
    # Philips calls localizers surveys; others do so with images of all bones.
    r"|(?<!bone )(?<!skeletal )survey",
    re.IGNORECASE,
)
_DOSE = re.compile(r"dose|patient protocol", re.IGNORECASE)
# By the axis of the patient (left, posterior, superior) along which slices follow each other.
_ORIENTATIONS = ("sagittal", "coronal", "axial")
_COPY = "copy of a file"
_STORAGE = "1.2.840.10008.5.1.4.1.1"
_SECONDARY_CAPTURE = f"{_STORAGE}.7"
_SEGMENTATIONS = (f"{_STORAGE}.66.4", f"{_STORAGE}.66.7")
_STRUCTURE_SET = f"{_STORAGE}.481.3"
# What is no image, by the start of its SOP class; the longest start counts.
_KINDS = {
    "1.2.840.10008.1.3.10": "DICOMDIR",
    f"{_STORAGE}.4.2": "spectrum",
    f"{_STORAGE}.9": "waveform",
    f"{_STORAGE}.11": "presentation state",
    f"{_STORAGE}.66": "registration or raw data",
    f"{_STORAGE}.88": "report",
    f"{_STORAGE}.88.59": "key object",
    f"{_STORAGE}.88.67": "dose report",
    f"{_STORAGE}.88.68": "dose report",
    f"{_STORAGE}.88.73": "dose report",
    f"{_STORAGE}.104": "encapsulated document",
    f"{_STORAGE}.481": "radiotherapy object",
    f"{_STORAGE}.481.2": "radiotherapy dose",
    f"{_STORAGE}.481.5": "radiotherapy plan",
}
_PLURALS = {
    _COPY: "copies of files",
    "registration or raw data": "registrations or raw data",
    "object without pixels": "objects without pixels",
    "radiotherapy dose": "radiotherapy doses",
    "spectrum": "spectra",
}
# What two files of one SOPInstanceUID have in common if one is a copy of the other.
_GEOMETRY = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
_TAGS = (
    *HEADER,
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "ImageType",
    "SeriesDescription",
    "ProtocolName",
    "SeriesNumber",
    "ConvolutionKernel",
    "InstanceNumber",
    "Columns",
    "NumberOfFrames",
    "SegmentSequence",
    "StructureSetROISequence",
    "ReferencedSeriesSequence",
    "ReferencedFrameOfReferenceSequence",
)


@dataclass(frozen=True)
class DicomImage:
    """One image among DICOM files: a stack of a series, or a file without a position.

    Attributes
    ----------
    source : Series or Path
        What `read_image` reads.
    patient, study, series, frame : str
        PatientID, StudyInstanceUID, SeriesInstanceUID and FrameOfReferenceUID; empty if absent.
    modality, description, protocol, kernel : str
        Modality, SeriesDescription, ProtocolName and ConvolutionKernel; empty if absent.
    number : int or None
        SeriesNumber.
    orientation : str
        axial, coronal or sagittal, whichever the slices are nearest to; empty without a position.
    slices : int
        Number of slices.
    part : str
        Which stack of its series; empty if there is one.
    """

    source: Series | Path
    patient: str
    study: str = ""
    series: str = ""
    frame: str = ""
    modality: str = ""
    description: str = ""
    protocol: str = ""
    kernel: str = ""
    number: int | None = None
    orientation: str = ""
    slices: int = 1
    part: str = ""

    @property
    def visit(self) -> tuple[str, str]:
        """Its patient and study."""
        return self.patient, self.study

    def __str__(self) -> str:
        """Return what distinguishes it within its study: ``CT "Thorax" (number=3 slices=80)``."""
        facts = [] if self.number is None else [f"number={self.number}"]
        facts += [f"part={self.part}"] if self.part else []
        facts += [f"orientation={self.orientation}"] if self.orientation else []
        facts.append(f"slices={self.slices}")
        return f'{self.modality or "?"} "{self.description}" ({" ".join(facts)})'


@dataclass(frozen=True)
class DicomMask:
    """A SEG or an RTSTRUCT.

    Attributes
    ----------
    file : Path
    kind : {"SEG", "RTSTRUCT"}
    series : tuple of str
        SeriesInstanceUID of each series on which it was drawn.
    structures : tuple of str
        Names of its structures.
    """

    file: Path
    kind: str
    series: tuple[str, ...]
    structures: tuple[str, ...]


@dataclass(frozen=True)
class DicomFolder:
    """What a folder of DICOM files holds.

    Attributes
    ----------
    images : tuple of DicomImage
        In the order of their first files.
    masks : tuple of DicomMask
    notes : tuple of str
        What was left out because it is no image of its own, counted.
    problems : tuple of str
        Files and series that cannot be used, and why.
    """

    images: tuple[DicomImage, ...]
    masks: tuple[DicomMask, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Slice:
    """A file that holds an image, by what of its header is needed."""

    file: Path
    folder: Path
    identity: str
    geometry: tuple[str, ...]
    image: DicomImage
    types: str
    captured: bool
    planes: Sequence[Plane]

    @property
    def key(self) -> tuple[str, Path | None]:
        """Its series, or the file itself if it is an image alone."""
        if not self.planes:
            return self.image.series, self.file
        return self.image.series, None if self.image.series else self.folder

    @property
    def is_named_localizer(self) -> bool:
        """Whether the name of its series, or else of its protocol, is that of a localizer."""
        return bool(_LOCALIZER.search(self.image.description or self.image.protocol))

    @property
    def is_screen(self) -> bool:
        """Whether its ImageType says that it shows a screen."""
        return "DOSE" in self.types or "SCREEN SAVE" in self.types

    @property
    def screen(self) -> str:
        """What it is called if it shows a screen."""
        shows_dose = _DOSE.search(f"{self.types} {self.image.description}")
        return "dose screen" if shows_dose else "screen capture"


@dataclass
class _Sorted:
    """The files of a folder as they are read."""

    slices: list[_Slice] = field(default_factory=list)
    # By SOPInstanceUID, or by the file if it has none: a copy is no further mask.
    masks: dict[str, DicomMask] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    # Of each file that cannot be used: its folder, and its series if that can be told.
    lost: list[tuple[Path, str]] = field(default_factory=list)


def read_headers(folder: Path) -> DicomFolder:
    """Sort the DICOM files of a folder and of all below by their headers.

    Slices that share a SeriesInstanceUID are one series, whichever folders they lie in; `stacks_of`
    divides it, and each stack is an image. A file without a position in the patient, such as an
    X-ray, is an image by itself. Two files of one SOPInstanceUID count once.

    Left out, and counted in the notes, is what is no image, and what is one only beside others:
    localizers (by ImageType or name, or of at most three slices in each direction beside a volume
    of the same study) and screens (secondary captures beside images of another kind).

    A file that cannot be read is a problem. Its series is left out. If nobody can tell its series,
    the only series in its folder is; of several, none is, and the problem says so: a gap between
    slices is found when they are read, a missing first or last slice is not.
    """
    found = _Sorted()
    root = real_path(folder)
    for directory in folders(folder):
        _sort(directory, root, found)
    slices = _without_captures(_once(found), found.others)
    series = _without_broken(slices, found)
    images = _without_localizers(
        [(members, _images_of(members, found.problems)) for members in series], found.others
    )
    return DicomFolder(
        tuple(images),
        tuple(found.masks.values()),
        tuple(_notes(found.others)),
        tuple(found.problems),
    )


def folders(folder: Path) -> Iterator[Path]:
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
            for child in reversed(visible(path))
            if child.is_dir()
        ]


def visible(folder: Path) -> list[Path]:
    """Return what is directly in a folder, by name, without hidden files and folders."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _sort(directory: Path, root: Path, found: _Sorted) -> None:
    """Add the files directly in a folder to what was found."""
    links = links_out(directory, root)
    found.problems += [f"{link} {LINK_OUT}" for link in links]
    found.lost += [(directory, "") for link in links if not link.is_dir()]
    for file in dicom_files(directory):
        if file in links:
            continue
        try:
            _add(file, directory, found)
        except InputError as error:
            found.problems.append(str(error))
            found.lost.append((directory, series_of(file)))


def _add(file: Path, directory: Path, found: _Sorted) -> None:
    """Add one file to what was found; raise `InputError` if it is damaged."""
    header = open_object(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    kind = _text(header, "SOPClassUID")
    if kind in (*_SEGMENTATIONS, _STRUCTURE_SET):
        mask = _mask_of(file, header, kind != _STRUCTURE_SET)
        if not mask.series:
            found.problems.append(f"{file}: this {mask.kind} names no series on which it was drawn")
        elif found.masks.setdefault(_text(header, "SOPInstanceUID") or str(file), mask) is not mask:
            found.others[_COPY] += 1
    elif name := _kind_of(kind):
        found.others[name] += 1
    elif "Rows" not in header and kind and "Image Storage" not in UID(kind).name:
        found.others["object without pixels"] += 1
    elif "Rows" not in header:
        raise InputError(f"{file} holds no image: it is cut off, or a document")
    else:
        found.slices.append(_slice_of(file, directory, header, kind))


def _slice_of(file: Path, directory: Path, header: pydicom.Dataset, kind: str) -> _Slice:
    planes = planes_of(file, header)
    is_placed = all(plane.position is not None for plane in planes)
    number = _text(header, "SeriesNumber")
    image = DicomImage(
        source=file,
        patient=_text(header, "PatientID"),
        study=_text(header, "StudyInstanceUID"),
        series=_text(header, "SeriesInstanceUID"),
        frame=_text(header, "FrameOfReferenceUID"),
        modality=_text(header, "Modality"),
        description=_text(header, "SeriesDescription"),
        protocol=_text(header, "ProtocolName"),
        kernel=_text(header, "ConvolutionKernel"),
        number=int(number) if re.fullmatch(r"-?\d{1,12}", number) else None,
        slices=len(planes),
    )
    geometry = [_text(header, name) for name in _GEOMETRY]
    return _Slice(
        file,
        directory,
        _text(header, "SOPInstanceUID"),
        tuple(geometry),
        image,
        _text(header, "ImageType").upper(),
        captured=f"{kind}.".startswith(f"{_SECONDARY_CAPTURE}."),
        planes=planes if is_placed else (),
    )


def _mask_of(file: Path, header: pydicom.Dataset, is_segmentation: bool) -> DicomMask:
    if is_segmentation:
        references = _items(header, "ReferencedSeriesSequence")
        structures = [_text(item, "SegmentLabel") for item in _items(header, "SegmentSequence")]
    else:
        path = ("RTReferencedStudySequence", "RTReferencedSeriesSequence")
        references = _items(header, "ReferencedFrameOfReferenceSequence", *path)
        structures = [_text(item, "ROIName") for item in _items(header, "StructureSetROISequence")]
    series = dict.fromkeys(_text(item, "SeriesInstanceUID") for item in references)
    kind = "SEG" if is_segmentation else "RTSTRUCT"
    return DicomMask(file, kind, tuple(filter(None, series)), tuple(structures))


def _items(part: pydicom.Dataset, *names: str) -> list[pydicom.Dataset]:
    """Return the items of a sequence, or of the sequences in those of another."""
    parts = [part]
    for name in names:
        parts = [item for part in parts for item in part.get(name) or ()]
    return parts


def _kind_of(sop_class: str) -> str:
    """Return what an object is that holds no image, by its SOP class; else an empty text."""
    starts = [start for start in _KINDS if f"{sop_class}.".startswith(f"{start}.")]
    return _KINDS[max(starts, key=len)] if starts else ""


def _text(part: pydicom.Dataset, name: str) -> str:
    """Return an element as a text, or an empty one if it is absent or cannot be decoded."""
    try:
        value = part.get(name)
        if isinstance(value, MultiValue):
            return "\\".join(map(str, value))
        return "" if value is None else str(value).strip()
    except Exception:  # What decides whether a file can be read is decoded by `open_object`.
        return ""


def _once(found: _Sorted) -> list[_Slice]:
    """Return the files without copies; two unlike files of one identity are a problem."""
    first: dict[tuple[str, str, str], _Slice] = {}
    slices = []
    for one in found.slices:
        if not one.identity:
            slices.append(one)
            continue
        known = first.setdefault((one.image.patient, one.image.series, one.identity), one)
        if known is one:
            slices.append(one)
        elif known.geometry == one.geometry:
            found.others[_COPY] += 1
        else:
            found.problems.append(
                f"{one.file} and {known.file} have one SOPInstanceUID, but are different"
            )
            found.lost.append((one.folder, one.image.series))
    return slices


def _without_captures(slices: Sequence[_Slice], others: Counter[str]) -> list[_Slice]:
    """Return the images without screens; a secondary capture alone in its study is an image.

    X-rays that were digitised, or converted from pictures, are secondary captures.
    """
    real = {one.image.visit for one in slices if not (one.captured or one.is_screen)}
    kept = []
    for one in slices:
        if one.is_screen or (one.captured and one.image.visit in real):
            others[one.screen] += 1
        else:
            kept.append(one)
    return kept


def _without_broken(slices: Sequence[_Slice], found: _Sorted) -> list[list[_Slice]]:
    """Return the files of each image or series, without series that cannot be used."""
    series: dict[tuple[str, Path | None], list[_Slice]] = defaultdict(list)
    for one in slices:
        series[one.key].append(one)
    damaged = _damaged(series, found)
    usable = []
    for key, members in series.items():
        name = _name(members)
        patients = sorted({one.image.patient for one in members})
        if len(patients) > 1:
            found.problems.append(f"{name}: its series has several patients: {', '.join(patients)}")
        elif key in damaged and members[0].planes:
            found.problems.append(f"{name}: a slice may be missing, as a file cannot be used")
        elif key not in damaged:
            usable.append(members)
    return usable


def _damaged(
    series: Mapping[tuple[str, Path | None], Sequence[_Slice]], found: _Sorted
) -> set[tuple[str, Path | None]]:
    """Return the series to which a file belongs, or must belong, that cannot be used."""
    volumes = {key: members for key, members in series.items() if members[0].planes}
    damaged: set[tuple[str, Path | None]] = set()
    unknown: Counter[Path] = Counter()
    for folder, uid in found.lost:
        # A file may be cut off within its UID.
        same = [key for key in volumes if uid and key[0] == uid]
        same = same or [key for key in volumes if uid and key[0].startswith(uid)]
        damaged.update(same)
        if not uid:
            unknown[folder] += 1
    for uid, file in series:
        if file is not None and (uid, None) in volumes:
            found.problems.append(f"{file}: it has no position, unlike other slices of its series")
            damaged |= {(uid, None), (uid, file)}
    for folder, count in unknown.items():
        beside = [
            key for key, members in volumes.items() if folder in {one.folder for one in members}
        ]
        if len(beside) == 1:
            damaged.add(beside[0])
        elif beside:
            found.problems.append(
                f"{folder}: of {count} file{'s' * (count > 1)} that cannot be used nobody can tell "
                f"the series: one of the {len(beside)} here may lack its first or last slice"
            )
    return damaged


def _name(members: Sequence[_Slice]) -> str:
    return str(Series("", tuple(str(one.file) for one in members)))


def _images_of(members: Sequence[_Slice], problems: list[str]) -> list[DicomImage]:
    """Return the stacks of a series, or the one image of a file without a position."""
    first = members[0]
    if not first.planes:
        return [first.image]
    try:
        stacks = stacks_of([plane for one in members for plane in one.planes])
    except InputError as error:
        problems.append(f"{_name(members)}: {error}")
        return []
    images = []
    for part, planes in stacks.items():
        if (missing := missing_of(stacks, part)) is not None:
            problems.append(f"{_name(members)}{f' ({part})' if part else ''}: {missing}")
            continue
        files = dict.fromkeys(sorted(str(plane.file) for plane in planes))
        images.append(
            replace(
                first.image,
                source=Series(first.image.series, tuple(files), part),
                orientation=_orientation(planes[0]),
                slices=len(planes),
                part=part,
            )
        )
    return images


def _without_localizers(
    series: Sequence[tuple[Sequence[_Slice], Sequence[DicomImage]]], others: Counter[str]
) -> list[DicomImage]:
    """Return the images of series that are no localizers; a series is its files and its stacks."""
    volumes = {
        stack.visit
        for members, stacks in series
        for stack in stacks
        if stack.slices > _MOST_OF_LOCALIZER and not members[0].is_named_localizer
    }
    kept: list[DicomImage] = []
    for members, stacks in series:
        first = members[0]
        directions = {stack.orientation for stack in stacks}
        small = sum(stack.slices for stack in stacks) <= _MOST_OF_LOCALIZER * len(directions)
        beside = bool(first.planes) and first.image.visit in volumes
        if "LOCALIZER" in first.types or (beside and (small or first.is_named_localizer)):
            others["localizer"] += 1
        else:
            kept += stacks
    return kept


def _notes(others: Counter[str]) -> list[str]:
    """Return what was left out, in one line."""
    if not others:
        return []
    parts = [
        f"{count:,} {kind if count == 1 else _PLURALS.get(kind, f'{kind}s')}"
        for kind, count in others.most_common()
    ]
    return [f"left out: {', '.join(parts)}"]


def _orientation(plane: Plane) -> str:
    """Return the name of the direction to which a plane's normal is nearest."""
    return _ORIENTATIONS[int(np.abs(plane.normal).argmax())]
