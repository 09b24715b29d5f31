"""What happened in a run, site by site."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmed_flower.files import write_rows
from fedmed_flower.metrics.names import MAIN, STALENESS, VIRTUAL_SECONDS
from fedmed_flower.server.traffic import Traffic
from fedmed_flower.wire import ALL_SITES, BYTES_SAVED, EPSILON, HOSPITAL_EPSILON, Sent

# Round, phase, site, metric and value.
Row = tuple[int, str, str, str, float]
COLUMNS = ("round", "phase", "site", "metric", "value")
# A site's number of training rows; of patients if they are protected by noise.
_COUNT = "num-examples"
# Of a round: what is no measure of the model.
_NOT_SHOWN = (
    _COUNT,
    "seconds",
    EPSILON,
    HOSPITAL_EPSILON,
    "clipping-norm",
    STALENESS,
    VIRTUAL_SECONDS,
    BYTES_SAVED,
)


@dataclass(frozen=True)
class Failure:
    """A site whose reply was not used: round, phase, site and reason."""

    round: int
    phase: str
    site: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Something about a site whose reply counted: round, phase, site and text."""

    round: int
    phase: str
    site: str
    text: str


@dataclass(frozen=True)
class Sum:
    """A secure sum that was opened: round, purpose and the hospitals that it is over."""

    round: int
    purpose: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """The end of a run before its last planned round: the last round done (0 if none), and why."""

    round: int
    reason: str


@dataclass(frozen=True)
class Kept:
    """The round whose model is a run's in the end, and the figure that chose it.

    Attributes
    ----------
    round : int
    metric : str
        Name of the figure; after ``server:`` one that the server measured.
    value : float
        The figure of that round, over all sites.
    direction : {"highest", "lowest"}
        Which value is the best.
    """

    round: int
    metric: str
    value: float
    direction: str


@dataclass
class History:
    """What happened in a run, site by site.

    Attributes
    ----------
    rows : list of (round, phase, site, metric, value)
        `site` is a site's name, or ``"all"`` for all sites together.
    failures : list of Failure
    notes : list of Note
    sent : Sent
        What the sites sent in the rounds.
    traffic : dict of str to Traffic
        Bytes and seconds of the rounds, by site.
    sums : list of Sum
        The secure sums of the run; empty if sites reply in plain.
    stopped : Stop or None
        Set if the run ended of its own accord before its last planned round.
    kept : Kept or None
        Set at the end of a run that keeps the model of its best round.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sent: Sent = field(default_factory=Sent)
    traffic: dict[str, Traffic] = field(default_factory=dict, compare=False, repr=False)
    notes: list[Note] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    stopped: Stop | None = None
    kept: Kept | None = None
    _seen: _Seen = field(default_factory=lambda: _Seen([]), init=False, compare=False, repr=False)

    def training_rows(self, site: str) -> float | None:
        """Return the number of training rows that a site told last; None if it has told none."""
        return self._up_to_date().counts.get(site)

    def _up_to_date(self) -> _Seen:
        """Return what is known of all rows, of which those that came since are read."""
        if self._seen.rows is not self.rows:
            self._seen = _Seen(self.rows)
        self._seen.read()
        return self._seen

    def add(self, server_round: int, phase: str, site: str, metrics: Mapping[str, Any]) -> None:
        """Append the metrics that are single numbers; lists are left out."""
        self.rows += [
            (server_round, phase, site, name, float(value))
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]

    def rounds_trained(self) -> dict[str, int]:
        """Return in how many rounds each site's update was accepted, or was part of the sum."""
        rounds = {(r, site) for r, phase, site, _, _ in self.rows if phase == "train"}
        trained = [sum for sum in self.sums if sum.purpose == "train"]
        rounds |= {(sum.round, site) for sum in trained for site in sum.sites}
        return dict(Counter(site for _, site in rounds if site != ALL_SITES))

    def has_phase(self, server_round: int, phase: str) -> bool:
        """Return whether anything is recorded of a phase of a round, be it a failure."""
        if any(row[0] == server_round and row[1] == phase for row in self.rows):
            return True
        return any((f.round, f.phase) == (server_round, phase) for f in self.failures)

    def describe(self, server_round: int | None, validated: int | None = None) -> str:
        """Return a round in a line: training loss, first known validation metric, failed sites.

        If a client names its metrics otherwise, the first of each phase is shown.

        Parameters
        ----------
        server_round : int or None
            None if nothing was trained.
        validated : int, optional
            The round whose validation figures came, if it is not the round itself; a line of both
            names it.
        """
        validated = server_round if validated is None else validated

        def in_line(number: int, phase: str) -> bool:
            return number == (validated if phase == "val" else server_round)

        # The rows of a round are the last ones, or few come after them.
        lowest = min(number for number in (server_round, validated) if number is not None)
        first = len(self.rows)
        while first and self.rows[first - 1][0] >= lowest:
            first -= 1
        known = {
            (phase, metric): value
            for number, phase, site, metric, value in self.rows[first:]
            if in_line(number, phase) and site == ALL_SITES
        }
        wanted = [("train", "loss"), *(("val", name) for name in MAIN)]
        shown = [(*key, known[key]) for key in wanted if key in known]
        others = {
            phase: [key for key in known if key[0] == phase and key[1] not in _NOT_SHOWN][:1]
            for phase in ("train", "val", "server")
        }
        for phase in ("train", "val"):
            if not any(entry[0] == phase for entry in shown):
                shown += [(*key, known[key]) for key in others[phase]]
        # The training loss and one validation metric, or two validation metrics without it.
        shown = shown[:2] + [(*key, known[key]) for key in others["server"]]
        other = "" if server_round in (None, validated) else f" (round {validated})"
        parts = [
            f"{phase} {name} {value:.4f}{other if phase == 'val' else ''}"
            for phase, name, value in shown
        ]
        if ("train", HOSPITAL_EPSILON) in known:
            parts.append(f"epsilon {known['train', HOSPITAL_EPSILON]:.3f}")
        failed = {
            failure.site for failure in self.failures if in_line(failure.round, failure.phase)
        }
        if failed:
            parts.append(f"failed: {', '.join(sorted(failed))}")
        return "  ".join(parts)

    def table(self) -> Sequence[bytes]:
        """Return the rows as a tidy table with the columns round, phase, site, metric, value.

        Returns
        -------
        sequence of bytes
            Parts of one CSV table, each of whole lines. Only what came since the last call is made
            anew, so that a long run writes its rows after each round in little time.
        """
        return self._up_to_date().table()

    def to_csv(self) -> bytes:
        """Return `table` as one text."""
        return b"".join(self.table())


class _Seen:
    """What is known of rows to which others are appended, without reading them again.

    Attributes
    ----------
    rows : list of Row
    counts : dict of str to float
        Of each site: the number of training rows that it told last.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.counts: dict[str, float] = {}
        self._read = 0
        self._parts = [_csv([COLUMNS])]
        self._written = 0

    def read(self) -> None:
        """Take up the rows that were appended since the last call."""
        for _, phase, site, metric, value in self.rows[self._read :]:
            if phase == "train" and metric == _COUNT:
                self.counts[site] = value
        self._read = len(self.rows)

    def table(self) -> Sequence[bytes]:
        """Return the rows as CSV, in parts."""
        if self._written < len(self.rows):
            self._parts.append(_csv(self.rows[self._written :]))
            self._written = len(self.rows)
        return tuple(self._parts)


def _csv(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO(newline="")
    write_rows(text, rows)
    return text.getvalue().encode(errors="backslashreplace")
