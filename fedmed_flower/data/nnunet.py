"""Cases of a folder as nnU-Net has it: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz.

F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 18, 203-211, 2021. The layout is that of version 2: its dataset.json
names channels, classes and the ending of the files, and lists no case.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed_flower.data.bounded import leads_out, quoted, real_path
from fedmed_flower.errors import InputError, shown
from fedmed_flower.images.names import plain_name
from fedmed_flower.images.photographs import PICTURES

_IMAGES = "imagesTr"
_MASKS = "labelsTr"
_BACKGROUND = "background"
_IGNORED = "ignore"
_ORDER = "regions_class_order"


def is_nnunet(content: Mapping[str, Any]) -> bool:
    """Return whether a dataset.json is nnU-Net's, of version 2."""
    return "training" not in content and "channel_names" in content


def read_cases(
    content: Mapping[str, Any], file: Path, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Return an entry for each case, by its name: ``image``, with a path a channel, and ``label``.

    A case that lacks a channel or its mask is added to ``problems``, and so is a file that belongs
    to no case. If ``channel_names`` names the colours of pictures, a case is one picture.

    Raises
    ------
    InputError
        If ``channel_names`` or ``file_ending`` is not as nnU-Net has it, or one of the two folders
        is not there or a link out of the dataset's folder.
    """
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not re.fullmatch(r"(\.\w{1,10}){1,2}", ending):
        raise InputError(
            f'{file}: "file_ending" must be one as ".nii.gz", as in nnU-Net, got {quoted(ending)}'
        )
    count = _channels(content["channel_names"], file)
    masks = {name.removesuffix(ending) for name in _names(file, _MASKS, ending)}
    images: dict[str, dict[int, str]] = defaultdict(dict)
    for name in _names(file, _IMAGES, ending):
        channel = re.fullmatch(r"(.+)_([0-9]{4})", name.removesuffix(ending))
        if channel is None or int(channel[2]) >= count:
            problems.append(
                f"{file.name}: {_IMAGES}/{name} is no channel of a case: those are called "
                f"CASE_0000{ending}, up to {count - 1:04}"
            )
        else:
            images[channel[1]][int(channel[2])] = name
    coloured = ending.lower() in PICTURES and all(set(found) == {0} for found in images.values())
    entries = {}
    cases = sorted({*images, *masks})
    for case in cases:
        names = [f"{case}_{number:04}{ending}" for number in range(1 if coloured else count)]
        lacking = [f"{_IMAGES}/{name}" for name in names if name not in images[case].values()]
        lacking += [] if case in masks else [f"{_MASKS}/{case}{ending}"]
        if lacking:
            problems.append(f"{file.name}, case {case}: {', '.join(lacking)} is not there")
            continue
        paths = [f"{_IMAGES}/{name}" for name in names]
        image = paths if len(paths) > 1 else paths[0]
        entries[case] = {"image": image, "label": f"{_MASKS}/{case}{ending}"}
    if content.get("numTraining", len(cases)) != len(cases):
        problems.append(
            f'{file.name}: "numTraining" says {quoted(content["numTraining"])}, and there are '
            f"{len(cases)} cases"
        )
    return entries


def has_regions(content: Mapping[str, Any]) -> bool:
    """Return whether ``labels`` has regions, of which one at least is a list of values."""
    labels = content.get("labels")
    return isinstance(labels, dict) and any(isinstance(value, list) for value in labels.values())


def numbered_classes(content: Mapping[str, Any], file: Path, problems: list[str]) -> Any:
    """Return ``labels``; a class that is to be ignored is a problem."""
    labels = content.get("labels")
    if isinstance(labels, dict) and _IGNORED in labels:
        problems.append(
            f'{file.name}: "labels" has a class "ignore", which is not left out of training and '
            "figures: it counts as any other class"
        )
    return labels


def read_regions_of(
    content: Mapping[str, Any], file: Path, problems: list[str]
) -> dict[str, tuple[int, ...]]:
    """Return the regions of ``labels``, with the values of masks that belong to each.

    Values that are to be ignored belong to no region: that there are some is a problem.

    Raises
    ------
    InputError
        If a region does not hold whole numbers from 1 on, each once; if two regions have one name;
        if ``regions_class_order`` does not name a value of each region, in their order.
    """
    labels: Mapping[str, Any] = content["labels"]
    regions: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        if name == _IGNORED:
            problems.append(
                f'{file.name}: "labels" has values to "ignore", which cannot be left out of '
                "training and figures: masks that hold them are rejected"
            )
            continue
        values = value if isinstance(value, list) else [value]
        is_background = len(values) == 1 and type(values[0]) is int and values[0] == 0
        if name == _BACKGROUND and not is_background:
            raise InputError(f'{file}: "background" must be 0, got {quoted(value)}')
        if is_background:
            continue
        whole = all(type(one) is int and one > 0 for one in values)
        if not whole or not values or len({*values}) < len(values):
            raise InputError(
                f'{file}: region "{shown(name)}" of "labels" must hold whole numbers from 1 on, '
                f"each once, got {quoted(value)}"
            )
        regions[name] = tuple(values)
    if len({*map(plain_name, regions)} - {""}) < len(regions):
        raise InputError(
            f'{file}: regions of "labels" must differ by more than case, blanks, "_" and "-", got '
            f"{shown(', '.join(regions), 200)}"
        )
    if _ORDER in content:
        _require_order(content[_ORDER], regions, file)
    return regions


def _require_order(order: Any, regions: Mapping[str, Sequence[int]], file: Path) -> None:
    """Raise `InputError` if the values that nnU-Net writes for regions are not theirs."""
    fits = isinstance(order, list) and len(order) == len(regions)
    if not fits or not all(
        value in values for value, values in zip(order, regions.values(), strict=True)
    ):
        listed = "; ".join(
            f"{name} of {', '.join(map(str, values))}" for name, values in regions.items()
        )
        raise InputError(
            f'{file}: "{_ORDER}" must name a value of each region in their order, '
            f"{shown(listed, 300)}, got {quoted(order)}"
        )


def _channels(names: Any, file: Path) -> int:
    """Return the number of channels."""
    if not isinstance(names, dict) or {*names} != {
        str(number) for number in range(len(names) or 1)
    }:
        raise InputError(
            f'{file}: "channel_names" must number the channels "0", "1", ..., as in nnU-Net, got '
            f"{quoted(names)}"
        )
    return len(names)


def _names(file: Path, folder: str, ending: str) -> Sequence[str]:
    """Return the names of the files with an ending in a folder beside dataset.json."""
    place = file.parent / folder
    if not place.is_dir():
        raise InputError(f"{file}: the folder {folder} is not there, which nnU-Net has beside it")
    if leads_out(place, real_path(file.parent)):
        raise InputError(f"{place} is a link out of the folder: copy its target into the folder")
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
    return [name for name in names if name.endswith(ending)]
