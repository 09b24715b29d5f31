"""The options of `fedmed run`, as the command hands them to the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Engine(StrEnum):
    """Where the sites run."""

    LOCAL = "local"
    FLOWER = "flower"


@dataclass(frozen=True)
class Options:
    """The options of `fedmed run`."""

    sites: int | None = None
    rounds: int | None = None
    settings: Sequence[str] = ()
    engine: Engine = Engine.LOCAL
    out: Path | None = None
    resume: Path | None = None
    data: Path | None = None
    node_config: Path | None = None
    verbose: bool = False
