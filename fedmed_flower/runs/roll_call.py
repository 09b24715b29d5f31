"""Exchanges outside the rounds: roll call, contributions, personal models and pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.data.pictures import sound
from fedmed_flower.data.site import GENERATED, SPLITS, some_of
from fedmed_flower.errors import InputError, shown
from fedmed_flower.server.ask import NoAnswer, ask, ask_all
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.listener import NOBODY, Listener
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.wire import (
    COLUMNS,
    CONTRIBUTION,
    COUNT,
    EMPTY,
    FILLED,
    IMAGES,
    LACKING,
    MESSAGE_VERSION,
    PERSONAL,
    PICTURES,
    REJECTED,
    SITE_RECORD,
    TITLES,
    VERSION,
    Sent,
    VersionError,
    require_version,
)

log = logging.getLogger("flwr.fedmed")

# Of the columns that a table lacks, or has no value in: how many are listed, and letters of each.
_MOST_NAMES = 200
_MOST_NAME = 100


@dataclass
class Sites:
    """What the sites reported of themselves at the roll call.

    Attributes
    ----------
    counts : dict
        Numbers of rows by node id and split. A site whose figures leave in secure sums alone tells
        none: for such a site only splits without rows are there, as 0.
    filled : dict
        Splits with rows, by node id.
    """

    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    filled: dict[int, set[str]] = field(default_factory=dict)
    labels: dict[int, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, int] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    empty: dict[str, list[str]] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    generated: bool = False
    simulated: bool = True
    nodes: set[int] = field(default_factory=set)
    refusals: dict[int, str] = field(default_factory=dict)
    # Nodes whose messages have another version; nothing more is sent to them.
    outdated: set[int] = field(default_factory=set)
    namesakes: Namesakes = field(default_factory=Namesakes)
    sent: Sent = field(default_factory=Sent)

    def refused(self) -> dict[str, list[str]]:
        """Return the names of the sites that cannot take part, by reason."""
        names: dict[str, list[str]] = {}
        for node_id, reason in self.refusals.items():
            names.setdefault(reason, []).append(self.names.get(node_id, f"node {node_id}"))
        return names

    def rows(self) -> dict[str, dict[str, int]]:
        """Return each site's numbers of rows by split, and of rows rejected if there are any."""
        rejected = self.rejected if any(self.rejected.values()) else {}
        return {
            self.names[node_id]: counts
            | ({REJECTED: rejected[node_id]} if node_id in rejected else {})
            for node_id, counts in self.counts.items()
        }

    def write_log(self) -> None:
        """Log which sites take part and with which rows."""
        for reason, names in self.refused().items():
            log.warning(
                "%d of %d sites cannot take part (%s): %s",
                len(names),
                len(self.nodes),
                some_of(sorted(names)),
                reason,
            )
        if self.generated:
            log.warning("%s", GENERATED)
        if text := self.namesakes.text(self.names, trained=True):
            log.warning("%s", text)
        for split in SPLITS:
            empty = [
                self.names[node] for node, filled in self.filled.items() if split not in filled
            ]
            if empty:
                log.warning("no rows in the %s split at %s", split, some_of(empty))
        for node_id in self.counts:
            labels = self.labels[node_id]
            details = f"; training rows by label: {labels}" if labels else ""
            if lacking := self.lacking.get(self.names[node_id]):
                details += f"; its table has no column {', '.join(lacking)}"
            if unfilled := self.empty.get(self.names[node_id]):
                details += f"; it has no value of {', '.join(unfilled)}"
            if rejected := self.rejected.get(node_id):
                details += f"; {rejected} rows rejected at the site"
            log.info("%s: %s%s", self.names[node_id], self.rows_text(node_id), details)

    def rows_text(self, node_id: int) -> str:
        """Return a site's numbers of rows in words."""
        counts = self.counts[node_id]
        if {*SPLITS} <= counts.keys():
            return ", ".join(f"{count} {split}" for split, count in counts.items())
        return "counts withheld (secure sums)"

    def absent_classes(self) -> list[int]:
        """Return the classes without a training row anywhere; only simulated sites report them."""
        counts = [labels for labels in self.labels.values() if isinstance(labels, list)]
        if len(counts) < len(self.labels) or len({len(labels) for labels in counts}) != 1:
            return []
        return [label for label, rows in enumerate(zip(*counts, strict=True)) if not any(rows)]

    def trainers(self) -> set[int]:
        """Return the nodes that have training rows; the others are only tested."""
        return {node_id for node_id, filled in self.filled.items() if "train" in filled}

    def only(self) -> set[int] | None:
        """Return the nodes that may train; None if no site is known to have no training rows.

        A site that did not answer may: it can come back.
        """
        tested_only = self.counts.keys() - self.trainers()
        return self.nodes - tested_only if tested_only else None

    def forget(self, node_id: int) -> None:
        """Remove a node whose site has come back under another node id."""
        self.nodes.discard(node_id)
        self.outdated.discard(node_id)
        self.filled.pop(node_id, None)
        for by_node in (self.counts, self.labels, self.names, self.rejected, self.refusals):
            by_node.pop(node_id, None)


