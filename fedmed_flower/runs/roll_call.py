"""What sites are asked beside the rounds: who they are, and for pictures at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.data.pictures import sound
from fedmed_flower.data.site import GENERATED, SPLITS, some_of
from fedmed_flower.errors import InputError
from fedmed_flower.server.ask import ask, ask_all
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.wire import (
    CONTRIBUTION,
    COUNT,
    IMAGES,
    PERSONAL,
    PICTURES,
    SITE_RECORD,
    TITLES,
    TURNED_AWAY,
    Sent,
)

log = logging.getLogger("flwr.fedmed")


@dataclass
class Sites:
    """What the sites said of themselves before the first round."""

    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    labels: dict[int, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    turned_away: dict[int, int] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    generated: bool = False
    simulated: bool = True
    asked: int = 0
    refusals: dict[int, str] = field(default_factory=dict)
    lines: list[logging.LogRecord] = field(default_factory=list)
    namesakes: Namesakes = field(default_factory=Namesakes)
    sent: Sent = field(default_factory=Sent)

    def refused(self) -> dict[str, list[str]]:
        """Return the names of the sites that cannot take part, by their reason."""
        found: dict[str, list[str]] = {}
        for node_id, reason in self.refusals.items():
            found.setdefault(reason, []).append(self.names.get(node_id, f"node {node_id}"))
        return found

    def rows(self) -> dict[str, dict[str, int]]:
        """Return the numbers of rows by the name of the site, with those turned away, if any."""
        away = self.turned_away if any(self.turned_away.values()) else {}
        return {
            self.names[node_id]: counts | ({TURNED_AWAY: away[node_id]} if node_id in away else {})
            for node_id, counts in self.counts.items()
        }

    def write_log(self) -> None:
        """Say in the log who takes part and with what, and what was said before there was a log."""
        for line in self.lines:
            log.handle(line)
        for reason, names in self.refused().items():
            count, some = f"{len(names)} of {self.asked}", some_of(sorted(names))
            log.warning("%s sites cannot take part (%s): %s", count, some, reason)
        if self.generated:
            log.warning("%s", GENERATED)
        if text := self.namesakes.text(self.names):
            more = ", may be tested on after training elsewhere, and have the privacy cost of both"
            log.warning("%s%s", text, more)
        for split in SPLITS:
            empty = [self.names[node] for node, counts in self.counts.items() if not counts[split]]
            if empty:
                log.warning("no rows in the %s split at %s", split, some_of(empty))
        for node_id, counts in self.counts.items():
            rows = ", ".join(f"{count} {split}" for split, count in counts.items())
            labels = self.labels[node_id]
            of_each = f"; training rows by label: {labels}" if labels else ""
            if away := self.turned_away.get(node_id):
                of_each += f"; {away} rows turned away at the site"
            log.info("%s: %s%s", self.names[node_id], rows, of_each)

    def trainers(self) -> set[int]:
        """Return the nodes that have training rows; the others are only tested."""
        return {node_id for node_id, counts in self.counts.items() if counts["train"]}


def roll_call(grid: Grid, timeout: float) -> Sites:
    """Ask every connected site for its name and its numbers of rows."""
    nodes = list(grid.get_node_ids())
    sites = Sites(asked=len(nodes))
    contents = {node_id: RecordDict() for node_id in nodes}

    def read(node_id: int, content: RecordDict) -> _About:
        sites.sent.take("describe", sites.names.get(node_id, f"node {node_id}"), content)
        return _about(content)

    asked = ask(grid, "describe", contents, read, timeout, sites.names)
    for answer in sorted(asked, key=lambda answer: (answer.site, answer.node_id)):
        about, node_id = answer.value, answer.node_id
        sites.names.setdefault(node_id, answer.site)
        sites.counts[node_id], sites.labels[node_id] = about.rows, about.labels
        if about.turned_away is not None:
            sites.turned_away[node_id] = about.turned_away
        sites.namesakes.take(node_id, answer.content)
        sites.sources.add(about.source)
        sites.generated |= about.generated
        sites.simulated &= about.simulated
    sites.refusals = {failure.node_id: failure.reason for failure in asked.failures}
    if not sites.counts:
        reasons = (failure.reason for failure in asked.failures if not failure.silent)
        raise InputError(next(reasons, "no site answered the roll call"))
    if not sites.trainers():
        raise InputError("no site has training rows")
    return sites


class _About(NamedTuple):
    """What one site says of itself."""

    rows: dict[str, int]
    labels: Any
    turned_away: int | None
    source: str
    generated: bool
    simulated: bool


def _about(content: RecordDict) -> _About:
    record = content.config_records[SITE_RECORD]
    (counts,) = content.metric_records.values()
    rows = {split: int(counts[split]) for split in SPLITS}  # type: ignore[arg-type]
    away = int(counts.get(TURNED_AWAY, 0))  # type: ignore[arg-type]
    if min(*rows.values(), away) < 0:
        raise ValueError(f"negative number of rows in {rows}, {away} turned away")
    flags = bool(record["generated"]), bool(record["simulated"])
    turned_away = away if TURNED_AWAY in counts else None
    return _About(rows, counts.get("labels"), turned_away, str(record["data"]), *flags)


@contextmanager
def held_back() -> Iterator[list[logging.LogRecord]]:
    """Hold log lines back until a run has a folder with a log for them.

    If it comes to none, because an error is raised, they are logged at once.
    """
    handler = BufferingHandler(capacity=2**30)
    log.addHandler(handler)
    log.propagate, before = False, log.propagate
    done = False
    try:
        yield handler.buffer
        done = True
    finally:
        log.removeHandler(handler)
        log.propagate = before
        for record in () if done else handler.buffer:
            log.handle(record)


def collect_contributions(
    grid: Grid, timeout: float, names: Mapping[int, str], sent: Sent
) -> dict[str, dict[str, Any]]:
    """Ask each site what the model is to be prepared with.

    Parameters
    ----------
    names : dict of int to str
        Site name by node id; only these are asked.
    sent : Sent
        Takes up what comes.

    Returns
    -------
    dict
        What each site told, by its name; the log says why one told nothing.
    """

    def read(_: int, content: RecordDict) -> dict[str, Any]:
        return dict(content.config_records[CONTRIBUTION])

    contents = {node_id: RecordDict() for node_id in names}
    answers, failures = ask_all(grid, CONTRIBUTION, contents, read, timeout, dict(names))
    for answer in answers:
        sent.take(CONTRIBUTION, answer.site, answer.content)
    for failure in failures:
        log.warning("%s tells nothing to prepare the model with: %s", failure.site, failure.reason)
    return {answer.site: answer.value for answer in answers}


def collect_personal(
    grid: Grid,
    arrays: ArrayRecord,
    config: ConfigRecord,
    timeout: float,
    names: Mapping[int, str],
    sent: Sent,
) -> dict[str, dict[str, float]]:
    """Let each site fine-tune a model for itself.

    Parameters
    ----------
    names, sent
        As in `collect_contributions`.

    Returns
    -------
    dict
        The figures of each site's own model, by the name of the site; the log says why one has
        none.
    """
    site_names = dict(names)

    def read(node_id: int, content: RecordDict) -> dict[str, float]:
        sent.take("personal", site_names[node_id], content)
        return _figures(content)

    contents = {node_id: RecordDict({"arrays": arrays, "config": config}) for node_id in names}
    answers, failures = ask_all(grid, "personal", contents, read, timeout, site_names)
    for failure in failures:
        log.warning("%s has no model of its own: %s", failure.site, failure.reason)
    return {answer.site: answer.value for answer in answers}


def _figures(content: RecordDict) -> dict[str, float]:
    """Return the figures of a site's own model."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"it has {len(records)} metric records instead of one")
    record = records[0]
    figures = {name: float(value) for name, value in record.items() if not isinstance(value, list)}
    if missing := sorted({*PERSONAL} - figures.keys()):
        raise ValueError(f"it has no {missing[0]}")
    if odd := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise ValueError(f"{odd[0]} is not finite")
    counts = ("personal-epochs", "num-examples")
    if odd := [n for n in counts if figures.get(n, 0) < 0 or figures.get(n, 0) % 1]:
        raise ValueError(f"{odd[0]} is {figures[odd[0]]}")
    return figures


