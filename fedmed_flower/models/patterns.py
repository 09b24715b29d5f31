"""Names of a network's parts by patterns, as settings give them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from fedmed_flower.errors import InputError
from fedmed_flower.settings.text import setting_error


def patterns_of(key: str, text: str, names: Sequence[str], kind: str, example: str) -> list[str]:
    """Return the patterns of a setting, each of which matches one of some names.

    Parameters
    ----------
    key : str
        The setting.
    text : str
        Patterns of `fnmatch` with commas between them.
    names : sequence of str
    kind : str
        What the names are of, as an error says it: "parameter".
    example : str
        A pattern, for the error.

    Raises
    ------
    InputError
        If a pattern is empty or matches no name.
    """
    patterns = [pattern.strip() for pattern in text.split(",")]
    if not all(patterns):
        raise setting_error(
            f"{key} must be patterns separated by commas, such as {example}, or empty, got "
            f"{text!r}",
            key,
        )
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            # Examples from all over the network, since the first three would be of one layer.
            examples = names[:: max(1, (len(names) - 1) // 2)][:3]
            such = f"{len(names)}, such as {', '.join(examples)}" if names else "none"
            raise InputError(f"{key}: no {kind} matches {pattern!r}; the network has {such}")
    return patterns


def matches(name: str, pattern: str) -> bool:
    """Return whether a name matches; ``*.decoder.*`` also matches ``decoder.conv``."""
    return fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)
