"""Settings as frozen dataclasses, read from a Flower config in kebab-case."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self, TypeVar

from fedmed_flower.settings.allowed import Allowed
from fedmed_flower.settings.text import expand, setting_error, with_type_of

if TYPE_CHECKING:
    from flwr.app import UserConfig

T = TypeVar("T", bool, int, float, str)

# With more rounds, planning a schedule and the noise would only keep a hospital busy.
MOST_ROUNDS = 100_000
# With a larger one, the weight of a stale reply would be too small a number.
MOST_EXPONENT = 10.0
_SETTING = "fedmed-setting"


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its name and its default.

    Attributes
    ----------
    meaning : str
        One or a few sentences.
    allowed : Allowed or None
        None if every value of the type is allowed.
    unit : str
        Of a number; empty if it has none.
    """

    meaning: str
    allowed: Allowed | None = None
    unit: str = ""


def setting(default: T, meaning: str, allowed: Allowed | None = None, unit: str = "") -> T:
    """Return the field of a `Section`, with what is known of it."""
    known = Setting(meaning, allowed, unit)
    made: Any = field(default=default, metadata={_SETTING: known})
    return made  # type: ignore[no-any-return]


def also(section: type[Section], name: str) -> Any:
    """Return the field of a key that another section has as well: same default, same meaning."""
    (entry,) = (entry for entry in fields(section) if entry.name == name)
    return field(default=entry.default, metadata=entry.metadata)


def setting_of(entry: Field[Any]) -> Setting:
    """Return what is known of a section's field."""
    known: Setting = entry.metadata.get(_SETTING, Setting(""))
    return known


def key_of(name: str) -> str:
    """Return the key of a field: ``local-epochs`` of `local_epochs`."""
    return name.replace("_", "-")


@dataclass(frozen=True)
class Section:
    """Base of a group of settings: the field `local_epochs` is the key ``local-epochs``.

    Each field has a default and, by `setting`, its meaning and what it may be. A value that it may
    not be is refused, from wherever it comes. A subclass that must check fields against each other
    overrides `check`.

    Examples
    --------
    >>> from fedmed_flower.settings.allowed import Within
    >>> @dataclass(frozen=True)
    ... class Warmup(Section):
    ...     warmup_rounds: int = setting(0, "Rounds of warming up.", Within(0, 100), "rounds")
    >>> Warmup.from_run_config({"warmup-rounds": 3})
    Warmup(warmup_rounds=3)
    >>> Warmup.from_run_config({"settings": "warmup-rounds = 3"})
    Warmup(warmup_rounds=3)
    >>> Warmup.from_run_config({"warmup-rounds": -1})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedmed_flower.errors.InputError: warmup-rounds must be from 0 to 100, got -1; see `fedmed ...
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            allowed = setting_of(entry).allowed
            if allowed is not None:
                self.require(entry.name, allowed.holds(getattr(self, entry.name)), allowed.words)
        self.check()

    def check(self) -> None:
        """Raise `InputError` if fields that are allowed each by itself do not go together."""

    @classmethod
    def from_run_config(cls, config: UserConfig) -> Self:
        """Read the settings; keys that are not there keep their defaults.

        Keys stand in `config` itself or in its text ``settings``, see `expand`.

        Raises
        ------
        InputError
            If a value has the wrong type or is out of range; it names key, bound and value.
        """
        given = expand(config)
        values: dict[str, Any] = {}
        for entry in fields(cls):
            key = key_of(entry.name)
            if key in given:
                values[entry.name] = with_type_of(entry.default, given[key], key)
        return cls(**values)

    def values(self) -> UserConfig:
        """Return the value of each key."""
        return {key_of(entry.name): getattr(self, entry.name) for entry in fields(self)}

    def require(self, name: str, fulfilled: bool, bound: str) -> None:
        """Raise `InputError` if a field is not as it must be."""
        if not fulfilled:
            key = key_of(name)
            raise setting_error(f"{key} must be {bound}, got {getattr(self, name)!r}", key)

    def require_positive(self, name: str) -> None:
        """Raise `InputError` if a field is not above 0 and finite."""
        value = getattr(self, name)
        self.require(name, value > 0 and math.isfinite(value), "above 0 and finite")
