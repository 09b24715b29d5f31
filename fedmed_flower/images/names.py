"""Names of structures, compared as people write them."""

from __future__ import annotations

import re

_SEPARATORS = re.compile(r"[\s_-]+")


def plain_name(name: str) -> str:
    """Return a name in the form in which it is compared.

    Case, blanks, underscores and hyphens do not count. Between two digits they count as one blank,
    so that "T1-1" is not "T11".
    """
    return _SEPARATORS.sub(_joined, name.casefold().strip(" \t\n_-"))


def _joined(separator: re.Match[str]) -> str:
    before = separator.string[separator.start() - 1 : separator.start()]
    after = separator.string[separator.end() : separator.end() + 1]
    return " " if before.isdigit() and after.isdigit() else ""
