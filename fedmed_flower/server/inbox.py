"""The replies of a run: which site each comes from, and which of them are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedmed_flower.server.history import Failure, History
from fedmed_flower.server.screening import metrics_of, screen, screen_arrays
from fedmed_flower.server.sites import learn_name
from fedmed_flower.wire import ALL_SITES, DECLINED

log = logging.getLogger("flwr.fedmed")

# Replies that are asked for at a time where they are used one by one.
_TOGETHER = 20


@dataclass
class Kept:
    """A reply that may be used, and whether the rule has used it."""

    message: Message
    node_id: int
    site: str
    weight: float = 1.0
    used: bool = False

    @property
    def arrays(self) -> ArrayRecord:
        """The reply's only arrays."""
        return next(iter(self.message.content.array_records.values()))

    @property
    def metrics(self) -> MetricRecord:
        """The reply's only metrics."""
        return metrics_of(self.message)


class Inbox:
    """Knows the sites by name, and keeps the run's history.

    Attributes
    ----------
    history : History
    site_names : dict
        Site name by node id, as far as the sites have told it.
    connected : collection of int
        The nodes that live, as far as is known.
    malformed : int
        Sites whose arrays the last call of `admit` could not use.
    declined : set of int
        The nodes that did not take part when they were last asked to train, by their own decision.
    """

    def __init__(self) -> None:
        self.history = History()
        self.site_names: dict[int, str] = {}
        self.connected: Collection[int] = ()
        self.malformed = 0
        self.declined: set[int] = set()
        self._sent: dict[str, int] = {}

    def name(self, node_id: int) -> str:
        """Return a node's site name, or ``node <id>`` where it has not told it."""
        return self.site_names.get(node_id, f"node {node_id}")

    def fail(self, server_round: int, phase: str, site: str, reason: str) -> None:
        """Record why a site, or ``"all"`` of them, did not count."""
        reason = " ".join(reason.split())
        if len(reason) > 400:
            # An engine's traceback names the cause in its last line.
            reason = f"{reason[:120]} … {reason[-270:]}"
        self.history.failures.append(Failure(server_round, phase, site, reason))
        if site == ALL_SITES:
            log.warning("round %d: no %s: %s", server_round, phase, reason)
        else:
            log.warning("round %d: %s left out of %s: %s", server_round, site, phase, reason)

    def exchange(
        self, grid: Grid, messages: list[Message], timeout: float, server_round: int, phase: str
    ) -> Iterable[Message]:
        """Send, collect, and record the sites from which nothing came back in time."""
        if not messages:
            return []
        began = time.monotonic()
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        self._expect(messages)
        answered = {self._node_id(reply) for reply in replies}
        self._miss(messages, answered, time.monotonic() - began, server_round, phase)
        return replies

    def stream(
        self, grid: Grid, messages: list[Message], timeout: float, server_round: int, phase: str
    ) -> Iterable[Message]:
        """Do the same, but hand out replies as they come, a few at a time."""
        began = time.monotonic()
        waiting = [key for key in grid.push_messages(messages) if key]
        self._expect(messages)
        answered: set[int] = set()
        while waiting and time.monotonic() - began < timeout:
            before = len(waiting)
            for start in range(0, before, _TOGETHER):
                if time.monotonic() - began >= timeout:
                    break
                for reply in grid.pull_messages(waiting[start : start + _TOGETHER]):
                    answered.add(self._node_id(reply))
                    yield reply
            done = {message.metadata.message_id for message in messages}
            done = {key for key in done if self._sent.get(key) in answered}
            waiting = [key for key in waiting if key not in done]
            if len(waiting) == before:
                if getattr(grid, "complete", False):
                    break
                time.sleep(1)
        self._miss(messages, answered, time.monotonic() - began, server_round, phase)

    def _expect(self, messages: list[Message]) -> None:
        self._sent = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        self._sent.pop("", None)

    def _miss(
        self,
        messages: list[Message],
        answered: set[int],
        waited: float,
        server_round: int,
        phase: str,
    ) -> None:
        for node_id in {message.metadata.dst_node_id for message in messages} - answered:
            self.fail(server_round, phase, self.name(node_id), f"no reply after {waited:.0f} s")

    def admit(
        self,
        server_round: int,
        phase: str,
        replies: Iterable[Message],
        weighted_by_key: str,
        like: ArrayRecord | None,
    ) -> Iterator[Kept]:
        """Hand on the replies that pass screening; record why the others do not.

        Parameters
        ----------
        like : ArrayRecord or None
            As `screen` takes it.
        """
        answered: set[str] = set()
        self.malformed = 0
        for reply in replies:
            node_id = self._node_id(reply)
            learn_name(self.site_names, node_id, reply, self.connected)
            if reply.has_content():
                kind = "train" if phase == "train" else "evaluate"
                self.history.sent.take(kind, self.name(node_id), reply.content)
            request = reply.metadata.reply_to_message_id
            if request and request in answered:
                reason: str | None = "the site has replied already"
            else:
                reason = screen(reply, weighted_by_key, like)
                if reason is not None and like is not None and reply.has_content():
                    self.malformed += screen_arrays(reply, like) is not None
            answered.add(request)
            if phase == "train":
                declined = reason is not None and reason.startswith(DECLINED)
                (self.declined.add if declined else self.declined.discard)(node_id)
            if reason is None:
                yield Kept(reply, node_id, self.name(node_id))
            else:
                self.fail(server_round, phase, self.name(node_id), reason)

    def in_order(self, kept: Iterable[Kept]) -> list[Kept]:
        """Sort by site name: the order of a sum decides its last bits, and must not be chance."""
        return sorted(kept, key=lambda reply: self.site_names.get(reply.node_id, ""))

    def record(self, server_round: int, phase: str, kept: Iterable[Kept]) -> None:
        """Put the metrics of the replies that passed screening into the history."""
        for reply in kept:
            self.history.add(server_round, phase, reply.site, reply.metrics)

    def _node_id(self, reply: Message) -> int:
        """Return the site that a reply speaks of: the SuperLink answers for one that died."""
        return self._sent.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
