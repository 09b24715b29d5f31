"""Settings of a simulation, which no real hospital follows."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import Numbers
from fedmed_flower.settings.section import Section, setting


@dataclass(frozen=True)
class SimulationSettings(Section):
    """Where the data of a simulation are, and how fast its sites."""

    data: str = setting(
        "",
        "Folder that holds one folder for each hospital, named after it. Empty: the app's own "
        "data. A real hospital ignores it.",
    )
    virtual_speeds: str = setting(
        "",
        "In a run in one process: how many training messages each site answers in a second of the "
        "virtual clock, in the order of the sites. Empty: all sites are alike, and no such time is "
        "shown.",
        Numbers(),
    )
