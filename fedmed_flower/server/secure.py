"""The server's exchanges of secure sums: hello, masked replies, who remains, what opens."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.data.site import some_of
from fedmed_flower.secure.audit import AUDIT, Chain
from fedmed_flower.secure.collector import Collector, SpoiltError
from fedmed_flower.secure.encoding import (
    SecureError,
    Value,
    decoded,
    digest,
    digest_of_arrays,
    encoded,
)
from fedmed_flower.secure.parts import CLIPPED, ONES, TOLD, figure_parts
from fedmed_flower.secure.record import DATA, TRAIN, Hello, Record, exposed_groups
from fedmed_flower.secure.ring import Layout, Part, Words
from fedmed_flower.secure.study import place_of
from fedmed_flower.server.ask import Enough, ask_all
from fedmed_flower.server.history import Sum
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

log = logging.getLogger("flwr.fedmed")

T = TypeVar("T")
# Decoding takes thirty times as much memory.
_MOST_LETTER = 1 << 23
_NONCE_BYTES = 16
_MOST_FIGURES = 10_000


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
    told : dict of str to RecordDict
        The figures of members that tell their own beside their part, by name.
    """

    values: dict[str, NDArray[Any]]
    members: list[str]
    record: Record
    told: dict[str, RecordDict] = field(default_factory=dict)


