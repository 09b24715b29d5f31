"""The server's exchanges of secure sums: hello, masked replies, who remains, what opens."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.encoding import SecureError, Value, decoded, encoded
from fedmed_flower.secure.parts import CLIPPED, ONES
from fedmed_flower.secure.record import DATA, Hello, Record
from fedmed_flower.secure.ring import Layout, Part, Words
from fedmed_flower.server.ask import ask_all
from fedmed_flower.server.inbox import SUM_NODE, Inbox
from fedmed_flower.wire import (
    ASKED,
    BOOKS,
    LETTER,
    MASKED,
    RECORD,
    SECURE,
    SECURE_RUN,
    SITE_RECORD,
)

T = TypeVar("T")
_MOST_LETTER = 1 << 28
_NONCE_BYTES = 16


@dataclass(frozen=True)
class Opened:
    """A sum that was opened.

    Attributes
    ----------
    values : dict of str to ndarray
        The sum of each part.
    members : list of str
        The hospitals that it is over.
    record : Record
    """

    values: dict[str, NDArray[Any]]
    members: list[str]
    record: Record

    @property
    def share(self) -> float:
        """The share of the hospitals asked that it is over."""
        return len(self.members) / len(self.record.names)


class SecureSums:
    """The secure sums of one run.

    Parameters
    ----------
    grid : Grid
    inbox : Inbox
        Knows the sites by name and records who fails.
    run : str
        Name of the run in hellos and records.
    timeout : float
        Seconds to wait in each exchange beside the first.
    books : Path, optional
        In a simulation, the folder of the sites' books.

    Attributes
    ----------
    hellos : dict of str to Hello
        What each hospital has said, by name.
    about : dict of str to dict
        What each hospital says of its rows' source, by name.
    opened : list of (int, str, list of str)
        Round, purpose and hospitals of each sum that was opened.
    """

    def __init__(
        self, grid: Grid, inbox: Inbox, run: str, timeout: float, books: Path | None = None
    ) -> None:
        self.grid = grid
        self.inbox = inbox
        self.run = run
        self.timeout = timeout
        self.books = books
        self.hellos: dict[str, Hello] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.opened: list[tuple[int, str, list[str]]] = []
        self._nodes: dict[str, int] = {}

    def greet(self, nodes: Collection[int], server_round: int) -> None:
        """Ask nodes that have said no hello yet for theirs; those that do not answer are noted."""
        new = sorted(set(nodes) - {*self._nodes.values()})
        if not new:
            return
        content = self._asked({SECURE_RUN: self.run})

        def read(node_id: int, reply: RecordDict) -> Hello:
            hello = Hello.of(decoded(_letter(reply)))
            hello.verify()
            if hello.run != self.run:
                raise SecureError("its hello is of another run")
            about = dict(reply.config_records[SITE_RECORD])
            if (said := str(about["name"])) != hello.name:
                raise SecureError(f"its hello is of {hello.name!r}, and it is named {said!r}")
            self.about[hello.name] = about
            return hello

        for node_id, hello in self._ask("hello", dict.fromkeys(new, content), read, server_round):
            self.hellos[hello.name] = hello
            self._nodes[hello.name] = node_id
            self.inbox.site_names[node_id] = hello.name

    def record(
        self,
        nodes: Collection[int],
        purpose: str,
        kind: str,
        server_round: int,
        layout: Layout,
        weighting: Mapping[str, Value],
    ) -> Record:
        """Return the record of a sum over some nodes.

        Raises
        ------
        SecureError
            If too few of them have said hello.
        """
        present = [hello for name, hello in self.hellos.items() if self._nodes[name] in nodes]
        if not present:
            raise SecureError("no hospital has said hello")
        record = Record.of_hellos(
            present,
            purpose=purpose,
            kind=kind,
            server_round=server_round,
            nonce=secrets.token_bytes(_NONCE_BYTES),
            layout=layout,
            weighting=weighting,
        )
        # What every hospital would refuse.
        record.require_enough(record.names)
        return record

    @property
    def greeted(self) -> dict[str, int]:
        """The nodes that have said hello, by the hospitals' names."""
        return dict(self._nodes)

    def question(
        self,
        nodes: Collection[int],
        name: str,
        content: RecordDict,
        parts: Sequence[Part],
        number: int = 0,
    ) -> Opened:
        """Put one question about data to nodes, and open the sum over all of them or not at all.

        Parameters
        ----------
        nodes : collection of int
            They have said hello.
        name : str
            Name of the query.
        content : RecordDict
            The same for all: no field is for one hospital.
        parts : sequence of Part
            What is summed.
        number : int
            Of the round or block, for the list of failures.

        Raises
        ------
        SecureError
            If one of them does not answer, or has sent what cannot be; the text has the way out.
        """
        known = len(self.inbox.history.failures)
        layout = Layout((*parts, ONES, CLIPPED))
        try:
            record = self.record(nodes, name, DATA, number, layout, {})
            # Each message gets the record of the sum, so each needs a content of its own.
            messages = [
                Message(RecordDict({**content}), node_id, f"{MessageType.QUERY}.{name}")
                for node_id in self.nodes_of(record)
            ]
            opened = self.sum(messages, record, name, self.timeout, whole=True)
        except SecureError as error:
            failures = self.inbox.history.failures[known:]
            reasons = "".join(f"; {failure.site}: {failure.reason}" for failure in failures)
            raise SecureError(
                f"the secure sum of {name} is lost: {error}{reasons}. A question about data is "
                "answered over all hospitals or not at all, so that no difference of two answers "
                "shows one hospital: ask again when all of them answer, or let each of the others "
                "leave it out (`fedmed keys regroup`)"
            ) from error
        if int(opened.values[ONES.name][0]) != len(opened.members):
            raise SecureError(f"the secure sum of {name} is wrong: a mask was wrong")
        if clipped := int(opened.values[CLIPPED.name][0]):
            raise SecureError(
                f"{clipped} numbers of the secure sum of {name} are no numbers or larger than a "
                "sum may hold: ask for columns in other units, or leave them out"
            )
        return opened

    def nodes_of(self, record: Record) -> list[int]:
        """Return the nodes of a record's hospitals."""
        return [self._nodes[name] for name in record.names]

    def sum(
        self,
        messages: Sequence[Message],
        record: Record,
        phase: str,
        timeout: float,
        minimum: int | None = None,
        grace: float = 0.0,
        whole: bool = False,
    ) -> Opened:
        """Send messages that ask for a sum, and open it over those that remain.

        Parameters
        ----------
        messages : sequence of Message
            To hospitals of the record.
        record : Record
        phase, timeout, minimum, grace
            As in `Inbox.collect`.
        whole : bool
            Whether to open it over all hospitals of the record or not at all. No hospital is then
            asked who remains, so all may still answer later.

        Raises
        ------
        SecureError
            If the sum cannot be opened. Nothing is then known but who took part.
        """
        server_round = record.server_round
        told = self._config({RECORD: record.to_bytes()})
        for message in messages:
            message.content[SECURE] = ConfigRecord({**told})
        collector = Collector(record)
        for site, reply in self.inbox.sorted_out(
            server_round,
            phase,
            self.inbox.collect(self.grid, messages, timeout, server_round, phase, minimum, grace),
        ):
            try:
                collector.add(site, _words(reply.content), _letter(reply.content))
            except SecureError as error:
                self.inbox.fail(server_round, phase, site, f"malformed reply: {error}")
        try:
            complete = collector.settle()
        finally:
            for site, problem in collector.problems.items():
                self.inbox.fail(server_round, phase, site, problem)
        if whole and not complete:
            lost = sorted({*record.names} - {*collector.members})
            raise SecureError(f"{', '.join(lost)} did not add to it")
        signatures = {} if complete else self._certificate(collector, server_round)
        members = collector.members
        contents = {
            self._nodes[name]: self._asked(
                {
                    SECURE_RUN: self.run,
                    "digest": collector.digest,
                    "members": members,
                    "envelopes": collector.envelopes_for(name),
                    "signatures": signatures,
                }
            )
            for name in members
        }
        by_node = {node_id: name for name, node_id in self._nodes.items()}

        def read(node_id: int, reply: RecordDict) -> None:
            collector.answer(by_node[node_id], _letter(reply))

        list(self._ask("unmask", contents, read, server_round))
        sites = len(members)
        values = record.layout.decode(collector.open(), sites)
        if (excess := record.layout.excess(values, sites)) is not None:
            raise SecureError(f"one of the hospitals has sent what cannot be: {excess}")
        self.opened.append((server_round, record.purpose, members))
        return Opened(values, members, record)

    def _certificate(self, collector: Collector, server_round: int) -> dict[str, bytes]:
        """Let the hospitals that remain sign that they do."""
        members = collector.members
        asked: dict[str, Value] = {SECURE_RUN: self.run, "digest": collector.digest}
        content = self._asked({**asked, "members": members})
        by_node = {self._nodes[name]: name for name in members}

        def read(node_id: int, reply: RecordDict) -> None:
            collector.certify(by_node[node_id], _letter(reply))

        list(self._ask("alive", dict.fromkeys(by_node, content), read, server_round))
        return collector.certificate()

    def _ask(
        self,
        question: str,
        contents: Mapping[int, RecordDict],
        read: Callable[[int, RecordDict], T],
        server_round: int,
    ) -> list[tuple[int, T]]:
        """Ask nodes; return the answers by node, and record who gave none."""
        answers, failures = ask_all(
            self.grid,
            question,
            contents,
            read,
            self.timeout,
            self.inbox.site_names,
            listener=self.inbox.listeners,
            server_round=server_round,
        )
        for failure in failures:
            self.inbox.fail(server_round, question, failure.site, failure.reason)
        return [(answer.node_id, answer.value) for answer in answers]

    def _asked(self, values: Mapping[str, Value]) -> RecordDict:
        return RecordDict({SECURE: self._config({ASKED: encoded(values)})})

    def _config(self, values: Mapping[str, Any]) -> ConfigRecord:
        config = ConfigRecord({**values})
        if self.books is not None:
            config[BOOKS] = str(self.books)
        return config


def _letter(content: RecordDict) -> bytes:
    letter = content.config_records.get(SECURE, ConfigRecord()).get(LETTER)
    if not isinstance(letter, bytes) or len(letter) > _MOST_LETTER:
        raise SecureError("it holds no letter")
    return letter


def _words(content: RecordDict) -> Words:
    record = content.array_records.get(MASKED, ArrayRecord())
    vectors = [view(array) for array in record.values()]
    if [vector.dtype for vector in vectors] != [np.uint32, np.uint64]:
        raise SecureError("it holds other vectors than a secure sum has")
    return vectors[0], vectors[1]


def reply_of(opened: Opened, kind: str, content: RecordDict, inbox: Inbox) -> Message:
    """Return a sum as one reply, from a node that stands for all its hospitals."""
    name = f"sum of {len(opened.members)} hospitals"
    inbox.site_names[SUM_NODE] = name
    content[SITE_RECORD] = ConfigRecord({"name": name})
    return Message(content, reply_to=Message(RecordDict(), SUM_NODE, kind))
