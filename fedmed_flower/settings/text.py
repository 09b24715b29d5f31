"""Run configs as Flower hands them on: keys that an app declares, and one text for all others.

Flower refuses a key that an app's pyproject does not declare. An app therefore declares one key of
ours, ``settings = ""``: a text in TOML that holds any other setting.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import tomli_w

from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from flwr.app import UserConfig, UserConfigValue

SETTINGS = "settings"
_MOST_LETTERS = 1 << 20
_EXAMPLE = "settings must be TOML, such as 'local-epochs = 2' or '{local-epochs = 2, seed = 1}'"


def expand(config: UserConfig) -> UserConfig:
    """Return a run config with what its text ``settings`` holds in the text's place.

    Raises
    ------
    InputError
        If the text is not TOML, holds something else than numbers, booleans and texts, or has a key
        that the config has as well, so that it cannot be known which counts.

    Examples
    --------
    >>> expand({"seed": 1, "settings": "local-epochs = 2"})
    {'seed': 1, 'local-epochs': 2}
    """
    if SETTINGS not in config:
        return dict(config)
    declared = {key: value for key, value in config.items() if key != SETTINGS}
    settings = parse(config[SETTINGS])
    if twice := sorted(settings.keys() & declared.keys()):
        key = twice[0]
        raise setting_error(
            f"{key} is given twice, by itself ({declared[key]!r}) and in settings "
            f"({settings[key]!r}): give it once",
            key,
        )
    return declared | settings


def parse(text: UserConfigValue) -> UserConfig:
    """Return the settings that the text ``settings`` holds.

    Raises
    ------
    InputError
        As `expand`.
    """
    if not isinstance(text, str):
        raise InputError(f"{_EXAMPLE}, got {text!r}")
    if len(text) > _MOST_LETTERS:
        raise InputError(f"settings must have at most {_MOST_LETTERS:,} letters, got {len(text):,}")
    braced = text.strip().startswith("{")
    try:
        table = tomllib.loads(f"{SETTINGS} = {text.strip()}" if braced else text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_EXAMPLE}, got {text!r} ({error})") from None
    if braced:
        if len(table) > 1:
            raise InputError(f"{_EXAMPLE}, got {text!r} (there is something after the table)")
        table = table[SETTINGS]
    for key, value in table.items():
        if not isinstance(value, bool | int | float | str):
            kind = type(value).__name__
            raise InputError(f"{key} in settings must be a number, boolean or text, got a {kind}")
    return table


def override(
    declared: UserConfig, texts: Collection[str], known: Mapping[str, UserConfigValue]
) -> UserConfig:
    """Return an app's run config with ``key=value`` texts applied.

    Parameters
    ----------
    declared : dict
        As the app declares it. Other keys are written into its text ``settings``.
    texts : collection of str
        The value is read as TOML; a text needs no quotes if the default is a text.
    known : mapping
        The default of each setting that the app's code reads, by its key.

    Raises
    ------
    InputError
        If a text has no ``=``, the key is unknown or the value has the wrong type; or if the app
        declares neither the key nor ``settings``.
    """
    # The app's own default decides the type.
    types = {**known, **expand(declared)}
    values: UserConfig = {}
    for text in texts:
        key, separator, raw = (part.strip() for part in text.partition("="))
        if not separator or not key:
            raise InputError(f"-c takes key=value, got {text!r}")
        if key not in types:
            raise unknown_key("the app has no setting", key, types)
        values[key] = with_type_of(types[key], _parse_value(raw, types[key]), key)
    return assign(declared, values)


def assign(declared: UserConfig, values: UserConfig) -> UserConfig:
    """Return an app's run config with values set: by themselves if declared, else in ``settings``.

    Raises
    ------
    InputError
        If the app declares neither a key nor ``settings``.
    """
    config = dict(declared)
    undeclared = {key: value for key, value in values.items() if key not in declared}
    config |= {key: value for key, value in values.items() if key in declared}
    if not undeclared:
        return config
    if SETTINGS not in declared:
        raise InputError(
            f"the app does not declare {min(undeclared)}, and Flower refuses an undeclared key: "
            'add settings = "" to [tool.flwr.app.config] of its pyproject.toml, which then takes '
            "any setting"
        )
    config[SETTINGS] = tomli_w.dumps(parse(config[SETTINGS]) | undeclared)
    return config


def text_of(value: UserConfigValue) -> str:
    """Return a value as it is given after ``-c KEY=``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def setting_error(text: str, key: str) -> InputError:
    """Return the error about a setting: it ends with the command that says what is known of it."""
    # Imported here, by its name, since the registry imports this module.
    listed = import_module("fedmed_flower.settings.registry").listed()
    app = "" if key in listed else "APP "
    join = " " if text.endswith("?") else "; "
    return InputError(f"{text}{join}see `fedmed settings {app}--search {key}`")


def unknown_key(what: str, key: str, known: Collection[str], more: str = "") -> InputError:
    """Return the error about a key that is not known.

    Parameters
    ----------
    what : str
        Start of the text.
    key : str
    known : collection of str
        The text names the nearest one, or all of them if there are few.
    more : str
        What the text says after that.
    """
    near = difflib.get_close_matches(key.replace("_", "-"), sorted(known), n=1, cutoff=0.6)
    if near:
        return setting_error(f"{what} {key!r}: did you mean {near[0]}?{more}", near[0])
    hint = "`fedmed settings` lists those there are"
    if len(known) <= 12:
        hint = f"known: {', '.join(sorted(known))}"
    return InputError(f"{what} {key!r}: {hint}{more}")


def with_type_of(default: Any, value: Any, key: str) -> Any:
    """Return `value`, an int as a float if `default` is one.

    Raises
    ------
    InputError
        If the types differ.
    """
    if isinstance(default, float) and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            text = f"{key} must be a number between -1e308 and 1e308"
            raise setting_error(text, key) from None
    if type(value) is not type(default):
        raise setting_error(f"{key} must be of type {type(default).__name__}, got {value!r}", key)
    return value


def _parse_value(raw: str, default: UserConfigValue) -> UserConfigValue:
    """Return the value that a text stands for in TOML; the text itself if it is no one value."""
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    value = table["value"]
    if len(table) > 1 or not isinstance(value, bool | int | float | str):
        return raw
    return raw if isinstance(default, str) and not isinstance(value, str) else value