class _Attempt:
    """One of several sums that are made at once, as far as it has come.

    Attributes
    ----------
    collector : Collector
    complete : bool
        Whether all hospitals of its record are in it.
    signatures : dict of str to bytes
        By which hospitals those that remain are certified; empty if all do.
    lost : SecureError or None
        Why it cannot be opened.
    told : dict of str to RecordDict
        The figures of hospitals that tell their own beside their part, by name.
    """

    def __init__(self, record: Record) -> None:
        self.collector = Collector(record)
        self.complete = False
        self.signatures: dict[str, bytes] = {}
        self.lost: SecureError | None = None
        self.told: dict[str, RecordDict] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note an error of a step, so that the other sums go on."""
        try:
            yield
        except SecureError as error:
            self.lost = error


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
    folder : Path, optional
        The run folder, in which the server's audit trail lies. None keeps none.
    grace : float
        After as many hospitals as a sum needs have signed a set, or have sent their shares, wait
        only so many seconds for the others.

    Attributes
    ----------
    hellos : dict of str to Hello
        What each hospital has said, by name.
    about : dict of str to dict
        What each hospital says of its rows' source, by name.
    settled : frozenset of str
        The hospitals over which questions about data were first opened in this run; empty before.
    bound : dict of str to frozenset of str
        In training, by group, the hospitals of the last set that one of them has signed or sent its
        shares for: that one answers the same question for no other set. The group is empty if the
        study has none.
    """

    def __init__(
        self,
        grid: Grid,
        inbox: Inbox,
        run: str,
        timeout: float,
        books: Path | None = None,
        folder: Path | None = None,
        grace: float = 60.0,
    ) -> None:
        self.grid = grid
        self.inbox = inbox
        self.run = run
        self.timeout = timeout
        self.books = books
        self.grace = grace
        self.hellos: dict[str, Hello] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.settled: frozenset[str] = frozenset()
        self.bound: dict[str, frozenset[str]] = {}
        self._nodes: dict[str, int] = {}
        # The nodes that hospitals had before they came back as other ones.
        self._former: dict[int, str] = {}
        # The most hospitals that a sum so far has needed; 0 before the first.
        self._needed = 0
        self._trail = None if folder is None else Chain(folder / AUDIT, None, "server")

    def greet(self, nodes: Collection[int], server_round: int, minimum: int | None = None) -> None:
        """Ask nodes that have said no hello yet for theirs; those that do not answer are noted.

        A hospital that comes back as another node says hello again, and its former node is asked
        for nothing more.

        Parameters
        ----------
        nodes : collection of int
        server_round : int
        minimum : int, optional
            After so many of the nodes have said hello, and as many as a sum needs, wait only
            `grace` seconds for the others. Before the first sum all are waited for.
        """
        known = {*self._nodes.values()}
        former = {node for node, name in self._former.items() if self._nodes[name] in nodes}
        new = sorted(set(nodes) - known - former)
        if not new:
            return
        if minimum is not None:
            enough = max(minimum, self._needed) - len(known.intersection(nodes))
            minimum = max(0, enough) if self._needed else None
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

        contents = dict.fromkeys(new, content)
        for node_id, hello in self._ask("hello", contents, read, server_round, minimum):
            before = self.hellos.get(hello.name)
            # A hospital that has started anew has another node, and the same key.
            if before is not None and before.key != hello.key:
                text = "another node has said hello by this name, with another key"
                self.inbox.fail(server_round, "hello", hello.name, text)
                continue
            self._take(node_id, hello)

    def _take(self, node_id: int, hello: Hello) -> None:
        name = hello.name
        before = self._nodes.get(name)
        if before is not None:
            log.warning("node %d replaces node %d as %s", node_id, before, name)
            self._former[before] = name
            self.inbox.site_names.pop(before, None)
        self._former.pop(node_id, None)
        self.hellos[name] = hello
        self._nodes[name] = node_id
        self.inbox.site_names[node_id] = name

    def record(
        self,
        nodes: Collection[int],
        purpose: str,
        kind: str,
        server_round: int,
        layout: Layout,
        weighting: Mapping[str, Value],
        group: str = "",
    ) -> Record:
        """Return the record of a sum over some nodes.

        A question about data is asked of the hospitals alone that the first one was opened over:
        they answer no other. Hospitals of a group of which too few are there are left out of it.

        Parameters
        ----------
        group : str
            Name of the group that is summed by itself; the others are left out. Empty for all.

        Raises
        ------
        SecureError
            If too few of them have said hello.
        """
        present = [
            hello
            for name, hello in self.hellos.items()
            if self._nodes[name] in nodes and group in ("", hello.group)
        ]
        if kind == DATA and self.settled:
            present = [hello for hello in present if hello.name in self.settled]
        if not present:
            raise SecureError("no hospital has said hello")
        if kind == DATA:
            present = _of_whole_groups(present)
            if not present:
                raise SecureError("of no group are there as many hospitals as a sum needs")
        record = Record.of_hellos(
            present,
            purpose=purpose,
            kind=kind,
            server_round=server_round,
            nonce=secrets.token_bytes(_NONCE_BYTES),
            layout=layout,
            weighting=weighting,
            group=group,
        )
        self._needed = max(self._needed, record.needed)
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
                f"the secure sum of {name} is lost: {error}{reasons}. Ask again when all of them "
                "answer, or let each of the others leave it out (`fedmed keys regroup`)"
            ) from error
        if clipped := int(opened.values[CLIPPED.name][0]):
            raise SecureError(
                f"{clipped} numbers of the secure sum of {name} are no numbers or larger than a "
                "sum may hold: ask for columns in other units, or leave them out"
            )
        return opened

    def nodes_of(self, record: Record) -> list[int]:
        """Return the nodes of a record's hospitals."""
        return [self._nodes[name] for name in record.names]

    def by_group(self, nodes: Collection[int]) -> dict[str, set[int]]:
        """Return those of some nodes that have said hello, by the names of their groups."""
        grouped: dict[str, set[int]] = {}
        for name, hello in sorted(self.hellos.items()):
            if self._nodes[name] in nodes:
                grouped.setdefault(hello.group, set()).add(self._nodes[name])
        return dict(sorted(grouped.items()))

    def bound_nodes(self, group: str) -> set[int]:
        """Return the nodes of the hospitals of a group that are `bound`."""
        return {self._nodes[name] for name in self.bound.get(group, ())}

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
        phase, timeout, minimum, grace, whole
            As in `sum_each`.

        Raises
        ------
        SecureError
            If the sum cannot be opened. Nothing is then known but who took part.
        """
        (opened,) = self.sum_each(messages, [record], phase, timeout, minimum, grace, whole)
        if isinstance(opened, SecureError):
            raise opened
        return opened

    def sum_each(
        self,
        messages: Sequence[Message],
        records: Sequence[Record],
        phase: str,
        timeout: float,
        minimum: int | None = None,
        grace: float = 0.0,
        whole: bool = False,
    ) -> list[Opened | SecureError]:
        """Make several sums of one phase at once, each over other hospitals.

        Parameters
        ----------
        messages : sequence of Message
            To hospitals of the records.
        records : sequence of Record
            No hospital is in two.
        phase, timeout, grace
            As in `Inbox.collect`.
        minimum : int, optional
            As in `Inbox.collect`; at least so many that each sum has as many as it needs.
        whole : bool
            Whether to open a sum over all hospitals of its record or not at all. No hospital is
            then asked who remains, so all may still answer later.

        Returns
        -------
        list
            Of each record the sum, or why it cannot be opened. Nothing is then known but who took
            part.
        """
        if not records:
            return []
        if minimum is not None:
            minimum = max(minimum, sum(record.needed for record in records))
        attempts = [_Attempt(record) for record in records]
        self._collect(messages, attempts, phase, timeout, minimum, grace)
        self._settle(attempts, phase, whole)
        self._certify([attempt for attempt in attempts if attempt.lost is None])
        self._unmask([attempt for attempt in attempts if attempt.lost is None])
        return [self._outcome(attempt, phase) for attempt in attempts]

    def _collect(
        self,
        messages: Sequence[Message],
        attempts: Sequence[_Attempt],
        phase: str,
        timeout: float,
        minimum: int | None,
        grace: float,
    ) -> None:
        """Send messages with the records of their sums, and add the vectors that come."""
        by_site = {name: each for each in attempts for name in each.collector.record.names}
        by_node = {self._nodes[name]: attempt for name, attempt in by_site.items()}
        told = {
            id(attempt): self._config({RECORD: attempt.collector.record.to_bytes()})
            for attempt in attempts
        }
        for message in messages:
            attempt = by_node[message.metadata.dst_node_id]
            message.content[SECURE] = ConfigRecord({**told[id(attempt)]})
        server_round = attempts[0].collector.record.server_round
        if self._trail is not None and messages:
            model = digest(_arrays_of(messages[0].content))
            for attempt in attempts:
                record = attempt.collector.record
                self._note(
                    record,
                    "sent",
                    purpose=record.purpose,
                    names=list(record.names),
                    model=model,
                    **record.noted_group,
                )
        for site, reply in self.inbox.sorted_out(
            server_round,
            phase,
            self.inbox.collect(
                self.grid,
                messages,
                timeout,
                server_round,
                phase,
                minimum,
                grace,
                _enough_of_each(
                    ({*self.nodes_of(each.collector.record)}, each.collector.record.needed)
                    for each in attempts
                ),
            ),
        ):
            try:
                if site not in by_site:
                    raise SecureError("it is not among the hospitals of this sum")
                attempt = by_site[site]
                collector = attempt.collector
                collector.add(site, _words(reply.content), _letter(reply.content))
                if collector.record.hello_of(site).tells and reply.content.metric_records:
                    attempt.told[site] = RecordDict({**reply.content.metric_records})
            except SecureError as error:
                self.inbox.fail(server_round, phase, site, f"malformed reply: {error}")

    def _settle(self, attempts: Sequence[_Attempt], phase: str, whole: bool) -> None:
        """Decide which hospitals each sum is over."""
        for attempt in attempts:
            record = attempt.collector.record
            with attempt.watched():
                attempt.complete = attempt.collector.settle()
                if whole and not attempt.complete:
                    lost = sorted({*record.names} - {*attempt.collector.members})
                    raise SecureError(
                        f"{some_of(lost)} could not be added, and figures of patients are summed "
                        f"over all {len(record.names)} hospitals or not at all"
                    )
            for site, problem in attempt.collector.problems.items():
                self.inbox.fail(record.server_round, phase, site, problem)

    def _certify(self, attempts: Sequence[_Attempt]) -> None:
        """Let the hospitals that remain of sums with a loss sign that they do."""
        going = [attempt for attempt in attempts if not attempt.complete]
        contents: dict[int, RecordDict] = {}
        for attempt in going:
            asked: dict[str, Value] = {SECURE_RUN: self.run, "digest": attempt.collector.digest}
            content = self._asked({**asked, "members": attempt.collector.members})
            contents |= {self._nodes[name]: content for name in attempt.collector.members}
        self._put("alive", contents, going, Collector.certify)
        for attempt in going:
            with attempt.watched():
                attempt.signatures = attempt.collector.certificate()

    def _unmask(self, attempts: Sequence[_Attempt]) -> None:
        """Ask the hospitals that remain for their shares."""
        contents = {
            self._nodes[name]: self._asked(
                {
                    SECURE_RUN: self.run,
                    "digest": attempt.collector.digest,
                    "members": attempt.collector.members,
                    "envelopes": attempt.collector.envelopes_for(name),
                    "signatures": attempt.signatures,
                }
            )
            for attempt in attempts
            for name in attempt.collector.members
        }
        self._put("unmask", contents, attempts, Collector.answer)

    def _put(
        self,
        question: str,
        contents: Mapping[int, RecordDict],
        attempts: Sequence[_Attempt],
        take: Callable[[Collector, str, bytes], None],
    ) -> None:
        """Ask the hospitals that remain in sums, until each sum has as many answers as it needs."""
        if not attempts:
            return
        asked = {
            self._nodes[name]: (attempt.collector, name)
            for attempt in attempts
            for name in attempt.collector.members
        }

        def read(node_id: int, reply: RecordDict) -> None:
            collector, name = asked[node_id]
            self._bind(collector.record, collector.members)
            take(collector, name, _letter(reply))

        records = [attempt.collector.record for attempt in attempts]
        minimum = sum(record.threshold for record in records)
        enough = _enough_of_each(({*self.nodes_of(record)}, record.threshold) for record in records)
        self._ask(question, contents, read, records[0].server_round, minimum, enough)

    def _outcome(self, attempt: _Attempt, phase: str) -> Opened | SecureError:
        """Return what a sum is, or why it is lost."""
        if attempt.lost is not None:
            return attempt.lost
        try:
            return self._open(attempt, phase)
        except SecureError as error:
            return error

    def _open(self, attempt: _Attempt, phase: str) -> Opened:
        """Return what a sum is, and note over which hospitals.

        Raises
        ------
        SecureError
            If it cannot be opened, or one of the hospitals has sent what cannot be.
        """
        collector = attempt.collector
        record = collector.record
        members = collector.members
        sites = len(members)
        words = collector.open()
        for site, doubt in collector.doubts.items():
            self.inbox.note(record.server_round, phase, site, doubt)
        values = record.layout.decode(words, sites)
        if ONES in record.layout.parts and int(values[ONES.name][0]) != sites:
            raise SpoiltError(f"the sum is not one of {sites} hospitals: a mask was wrong")
        if (excess := record.layout.excess(values, sites)) is not None:
            raise SpoiltError(f"one of the hospitals has sent what cannot be: {excess}")
        if record.kind == DATA:
            self.settled = self.settled or frozenset(members)
        self.inbox.history.sums.append(Sum(record.server_round, record.purpose, tuple(members)))
        self._note(record, "opened", members=members)
        told = {site: attempt.told[site] for site in members if site in attempt.told}
        return Opened(values, members, record, told)

    def figures(self, messages: Sequence[Message], server_round: int) -> Layout:
        """Ask hospitals what they would sum in an evaluation, and return it, with the tail.

        They answer with names and sizes, which follow from what their client declares and from no
        patient.

        Parameters
        ----------
        messages : sequence of Message
            The messages of the evaluation.
        server_round : int

        Raises
        ------
        SecureError
            If a hospital does not answer, or they do not all say the same.
        """
        contents = {
            message.metadata.dst_node_id: RecordDict({**message.content, SECURE: self._config({})})
            for message in messages
        }

        def read(node_id: int, reply: RecordDict) -> Layout:
            listed = decoded(_letter(reply))
            if not isinstance(listed, list) or len(listed) > _MOST_FIGURES:
                raise SecureError(f"it must list at most {_MOST_FIGURES} figures")
            parts: list[Part] = []
            for name, size, whole in listed:
                if type(name) is not str or type(size) is not int or type(whole) is not bool:
                    raise SecureError("a figure must have a name, a size, and whether it is whole")
                parts += figure_parts(name, size, whole)
            return Layout((*parts, TOLD, ONES))

        failures = self.inbox.history.failures
        before = len(failures)
        said: dict[Layout, list[str]] = {}
        for node_id, layout in self._ask("figures", contents, read, server_round):
            said.setdefault(layout, []).append(self.inbox.name(node_id))
        answered = {name for names in said.values() for name in names}
        asked = {self.inbox.name(node_id) for node_id in contents}
        if silent := sorted(asked - answered):
            why = f": {failures[before].reason}" if len(failures) > before else ""
            raise SecureError(f"{some_of(silent)} did not say which figures it has{why}")
        if len(said) > 1:
            odd = sorted(name for names in sorted(said.values(), key=len)[:-1] for name in names)
            raise SecureError(
                f"{some_of(odd)} would sum other figures than the rest: all must run the same app "
                "with the same declared columns, classes and settings"
            )
        return next(iter(said))

    def _note(self, record: Record, kind: str, **more: Value) -> None:
        """Write into the server's audit trail, if there is one."""
        if self._trail is None:
            return
        place: dict[str, Value] = {"run": record.run, "round": record.server_round}
        self._trail.append(kind, place | {"digest": record.fingerprint} | more)

    def _bind(self, record: Record, members: Collection[str]) -> None:
        """Note that a hospital has answered a question for a set, and does so for no other."""
        if record.kind == TRAIN:
            self.bound[record.group] = frozenset(members)

    def _ask(
        self,
        question: str,
        contents: Mapping[int, RecordDict],
        read: Callable[[int, RecordDict], T],
        server_round: int,
        minimum: int | None = None,
        enough: Enough | None = None,
    ) -> list[tuple[int, T]]:
        """Ask nodes; return the answers by node, and record who gave none."""

        def recorded(node_id: int, reply: RecordDict) -> T:
            self.inbox.history.sent.take(question, self.inbox.name(node_id), reply)
            return read(node_id, reply)

        answers, failures = ask_all(
            self.grid,
            question,
            contents,
            recorded,
            self.timeout,
            self.inbox.site_names,
            minimum,
            self.grace,
            listener=self.inbox.listeners,
            server_round=server_round,
            enough=enough,
        )
        for failure in failures:
            self.inbox.fail(server_round, question, failure.site, failure.reason, heard=True)
        return [(answer.node_id, answer.value) for answer in answers]

    def _asked(self, values: Mapping[str, Value]) -> RecordDict:
        return RecordDict({SECURE: self._config({ASKED: encoded(values)})})

    def _config(self, values: Mapping[str, Any]) -> ConfigRecord:
        config = ConfigRecord({**values})
        if self.books is not None:
            config[BOOKS] = str(self.books)
        return config


