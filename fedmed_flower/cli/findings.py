"""What was found in a hospital's images: as a table, as lines, and as a file."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from fedmed_flower.errors import InputError, shown
from fedmed_flower.files import write_atomic, write_rows

if TYPE_CHECKING:
    from fedmed_flower.data.checks import Finding

# Bounds the values that are listed: an image that was mistaken for a mask may hold thousands.
_MOST_VALUES = 12
_MOST_KINDS = 5
_COLUMNS = ("patient", "image", "split", "shape", "spacing", "axes", "low", "high", "label")


def table_of(images: Sequence[Finding], folder: Path) -> Table:
    """Return a table of the images, a line each; columns that are empty are left out."""
    columns = {
        "patient": [finding.patient for finding in images],
        "image": [finding.image.replace(f"{folder}/", "") for finding in images],
        "split": [finding.split for finding in images],
        "shape": [_times(finding.shape) for finding in images],
        "spacing (mm)": [_times(finding.spacing) for finding in images],
        "axes": [finding.orientation for finding in images],
        "values": [
            "" if finding.low is None else f"{finding.low:g} to {finding.high:g}"
            for finding in images
        ],
        "label": [_label(finding.label) for finding in images],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in filled:
        table.add_column(name, overflow="fold")
    for finding, *cells in zip(images, *filled.values(), strict=True):
        table.add_row(*cells, style="red" if finding.problem else None)
    return table


def summary_of(images: Sequence[Finding], num_classes: int | None = None) -> list[str]:
    """Return lines about all images: how many of which class, size, spacing and orientation.

    Parameters
    ----------
    images : sequence of Finding
    num_classes : int or None
        Classes without any row are named too, if the number of classes is known.
    """
    lines = _classes(images, num_classes)
    splits = Counter(finding.split for finding in images if finding.split)
    parts = ", ".join(f"{name} {count}" for name, count in splits.items())
    lines.append(
        f"{len(images)} images of {len({finding.patient for finding in images})} patients"
        + (f": {parts}" if parts else "")
    )
    read = [finding for finding in images if finding.shape]
    flat = [finding.shape[1:] for finding in read if len(finding.shape) == 3]
    if len(set(flat)) > 1:
        lines.append(_kinds("sizes", "image-size", [_times(shape) for shape in flat]))
    if read:
        lines.append(_kinds("spacings", "spacing", [_times(finding.spacing) for finding in read]))
    if axes := [finding.orientation for finding in read if finding.orientation]:
        lines.append(_kinds("orientations", "orientation", axes))
    return lines


def write_findings(path: Path, found: Iterable[tuple[str, Finding]]) -> None:
    """Write findings as CSV or JSON, as the path ends; the file appears whole or not at all.

    Parameters
    ----------
    path : Path
    found : iterable of (str, Finding)
        Each with the name of its hospital, which is left out if it is empty everywhere.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    entries = [{"hospital": hospital, **_entry(finding)} for hospital, finding in found]
    if not any(entry["hospital"] for entry in entries):
        entries = [{k: value for k, value in entry.items() if k != "hospital"} for entry in entries]
    if path.suffix.lower() == ".json":
        text = json.dumps(entries, indent=1) + "\n"
    else:
        hospital = ["hospital"] if entries and "hospital" in entries[0] else []
        file = io.StringIO(newline="")
        head = [*hospital, *_COLUMNS, "problem"]
        write_rows(file, [head, *([_cell(entry[name]) for name in head] for entry in entries)])
        text = file.getvalue()
    try:
        write_atomic(path, text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}") from error


def require_writable(path: Path) -> None:
    """Raise `InputError` before anything is read, if findings cannot be written to a path."""
    if path.suffix.lower() not in (".csv", ".json"):
        raise InputError(f"--out must end in .csv or .json, got {path}")
    if path.exists():
        raise InputError(f"{path} exists already: give another --out")


def problem_of(finding: Finding) -> str:
    """Return a finding's problem with its patient."""
    return (
        f"patient {finding.patient}: {finding.problem}" if finding.image else f"{finding.problem}"
    )


def _classes(images: Sequence[Finding], num_classes: int | None) -> list[str]:
    """Return how many rows have each class, and how many masks hold it."""
    numbers = [finding.label for finding in images if isinstance(finding.label, int)]
    masks = [finding.label for finding in images if isinstance(finding.label, tuple)]
    known = dict.fromkeys(range(min(num_classes or 0, 256)), 0)
    lines = []
    for title, held in (
        ("rows of each class", Counter(numbers)),
        ("images that hold each class", Counter(value for mask in masks for value in mask)),
    ):
        if held:
            counts = sorted((known | held).items())
            listed = ", ".join(f"{value} ({count})" for value, count in counts[:_MOST_VALUES])
            lines.append(f"{title}: {listed}{_more(len(counts), _MOST_VALUES)}")
    return lines


def _kinds(name: str, setting: str, values: Sequence[str]) -> str:
    """Return how often each value occurs, and which setting makes the images agree."""
    kinds = Counter(values).most_common()
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds[:_MOST_KINDS])
    hint = f"; {setting} in the run config brings them to one" if len(kinds) > 1 else ""
    return f"{name}: {listed}{_more(len(kinds), _MOST_KINDS)}{hint}"


def _more(count: int, most: int) -> str:
    return f" and {count - most} more" if count > most else ""


def _entry(finding: Finding) -> dict[str, Any]:
    values = (
        shown(finding.patient),
        shown(finding.image),
        shown(finding.split),
        list(finding.shape),
        list(finding.spacing),
        finding.orientation,
        finding.low,
        finding.high,
        list(finding.label) if isinstance(finding.label, tuple) else finding.label,
    )
    return dict(zip(_COLUMNS, values, strict=True)) | {"problem": finding.problem}


def _cell(value: Any) -> object:
    if isinstance(value, list):
        return " ".join(f"{number:g}" for number in value)
    return "" if value is None else value


def _label(label: int | tuple[int, ...] | None) -> str:
    if not isinstance(label, tuple):
        return "" if label is None else str(label)
    more = ", ..." if len(label) > _MOST_VALUES else ""
    return ", ".join(map(str, label[:_MOST_VALUES])) + more


def _times(values: Iterable[Any]) -> str:
    return "x".join(f"{value:g}" for value in values)
