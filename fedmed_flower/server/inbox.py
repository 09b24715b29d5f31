"""The replies of a run: which site each comes from, and which of them are accepted."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.arrays.views import records_of
from fedmed_flower.errors import shown
from fedmed_flower.secure.study import MOST_GROUPS
from fedmed_flower.server.ask import Enough, Exchange
from fedmed_flower.server.compression import Unpacker, saved_bytes
from fedmed_flower.server.history import Failure, History, Note
from fedmed_flower.server.listeners import Listeners
from fedmed_flower.server.screening import (
    error_text,
    metrics_of,
    model_of,
    screen,
    screen_arrays,
    without_arrays,
)
from fedmed_flower.server.sites import learn_name
from fedmed_flower.server.traffic import Traffic, size_of
from fedmed_flower.server.validation import Validation, parted
from fedmed_flower.wire import ALL_SITES, CHANGES, DECLINED, IN_SUMS, ROWS_RECORD

log = logging.getLogger("flwr.fedmed")

# The node that stands for all hospitals of a secure sum; it has sent nothing itself. Those below
# stand for the groups of a study.
SUM_NODE = 2**64 - 1
# Letters by which two errors are compared.
_ALIKE = 200
# Letters of what a site says of changes of its rows.
_MOST_CHANGES = 200
# A site's number of training rows; of patients if they are protected by noise.
_COUNT = "num-examples"


def _named(reply: Message, names: Iterable[str]) -> dict[str, ArrayRecord]:
    records = records_of(reply.content, ArrayRecord)
    return {name: records[name] for name in names}


def is_sum(node_id: int) -> bool:
    """Return whether a node stands for several hospitals."""
    return node_id >= SUM_NODE - MOST_GROUPS


@dataclass
class AcceptedReply:
    """A reply that passed screening.

    Attributes
    ----------
    message : Message
    node_id : int
    site : str
    number : int
        Index of the message that it replies to in its phase: a site may be sent two.
    arrays : ArrayRecord
        The model that came back; empty for an evaluation reply.
    companions : dict of str to ArrayRecord
        What came back beside the model, by name.
    weight : float
    freshness : float
        What is left of its weight for the model, because of the age of the model that it replies
        to; above 0, at most 1. Companions are combined by the whole weight.
    used : bool
        Whether the rule used it.
    """

    message: Message
    node_id: int
    site: str
    number: int = 0
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    companions: dict[str, ArrayRecord] = field(default_factory=dict)
    weight: float = 1.0
    freshness: float = 1.0
    used: bool = False

    @property
    def metrics(self) -> MetricRecord:
        """The reply's only metrics."""
        return metrics_of(self.message)

    def drop_arrays(self) -> None:
        """Forget the arrays, which have been used, to save memory."""
        self.message = without_arrays(self.message)
        self.arrays = ArrayRecord()
        self.companions = {}


@dataclass(frozen=True)
class Request:
    """What is kept of a message until its reply comes.

    Attributes
    ----------
    message_id : str
    node_id : int
        The node that is asked.
    number : int
        Index of the message in its phase.
    size : int
        Bytes of its content.
    content : RecordDict
        Its arrays are those of all messages of its round, which are not copied.
    """

    message_id: str
    node_id: int
    number: int
    size: int
    content: RecordDict

    @classmethod
    def of(cls, message: Message, number: int) -> Self:
        """Return the request of a message that has been sent."""
        metadata = message.metadata
        content = message.content
        return cls(metadata.message_id, metadata.dst_node_id, number, size_of(content), content)


