"""The virtual clock of a run in one process, in which each site has a speed of its own.

Clients run one after the other here, so real seconds say nothing of which hospital would have
replied first. By this clock a site of speed s replies to a training message 1 / s virtual seconds
after it was sent, whatever the site's rows; all other messages take no time. Nothing waits: the
clock is set on to the time of each reply as it is pulled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flwr.app import Message, MessageType, UserConfig

from fedmed_flower.settings.simulation import SimulationSettings
from fedmed_flower.settings.text import expand, setting_error

_KEY = "virtual-speeds"


class VirtualClock:
    """Virtual seconds since the start, and when each site's reply is due.

    Parameters
    ----------
    speeds : mapping of int to float, optional
        Training messages that each node answers in a virtual second; above 0. None: one each.

    Attributes
    ----------
    now : float
        Virtual seconds.
    given : bool
        Whether speeds were given.
    """

    def __init__(self, speeds: Mapping[int, float] | None = None) -> None:
        self._speeds = speeds or {}
        self.given = speeds is not None
        self.now = 0.0

    def due(self, message: Message) -> float:
        """Return when the reply comes to a message that is sent now."""
        if message.metadata.message_type != MessageType.TRAIN:
            return self.now
        return self.now + 1 / self._speeds.get(message.metadata.dst_node_id, 1.0)

    def advance(self, seconds: float) -> None:
        """Set the clock to a time, unless that has passed or is never."""
        if math.isfinite(seconds):
            self.now = max(self.now, seconds)


def speeds_of(config: UserConfig, num_sites: int) -> list[float] | None:
    """Return each site's speed by ``virtual-speeds`` of a run config; None if it is not set.

    Raises
    ------
    InputError
        If its number of speeds is not that of the sites, or a speed is not above 0.
    """
    given = {key: value for key, value in expand(config).items() if key == _KEY}
    text = SimulationSettings.from_run_config(given).virtual_speeds
    if not text.strip():
        return None
    speeds = [float(part) for part in text.split(",")]
    if len(speeds) != num_sites:
        raise setting_error(
            f"{_KEY} must have one speed for each of the {num_sites} sites, got {len(speeds)}", _KEY
        )
    return speeds
