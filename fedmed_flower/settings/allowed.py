"""What a setting may be, as data: the check, the error, the docs and the tests come from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

_MOST_NUMBER = 1e9


class Allowed(Protocol):
    """The values that a setting may have.

    Attributes
    ----------
    words : str
        As an error and the docs say it, after "must be".
    """

    @property
    def words(self) -> str:
        """The bound in words."""

    def holds(self, value: Any) -> bool:
        """Return whether a value of the setting's type is allowed."""

    def wrong(self) -> list[Any]:
        """Return some values of the setting's type that are not allowed, for tests."""


@dataclass(frozen=True)
class Within:
    """Numbers from `low` to `high`.

    `above` and `below` leave `low` and `high` out. `or_zero` allows 0 as well. NaN and the
    infinities are never allowed. If `low` is an int, so is the setting.

    Examples
    --------
    >>> Within(1, 10_000).words
    'from 1 to 10,000'
    >>> Within(0.0, above=True).words
    'above 0 and finite'
    >>> Within(1e-6, 1, or_zero=True).holds(0)
    True
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    or_zero: bool = False

    @property
    def words(self) -> str:
        """The bounds."""
        low, high = _text(self.low), _text(self.high)
        if self.high == math.inf:
            finite = " and finite" if isinstance(self.low, float) else ""
            text = f"{'above' if self.above else 'at least'} {low}{finite}"
        elif self.above or self.below:
            first = "above" if self.above else "at least"
            text = f"{first} {low} and {'below' if self.below else 'at most'} {high}"
        else:
            text = f"from {low} to {high}"
        return f"{text}, or 0" if self.or_zero else text

    def holds(self, value: float) -> bool:
        """Return whether a number is within the bounds."""
        if self.or_zero and value == 0:
            return True
        if not math.isfinite(value):
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def wrong(self) -> list[float]:
        """Return numbers on both sides of the bounds."""
        values: list[float] = [self.low - 1]
        values += [self.low] if self.above else []
        if self.high < math.inf:
            values += [self.high + 1, self.high * 2 + 1]
            values += [self.high] if self.below else []
        if isinstance(self.low, float):
            values += [-math.inf, math.nan, math.inf]
        return [value for value in values if not self.holds(value)]


@dataclass(frozen=True)
class OneOf:
    """One of some texts; `said` is how an error names them if they are many."""

    values: tuple[str, ...]
    said: str = ""

    @property
    def words(self) -> str:
        """The texts."""
        return self.said or f"one of {', '.join(self.values)}"

    def holds(self, value: str) -> bool:
        """Return whether a text is one of them."""
        return value in self.values

    def wrong(self) -> list[str]:
        """Return texts that are near to one of them."""
        last = self.values[-1]
        near = ["", f"{last} ", last.upper(), last.lower(), f"{last},{last}", "other"]
        return [text for text in near if text not in self.values]


@dataclass(frozen=True)
class SomeOf:
    """Some of a few texts with commas between them, or an empty text."""

    values: tuple[str, ...]

    @property
    def words(self) -> str:
        """The texts."""
        return f"empty or some of {', '.join(self.values)}, with commas between them"

    def holds(self, value: str) -> bool:
        """Return whether a text lists only these."""
        return not value.strip() or {*parts_of(value)} <= {*self.values}

    def wrong(self) -> list[str]:
        """Return texts that list another one."""
        last = self.values[-1]
        return [f"{last},", f"{last}x", f"{last};{last}", f"{last},other"]


def parts_of(value: str) -> list[str]:
    """Return the parts of a text with commas between them."""
    return [part.strip() for part in value.split(",")]


@dataclass(frozen=True)
class Matching:
    """Texts that match a regular expression as a whole; `examples` are some that do not."""

    pattern: str
    words: str
    examples: tuple[str, ...]

    def holds(self, value: str) -> bool:
        """Return whether a text matches."""
        return re.fullmatch(self.pattern, value) is not None

    def wrong(self) -> list[str]:
        """Return texts that do not match."""
        return list(self.examples)


@dataclass(frozen=True)
class Numbers:
    """Texts of numbers above 0 with commas between them, or empty; `whole` allows integers only."""

    whole: bool = False

    @property
    def words(self) -> str:
        """The form of the text."""
        return "empty or numbers above 0 separated by commas"

    def holds(self, value: str) -> bool:
        """Return whether a text has that form."""
        if not value.strip():
            return True
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            return False
        if not all(0 < number < _MOST_NUMBER for number in numbers):
            return False
        return not self.whole or all(number == int(number) for number in numbers)

    def wrong(self) -> list[str]:
        """Return texts of another form."""
        texts = ["1,x", "1,0", "nan", "1,", "1;1", "-1", "1e300", "inf"]
        return [*texts, "1.5"] if self.whole else texts


def _text(number: float) -> str:
    """Return a number as errors show it: 10000.0 is 10,000."""
    return f"{int(number):,}" if math.isfinite(number) and number == int(number) else f"{number}"
