"""Hands the events of one run on to all who listen, and says how the run ended."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedmed_flower.server.history import Row
from fedmed_flower.server.listener import Listener
from fedmed_flower.server.live import Live
from fedmed_flower.server.run_folder import RunFolder

log = logging.getLogger("flwr.fedmed")


@dataclass
class Ending:
    """How a run ends; set by whoever knows it."""

    status: str = "finished"
    message: str = ""


def ending_of(error: BaseException) -> Ending:
    """Return how a run ends that an exception has ended."""
    if isinstance(error, KeyboardInterrupt):
        return Ending("stopped", "stopped by the user")
    return Ending("failed", f"{type(error).__name__}: {error}")


class Listeners(Listener):
    """Hands the events of one run on to all who listen.

    Parameters
    ----------
    listeners : iterable of Listener
        They hear every run of the strategy.

    Attributes
    ----------
    part : str
        The model for comparison whose rounds come next; empty for the run itself.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.part = ""
        self._own = tuple(listeners)
        self._hearing: list[Listener] = list(self._own)
        self._live: Live | None = None
        self._ending = Ending()
        self._running = False

    @contextmanager
    def run(self, again: bool = False) -> Iterator[Ending]:
        """Hear a run from its start to its end; within another `run`, belong to that one.

        Parameters
        ----------
        again : bool
            Go on with ``live.json`` of the run before, which also decides how it ends.

        Yields
        ------
        Ending
            An exception ends the run by itself.
        """
        if self._running:
            yield Ending()
            return
        if self._live is None or not again:
            self._live = Live()
            self._ending = Ending()
        ending = self._ending
        self._hearing = [self._live, *self._own]
        self._running = True
        try:
            yield ending
        except BaseException as error:
            ending = self._ending = ending_of(error)
            raise
        finally:
            self._running = False
            self.part = ""
            self.ended(ending.status, ending.message)

    def open(self, folder: RunFolder, app: str, more: Iterable[Listener] = ()) -> None:
        """Let the run that is heard leave ``live.json`` in its folder; the first call counts.

        Parameters
        ----------
        folder : RunFolder
            May be written from here on.
        app : str
            The app's name.
        more : iterable of Listener
            They hear this run from here on.
        """
        if self._live is not None and self._running:
            self._live.open(folder, app)
            self._hearing += more

    def began(self, part: str, rounds: int, rows: Sequence[Row]) -> None:
        """Hand the event on."""
        self._tell("began", part, rounds, rows)

    def asked(self, server_round: int, phase: str, sites: Sequence[str]) -> None:
        """Hand the event on."""
        self._tell("asked", server_round, phase, sites)

    def named(self, before: str, site: str) -> None:
        """Hand the event on."""
        self._tell("named", before, site)

    def replied(self, site: str) -> None:
        """Hand the event on."""
        self._tell("replied", site)

    def failed(self, server_round: int, phase: str, site: str, reason: str) -> None:
        """Hand the event on."""
        self._tell("failed", server_round, phase, site, reason)

    def round_ended(self, server_round: int, rows: Sequence[Row]) -> None:
        """Hand the event on."""
        self._tell("round_ended", server_round, rows)

    def tested(self, rows: Sequence[Row]) -> None:
        """Hand the event on."""
        self._tell("tested", rows)

    def ended(self, status: str, message: str) -> None:
        """Hand the event on."""
        self._tell("ended", status, message)

    def _tell(self, event: str, *arguments: object) -> None:
        for listener in list(self._hearing):
            try:
                getattr(listener, event)(*arguments)
            except Exception as error:
                self._hearing.remove(listener)
                log.warning(
                    "the listener %s failed in %s and hears no more: %s: %s",
                    type(listener).__name__,
                    event,
                    type(error).__name__,
                    error,
                )
                log.debug("%s", error, exc_info=True)