def roll_call(
    grid: Grid,
    timeout: float,
    minimum: int | None = None,
    grace: float = 0.0,
    listener: Listener = NOBODY,
    training: bool = True,
) -> Sites:
    """Ask every connected site for its name and its numbers of rows, or which splits have some.

    Parameters
    ----------
    grid, timeout, minimum, grace, listener
        As in `ask`.
    training : bool
        Whether a model is trained, which needs training rows.

    Raises
    ------
    InputError
        If no site answers; if a model is trained, also if none has training rows, or in a
        simulation none has training rows of a class.
    """
    sites = Sites()
    failures = _describe(
        grid, grid.get_node_ids(), sites, timeout, listener, minimum=minimum, grace=grace
    )
    if not sites.counts:
        reasons = (failure.reason for failure in failures if not failure.silent)
        raise InputError(next(reasons, "no site answered the roll call"))
    if not training:
        return sites
    if not sites.trainers():
        raise InputError("no site has training rows")
    if absent := sites.absent_classes():
        raise InputError(
            f"no site has a training row of class {', '.join(map(str, absent))}: look at the "
            "labels, or declare fewer classes"
        )
    return sites


def call_newcomers(
    grid: Grid,
    sites: Sites,
    timeout: float,
    listener: Listener = NOBODY,
    server_round: int = 0,
) -> dict[str, int | None]:
    """Ask the sites that have connected since the roll call, and add them.

    Parameters
    ----------
    grid, timeout, listener, server_round
        As in `ask`.
    sites : Sites

    Returns
    -------
    dict of str to (int or None)
        The name of each site that answered. Its value is the node id that the site had before; None
        if it is new.
    """
    connected = set(grid.get_node_ids())
    gone = {name: node_id for node_id, name in sites.names.items() if node_id not in connected}
    newcomers = connected - sites.nodes
    if not newcomers:
        return {}
    held = {node_id: sites.names.pop(node_id) for node_id in gone.values()}
    _describe(grid, newcomers, sites, timeout, listener, server_round)
    came = {sites.names[node_id]: node_id for node_id in newcomers if node_id in sites.counts}
    sites.names |= {node_id: name for node_id, name in held.items() if name not in came}
    for name in came:
        if name in gone:
            sites.forget(gone[name])
    return {name: gone.get(name) for name in sorted(came)}


def _describe(
    grid: Grid,
    nodes: Iterable[int],
    sites: Sites,
    timeout: float,
    listener: Listener,
    server_round: int = 0,
    minimum: int | None = None,
    grace: float = 0.0,
) -> list[NoAnswer]:
    """Ask nodes for their names and numbers of rows, and add the answers to `sites`."""
    contents = {
        node_id: RecordDict({"config": ConfigRecord({VERSION: MESSAGE_VERSION})})
        for node_id in nodes
    }
    sites.nodes |= contents.keys()

    def read(node_id: int, content: RecordDict) -> _About:
        name = sites.names.get(node_id, f"node {node_id}")
        sites.sent.take("describe", name, content)
        try:
            require_version(content.config_records[SITE_RECORD].get(VERSION), name, "hospital")
        except VersionError:
            sites.outdated.add(node_id)
            raise
        return _about(content)

    asked = ask(
        grid,
        "describe",
        contents,
        read,
        timeout,
        sites.names,
        minimum,
        grace,
        listener,
        server_round,
    )
    for answer in sorted(asked, key=lambda answer: (answer.site, answer.node_id)):
        about = answer.value
        node_id = answer.node_id
        sites.names.setdefault(node_id, answer.site)
        sites.counts[node_id] = about.rows
        sites.filled[node_id] = about.filled
        sites.labels[node_id] = about.labels
        for by_site, columns in ((sites.lacking, about.lacking), (sites.empty, about.empty)):
            # A site that comes back may have corrected its table.
            by_site.pop(answer.site, None)
            if columns:
                by_site[answer.site] = columns
        if about.rejected is not None:
            sites.rejected[node_id] = about.rejected
        sites.namesakes.take(node_id, answer.content)
        sites.sources.add(about.source)
        sites.generated |= about.generated
        sites.simulated &= about.simulated
    sites.refusals |= {failure.node_id: failure.reason for failure in asked.failures}
    return asked.failures


