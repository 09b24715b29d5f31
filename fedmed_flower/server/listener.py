"""What can be heard of a run, for whatever shows, records or tracks it.

`Listener` has a method for each event, and each does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmed_flower.server.history import Row


class Listener:
    """Hears how a run goes; a subclass overrides what it wants to hear.

    Give it to a strategy, ``FedAvg(listeners=[...])``, or to `grow`. All methods are called in the
    process of the server, one after the other: a slow one delays the run. One that raises is
    logged and hears no more; the run goes on.

    A phase is ``train``, ``val``, ``test``, or the name of a question: ``describe`` (the roll
    call), ``contribution``, ``personal`` or ``pictures``.
    """

    def began(self, part: str, rounds: int, rows: Sequence[Row]) -> None:
        """Hear that rounds begin.

        Parameters
        ----------
        part : str
            Empty for the run itself; otherwise the model for comparison that is made, such as
            ``hospital-1 alone``.
        rounds : int
            Number of rounds that are planned, with those that are done.
        rows : sequence of (round, phase, site, metric, value)
            All figures of the rounds that are done; empty unless the run is resumed.
        """

    def asked(self, server_round: int, phase: str, sites: Sequence[str]) -> None:
        """Hear that messages of a phase go out.

        Parameters
        ----------
        server_round : int
            0 before the first round.
        phase : str
        sites : sequence of str
            Names of the sites; ``node <id>`` of one that has not reported its name.
        """

    def named(self, before: str, site: str) -> None:
        """Hear the name of a site that was called `before`, ``node <id>``, until now."""

    def replied(self, site: str) -> None:
        """Hear that a site has replied without an error in the phase that was asked last."""

    def failed(self, server_round: int, phase: str, site: str, reason: str) -> None:
        """Hear that a site does not count in a phase; ``all`` stands for all sites together."""

    def round_ended(self, server_round: int, rows: Sequence[Row]) -> None:
        """Hear that a round has ended, after its checkpoint was written.

        Parameters
        ----------
        server_round : int
        rows : sequence of (round, phase, site, metric, value)
            The figures of the round. With ``validate="next"`` they hold the validation figures of
            the round before; those of the last round come by a call of their own.
        """

    def tested(self, rows: Sequence[Row]) -> None:
        """Hear the figures of the test rows: of the run's model, or of models for comparison."""

    def ended(self, status: str, message: str) -> None:
        """Hear that the run has ended; the last event.

        An app that calls a strategy itself ends after `start`, and again after each `test`.

        Parameters
        ----------
        status : str
            ``finished``, ``failed``, or ``stopped`` by the user.
        message : str
            Why; may be empty.
        """


# Hears nothing.
NOBODY = Listener()