def collect_pictures(
    grid: Grid,
    arrays: ArrayRecord,
    config: ConfigRecord,
    count: int,
    timeout: float,
    names: Mapping[int, str],
    sent: Sent,
    folder: RunFolder,
) -> list[dict[str, str]]:
    """Ask each site for pictures of test cases and write those that may be shown.

    Parameters
    ----------
    count : int
        Cases a site, beside the worst.
    names, sent
        As in `collect_contributions`.
    folder : RunFolder
        Gets ``pictures/1.png`` and so on.

    Returns
    -------
    list of dict
        ``site``, ``file`` and ``title`` of each picture, in the order of the sites' names. A site
        that answers with an error, or with what is no sound picture, has none; the log says why.
    """
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, COUNT: count})})
    contents = {node_id: content for node_id in grid.get_node_ids() if node_id in names}

    def read(_: int, content: RecordDict) -> list[tuple[str, bytes]]:
        return _pairs(content.config_records[PICTURES])

    answers, failures = ask_all(grid, PICTURES, contents, read, timeout, dict(names))
    for failure in failures:
        log.warning("no pictures of %s: %s", failure.site, failure.reason)
    found: dict[str, list[tuple[str, bytes]]] = {}
    for answer in answers:
        if answer.value:
            sent.take(PICTURES, answer.site, answer.content)
        found[answer.site] = []
        for title, png in answer.value[: count + 1]:
            if (reason := sound(png)) is not None:
                log.warning("a picture of %s is not shown: %s", answer.site, reason)
            else:
                found[answer.site].append((title[:120], png))
    pictures: list[dict[str, str]] = []
    for site in sorted(found):
        for title, png in found[site]:
            name = f"pictures/{len(pictures) + 1}.png"
            folder.write(name, png)
            pictures.append({"site": site, "file": name, "title": title})
    return pictures


def _pairs(record: ConfigRecord) -> list[tuple[str, bytes]]:
    """Return title and file of each picture; whatever else a site may send is an error."""
    titles: Any = record[TITLES]
    images: Any = record[IMAGES]
    if not isinstance(titles, list) or not isinstance(images, list):
        raise TypeError("titles and images must be lists")
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles of {len(images)} pictures")
    pairs = list(zip(titles, images, strict=True))
    for title, png in pairs:
        # Made into bytes, a number would become as many zeros.
        if not isinstance(title, str) or not isinstance(png, bytes):
            raise TypeError("titles must be texts and images bytes")
    return pairs
