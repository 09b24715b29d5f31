"""A run folder while a run writes to it: read again only where a file has changed.

The folder may be a stranger's: reads are bounded, texts are cleaned and cut, and what a file cannot
mean is left out. Neither Flower nor torch is loaded, so that to watch costs next to nothing.
"""

from __future__ import annotations

import csv
import io
import re
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from fedmed_flower.errors import InputError, shown
from fedmed_flower.files import (
    LIVE,
    LOG,
    METRICS,
    RELEASES,
    REPORT,
    SUMMARY,
    cell_text,
    open_file,
    read_file,
    read_lines,
    read_object,
)
from fedmed_flower.metrics.names import lower_is_better, main_metric
from fedmed_flower.wire import ALL_SITES, EPSILON, HOSPITAL_EPSILON, Sent

# Bytes of a table of metrics: about two million rows.
_MOST_METRICS = 1 << 27
# Of what is shown: hospitals, metrics, failures, letters of a text.
_MOST_SITES = 2000
_MOST_SERIES = 1000
_MOST_FAILURES = 100
_MOST_LETTERS = 300
# Points of a curve in one answer; the next answer goes on from there.
_MOST_POINTS = 100_000
# Seconds. A run writes `live.json` every ten seconds at least; other files once a round.
_PATIENCE_WITH_BEATS = 60
_PATIENCE = 300
# Beyond these a round or a value cannot be drawn.
_MOST_ROUND = 10**9
_MOST_VALUE = 1e100
# Bytes before the place where the table was left, by which it is recognised.
_TAIL = 4096
_COLUMNS = ("round", "phase", "site", "metric", "value")
_ENDED = ("finished", "failed", "stopped")

Stamp = tuple[int, int, int]  # of a file: when it was written, its size, its number on the disk


@dataclass
class _Points:
    """The values of one metric in one phase, in the order of the table."""

    rounds: array[int] = field(default_factory=lambda: array("q"))
    sites: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))


