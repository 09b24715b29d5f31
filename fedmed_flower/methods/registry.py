"""All methods by name, and those that an app registers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import PLAIN, Method
from fedmed_flower.settings.text import SETTINGS, setting_error
from fedmed_flower.wire import METHOD, METHOD_SETTINGS, PROXIMAL_MU

# Read when they are asked for: each loads torch.
_KNOWN: dict[str, str | type[Method]] = {
    "fedprox": "fedprox:FedProx",
    "scaffold": "scaffold:Scaffold",
    "feddyn": "feddyn:FedDyn",
    "fednova": "fednova:FedNova",
    "cyclic": "cyclic:Cyclic",
    "ditto": "ditto:Ditto",
    "apfl": "apfl:APFL",
    "fedrep": "fedrep:FedRep",
    "moon": "moon:MOON",
}


def names() -> list[str]:
    """Return the names of all methods, those of the app last."""
    return list(_KNOWN)


def register(method: type[Method]) -> type[Method]:
    """Add a method of an app; usable as a decorator, in a module that both its sides import.

    Raises
    ------
    InputError
        If it has no name, or another class has the name.
    """
    name = method.name
    if not name:
        raise InputError(f"{method.__name__} needs a name to be registered: set `name`")
    known = _KNOWN.get(name)
    # An app may be loaded twice in a process, each time with classes of its own.
    same = isinstance(known, type) and known.__qualname__ == method.__qualname__
    if known is not None and not same:
        raise InputError(f"there is a method {name!r} already: give {method.__name__} another name")
    _KNOWN[name] = method
    return method


def method_class(name: str) -> type[Method]:
    """Return the class of a name.

    Raises
    ------
    InputError
        If there is none; it names the nearest one.
    """
    found = _KNOWN.get(name)
    if found is None:
        raise setting_error(f"method must be one of {', '.join(names())}, got {name!r}", "method")
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        made: type[Method] = getattr(import_module(f"fedmed_flower.methods.{module}"), attribute)
        return made
    return found


def method_of(given: str | Method | type[Method] | None) -> Method | None:
    """Return the method that an argument names; None if it names none.

    Raises
    ------
    InputError
        If it is no method.
    """
    if given is None or given == "":
        return None
    if isinstance(given, str):
        return method_class(given)()
    if isinstance(given, type) and issubclass(given, Method):
        return given()
    if isinstance(given, Method):
        return given
    raise setting_error(f"method must be a name or a Method, got {given!r}", "method")


def method_by_settings(name: str, config: Mapping[str, Any]) -> Method | None:
    """Return a method with its settings from a config; None for ``""``.

    Raises
    ------
    InputError
        If the name is unknown or a setting is wrong.
    """
    if not name:
        return None
    found = method_class(name)
    return found(found.section.from_run_config(dict(config)))


def method_of_message(config: Mapping[str, Any]) -> Method:
    """Return the method that the config of a message names, else plain training.

    Flower's FedProx names none, and sends ``proximal-mu``.
    """
    name = str(config.get(METHOD, ""))
    settings: dict[str, Any] = {SETTINGS: str(config.get(METHOD_SETTINGS, ""))}
    if not name and PROXIMAL_MU in config:
        name = "fedprox"
        settings = {PROXIMAL_MU: config[PROXIMAL_MU]}
    return method_by_settings(name, settings) or PLAIN
