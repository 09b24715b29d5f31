"""What happened in a run, site by site."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmed_flower.metrics.names import MAIN
from fedmed_flower.wire import ALL_SITES, Sent

COLUMNS = ("round", "phase", "site", "metric", "value")


@dataclass(frozen=True)
class Failure:
    """A site whose reply was not used: when, which and why."""

    round: int
    phase: str
    site: str
    reason: str


@dataclass
class History:
    """What happened in a run, site by site.

    Attributes
    ----------
    rows : list of (round, phase, site, metric, value)
        `site` is a site's name, or ``"all"`` for all sites together.
    failures : list of Failure
    sent : Sent
        What the sites have sent in the rounds.
    """

    rows: list[tuple[int, str, str, str, float]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sent: Sent = field(default_factory=Sent)

    def add(self, server_round: int, phase: str, site: str, metrics: Mapping[str, Any]) -> None:
        """Append the single numbers among `metrics`; lists are left out."""
        self.rows += [
            (server_round, phase, site, name, float(value))
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]

    def describe(self, server_round: int) -> str:
        """Return a round in a line: loss, the first known validation figure, who failed."""
        known = {
            (phase, metric): value
            for number, phase, site, metric, value in self.rows
            if number == server_round and site == ALL_SITES
        }
        wanted = [("train", "loss"), *(("val", name) for name in MAIN)]
        shown = [(*key, known[key]) for key in wanted if key in known]
        # After the training loss one figure is enough.
        parts = [f"{phase} {name} {value:.4f}" for phase, name, value in shown[:2]]
        if failed := {failure.site for failure in self.failures if failure.round == server_round}:
            parts.append(f"failed: {', '.join(sorted(failed))}")
        return "  ".join(parts)

    def to_csv(self) -> bytes:
        """Return the rows as a tidy table with the columns round, phase, site, metric, value."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        writer.writerows(self.rows)
        return text.getvalue().encode(errors="backslashreplace")
