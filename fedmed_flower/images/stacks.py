"""The planes of DICOM files, and the stacks of slices that they form.

One series often holds several stacks: b-values of diffusion, echoes, phases of time, or the three
orientations of a localizer. A stack has one plane at each position.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import dictionary_description, dictionary_has_tag, keyword_for_tag

from fedmed_flower.errors import InputError
from fedmed_flower.images.frames import Frame, Numbers, digits, frames_of, numbers
from fedmed_flower.images.headers import PRIVATE_B_VALUES, readable

# Directions that differ by less are one, as some scanners print six digits and others two.
_SAME_DIRECTION = 1e-3
# Millimetres: planes that are nearer to each other are at one position.
_SAME_POSITION = 0.01
# Dimensions along which the slices of one stack lie.
_OF_PLACE = ("StackID", "InStackPositionNumber", "ImagePositionPatient", "SliceLocation")
_AXES = ("sagittal", "coronal", "axial")

Planes = Sequence["Plane"]


@dataclass(frozen=True)
class Plane:
    """One slice: a file, or one frame of a file.

    Attributes
    ----------
    file : Path
    frame : int
        From 0; 0 in a file of one frame.
    shape : (int, int)
        Rows and columns.
    spacing : (float, float), optional
        Millimetres between rows and between columns; None if the header does not state it.
    position : (float, float, float), optional
        Centre of the first pixel in mm (left, posterior, superior); None if the header has no
        position or no orientation, as an X-ray.
    orientation : six floats, optional
        Directions of a row and of a column.
    digits : (float, float, float)
        What the last printed digit of each number of the position counts, in mm.
    told : tuple of (str, value)
        What else the header says of the plane that can tell its stack from others, such as
        ``("b", 1000)``.
    slices : int
        How many slices the header says that its volume has; 0 if it does not say it.
    images : int
        How many images the header says that its series has; 0 if it does not say it.
    """

    file: Path
    frame: int
    shape: tuple[int, int]
    spacing: tuple[float, float] | None
    position: Numbers | None = None
    orientation: Numbers | None = None
    digits: Numbers = ()
    told: tuple[tuple[str, Any], ...] = ()
    slices: int = 0
    images: int = 0

    def __str__(self) -> str:
        return f"frame {self.frame} of {self.file.name}" if self.frame else self.file.name

    @property
    def normal(self) -> NDArray[np.float64]:
        """Direction in which slices follow each other, (3,), of length 1."""
        normal = np.cross(*np.reshape(np.asarray(self.orientation), (2, 3)))
        return np.asarray(normal / max(float(np.linalg.norm(normal)), 1e-9))


def planes_of(file: Path, header: pydicom.Dataset) -> list[Plane]:
    """Return the planes that a file holds, one a frame, from its header alone.

    Parameters
    ----------
    file : Path
    header : Dataset
        From `headers.open_dicom`, with the elements of `headers.HEADER` or all.

    Raises
    ------
    InputError
        If an element cannot be read, or the number of frames is not that of the frames described.
    """
    with readable(file):
        frames = frames_of(file, header)
        offsets = _dose_offsets(file, frames)
        shape = (int(header.Rows), int(header.Columns))
        slices = _volume_slices(header)
        images = _acquired(header)
        planes = []
        for frame, offset in zip(frames, offsets, strict=True):
            place = _place(frame, offset)
            told = tuple(_told(frame))
            planes.append(
                Plane(file, frame.number, shape, frame.spacing, *place, told, slices, images)
            )
        return planes


def stacks_of(planes: Planes) -> dict[str, list[Plane]]:
    """Divide the planes of one series into stacks.

    Planes of another size or direction are another stack, and so are those of another b-value,
    echo or time. Further elements, such as the kind of image, are looked at if planes would
    otherwise be at one position.

    Returns
    -------
    dict of lists
        The planes of each stack in order of their position; those without a position in the order
        given. Its key is empty if there is only one, else what tells it apart, such as ``axial``,
        ``b=1000`` or ``echo 2, magnitude``.
    """
    groups = [part for group in _by_direction(planes) for part in _divided(group)]
    words = [", ".join(group.words) for group in groups]
    counts = Counter(words)
    seen: Counter[str] = Counter()
    stacks = {}
    for group, name in zip(groups, words, strict=True):
        seen[name] += 1
        if counts[name] > 1:
            name = f"{name} ({seen[name]})".strip()
        stacks[name] = [group.planes[index] for index in _order(group.planes)]
    return stacks


def missing_of(stacks: dict[str, list[Plane]], name: str = "") -> str | None:
    """Return which slices a stack lacks at an end, as its header or another stack tells; or None.

    Parameters
    ----------
    stacks : dict of lists
        From `stacks_of`: all that the series has.
    name : str
        Which stack; if the series has only one, that one.
    """
    stack = stacks[name] if name in stacks else next(iter(stacks.values()))
    count = len(stack)
    if count < stack[0].slices:
        return f"its header says that it has {stack[0].slices} slices, and {count} are here"
    total = sum(map(len, stacks.values()))
    images = stack[0].images
    # Where several series are made of one acquisition, some scanners count the images of all.
    if total < images < 2 * total:
        return f"its header says that it has {images} images, and {total} are here"
    for other, longer in stacks.items():
        if len(longer) > count > 1 and _holds(longer, stack):
            return f"it has {count} slices, and {other!r} of the same series has {len(longer)}"
    return None


@dataclass(frozen=True)
class _Group:
    planes: Planes
    words: tuple[str, ...] = ()


def _holds(longer: Planes, stack: Planes) -> bool:
    """Return whether one stack goes on where the other, with the same steps, ends."""
    if stack[0].position is None or longer[0].position is None:
        return False
    if stack[0].shape != longer[0].shape or not _same_direction(stack[0], longer[0]):
        return False
    heights = _heights(stack, stack[0].normal)
    others = _heights(longer, stack[0].normal)
    step = np.median(np.diff(np.sort(heights)))
    other_step = np.median(np.diff(np.sort(others)))
    if abs(step - other_step) > 0.1 * step:
        return False
    nearest = np.abs(heights[:, None] - others[None]).min(axis=1)
    return bool(nearest.max() <= 0.1 * step)


def _by_direction(planes: Planes) -> list[_Group]:
    """Divide planes by size and direction."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if group[0].shape == plane.shape and _same_direction(group[0], plane):
                group.append(plane)
                break
        else:
            groups.append([plane])
    groups.sort(key=lambda group: (_facing(group[0]), group[0].orientation or (), group[0].shape))
    facing = {_facing(group[0]) for group in groups}
    sizes = {(_facing(group[0]), group[0].shape) for group in groups}
    named = []
    for group in groups:
        words = [_facing(group[0])] if len(facing) > 1 else []
        if len(sizes) > len(facing):
            words.append("x".join(map(str, group[0].shape)))
        named.append(_Group(group, tuple(words)))
    return named