def _arrays_of(content: RecordDict) -> dict[str, Value]:
    """Return the digests of a message's records of arrays, as hospitals have them."""
    return {
        name: digest_of_arrays({key: view(record[key]) for key in record})
        for name, record in content.array_records.items()
    }


def _letter(content: RecordDict) -> bytes:
    letter = content.config_records.get(SECURE, ConfigRecord()).get(LETTER)
    if not isinstance(letter, bytes) or len(letter) > _MOST_LETTER:
        raise SecureError("it holds no letter")
    return letter


def _words(content: RecordDict) -> Words:
    record = content.array_records.get(MASKED, ArrayRecord())
    try:
        vectors = [view(array) for array in record.values()]
    except ValueError as error:
        raise SecureError(error) from None
    if [vector.dtype for vector in vectors] != [np.uint32, np.uint64]:
        raise SecureError("it holds other vectors than a secure sum has")
    return vectors[0], vectors[1]


def _of_whole_groups(hellos: list[Hello]) -> list[Hello]:
    """Leave out the hospitals of groups of which too few are there."""
    least = max(hello.least for hello in hellos)
    colluders = max(hello.colluders for hello in hellos)
    exposed = [group for group in exposed_groups(hellos, least, colluders) if group]
    return [hello for hello in hellos if hello.group not in exposed]


def _enough_of_each(asked: Iterable[tuple[Collection[int], int]]) -> Enough:
    """Return what says of nodes that have answered whether they are enough for each sum.

    Parameters
    ----------
    asked : iterable of (collection of int, int)
        Of each sum the nodes that are asked, and how many of them must answer.
    """
    listed = [(frozenset(nodes), needed) for nodes, needed in asked]

    def enough(answered: Collection[int]) -> bool:
        return all(len(nodes.intersection(answered)) >= needed for nodes, needed in listed)

    return enough


def reply_of(opened: Opened, kind: str, content: RecordDict, inbox: Inbox) -> Message:
    """Return a sum as one reply, from a node that stands for all its hospitals."""
    group = opened.record.group
    count = len(opened.members)
    name = f"mean of {count} hospitals, group {group}" if group else f"sum of {count} hospitals"
    node = SUM_NODE - place_of(group)
    inbox.site_names[node] = name
    content[SITE_RECORD] = ConfigRecord({"name": name})
    return Message(content, reply_to=Message(RecordDict(), node, kind))
