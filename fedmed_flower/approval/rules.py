"""Which values of a setting a hospital allows: one of several, a range, or any."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import UserConfig, UserConfigValue

from fedmed_flower.errors import InputError
from fedmed_flower.settings.text import text_of

ANY = "*"
_MEANS = "KEY=VALUE, KEY=VALUE|VALUE, KEY=LOW..HIGH or KEY=*"
_RANGE = re.compile(r"(.+?)\.\.(.+)")


@dataclass(frozen=True)
class Rule:
    """What a setting may be.

    Attributes
    ----------
    values : tuple
        It may be one of these.
    low, high : float
        Or a number from one to the other; NaN if no number is allowed by a range.
    any : bool
        Or anything.
    """

    values: tuple[UserConfigValue, ...] = ()
    low: float = math.nan
    high: float = math.nan
    any: bool = False

    def allows(self, value: object) -> bool:
        """Return whether a setting may have a value."""
        if self.any or any(same(value, each) for each in self.values):
            return True
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high  # type: ignore[operator]

    @property
    def words(self) -> str:
        """What is allowed, as `parse` reads it."""
        if self.any:
            return ANY
        if self.values:
            return "|".join(text_of(value) for value in self.values)
        return f"{text_of(self.low)}..{text_of(self.high)}"

    def content(self) -> dict[str, Any]:
        """Return the rule as plain values, for its file."""
        if self.any:
            return {"any": True}
        if self.values:
            return {"one-of": list(self.values)}
        return {"least": self.low, "most": self.high}


def same(one: object, other: object) -> bool:
    """Return whether two settings are equal; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def parse(text: str) -> tuple[str, Rule]:
    """Return key and rule of a text such as ``num-server-rounds=1..50``.

    Raises
    ------
    InputError
        If it is none, or a range is empty.
    """
    key, separator, raw = (part.strip() for part in text.partition("="))
    if not separator or not key or not raw:
        raise InputError(f"a setting is allowed by {_MEANS}, got {text!r}")
    if raw == ANY:
        return key, Rule(any=True)
    found = _RANGE.fullmatch(raw)
    if found is not None:
        return key, _range(key, _value(found[1]), _value(found[2]))
    return key, Rule(tuple(_value(part) for part in raw.split("|")))


def rule_of(key: str, content: object) -> Rule:
    """Return the rule that `Rule.content` has written.

    Raises
    ------
    InputError
        If it is none.
    """
    if isinstance(content, Mapping):
        if {*content} == {"any"} and content["any"] is True:
            return Rule(any=True)
        if {*content} == {"least", "most"}:
            return _range(key, content["least"], content["most"])
        values = content.get("one-of")
        plain = isinstance(values, list) and all(_is_value(value) for value in values)
        if {*content} == {"one-of"} and plain and values:
            return Rule(tuple(values))
    raise InputError(
        f"the rule of {key} must be {{any = true}}, {{least = NUMBER, most = NUMBER}} or "
        f"{{one-of = [VALUE, ...]}}, got {content!r}"
    )


def changed(before: UserConfig, after: UserConfig) -> list[str]:
    """Return the keys that one of two configs lacks, or of which the values differ, sorted."""
    return [
        key
        for key in sorted({*before, *after})
        if not (key in before and key in after and same(before[key], after[key]))
    ]


def refused(before: UserConfig, after: UserConfig, rules: Mapping[str, Rule]) -> list[str]:
    """Return in words each setting that a run changes and that no rule allows.

    Parameters
    ----------
    before : dict
        The settings of a run that changes none.
    after : dict
        Those of the run.
    rules : mapping of str to Rule
        By the key of the setting.
    """
    found = []
    for key in changed(before, after):
        rule = rules.get(key)
        if rule is not None and key in after and rule.allows(after[key]):
            continue
        value = text_of(after[key]) if key in after else "nothing"
        declared = text_of(before[key]) if key in before else "nothing"
        allowed = f"the app's {declared or 'empty text'}"
        if rule is not None:
            allowed += f" or {rule.words}"
        found.append(f"{key} is {value or 'empty'}, allowed is {allowed}")
    return found


def _range(key: str, low: object, high: object) -> Rule:
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise InputError(f"the range of {key} must be of two numbers, got {value!r}")
    if low > high:  # type: ignore[operator]
        raise InputError(f"the range of {key} is empty: {low} is above {high}")
    return Rule(low=low, high=high)  # type: ignore[arg-type]


def _is_value(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _value(raw: str) -> UserConfigValue:
    """Read a value as TOML; what is none is a text."""
    raw = raw.strip()
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        return raw
    return value if _is_value(value) else raw
