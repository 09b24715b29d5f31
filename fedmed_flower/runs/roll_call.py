"""What sites are asked beside the rounds: who they are, and for pictures at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.data.pictures import sound
from fedmed_flower.data.site import GENERATED, SPLITS, some_of
from fedmed_flower.errors import InputError
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.server.screening import error_text
from fedmed_flower.server.sites import learn_name
from fedmed_flower.wire import PERSONAL, SITE_RECORD, Sent

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
            self.names[node_id]: counts
            | ({"turned-away": away[node_id]} if node_id in away else {})
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
    question = f"{MessageType.QUERY}.describe"
    messages = [Message(RecordDict(), node_id, question) for node_id in nodes]
    sites = Sites(asked=len(nodes))
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node_id = reply.metadata.src_node_id
        learn_name(sites.names, node_id, reply)
        if reply.has_error():
            sites.refusals[node_id] = error_text(reply)
            continue
        name = sites.names.get(node_id, f"node {node_id}")
        sites.sent.take("describe", name, reply.content)
        try:
            about = reply.content.config_records[SITE_RECORD]
            (counts,) = reply.content.metric_records.values()
            rows = {split: int(counts[split]) for split in SPLITS}  # type: ignore[arg-type]
            away = int(counts.get("turned-away", 0))  # type: ignore[arg-type]
            if min(*rows.values(), away) < 0:
                raise ValueError(f"negative number of rows in {rows}, {away} turned away")
            source, generated, simulated = about["data"], about["generated"], about["simulated"]
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            sites.refusals[node_id] = f"malformed answer: {type(error).__name__} {error}"
            continue
        sites.names.setdefault(node_id, f"node {node_id}")
        sites.counts[node_id], sites.labels[node_id] = rows, counts.get("labels")
        if "turned-away" in counts:
            sites.turned_away[node_id] = away
        sites.namesakes.take(reply)
        sites.sources.add(str(source))
        sites.generated |= bool(generated)
        sites.simulated &= bool(simulated)
    if not sites.counts:
        raise InputError(next(iter(sites.refusals.values()), "no site answered the roll call"))
    if not sites.trainers():
        raise InputError("no site has training rows")
    for node_id in {*nodes} - sites.counts.keys() - sites.refusals.keys():
        sites.refusals[node_id] = f"no answer within {timeout:g} s"
    in_order = sorted(sites.counts, key=lambda node_id: sites.names[node_id])
    sites.counts = {node_id: sites.counts[node_id] for node_id in in_order}
    return sites


@contextmanager
def held_back() -> Iterator[list[logging.LogRecord]]:
    """Hold log lines back until a run has a folder with a log for them.

    Where it comes to none, because an error is raised, they are logged at once.
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
    kind, found = f"{MessageType.QUERY}.contribution", dict[str, dict[str, Any]]()
    messages = [Message(RecordDict(), node_id, kind) for node_id in names]
    reasons = dict.fromkeys(names.values(), "no answer")
    for reply in grid.send_and_receive(messages, timeout=timeout):
        site = names.get(reply.metadata.src_node_id, "")
        record = None if reply.has_error() else reply.content.config_records.get("contribution")
        if record is None:
            reasons[site] = error_text(reply) if reply.has_error() else "malformed answer"
        else:
            sent.take("contribution", site, reply.content)
            found[site] = dict(record)
    for site in sorted(reasons.keys() - found.keys()):
        log.warning("%s tells nothing to prepare the model with: %s", site, reasons[site])
    return found


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
    kind, found = f"{MessageType.QUERY}.personal", dict[str, dict[str, float]]()
    content = RecordDict({"arrays": arrays, "config": config})
    messages = [Message(content, node_id, kind) for node_id in names]
    reasons = dict.fromkeys(names.values(), "no answer")
    for reply in grid.send_and_receive(messages, timeout=timeout):
        site = names.get(reply.metadata.src_node_id, "")
        if reply.has_error():
            reasons[site] = error_text(reply)
            continue
        sent.take("personal", site, reply.content)
        try:
            (record,) = reply.content.metric_records.values()
            figures = {
                name: float(value) for name, value in record.items() if not isinstance(value, list)
            }
            if not all(map(math.isfinite, figures.values())) or not {*PERSONAL} <= figures.keys():
                raise ValueError
            counts = ("personal-epochs", "num-examples")
            if any(figures.get(name, 0) < 0 or figures.get(name, 0) % 1 for name in counts):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            reasons[site] = f"malformed answer: {type(error).__name__}"
        else:
            found[site] = figures
    for site in sorted(reasons.keys() - found.keys()):
        log.warning("%s has no model of its own: %s", site, reasons[site])
    return dict(sorted(found.items()))


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
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "count": count})})
    nodes = [node_id for node_id in grid.get_node_ids() if node_id in names]
    kind = f"{MessageType.QUERY}.pictures"
    found: dict[str, list[tuple[str, bytes]]] = {}
    for reply in grid.send_and_receive(
        [Message(content, node_id, kind) for node_id in nodes], timeout=timeout
    ):
        site = names.get(reply.metadata.src_node_id, "")
        if reply.has_error():
            log.warning("no pictures of %s: %s", site, error_text(reply))
            continue
        try:
            pairs = _pairs(reply.content.config_records["pictures"])
            if pairs:
                sent.take("pictures", site, reply.content)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("no pictures of %s: malformed answer: %s", site, type(error).__name__)
            continue
        found[site] = []
        for title, png in pairs[: count + 1]:
            if (reason := sound(png)) is not None:
                log.warning("a picture of %s is not shown: %s", site, reason)
            else:
                found[site].append((title[:120], png))
    pictures: list[dict[str, str]] = []
    for site in sorted(found):
        for title, png in found[site]:
            name = f"pictures/{len(pictures) + 1}.png"
            folder.write(name, png)
            pictures.append({"site": site, "file": name, "title": title})
    return pictures


def _pairs(record: ConfigRecord) -> list[tuple[str, bytes]]:
    """Return title and file of each picture; whatever else a site may send is an error."""
    titles: Any = record["titles"]
    images: Any = record["images"]
    pairs = list(zip(titles, images, strict=True))
    for title, png in pairs:
        # Made into bytes, a number would become as many zeros.
        if not isinstance(title, str) or not isinstance(png, bytes):
            raise TypeError
    return pairs
