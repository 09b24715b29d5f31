"""Public names of a room, each loaded at its first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_demand(room: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return ``__getattr__`` and ``__all__`` for a room that loads its files on demand.

    So a server that uses only a strategy does not wait for torch and MONAI to load.

    Parameters
    ----------
    room : str
        The room's ``__name__``.
    homes : mapping of str to str
        The module of each public name, relative to the room.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{homes[name]}"), name)

    return load, sorted(homes)
