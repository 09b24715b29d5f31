"""Settings as frozen dataclasses, read from a Flower run config in kebab-case."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Self

from flwr.app import UserConfig, UserConfigValue

from fedmed_flower.errors import InputError

# With more rounds, planning a schedule and the noise would only keep a hospital busy.
MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class Section:
    """Base of a group of settings: the field `local_epochs` is the key ``local-epochs``.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Warmup(Section):
    ...     warmup_rounds: int = 0
    ...
    ...     def __post_init__(self):
    ...         self.require_within(0, 100, "warmup_rounds")
    >>> Warmup.from_run_config({"warmup-rounds": 3})
    Warmup(warmup_rounds=3)
    >>> Warmup.from_run_config({"warmup-rounds": -1})
    Traceback (most recent call last):
    fedmed_flower.errors.InputError: warmup-rounds must be from 0 to 100, got -1
    """

    @classmethod
    def from_run_config(cls, config: UserConfig) -> Self:
        """Read the settings; a setting that the config lacks keeps its default.

        Raises
        ------
        InputError
            If a value has the wrong type or is out of range; the error names key, bound and value.
        """
        values: dict[str, Any] = {}
        for entry in fields(cls):
            key = entry.name.replace("_", "-")
            if key in config:
                values[entry.name] = with_type_of(entry.default, config[key], key)
        return cls(**values)

    def require(self, name: str, fulfilled: bool, bound: str) -> None:
        """Raise `InputError` if `fulfilled` is false: the field must be what `bound` says."""
        if not fulfilled:
            key, value = name.replace("_", "-"), getattr(self, name)
            raise InputError(f"{key} must be {bound}, got {value!r}")

    def require_at_least(self, bound: int, *names: str) -> None:
        """Raise `InputError` if a field is below `bound`."""
        for name in names:
            self.require(name, getattr(self, name) >= bound, f"at least {bound}")

    def require_within(self, low: float, high: float, *names: str) -> None:
        """Raise `InputError` if a field is below `low` or above `high`."""
        for name in names:
            self.require(name, low <= getattr(self, name) <= high, f"from {low:,} to {high:,}")

    def require_positive(self, *names: str) -> None:
        """Raise `InputError` if a field is not above 0 or not finite."""
        for name in names:
            value = getattr(self, name)
            self.require(name, value > 0 and math.isfinite(value), "above 0 and finite")


def with_type_of(default: Any, value: Any, key: str) -> Any:
    """Return `value` if it has the type of `default`; an int may stand for a float.

    Raises
    ------
    InputError
        If the types differ, or if an int is too large for a float.
    """
    if isinstance(default, float) and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise InputError(f"{key} must be a number between -1e308 and 1e308") from None
    if type(value) is not type(default):
        raise InputError(f"{key} must be of type {type(default).__name__}, got {value!r}")
    return value


def override(defaults: UserConfig, texts: Collection[str]) -> UserConfig:
    """Return an app's run config with ``key=value`` texts applied.

    Parameters
    ----------
    defaults : dict
        The run config that the app declares; only its keys can be set.
    texts : collection of str
        Each value is read as TOML. If the default is a text, the value needs no quotes.

    Raises
    ------
    InputError
        If a text has no ``=``, the key is unknown or the value has the wrong type.
    """
    config = dict(defaults)
    for text in texts:
        key, separator, raw = (part.strip() for part in text.partition("="))
        if not separator or not key:
            raise InputError(f"-c takes key=value, got {text!r}")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(defaults))}"
            raise InputError(f"the app has no setting {key!r}: {hint}")
        config[key] = with_type_of(defaults[key], _parse(raw, defaults[key]), key)
    return config


def _parse(raw: str, default: UserConfigValue) -> UserConfigValue:
    """Read a text as one TOML value; return the text itself if it is none, or a text is needed."""
    try:
        found = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    value = found["value"]
    if len(found) > 1 or not isinstance(value, bool | int | float | str):
        return raw
    return raw if isinstance(default, str) and not isinstance(value, str) else value