class _About(NamedTuple):
    """What one site reports of itself."""

    rows: dict[str, int]
    filled: set[str]
    labels: Any
    rejected: int | None
    lacking: list[str]
    empty: list[str]
    source: str
    generated: bool
    simulated: bool


def _about(content: RecordDict) -> _About:
    record = content.config_records[SITE_RECORD]
    counts = MetricRecord()
    rejected = 0
    if FILLED in content.config_records:
        filled = _filled(content.config_records[FILLED])
        rows = {split: 0 for split in SPLITS if split not in filled}
    else:
        (counts,) = content.metric_records.values()
        rows = {split: int(counts[split]) for split in SPLITS}  # type: ignore[arg-type]
        rejected = int(counts.get(REJECTED, 0))  # type: ignore[arg-type]
        if min(*rows.values(), rejected) < 0:
            raise ValueError(f"negative number of rows in {rows}, {rejected} rejected")
        filled = {split for split, count in rows.items() if count}
    return _About(
        rows=rows,
        filled=filled,
        labels=counts.get("labels"),
        rejected=rejected if REJECTED in counts else None,
        lacking=_columns(content, LACKING),
        empty=_columns(content, EMPTY),
        source=str(record["data"]),
        generated=bool(record["generated"]),
        simulated=bool(record["simulated"]),
    )


def _filled(record: ConfigRecord) -> set[str]:
    """Return the splits with rows, by a site that tells no numbers."""
    told = {split: record[split] for split in SPLITS}
    if not all(isinstance(value, bool) for value in told.values()):
        raise TypeError("whether a split has rows must be true or false")
    return {split for split, value in told.items() if value}


def _columns(content: RecordDict, record: str) -> list[str]:
    """Return the columns that a record of a site's answer names; none if there is no record."""
    if record not in content.config_records:
        return []
    names = content.config_records[record][COLUMNS]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the columns in its record {record!r} are not a list of names")
    return [shown(str(name))[:_MOST_NAME] for name in names[:_MOST_NAMES]]


def collect_contributions(
    grid: Grid,
    timeout: float,
    names: Mapping[int, str],
    sent: Sent,
    listener: Listener = NOBODY,
) -> dict[str, dict[str, Any]]:
    """Ask each site for its contribution, from which the model is prepared.

    Parameters
    ----------
    names : dict of int to str
        Site name by node id; only these nodes are asked.
    sent : Sent
        The answers are added to it.
    listener : Listener
        As in `ask`.

    Returns
    -------
    dict
        Contribution by name of the site. The log says why a site sent none.
    """

    def read(_: int, content: RecordDict) -> dict[str, Any]:
        return dict(content.config_records[CONTRIBUTION])

    contents = {node_id: RecordDict() for node_id in names}
    answers, failures = ask_all(
        grid, CONTRIBUTION, contents, read, timeout, dict(names), listener=listener
    )
    for answer in answers:
        sent.take(CONTRIBUTION, answer.site, answer.content)
    for failure in failures:
        log.warning("%s sent nothing to prepare the model with: %s", failure.site, failure.reason)
    return {answer.site: answer.value for answer in answers}


