"""The options of `fedmed run` and `fedmed evaluate`, as they are handed to the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Engine(StrEnum):
    """Where the sites run."""

    LOCAL = "local"
    FLOWER = "flower"


# What both commands take.
GivenSettings = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="A setting: key=value. `fedmed settings` lists them."),
]
GivenEngine = Annotated[
    Engine, typer.Option(help="local: in this process. flower: Flower's simulation engine.")
]
GivenData = Annotated[
    Path | None,
    typer.Option(help="A folder with one folder for each hospital, which is named after it."),
]
GivenNodes = Annotated[
    Path | None,
    typer.Option(
        help="TOML with a table of node config for each hospital of --data that shall be treated "
        "as a real one."
    ),
]
GivenWorkers = Annotated[
    int, typer.Option(help="Sites that work at once, each in a process, from 1 to 64. Linux only.")
]
GivenVerbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's own lines too.")]


@dataclass(frozen=True)
class Options:
    """The options of `fedmed run` and `fedmed evaluate`."""

    sites: int | None = None
    rounds: int | None = None
    settings: Sequence[str] = ()
    engine: Engine = Engine.LOCAL
    out: Path | None = None
    resume: Path | None = None
    data: Path | None = None
    node_config: Path | None = None
    verbose: bool = False
    # How many sites work at once.
    workers: int = 1
    # The model that is tested instead of a training run.
    evaluate: Path | None = None


class Kind(StrEnum):
    """What the hospitals of an app hold."""

    IMAGES = "images"
    MASKS = "masks"
    TABLE = "table"
    SURVIVAL = "survival"
    GENOMES = "genomes"
    OTHER = "other"


MEANINGS = {
    Kind.IMAGES: "images to classify (ClassificationClient)",
    Kind.MASKS: "images in which structures are outlined (SegmentationClient)",
    Kind.TABLE: "tables with a column to predict (TabularClient)",
    Kind.SURVIVAL: "tables with the time until an event (SurvivalClient)",
    Kind.GENOMES: "genotypes, for an association study (GenomicsClient)",
    Kind.OTHER: "rows of a form of your own (MedicalClient)",
}
WHAT_THEY_HOLD = "What the hospitals hold. " + "; ".join(
    f"{kind}: {meaning}" for kind, meaning in MEANINGS.items()
)