def _same_direction(one: Plane, other: Plane) -> bool:
    if one.position is None or other.position is None:
        return one.position is other.position
    pairs = zip(one.orientation or (), other.orientation or (), strict=True)
    return all(abs(a - b) <= _SAME_DIRECTION for a, b in pairs)


def _facing(plane: Plane) -> str:
    """Return the name of the orientation that a plane is nearest to."""
    if plane.position is None:
        return "without position"
    return _AXES[int(np.argmax(np.abs(plane.normal)))]


def _divided(group: _Group) -> list[_Group]:
    """Divide planes of one direction into stacks, as far as what is told of them allows it."""
    parts = [group]
    if group.planes[0].position is None:
        return parts
    for key in _ALWAYS:
        parts = [piece for part in parts for piece in _by_value(part, key)]
    for key in _IF_DOUBLED:
        parts = [piece for part in parts for piece in _by_value_if_doubled(part, key)]
    for key in _BY_RANK:
        parts = [piece for part in parts for piece in _by_rank(part, key)]
    return parts


def _by_value(group: _Group, key: str) -> list[_Group]:
    """Divide planes by one element, unless it only counts the slices."""
    parts: dict[Hashable, list[Plane]] = defaultdict(list)
    for plane in group.planes:
        parts[dict(plane.told).get(key)].append(plane)
    if len(parts) == 1 or (len(parts) == len(group.planes) > 2 and not _is_doubled(group.planes)):
        return [group]
    values = sorted(parts, key=lambda value: (value is not None, value))
    words = _WORDS[key](values)
    return [
        _Group(parts[value], (*group.words, *([word] if word else [])))
        for value, word in zip(values, words, strict=True)
    ]


