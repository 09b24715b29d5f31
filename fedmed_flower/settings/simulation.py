"""Settings of a simulation, which no real hospital follows."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.section import Section, setting


@dataclass(frozen=True)
class SimulationSettings(Section):
    """Where the data of a simulation are."""

    data: str = setting(
        "",
        "Folder that holds one folder for each hospital, named after it. Empty: the app's own "
        "data. A real hospital ignores it.",
    )