class MetricTable:
    """The table of metrics of a run, of which only what has been added is read.

    Attributes
    ----------
    generation : int
        How often the table was read from its start. It is so again if the lines that were read are
        no longer those of the file.
    names : list of str
        Sites, in the order in which they first appear; ``"all"`` is all of them together.
    series : dict
        Points by phase and metric, in the order in which they first appear. `sites` of a point is
        an index of `names`.
    latest : dict of (phase, metric, site) to float
        Last value of each metric that says what privacy a hospital has spent.
    last_round : int
        The last round in which somebody trained; 0 if there is none.
    complete : bool
        Whether all of it is here; False if there is more than can be shown.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.names: list[str] = []
        self.series: dict[tuple[str, str], _Points] = {}
        self.latest: dict[tuple[str, str, str], float] = {}
        self.last_round = 0
        self.complete = True
        self._index: dict[str, int] = {}
        self._columns: tuple[int, ...] = ()
        self._read_to = 0
        self._tail = b""
        self._lines = 0

    def read(self, folder: Path) -> None:
        """Take up the lines that have been added; all, if the file is another one.

        Raises
        ------
        OSError
            As `open_file`.
        InputError
            If a line is no metric. The lines before it are taken up, and all are read again when
            the file has changed.
        """
        with open_file(folder, METRICS, _MOST_METRICS) as file:
            if not self._read_to or not self._goes_on(file):
                self._clear()
                self.generation += 1
            file.seek(self._read_to)
            added = file.read(_MOST_METRICS)
        # Somebody else's writer may be in the middle of a line.
        added = added[: added.rfind(b"\n") + 1]
        if not added:
            return
        begin = self._read_to
        self._read_to = 0
        self._take(added.decode("utf-8", errors="replace"), folder / METRICS)
        self._read_to = begin + len(added)
        self._tail = (self._tail + added)[-_TAIL:]

    def forget(self) -> None:
        """Take up that there is no table."""
        self._clear()
        self.generation += 1

    def _goes_on(self, file: BinaryIO) -> bool:
        """Return whether the file begins with what has been read, by its last bytes."""
        file.seek(self._read_to - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _take(self, text: str, path: Path) -> None:
        lines = csv.reader(read_lines(io.StringIO(text, newline="")))
        try:
            for cells in lines:
                if not self._columns:
                    self._columns = tuple(cells.index(name) for name in _COLUMNS)
                    continue
                self._add(*(cells[column] for column in self._columns))
        except (IndexError, ValueError, csv.Error) as error:
            line = self._lines + lines.line_num
            raise InputError(
                f"{path} line {line} is not a metric ({error}): mend or remove it"
            ) from error
        finally:
            self._lines += lines.line_num

    def _add(self, number: str, phase: str, site: str, metric: str, value: str) -> None:
        server_round = int(number)
        figure = float(value)
        if abs(server_round) > _MOST_ROUND:
            raise ValueError(f"there is no round {server_round}")
        site = cell_text(site)
        metric = shown(cell_text(metric))
        phase = shown(phase)
        if phase == "train" and site != ALL_SITES:
            self.last_round = max(self.last_round, server_round)
        # NaN is not below the bound.
        if not abs(figure) < _MOST_VALUE:
            return
        if metric in (EPSILON, HOSPITAL_EPSILON):
            self.latest[phase, metric, site] = figure
        new_series = (phase, metric) not in self.series
        new_site = site not in self._index
        too_many = (new_series and len(self.series) == _MOST_SERIES) or (
            new_site and len(self.names) == _MOST_SITES
        )
        if too_many or len(metric) > _MOST_LETTERS or len(phase) > _MOST_LETTERS:
            self.complete = False
            return
        if new_site:
            self._index[site] = len(self.names)
            self.names.append(site)
        points = self.series.setdefault((phase, metric), _Points())
        points.rounds.append(server_round)
        points.sites.append(self._index[site])
        points.values.append(figure)


class LiveFolder:
    """What a page shows of a run, by its run folder alone; the folder need not exist yet.

    Parameters
    ----------
    path : Path
    clock : callable
        Returns the time in seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._table = MetricTable()
        self._stamps: dict[str, Stamp] = {}
        self._objects: dict[str, dict[str, Any]] = {}
        self._problems: dict[str, str] = {}

    def refresh(self) -> str:
        """Read what has changed; return a text that is another one if anything has."""
        before = self._stamps
        names = (LIVE, SUMMARY, METRICS, RELEASES, REPORT, LOG)
        stamps = {name: _stamp(self.path / name) for name in names}
        self._stamps = {name: stamp for name, stamp in stamps.items() if stamp is not None}
        for name in (LIVE, SUMMARY, RELEASES, METRICS):
            if self._stamps.get(name) != before.get(name):
                self._read(name)
        return repr(self._stamps)

    def _read(self, name: str) -> None:
        self._problems.pop(name, None)
        try:
            if name not in self._stamps:
                self._objects.pop(name, None)
                if name == METRICS:
                    self._table.forget()
            elif name == METRICS:
                self._table.read(self.path)
            else:
                self._objects[name] = read_object(self.path, name, "restore it from a copy")
        except OSError as error:
            self._problems[name] = f"{self.path / name} cannot be read ({error.strerror})"
        except InputError as error:
            self._problems[name] = str(error)

    def state(self) -> dict[str, Any]:
        """Return what the page shows beside the curves, as JSON can write it.

        Texts are one line without control codes, of at most 300 letters. ``age`` is the number of
        seconds since a file of the run was last written, None if there is none. A run that is
        silent for more than ``patience`` seconds may have been killed; if it ``beats``, it was.
        """
        live = self._objects.get(LIVE, {})
        summary = self._objects.get(SUMMARY, {})
        source = self._written_last(live, summary)
        # A strategy that an app calls itself writes no status.
        status = source.get("status") or ("running" if self._table.series else "waiting")
        running = status == "running"
        written = [stamp[0] / 1e9 for stamp in self._stamps.values()]
        now = self._clock()
        rounds = _number(live.get("rounds")) or _number(summary.get("rounds-planned"))
        current = _number(live.get("round")) if live else None
        return {
            "folder": shown(self.path, _MOST_LETTERS),
            "app": _text(live.get("app")) or _text(summary.get("app")),
            "status": status,
            "message": _text(source.get("message")),
            "generated": summary.get("generated") is True,
            "part": _text(live.get("part")) if running else "",
            "phase": _text(live.get("phase")) if running else "",
            "round": self._table.last_round if current is None else current,
            "rounds": rounds,
            "seconds": _seconds(live, summary, status, now),
            "left": _number(live.get("seconds_left")) if running else None,
            "age": max(0.0, now - max(written)) if written else None,
            "beats": bool(live),
            "patience": _PATIENCE_WITH_BEATS if live else _PATIENCE,
            "sites": self._sites(live if running else {}, summary),
            "failures": _failures(live if live.get("failures") else summary),
            "metrics": self._metrics(),
            "main": self._main(),
            "privacy": self._privacy(summary),
            "noised": _noised(summary),
            "report": status in _ENDED and REPORT in self._stamps,
            "problems": self._reported(),
        }

    def curve(self, phase: str, metric: str, generation: int, since: int) -> dict[str, Any]:
        """Return the points of a metric from index `since` on.

        Parameters
        ----------
        generation : int
            That of the answer in which `since` was ``until``; after another one all points come.

        Returns
        -------
        dict
            ``generation``; ``since`` and ``until``, the indices of the first point and behind the
            last; ``more``, whether there are others after them; ``names``, the sites of the whole
            table; ``rounds``, ``sites`` (indices of names) and ``values`` of the points.
        """
        table = self._table
        points = table.series.get((phase, metric), _Points())
        total = len(points.rounds)
        begin = min(max(0, since), total) if generation == table.generation else 0
        end = min(total, begin + _MOST_POINTS)
        return {
            "generation": table.generation,
            "since": begin,
            "until": end,
            "more": end < total,
            "names": [_text(name) for name in table.names],
            "rounds": points.rounds[begin:end].tolist(),
            "sites": points.sites[begin:end].tolist(),
            "values": points.values[begin:end].tolist(),
        }

    def report(self) -> bytes:
        """Return the page of the run.

        Raises
        ------
        OSError
            As `open_file`.
        """
        return read_file(self.path, REPORT)

    def _written_last(self, live: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
        """Return the one of two files with a status that was written last; empty if none has one.

        A run that goes on writes both anew; at its end one is written before the other.
        """
        found = [
            (self._stamps[name][0], content)
            for name, content in ((SUMMARY, summary), (LIVE, live))
            if name in self._stamps and content.get("status") in ("running", *_ENDED)
        ]
        return max(found, key=lambda each: each[0], default=(0, {}))[1]

    def _reported(self) -> list[str]:
        """Return what cannot be shown, and why."""
        texts = [shown(text, 2 * _MOST_LETTERS) for text in self._problems.values()]
        if not self._table.complete:
            texts.append(
                f"{METRICS} has more than {_MOST_SITES:,} sites, more than {_MOST_SERIES:,} "
                f"metrics, or a name of more than {_MOST_LETTERS} letters: the others are not shown"
            )
        return texts

    def _sites(self, live: dict[str, Any], summary: dict[str, Any]) -> list[dict[str, Any]]:
        """Return each hospital with what it does now and what its patients' privacy has cost."""
        asked = set(_names(live.get("asked")))
        replied = set(_names(live.get("replied")))
        failed = {_text(each.get("site")): each for each in _objects(live.get("failed"))}
        listed = [*_keys(summary.get("sites")), *_keys(summary.get("trained"))]
        recorded = [_text(name) for name in self._table.names if name != ALL_SITES]
        every = dict.fromkeys([*listed, *recorded, *asked, *replied, *failed])
        costs = {
            _text(site): cost
            for (_, metric, site), cost in self._table.latest.items()
            if metric == EPSILON
        }
        sites = []
        for name in sorted(every, key=_natural)[:_MOST_SITES]:
            doing = ""
            if name in failed:
                doing = "failed"
            elif name in replied:
                doing = "replied"
            elif name in asked:
                doing = "asked"
            reason = _text(failed[name].get("reason")) if name in failed else ""
            sites.append(
                {"name": name, "doing": doing, "reason": reason, "epsilon": costs.get(name)}
            )
        return sites

    def _metrics(self) -> list[dict[str, Any]]:
        return [
            {"phase": phase, "metric": metric, "lower": lower_is_better(metric)}
            for phase, metric in self._table.series
        ]

    def _main(self) -> list[str]:
        """Return phase and metric that are shown first: the main one on validation rows."""
        series = self._table.series
        for phase in ("val", "train", "server", "test"):
            known = [metric for where, metric in series if where == phase]
            if known:
                main = main_metric(known)
                return [phase, main if main in known else known[0]]
        return list(next(iter(series), ("", "")))

    def _privacy(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Return target, delta and cost by unit: of patients and of hospitals."""
        recorded = summary.get("privacy")
        patient = recorded.get("patient") if isinstance(recorded, dict) else None
        found: dict[str, Any] = {}
        costs = self._table.latest
        if isinstance(patient, dict) or any(metric == EPSILON for _, metric, _ in costs):
            settings = patient if isinstance(patient, dict) else {}
            found["patient"] = {
                "target": _number(settings.get("target-epsilon")),
                "delta": _number(settings.get("delta")),
            }
        releases = self._objects.get(RELEASES, {})
        spent = costs.get(("train", HOSPITAL_EPSILON, ALL_SITES))
        if releases or spent is not None:
            found["hospital"] = {"epsilon": spent, "delta": _number(releases.get("delta"))}
        return found


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _seconds(
    live: dict[str, Any], summary: dict[str, Any], status: str, now: float
) -> float | None:
    """Return how long the run has taken; None if that is unknown."""
    if status in _ENDED:
        known = _number(summary.get("seconds"))
        if known is not None:
            return known
        began, ended = _time(live.get("started")), _time(live.get("updated"))
        return None if began is None or ended is None else max(0.0, ended - began)
    began = _time(live.get("started")) or _time(summary.get("started"))
    return None if began is None else max(0.0, now - began)


def _noised(summary: dict[str, Any]) -> bool:
    """Return whether hospitals have measured by counts with noise, or are to do so."""
    recorded = summary.get("privacy")
    patient = recorded.get("patient") if isinstance(recorded, dict) else None
    planned = isinstance(patient, dict) and patient.get("private-metrics") is not False
    return planned or bool(Sent.of(summary.get("sent")).noised)


def _failures(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the latest failures of hospitals, the last one first."""
    listed = _objects(content.get("failures"))[-_MOST_FAILURES:]
    return [
        {"round": _number(each.get("round"))}
        | {key: _text(each.get(key)) for key in ("phase", "site", "reason")}
        for each in reversed(listed)
    ]


def _text(value: Any) -> str:
    return shown(value, _MOST_LETTERS) if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e12 else None


def _time(value: Any) -> float | None:
    """Return seconds since 1970 of a time as ISO 8601 writes it."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (OverflowError, OSError, TypeError, ValueError):
        return None


def _names(value: Any) -> list[str]:
    return [_text(name) for name in _most(value) if isinstance(name, str)]


def _keys(value: Any) -> list[str]:
    return _names(list(value)) if isinstance(value, dict) else []


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in _most(value) if isinstance(entry, dict)]


def _most(value: Any) -> Iterable[Any]:
    return value[-_MOST_SITES:] if isinstance(value, list) else ()


def _natural(text: str) -> str:
    """Return what sorts names as people number them: hospital-2 before hospital-10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(9), text)