def _by_value_if_doubled(group: _Group, key: str) -> list[_Group]:
    """Divide planes of which some are at one position, unless the element counts images."""
    most = max(map(len, _places(group.planes)))
    values = {dict(plane.told).get(key) for plane in group.planes}
    return _by_value(group, key) if most > 1 and len(values) <= 2 * most else [group]


def _by_rank(group: _Group, key: str) -> list[_Group]:
    """Divide planes by the order in which those at one position were taken, if all have several."""
    places = _places(group.planes)
    count = len(places[0])
    if count == 1 or any(len(place) != count for place in places):
        return [group]
    parts: list[list[Plane]] = [[] for _ in range(count)]
    for place in places:
        times: list[Any] = [dict(plane.told).get(key) for plane in place]
        if None in times or len(set(times)) < count:
            return [group]
        pairs = sorted(zip(times, range(count), strict=True))
        for part, (_, index) in zip(parts, pairs, strict=True):
            part.append(place[index])
    word = _BY_RANK[key]
    return [
        _Group(part, (*group.words, f"{word} {rank}")) for rank, part in enumerate(parts, start=1)
    ]


def _is_doubled(planes: Planes) -> bool:
    return len(_places(planes)) < len(planes)


def _places(planes: Planes) -> list[list[Plane]]:
    """Return the planes at each position, in order of position."""
    order = _order(planes)
    heights = _heights(planes, planes[0].normal)[order]
    places: list[list[Plane]] = []
    before = -np.inf
    for index, height in zip(order, heights, strict=True):
        if height - before > _SAME_POSITION:
            places.append([])
        places[-1].append(planes[index])
        before = height
    return places


def _order(planes: Planes) -> list[int]:
    """Return the indices of planes of one direction in order of their position."""
    if planes[0].position is None:
        return list(range(len(planes)))
    heights = _heights(planes, planes[0].normal)
    return [int(index) for index in np.argsort(heights, kind="stable")]