class Inbox:
    """Screens replies, names their sites and records both in the run's history.

    Attributes
    ----------
    history : History
    listeners : Listeners
        They hear who is asked, who replies and who fails.
    site_names : dict
        Site name by node id, as far as the sites have reported it.
    connected : collection of int
        The nodes that were connected at the last look.
    malformed : int
        Number of replies with unusable arrays in the last call of `admit`.
    declined : set of int
        The nodes that declined when they were last asked to train.
    usable : int
        Number of replies that passed screening in the last call of `admit`.
    saved : int
        Bytes that codes have saved in the replies of the last call of `admit`.
    errors : list of str
        What the sites that failed gave as reason in the last call of `admit`; those that declined
        are not among them.
    validation : Validation
        Who was asked for validation figures with the training of this round, and what has come.
    """

    def __init__(self) -> None:
        self.history = History()
        self.listeners = Listeners()
        self.site_names: dict[int, str] = {}
        self.connected: Collection[int] = ()
        self.malformed = 0
        self.declined: set[int] = set()
        self.usable = 0
        self.saved = 0
        self.errors: list[str] = []
        self.validation = Validation()
        # What each message of the phase held, by message id.
        self._requests: dict[str, RecordDict] = {}
        # Node and index of each message of the phase, by message id.
        self._senders: dict[str, tuple[int, int]] = {}
        # Node, bytes to it, bytes from it and seconds of each reply of the phase.
        self._traffic: list[tuple[int, int, int, float]] = []
        # Messages of the phase of whose failed replies the listeners have heard, by id.
        self._heard: set[str] = set()

    def name(self, node_id: int) -> str:
        """Return a node's site name, or ``node <id>`` if it has reported none."""
        return self.site_names.get(node_id, f"node {node_id}")

    def fail(
        self, server_round: int, phase: str, site: str, reason: str, heard: bool = False
    ) -> None:
        """Record, log and tell the listeners why a site, or ``"all"`` of them, did not count.

        Parameters
        ----------
        server_round : int
        phase, site, reason : str
        heard : bool
            Whether the listeners have heard of it already.
        """
        if not heard:
            self.listeners.failed(server_round, phase, site, reason)
        reason = " ".join(reason.split())
        if len(reason) > 400:
            # An engine's traceback names the cause in its last line.
            reason = f"{reason[:120]} … {reason[-270:]}"
        self.history.failures.append(Failure(server_round, phase, site, reason))
        if site == ALL_SITES:
            log.warning("round %d: no %s: %s", server_round, phase, reason)
        else:
            log.warning("round %d: %s left out of %s: %s", server_round, site, phase, reason)

    def note(self, server_round: int, phase: str, site: str, text: str) -> None:
        """Record and log something about a site whose reply counts."""
        self.history.notes.append(Note(server_round, phase, site, text))
        log.warning("round %d, %s: %s: %s", server_round, phase, site, text)

    def collect(
        self,
        grid: Grid,
        messages: Sequence[Message],
        timeout: float,
        server_round: int,
        phase: str,
        minimum: int | None = None,
        grace: float = 0.0,
        enough: Enough | None = None,
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they come; record sites without a reply in time.

        No reference to a reply remains here: it is freed as soon as the caller drops it.

        Parameters
        ----------
        grid, messages, timeout, minimum, grace, enough
            As in `Exchange`.
        server_round : int
        phase : str
        """
        exchange = Exchange(grid, messages, timeout, minimum, grace, enough)
        numbers = {id(message): number for number, message in enumerate(messages)}
        self.begin_phase()
        asked = [self.name(message.metadata.dst_node_id) for message in messages]
        self.listeners.asked(server_round, phase, asked)
        for message, reply in exchange:
            request = Request.of(message, numbers[id(message)])
            self.take(request, reply, server_round, phase, exchange.waited)
            yield reply
        # Only now all sites that replied have given their names.
        self.count_traffic()
        for message in exchange.silent:
            site = self.name(message.metadata.dst_node_id)
            self.fail(server_round, phase, site, f"no reply {exchange.patience}")

    def begin_phase(self) -> None:
        """Forget which messages the replies of the phase before belong to."""
        self._senders = {}
        self._requests = {}
        self._traffic = []
        self._heard = set()

    def take(
        self, request: Request, reply: Message, server_round: int, phase: str, seconds: float
    ) -> None:
        """Note whose reply has come, and tell the listeners; it may still fail in screening.

        Parameters
        ----------
        request : Request
            Of the message that it replies to.
        reply : Message
        server_round : int
        phase : str
        seconds : float
            How long the reply was waited for.
        """
        node_id = request.node_id
        self._senders[request.message_id] = (node_id, request.number)
        self._requests[request.message_id] = request.content
        before = self.name(node_id)
        learn_name(self.site_names, node_id, reply, self.connected)
        site = self.name(node_id)
        if site != before:
            self.listeners.named(before, site)
        if reply.has_error():
            self._heard.add(request.message_id)
            self.listeners.failed(server_round, phase, site, error_text(reply))
        else:
            self.listeners.replied(site)
        size = size_of(reply.content) if reply.has_content() else 0
        self._traffic.append((node_id, request.size, size, seconds))

    def count_traffic(self) -> None:
        """Add the bytes and seconds of the phase's replies to the history, by site."""
        for node_id, to_site, from_site, seconds in self._traffic:
            traffic = self.history.traffic.setdefault(self.name(node_id), Traffic())
            traffic.add(to_site, from_site, seconds)
        self._traffic = []

    def sorted_out(
        self, server_round: int, phase: str, replies: Iterable[Message]
    ) -> Iterator[tuple[str, Message]]:
        """Yield site and reply of those with a content; record why the others have none."""
        self.malformed = 0
        self.usable = 0
        self.errors = []
        answered: set[str] = set()
        for reply in replies:
            node_id, _ = self._sender(reply)
            request = reply.metadata.reply_to_message_id
            reason = error_text(reply) if reply.has_error() else None
            if request in answered:
                reason = "the site has replied already"
            answered.add(request)
            if phase == "train":
                self._note_declined(node_id, reason)
            if reason is None:
                self.usable += 1
                kind = phase if phase in IN_SUMS else "evaluate"
                self.history.sent.take(kind, self.name(node_id), reply.content)
                yield self.name(node_id), reply
                continue
            if reply.has_error() and not reason.startswith(DECLINED):
                self.errors.append(reason)
            heard = request in self._heard
            self.fail(server_round, phase, self.name(node_id), reason, heard)

    def admit(
        self,
        server_round: int,
        phase: str,
        replies: Iterable[Message],
        weighted_by_key: str,
        layout: ArrayRecord | None,
        companions: Mapping[str, ArrayRecord] | None = None,
        unpacker: Unpacker | None = None,
    ) -> Iterator[AcceptedReply]:
        """Yield the replies that pass screening; record why the others do not.

        Parameters
        ----------
        weighted_by_key, layout, companions
            As in `screen`.
        unpacker : Unpacker, optional
            Unpacks the arrays, if the sites were asked for a code.
        """
        layouts = companions or {}
        answered: set[str] = set()
        self.malformed = 0
        self.usable = 0
        self.saved = 0
        self.errors = []
        for reply in replies:
            node_id, number = self._sender(reply)
            learn_name(self.site_names, node_id, reply, self.connected)
            figures: Message | None = None
            if phase == "train" and node_id in self.validation.nodes and reply.has_content():
                reply, figures = parted(reply, node_id)
            if reply.has_content() and not is_sum(node_id):
                kind = "train" if phase == "train" else "evaluate"
                self.history.sent.take(kind, self.name(node_id), reply.content)
            request = reply.metadata.reply_to_message_id
            if request and request in answered:
                reason: str | None = "the site has replied already"
            else:
                try:
                    dense = self.unpacked(reply, unpacker)
                    self._count_saved(reply, dense)
                    reply = dense
                    reason = self._flaw(reply, weighted_by_key, layout, layouts)
                except ValueError as error:
                    reason = str(error)
                    self.malformed += 1
            answered.add(request)
            if phase == "train":
                self._note_declined(node_id, reason)
            if reason is not None:
                if reply.has_error() and not reason.startswith(DECLINED):
                    self.errors.append(reason)
                heard = request in self._heard
                self.fail(server_round, phase, self.name(node_id), reason, heard)
                continue
            self.usable += 1
            if figures is not None:
                self.validation.replies.setdefault(node_id, figures)
            accepted = AcceptedReply(reply, node_id, self.name(node_id), number)
            if layout is not None:
                accepted.arrays = model_of(reply, layouts)
                accepted.companions = _named(reply, layouts)
            yield accepted

    def figures(self, validated: int, server_round: int) -> list[Message]:
        """Return the validation figures that have come with a round's training, as replies.

        Who was asked for them and whose training reply did not count is recorded.

        Parameters
        ----------
        validated : int
            The round whose model was validated.
        server_round : int
            The round of the training.
        """
        asked = self.validation
        training = f"the training of round {server_round}"
        for site in sorted(map(self.name, asked.missing)):
            reason = f"no figures: its reply to {training} did not count"
            self.fail(validated, "val", site, reason)
        if not asked.nodes:
            reason = f"no figures: nobody was sent {training}, with which they come"
            self.fail(validated, "val", ALL_SITES, reason)
        return list(asked.replies.values())

    def common_error(self, asked: int) -> str | None:
        """Return the error with which all sites of a phase failed alike; None if they did not.

        Numbers in the texts may differ.

        Parameters
        ----------
        asked : int
            Number of messages of the phase.
        """
        if self.usable or not asked or len(self.errors) < asked:
            return None
        kinds = {re.sub(r"\d+", "", error)[:_ALIKE] for error in self.errors}
        return self.errors[0] if len(kinds) == 1 else None

    def unpacked(self, reply: Message, unpacker: Unpacker | None) -> Message:
        """Unpack a reply's arrays, if the sites were asked for a code.

        Raises
        ------
        ValueError
            As `Unpacker.unpacked`.
        """
        if unpacker is None or not reply.has_content():
            return reply
        message_id = reply.metadata.reply_to_message_id
        request = self._requests.get(message_id)
        if request is None and message_id in self._senders:
            raise ValueError("it is not known from which model its change counts")
        return unpacker.unpacked(reply, request)

    def _count_saved(self, reply: Message, dense: Message) -> None:
        """Count what the code of a reply has saved."""
        if dense is reply:
            return
        saved = saved_bytes(reply, dense)
        self.saved += saved
        site = self.name(self._sender(reply)[0])
        self.history.traffic.setdefault(site, Traffic()).bytes_saved += saved

    def _flaw(
        self,
        reply: Message,
        weighted_by_key: str,
        layout: ArrayRecord | None,
        companions: Mapping[str, ArrayRecord],
    ) -> str | None:
        """Screen a reply; if its arrays cannot be used, count it as malformed."""
        reason = screen(reply, weighted_by_key, layout, companions)
        if reason is not None and layout is not None and reply.has_content():
            self.malformed += screen_arrays(reply, layout, companions) is not None
        return reason

    def _note_declined(self, node_id: int, reason: str | None) -> None:
        if reason is not None and reason.startswith(DECLINED):
            self.declined.add(node_id)
        else:
            self.declined.discard(node_id)

    def in_order(self, replies: Iterable[AcceptedReply]) -> list[AcceptedReply]:
        """Sort by site name: sums depend on the order in their last bits."""
        return sorted(
            replies, key=lambda reply: (self.site_names.get(reply.node_id, ""), reply.number)
        )

    def record(self, server_round: int, phase: str, replies: Iterable[AcceptedReply]) -> None:
        """Put the metrics of the replies that passed screening into the history.

        If a site's rows have changed since it trained before, that is noted. The reply that stands
        for a secure sum is no site's: what it holds is recorded of all sites together.
        """
        for reply in replies:
            if is_sum(reply.node_id):
                continue
            if phase == "train" and (changes := self._changes(reply)):
                self.note(server_round, phase, reply.site, changes)
            self.history.add(server_round, phase, reply.site, reply.metrics)

    def _changes(self, reply: AcceptedReply) -> str:
        """Return how a site's training rows have changed; empty if they have not, or it is known.

        Sites that protect patients by noise say nothing but the number of their patients.
        """
        record = records_of(reply.message.content, ConfigRecord).get(ROWS_RECORD, ConfigRecord())
        changes = shown(record.get(CHANGES, ""), _MOST_CHANGES)
        counted = self._counted(reply)
        if changes and not counted:
            notes = [note.text for note in self.history.notes if note.site == reply.site]
            return "" if any(note.startswith(changes) for note in notes) else changes
        return "; ".join(filter(None, (changes, counted)))

    def _counted(self, reply: AcceptedReply) -> str:
        """Return how a site's number of training rows has changed; empty if it has not."""
        before = self.history.training_rows(reply.site)
        now = reply.metrics.get(_COUNT)
        if before is None or not isinstance(now, int | float) or before == now:
            return ""
        return f"its number of training rows is {now:g} now and was {before:g}"

    def _sender(self, reply: Message) -> tuple[int, int]:
        """Return the node that was asked, and the index of the message to it.

        It is not always the node of the reply: the SuperLink replies for a site that has died.
        """
        unknown = (reply.metadata.src_node_id, 0)
        return self._senders.get(reply.metadata.reply_to_message_id, unknown)
