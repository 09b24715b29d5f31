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
