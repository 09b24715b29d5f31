"""Rules that choose series among those of a patient's study: one rule a channel of the image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fedmed_flower.errors import InputError
from fedmed_flower.images.listing import DicomImage
from fedmed_flower.settings.imaging import SERIES_CONDITION, SERIES_KEYS

_WHOLE = ("slices", "number")
_ORIENTATIONS = ("axial", "coronal", "sagittal")
_COMPARED = re.compile(r"(>=|<=|=)?\s*(\d{1,9})")
_MOST_LISTED = 12


@dataclass(frozen=True)
class Condition:
    """One condition of a rule: ``key``, a comparison (=, >=, <=) and ``value``."""

    key: str
    comparison: str
    value: str

    def holds(self, image: DicomImage) -> bool:
        """Return whether an image satisfies it.

        A text matches its pattern as in a shell (``*``, ``?``, ``[...]``), without regard to case.
        """
        found = getattr(image, self.key)
        if self.key not in _WHOLE:
            return fnmatchcase(found.strip().lower(), self.value.lower())
        if found is None:
            return False
        bound = int(self.value)
        if self.comparison == "=":
            return bool(found == bound)
        return bool(found >= bound if self.comparison == ">=" else found <= bound)

    def __str__(self) -> str:
        quote = '"' if re.search(r"[\s;]", self.value) else ""
        return f"{self.key}{self.comparison}{quote}{self.value}{quote}"


@dataclass(frozen=True)
class Rule:
    """Which series is a channel: all of its conditions must hold."""

    conditions: tuple[Condition, ...]

    def holds(self, image: DicomImage) -> bool:
        """Return whether an image satisfies all conditions."""
        return all(condition.holds(image) for condition in self.conditions)

    def __str__(self) -> str:
        return " ".join(map(str, self.conditions))


class UnmatchedError(Exception):
    """The rules do not choose one series each; the text says of which there are."""


def rules_of(text: str) -> tuple[Rule, ...]:
    """Return the rules of a text such as ``modality=CT slices>=40; modality=PT``.

    Parameters
    ----------
    text : str
        Rules with ";" between them. A rule is conditions with blanks between them: a key of
        `SERIES_KEYS`, ``=`` (or ``>=``, ``<=`` for slices and number) and a value. A value with
        blanks stands in quotation marks.

    Raises
    ------
    InputError
        If the text has another form, or a value can never match.
    """
    rules: list[Rule] = []
    for part in re.findall(r"""(?:"[^"]*"|'[^']*'|[^;"'])+""", text):
        conditions = []
        for word in re.findall(r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""", part):
            found = re.fullmatch(SERIES_CONDITION, word)
            if found is None:
                raise InputError(
                    f"series: {word!r} is no condition such as modality=CT or slices>=40; the keys "
                    f"are {', '.join(SERIES_KEYS)}"
                )
            conditions.append(
                _condition("series", found[1], found[2], re.sub("[\"']", "", found[3]))
            )
        if conditions:
            rules.append(Rule(tuple(conditions)))
    return tuple(rules)


def rule_of_cells(where: str, cells: Mapping[str, Any]) -> Rule:
    """Return the rule of one line of a hospital's series.csv, whose columns are keys.

    Parameters
    ----------
    where : str
        The line's name in errors.
    cells : mapping
        Texts by key, without empty ones. In slices and number a comparison may come first, and
        several may stand there: ``>=40 <=80``.

    Raises
    ------
    InputError
        If a column is no key, all cells are empty, or a value can never match.
    """
    conditions = []
    for key, text in cells.items():
        if key not in SERIES_KEYS:
            raise InputError(
                f"{where}: {key!r} is no column of rules; they are {', '.join(SERIES_KEYS)}"
            )
        if key not in _WHOLE:
            conditions.append(_condition(where, key, "=", text))
            continue
        parts = re.findall(r"(?:[<>=]+\s*)?[^\s<>=]+|[<>=]+", text)
        for part in parts:
            found = _COMPARED.fullmatch(part)
            if found is None:
                raise InputError(f"{where}: {key} must be a number, >=40 or <=80, got {text!r}")
            conditions.append(_condition(where, key, found[1] or "=", found[2]))
    if not conditions:
        raise InputError(f"{where}: it has no condition")
    return Rule(tuple(conditions))


def chosen(rules: Sequence[Rule], images: Sequence[DicomImage]) -> tuple[DicomImage, ...]:
    """Return the image that each rule chooses among those of one study of a patient.

    Returns
    -------
    tuple of DicomImage
        In the order of the rules; empty if no rule matches any image.

    Raises
    ------
    UnmatchedError
        If a rule matches none or several, while others match; if two rules choose the same image.
    """
    matches = [[image for image in images if rule.holds(image)] for rule in rules]
    if not any(matches):
        return ()
    for rule, found in zip(rules, matches, strict=True):
        if not found:
            raise UnmatchedError(f"no series matches {rule}; there {_are(images)}")
        if len(found) > 1:
            raise UnmatchedError(
                f"{len(found)} series match {rule}: {listed(found)}; add a condition that only one "
                "of them satisfies, such as number, slices, part or description"
            )
    channels = tuple(found[0] for found in matches)
    if len({*channels}) < len(channels):
        raise UnmatchedError(f"two rules choose the same series; there {_are(images)}")
    return channels


def listed(images: Sequence[DicomImage]) -> str:
    """Return what distinguishes images, in one line; of many, the first ones."""
    texts = [str(image) for image in images[:_MOST_LISTED]]
    more = len(images) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def _are(images: Sequence[DicomImage]) -> str:
    return f"{'is' if len(images) == 1 else 'are'} {listed(images)}"


def _condition(where: str, key: str, comparison: str, value: str) -> Condition:
    """Return a condition; raise `InputError` if it could never hold."""
    if key in _WHOLE:
        if not re.fullmatch(r"\d{1,9}", value):
            raise InputError(f"{where}: {key} must be a whole number, 0 or greater, got {value!r}")
    elif comparison != "=":
        raise InputError(
            f"{where}: {key} is a text, which only = compares, got {key}{comparison}{value}"
        )
    if key == "orientation" and not any(fnmatchcase(name, value.lower()) for name in _ORIENTATIONS):
        raise InputError(
            f"{where}: orientation must be one of {', '.join(_ORIENTATIONS)}, got {value!r}"
        )
    return Condition(key, comparison, value)
