"""What a run asks hospitals to keep to themselves, beyond what each keeps by its node config."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import Within
from fedmed_flower.settings.section import Section, setting

# The fewest patients behind what a real hospital sends, if its node config says nothing.
FEWEST = 10


@dataclass(frozen=True)
class DisclosureSettings(Section):
    """What a run asks hospitals to keep to themselves."""

    min_cell_count: int = setting(
        FEWEST,
        "The fewest patients behind a number that a hospital sends. It raises a real hospital's "
        "own minimum; in a simulation it also lowers it.",
        Within(1),
        "patients",
    )