def collect_personal(
    grid: Grid,
    arrays: ArrayRecord,
    config: ConfigRecord,
    timeout: float,
    names: Mapping[int, str],
    sent: Sent,
    listener: Listener = NOBODY,
) -> dict[str, dict[str, float]]:
    """Let each site fine-tune a model for itself.

    Parameters
    ----------
    names, sent, listener
        As in `collect_contributions`.

    Returns
    -------
    dict
        Metrics of each site's personal model, by name of the site. The log says why a site has
        none.
    """
    site_names = dict(names)

    def read(node_id: int, content: RecordDict) -> dict[str, float]:
        sent.take("personal", site_names[node_id], content)
        return _personal_metrics(content)

    contents = {node_id: RecordDict({"arrays": arrays, "config": config}) for node_id in names}
    answers, failures = ask_all(
        grid, "personal", contents, read, timeout, site_names, listener=listener
    )
    for failure in failures:
        log.warning("%s has no model of its own: %s", failure.site, failure.reason)
    return {answer.site: answer.value for answer in answers}


def _personal_metrics(content: RecordDict) -> dict[str, float]:
    """Read the metrics of a site's personal model from its answer."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"it has {len(records)} metric records instead of one")
    record = records[0]
    metrics = {name: float(value) for name, value in record.items() if not isinstance(value, list)}
    if missing := sorted({*PERSONAL} - metrics.keys()):
        raise ValueError(f"it has no {missing[0]}")
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
    for name in ("personal-epochs", "num-examples"):
        count = metrics.get(name, 0)
        if count < 0 or count % 1:
            raise ValueError(f"{name} must be a whole number, at least 0, got {count}")
    return metrics


def collect_pictures(
    grid: Grid,
    arrays: ArrayRecord,
    config: ConfigRecord,
    count: int,
    timeout: float,
    names: Mapping[int, str],
    sent: Sent,
    folder: RunFolder,
    listener: Listener = NOBODY,
) -> list[dict[str, str]]:
    """Ask each site for pictures of test cases, and write the sound ones to the run folder.

    Parameters
    ----------
    count : int
        Number of cases per site, besides the worst one.
    names, sent, listener
        As in `collect_contributions`.
    folder : RunFolder
        The pictures are written to it as ``pictures/1.png`` and so on.

    Returns
    -------
    list of dict
        ``site``, ``file`` and ``title`` of each picture, in the order of the sites' names. An
        answer with an error gives no picture, and a broken picture is left out; the log says why.
    """
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, COUNT: count})})
    contents = {node_id: content for node_id in grid.get_node_ids() if node_id in names}

    def read(_: int, content: RecordDict) -> list[tuple[str, bytes]]:
        return _pairs(content.config_records[PICTURES])

    answers, failures = ask_all(
        grid, PICTURES, contents, read, timeout, dict(names), listener=listener
    )
    for failure in failures:
        log.warning("no pictures of %s: %s", failure.site, failure.reason)
    by_site: dict[str, list[tuple[str, bytes]]] = {}
    for answer in answers:
        if answer.value:
            sent.take(PICTURES, answer.site, answer.content)
        by_site[answer.site] = _sound_pictures(answer.site, answer.value[: count + 1])
    pictures: list[dict[str, str]] = []
    for site in sorted(by_site):
        for title, png in by_site[site]:
            name = f"pictures/{len(pictures) + 1}.png"
            folder.write(name, png)
            pictures.append({"site": site, "file": name, "title": title})
    return pictures


def _sound_pictures(site: str, pictures: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Return the pictures that can be shown, with titles cut to 120 letters; log the others."""
    shown = []
    for title, png in pictures:
        reason = sound(png)
        if reason is None:
            shown.append((title[:120], png))
        else:
            log.warning("a picture of %s is not shown: %s", site, reason)
    return shown


def _pairs(record: ConfigRecord) -> list[tuple[str, bytes]]:
    """Read title and PNG file of each picture from an answer; any other content is an error."""
    titles: Any = record[TITLES]
    images: Any = record[IMAGES]
    if not isinstance(titles, list) or not isinstance(images, list):
        raise TypeError("titles and images must be lists")
    if len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles of {len(images)} pictures")
    pairs = list(zip(titles, images, strict=True))
    for title, png in pairs:
        # Checked, because bytes(n) of a number n would be n zeros.
        if not isinstance(title, str) or not isinstance(png, bytes):
            raise TypeError("titles must be texts and images bytes")
    return pairs
