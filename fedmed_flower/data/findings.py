"""Labels of several findings in one image, each there, not there or not read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.checks import Finding, check_row
from fedmed_flower.data.site import Row, some_of


def check_findings(row: Row, spatial_dims: int | None, findings: Sequence[str]) -> Finding:
    """Read the image of a row, and look at its label; a problem is part of what is returned.

    Parameters
    ----------
    row : dict
        ``image``, ``patient``, and ``label``: a dict by finding of 1 (there), 0 (not there) or None
        (not read).
    spatial_dims : int or None
        As in `read_image`.
    findings : sequence of str
        Those that a label may name.
    """
    is_whole = isinstance(row, Mapping) and "label" in row
    # A label that passes as a class, so that the other parts are checked.
    found = check_row({**row, "label": 0} if is_whole else row, spatial_dims, masks=False)
    found = replace(found, label=None)
    if found.problem is not None:
        return found
    if problem := _problem_of(row["label"], findings):
        return replace(found, problem=problem, mislabelled=True)
    if not read_in(row["label"]):
        return replace(found, problem="none of its findings was read")
    return found


def is_unread(value: Any) -> bool:
    """Return whether the value of a finding says that nobody looked for it."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def read_in(label: Any) -> list[str]:
    """Return the findings that a label says something of."""
    if not isinstance(label, Mapping):
        return []
    return [name for name, value in label.items() if not is_unread(value)]


def _problem_of(label: Any, findings: Sequence[str]) -> str:
    """Return why a label is not one of findings; empty if it is."""
    if not isinstance(label, Mapping):
        return f"label {quoted(label)} is no dict of findings, such as {{{findings[0]!r}: 1}}"
    for name, value in label.items():
        if name not in findings:
            return f"label names {quoted(name)}, which is none of the findings {some_of(findings)}"
        if not (is_unread(value) or _is_binary(value)):
            return f"label of {name} is {quoted(value)}: it must be 1, 0 or None"
    return ""


def _is_binary(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and value in (0, 1)