def _heights(planes: Planes, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray([plane.position for plane in planes], float) @ normal


def _place(frame: Frame, offset: float) -> tuple[Numbers | None, Numbers | None, Numbers]:
    """Return position, orientation and digits of a frame; without one there is none of them."""
    printed = frame.position
    position = numbers(printed, 3)
    orientation = numbers(frame.orientation, 6)
    if position is None or orientation is None:
        return None, None, ()
    if offset:
        moved = np.asarray(position) + offset * np.cross(*np.reshape(orientation, (2, 3)))
        position = tuple(map(float, moved))
    return position, orientation, digits(printed)


def _dose_offsets(file: Path, frames: Sequence[Frame]) -> list[float]:
    """Return how far each frame lies from the first along the normal, in mm, as an RT dose has it.

    In other files each frame has a position of its own.
    """
    stated = frames[0].header.get("GridFrameOffsetVector")
    if stated is None or len(frames) == 1:
        return [0.0] * len(frames)
    offsets = numbers(stated, len(frames))
    if offsets is None:
        raise InputError(
            f"{file}: its GridFrameOffsetVector must be {len(frames)} numbers, got {stated}"
        )
    # They may also be positions in the patient: the first is then that of the first frame.
    return [offset - offsets[0] for offset in offsets]


def _told(frame: Frame) -> Iterator[tuple[str, Any]]:
    """Yield what the header says of a frame that can tell its stack from others."""
    for key, read in _TOLD.items():
        value = read(frame)
        if value is not None:
            yield key, value


def _number(group: str, *names: str) -> Callable[[Frame], float | None]:
    """Return a function that reads the first of some elements that is a number."""

    def read(frame: Frame) -> float | None:
        for name in names:
            if (found := numbers([frame.value(group, name)], 1)) is not None:
                return found[0]
        return None

    return read


def _text(group: str, *names: str) -> Callable[[Frame], str | None]:
    """Return a function that reads the first of some elements as a text, its parts with "/"."""

    def read(frame: Frame) -> str | None:
        for name in names:
            value = frame.value(group, name)
            if value is not None:
                many = not isinstance(value, str) and isinstance(value, Sequence)
                return "/".join(map(str, value)) if many else str(value)
        return None

    return read


def _b_value(frame: Frame) -> float | None:
    standard = _number("MRDiffusionSequence", "DiffusionBValue")(frame)
    return _private_b_value(frame.header) if standard is None else standard


def _private_b_value(header: pydicom.Dataset) -> float | None:
    """Return the b-value that Siemens, GE or Philips wrote into an element of their own."""
    for group, creator, element in PRIVATE_B_VALUES:
        try:
            value = header.private_block(group, creator)[element].value
        except KeyError:
            continue
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace").strip(" \0").split("\\")
        first = value if isinstance(value, str | int | float) else next(iter(value or ()), None)
        if (found := numbers([first], 1)) is not None:
            # GE adds a thousand million to those of some sequences.
            return found[0] % 1e6
    return None


def _direction(frame: Frame) -> Numbers | None:
    item = frame.group("MRDiffusionSequence")
    if item is not None and (found := item.get("DiffusionGradientDirectionSequence")):
        return numbers(found[0].get("DiffusionGradientOrientation"), 3)
    return numbers(frame.header.get("DiffusionGradientOrientation"), 3)


def _dimensions(frame: Frame) -> tuple[tuple[str, int], ...] | None:
    """Return the indices of a frame in the dimensions of its file that are none of place."""
    content = frame.group("FrameContentSequence")
    indices = () if content is None else content.get("DimensionIndexValues") or ()
    if isinstance(indices, int):
        indices = (indices,)
    dimensions = frame.header.get("DimensionIndexSequence") or ()
    if not dimensions or len(dimensions) != len(indices):
        return None
    return tuple(
        (dictionary_description(pointer).lower(), int(index))
        for item, index in zip(dimensions, indices, strict=True)
        if dictionary_has_tag(pointer := item.DimensionIndexPointer)
        and keyword_for_tag(pointer) not in _OF_PLACE
    )


def _time_slice(frame: Frame) -> float | None:
    """Return which of several volumes a slice belongs to, as MR, CT or PET write it."""
    found = _number("FrameContentSequence", "TemporalPositionIndex")(frame)
    if found is None:
        found = _number("", "TemporalPositionIdentifier")(frame)
    if found is None:
        names = ("ImageIndex", "NumberOfSlices", "NumberOfTimeSlices")
        dynamic = numbers([frame.header.get(name) for name in names], 3)
        if dynamic is not None and dynamic[1] > 0 and dynamic[2] > 1:
            return float((dynamic[0] - 1) // dynamic[1] + 1)
    return found


def _volume_slices(header: pydicom.Dataset) -> int:
    """Return how many slices a volume of PET has; 0 for other images, whose headers vary."""
    found = numbers([header.get("NumberOfSlices")], 1)
    return int(found[0]) if found and header.get("Modality") == "PT" else 0


def _acquired(header: pydicom.Dataset) -> int:
    """Return how many images the acquisition has; 0 if that is not told, or of another one."""
    found = numbers([header.get("ImagesInAcquisition")], 1)
    kind = header.get("ImageType") or ()
    return int(found[0]) if found and kind and kind[0] == "ORIGINAL" else 0


def _plain(form: str) -> Callable[[Sequence[Any]], list[str]]:
    """Return a function that gives each value a word; none for a missing value."""
    return lambda values: ["" if value is None else form.format(value) for value in values]


def _kinds(values: Sequence[Any]) -> list[str]:
    """Return of each image type what the others do not share."""
    parts = [[] if value is None else str(value).split("/") for value in values]
    common = set(parts[0]).intersection(*parts[1:])
    return ["/".join(word for word in own if word not in common) for own in parts]


def _indices(values: Sequence[Any]) -> list[str]:
    """Return of each frame's indices those that differ."""
    common = set(values[0] or ()).intersection(*(value or () for value in values[1:]))
    return [
        ", ".join(f"{name} {index}" for name, index in value or () if (name, index) not in common)
        for value in values
    ]


def _numbered(values: Sequence[Any]) -> list[str]:
    known = [value for value in values if value is not None]
    return ["" if v is None else f"direction {known.index(v) + 1}" for v in values]


_TOLD: dict[str, Callable[[Frame], Any]] = {
    "b": _b_value,
    "echo": _number("", "EchoNumbers"),
    "time": _time_slice,
    "component": _text("MRImageFrameTypeSequence", "ComplexImageComponent"),
    "stack": _text("FrameContentSequence", "StackID"),
    "kind": _text("MRImageFrameTypeSequence", "FrameType", "ImageType"),
    "CT kind": _text("CTImageFrameTypeSequence", "FrameType"),
    "TE": _number("MREchoSequence", "EffectiveEchoTime", "EchoTime"),
    "TI": _number("MRModifierSequence", "InversionTimes", "InversionTime"),
    "flip": _number("MRTimingAndRelatedParametersSequence", "FlipAngle"),
    "labelling": _text("MRArterialSpinLabelingSequence", "ASLContext"),
    "direction": _direction,
    "heart": _number(
        "CardiacSynchronizationSequence",
        "NominalPercentageOfCardiacPhase",
    ),
    "kV": _number("CTXRayDetailsSequence", "KVP"),
    "kernel": _text("CTReconstructionSequence", "ConvolutionKernel"),
    "acquisition": _number("FrameContentSequence", "FrameAcquisitionNumber", "AcquisitionNumber"),
    "trigger": _number(
        "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "TriggerTime"
    ),
    "dimensions": _dimensions,
    "clock": _text(
        "FrameContentSequence", "FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime"
    ),
}
# What always tells stacks apart, what does if planes would be at one position, and what does by
# its order there.
_ALWAYS = ("b", "echo", "time", "component", "stack")
_IF_DOUBLED = (
    "kind", "CT kind", "labelling", "TE", "TI", "flip", "direction", "heart", "kV", "kernel",
    "acquisition", "dimensions",
)  # fmt: skip
_BY_RANK = {"trigger": "phase", "clock": "time"}
_WORDS: dict[str, Callable[[Sequence[Any]], list[str]]] = {
    "b": _plain("b={:g}"),
    "echo": _plain("echo {:g}"),
    "time": _plain("time {:g}"),
    "component": lambda values: [(value or "").lower() for value in values],
    "stack": _plain("stack {}"),
    "kind": _kinds,
    "CT kind": _kinds,
    "flip": _plain("flip angle {:g}"),
    "labelling": lambda values: [(value or "").lower() for value in values],
    "TE": _plain("TE={:g} ms"),
    "TI": _plain("TI={:g} ms"),
    "direction": _numbered,
    "heart": _plain("{:g}% of the heartbeat"),
    "kV": _plain("{:g} kV"),
    "kernel": _plain("kernel {}"),
    "acquisition": _plain("acquisition {:g}"),
    "dimensions": _indices,
}
