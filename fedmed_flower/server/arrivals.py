"""Replies one by one as they arrive, whoever sends the next one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

# Most messages whose replies are pulled at a time: each reply may hold a model.
_TOGETHER = 20
# Seconds between two looks for replies. Of what has been waited for so far it is this share, so
# that a reply is found late by no more than that, and long rounds cost the server little.
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
_SHARE_OF_WAIT = 0.02


def pause_after(waited: float) -> float:
    """Return the seconds until the next look for replies.

    Each look is a request to the SuperLink, which costs both some milliseconds of CPU.

    Parameters
    ----------
    waited : float
        Seconds that have been waited so far.

    Returns
    -------
    float
        A fiftieth of it, from 0.1 to 1 s.

    Examples
    --------
    >>> pause_after(1), pause_after(20), pause_after(3600)
    (0.1, 0.4, 1.0)
    """
    return min(max(_SHORTEST_PAUSE, _SHARE_OF_WAIT * waited), _LONGEST_PAUSE)


@runtime_checkable
class Arrivals(Protocol):
    """Where the next reply comes from, and the clock by which it is waited for."""

    @property
    def now(self) -> float:
        """Seconds of the clock."""

    def next_reply(self, message_ids: Sequence[str], until: float) -> Message | None:
        """Return the next reply to any of some messages; None if none comes until a time.

        Parameters
        ----------
        message_ids : sequence of str
            Ids of messages that have been sent.
        until : float
            Seconds of the clock; may be infinite.
        """


class Polled:
    """The replies of sites that work at the same time, which a grid is asked for again and again.

    Parameters
    ----------
    grid : Grid
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._came: deque[Message] = deque()

    @property
    def now(self) -> float:
        """Seconds of this machine's clock."""
        return time.monotonic()

    def next_reply(self, message_ids: Sequence[str], until: float) -> Message | None:
        """Return the next reply, as `Arrivals.next_reply`."""
        began = self.now
        while not self._came:
            for start in range(0, len(message_ids), _TOGETHER):
                ids = message_ids[start : start + _TOGETHER]
                self._came.extend(self._grid.pull_messages(ids))
                if self._came:
                    break
            now = self.now
            if self._came or now >= until:
                break
            # The last look is at the end.
            time.sleep(min(pause_after(now - began), until - now))
        return self._came.popleft() if self._came else None


def arrivals_of(grid: Grid) -> Arrivals:
    """Return the arrivals of a grid: its own, or those that it is polled for."""
    return grid if isinstance(grid, Arrivals) else Polled(grid)
