"""Names of structures, compared as people write them."""

from __future__ import annotations

import re
from typing import Any

from fedmed_flower.errors import InputError

_SEPARATORS = re.compile(r"[\s_-]+")


def plain_name(name: str) -> str:
    """Return a name in the form in which it is compared.

    Case, blanks, underscores and hyphens do not count. Between two digits they count as one blank,
    so that "T1-1" is not "T11".
    """
    return _SEPARATORS.sub(_joined, name.casefold().strip(" \t\n_-"))


def listed_names(value: Any) -> tuple[str, ...]:
    """Return the names of a list, or of a text in which ";" separates them; None has no name.

    Raises
    ------
    InputError
        If it is something else.
    """
    if value is None:
        return ()
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise InputError(f'names must be texts, as in "WT;TC;ET", got {value!r:.100}')
    return tuple(name for part in parts if (name := part.strip()))


def _joined(separator: re.Match[str]) -> str:
    before = separator.string[separator.start() - 1 : separator.start()]
    after = separator.string[separator.end() : separator.end() + 1]
    return " " if before.isdigit() and after.isdigit() else ""
