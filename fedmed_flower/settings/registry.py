"""All settings: what the docs list, and what tells a key from a typing error.

Server and hospital each check for themselves before anything starts. Neither needs to import the
other: all sections of this package stand here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedmed_flower.settings.bags import BagSettings
from fedmed_flower.settings.disclosure import DisclosureSettings
from fedmed_flower.settings.imaging import ImagingSettings
from fedmed_flower.settings.methods import (
    APFLSettings,
    DittoSettings,
    FedDynSettings,
    FedProxSettings,
    FedRepSettings,
    MethodSettings,
    MoonSettings,
)
from fedmed_flower.settings.model import ModelSettings
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.section import Section, key_of, setting_of
from fedmed_flower.settings.secure import SecureSettings
from fedmed_flower.settings.simulation import SimulationSettings
from fedmed_flower.settings.study import Study
from fedmed_flower.settings.survey import SurveySettings
from fedmed_flower.settings.survival import SurvivalSettings
from fedmed_flower.settings.tabular import TabularSettings
from fedmed_flower.settings.text import expand, text_of, unknown_key
from fedmed_flower.settings.training import Settings
from fedmed_flower.settings.trees import TreeSettings

if TYPE_CHECKING:
    from flwr.app import UserConfig, UserConfigValue

Sections = Sequence[type[Section]]


@runtime_checkable
class Sectioned(Protocol):
    """A ClientApp that knows which settings it reads, such as one of this package."""

    sections: Sections
    node_keys: Collection[str]


# Of the methods for hospitals that differ.
METHODS: Sections = (
    FedProxSettings,
    FedDynSettings,
    DittoSettings,
    APFLSettings,
    FedRepSettings,
    MoonSettings,
)

# In the order of the docs. A key of several sections is listed in the first.
RUN: Sections = (
    Plan,
    SimulationSettings,
    Settings,
    PrivacySettings,
    DisclosureSettings,
    SecureSettings,
    MethodSettings,
    *METHODS,
    ModelSettings,
    ImagingSettings,
    BagSettings,
    TabularSettings,
    SurvivalSettings,
    TreeSettings,
    Study,
    SurveySettings,
)


@dataclass(frozen=True)
class Entry:
    """A setting as the docs list it.

    Attributes
    ----------
    key : str
    section : type of Section
        The first that has the key.
    default : bool, int, float or str
    allowed : str
        What a value must be; empty if every value of the default's type will do.
    unit, meaning : str
    where : {"run config", "node config"}
    """

    key: str
    section: type[Section]
    default: UserConfigValue
    allowed: str
    unit: str
    meaning: str
    where: str


def entries(sections: Iterable[type[Section]], where: str = "run config") -> list[Entry]:
    """Return the settings of sections, each key once."""
    listed: dict[str, Entry] = {}
    for section in sections:
        for entry in fields(section):
            if entry.default is MISSING:
                raise TypeError(f"{section.__name__}.{entry.name} needs a default")
            known = setting_of(entry)
            allowed = "" if known.allowed is None else known.allowed.words
            key = key_of(entry.name)
            new = Entry(key, section, entry.default, allowed, known.unit, known.meaning, where)
            listed.setdefault(key, new)
    return list(listed.values())


def node_entries(own: Collection[str] = ()) -> list[Entry]:
    """Return the settings of a hospital's node config; `own` are keys that an app adds."""
    where = "node config"
    added = [
        Entry(key, NodeSettings, "", "", "", "The app's own, which its client reads.", where)
        for key in own
    ]
    return [*entries([NodeSettings], where), *added]


def defaults(own: Sections = ()) -> UserConfig:
    """Return each key of the run config with its default; `own` are an app's own sections."""
    return dict(_defaults(tuple(own)))


@cache
def _defaults(own: tuple[type[Section], ...]) -> UserConfig:
    return {entry.key: entry.default for entry in entries([*RUN, *own])}


@cache
def listed() -> frozenset[str]:
    """Return the keys that `fedmed settings` lists without an app."""
    return frozenset(entry.key for entry in (*entries(RUN), *node_entries()))


def choices(own: Sections = ()) -> set[str]:
    """Return the keys whose values are texts of a given form, which cannot name a path or code."""
    return {
        key_of(entry.name)
        for section in (*RUN, *own)
        for entry in fields(section)
        if isinstance(entry.default, str) and setting_of(entry).allowed is not None
    }


def sections_of(cls: type[Any]) -> Sections:
    """Return the sections that a class and its bases name in `sections`, the bases' first."""
    named = [vars(base).get("sections", ()) for base in reversed(cls.__mro__)]
    return list(dict.fromkeys(section for sections in named for section in sections))


def require_known(config: UserConfig, own: Sections = ()) -> None:
    """Refuse a run config with a key that nobody reads, which would be ignored without a word.

    Parameters
    ----------
    config : dict
    own : sequence of Section classes
        An app's own.

    Raises
    ------
    InputError
        It names the key and the nearest known one.
    """
    known = _defaults(tuple(own))
    for key in expand(config):
        if key not in known:
            own_keys = "a field of a Section that its client names in `sections`"
            more = f" (an app's own key must be {own_keys})"
            raise unknown_key("unknown setting", key, known, more)


def effective(config: UserConfig, sections: Sections) -> UserConfig:
    """Return the value of each key of some sections, set or default.

    Raises
    ------
    InputError
        As `Section.from_run_config`.
    """
    values: UserConfig = {}
    for section in sections:
        for key, value in section.from_run_config(config).values().items():
            values.setdefault(key, value)
    return values


def complete(config: UserConfig, own: Sections = ()) -> UserConfig:
    """Return a run config with the default of each known key that it lacks."""
    return defaults(own) | expand(config)


def as_markdown() -> str:
    """Return the tables of the documentation: a section each, then the node config."""
    parts = []
    seen: set[str] = set()
    for section in (*RUN, NodeSettings):
        where = "node config" if section is NodeSettings else "run config"
        listed = entries([section], where)
        if where == "run config":
            listed = [entry for entry in listed if entry.key not in seen]
            seen.update(entry.key for entry in listed)
        if listed:
            lines = [_row(entry) for entry in listed]
            title = (section.__doc__ or "").partition("\n")[0].rstrip(".").replace("``", "`")
            head = "| setting | default | allowed | meaning |\n|---|---|---|---|"
            parts.append("\n".join([f"## {title}", "", head, *lines]))
    return "\n\n".join(parts)


def _row(entry: Entry) -> str:
    default = text_of(entry.default)
    allowed = entry.allowed
    if not allowed:
        allowed = {bool: "true or false", str: "a text"}.get(type(entry.default), "a number")
    unit = f", {entry.unit}" if entry.unit else ""
    meaning = entry.meaning.replace("|", "\\|")
    return f"| `{entry.key}` | {f'`{default}`' if default else ''} | {allowed}{unit} | {meaning} |"
