"""One way to ask: send messages to sites, collect the replies, and read the answers.

`Exchange` sends messages and lists those without a reply; the rounds of training use it. `ask`
puts a question to sites and reads their answers; all other questions use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar, runtime_checkable

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.server.arrivals import pause_after
from fedmed_flower.server.listener import NOBODY, Listener
from fedmed_flower.server.screening import error_text, metrics_excess
from fedmed_flower.server.sites import learn_name
from fedmed_flower.server.traffic import size_of
from fedmed_flower.wire import VersionError

T = TypeVar("T")
Enough = Callable[[Collection[int]], bool]
# Most replies pulled at a time: each may hold a model.
_TOGETHER = 20
# Exceptions that reading a malformed answer may raise.
MALFORMED = (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration)
# Bytes of the replies pulled at a time, if each is as large as the largest message.
_BYTES_TOGETHER = 1 << 30


class Exchange:
    """Sends messages when it is iterated over, and yields message and reply as replies come.

    Parameters
    ----------
    grid : Grid
    messages : sequence of Message
        Several may go to one site; each can be replied to.
    timeout : float
        Seconds to wait for the replies. In one process, where sites work one after the other, it is
        each site's own time: a reply that took longer does not count.
    minimum : int, optional
        After this number of replies without an error, wait only `grace` seconds more. None waits
        for all.
    grace : float
        Seconds to wait after the `minimum` of replies. Not in one process, where every site has its
        turn.
    enough : callable, optional
        Maps the nodes that have replied without an error to whether they are enough; only then does
        `grace` begin, and not before the `minimum` either. None asks for no more than that.

    Attributes
    ----------
    silent : list of Message
        Messages without a reply in time; complete at the end of the iteration.
    answered : int
        Number of replies without an error so far.
    seconds : float
        How long the iteration took.
    waited : float
        Seconds to the last reply: from sending or, in one process, from the site's turn.
    """

    def __init__(
        self,
        grid: Grid,
        messages: Sequence[Message],
        timeout: float,
        minimum: int | None = None,
        grace: float = 0.0,
        enough: Enough | None = None,
    ) -> None:
        self.grid = grid
        self.messages = messages
        self.timeout = timeout
        self.minimum = minimum
        self.grace = grace
        self.enough = enough
        self.silent: list[Message] = []
        self.answered = 0
        self.seconds = 0.0
        self.waited = 0.0
        self._nodes: set[int] = set()
        # Of large models only few fit in memory at a time.
        largest = max((size_of(message.content) for message in messages), default=0)
        self._together = max(1, min(_TOGETHER, _BYTES_TOGETHER // max(1, largest)))

    def __iter__(self) -> Iterator[tuple[Message, Message]]:
        sent = self._push()
        # The time that sending took does not count: a large model takes long.
        began = time.monotonic()
        waiting = dict(sent)
        for reply in self._pull(waiting, began):
            request = reply.metadata.reply_to_message_id
            if request in sent:
                waiting.pop(request, None)
                if not reply.has_error():
                    self._nodes.add(sent[request].metadata.dst_node_id)
                yield sent[request], reply
        self.silent = [
            message for message in self.messages if message.metadata.message_id not in sent
        ]
        self.silent += waiting.values()
        self.seconds = time.monotonic() - began

    def _push(self) -> dict[str, Message]:
        """Send the messages; return those that Flower accepted, by id."""
        if not self.messages:
            return {}
        accepted = {key for key in self.grid.push_messages(self.messages) if key}
        by_id = {message.metadata.message_id: message for message in self.messages}
        return {key: message for key, message in by_id.items() if key in accepted}

    def _pull(self, waiting: Mapping[str, Message], began: float) -> Iterator[Message]:
        """Yield replies until no message waits for one or the time is over."""
        if getattr(self.grid, "in_process", False):
            yield from self._pull_in_process(list(waiting))
            return
        deadline = began + self.timeout
        grace_began = False
        while waiting:
            keys = iter(list(waiting))
            while ids := list(islice(keys, self._together)):
                for reply in self.grid.pull_messages(ids):
                    self.answered += not reply.has_error()
                    self.waited = time.monotonic() - began
                    yield reply
            now = time.monotonic()
            if self._suffice() and not grace_began:
                deadline = min(deadline, now + self.grace)
                grace_began = True
            if now >= deadline:
                return
            if waiting:
                # The last look is at the deadline.
                time.sleep(min(pause_after(now - began), deadline - now))

    def _suffice(self) -> bool:
        """Return whether enough sites have replied to wait only `grace` seconds more."""
        if self.minimum is None or self.answered < self.minimum:
            return False
        return self.enough is None or self.enough(self._nodes)

    @property
    def patience(self) -> str:
        """How long the silent sites were waited for, as the end of a sentence."""
        in_process = getattr(self.grid, "in_process", False)
        if in_process or self.minimum is None or self.answered < self.minimum:
            return f"within {self.timeout:g} s"
        return f"within {self.seconds:.0f} s; {self.answered} of {len(self.messages)} had replied"

    def _pull_in_process(self, ids: Sequence[str]) -> Iterator[Message]:
        """Let one client after the other run, and yield the replies that came in time."""
        for message_id in ids:
            replies, seconds = self._pull_one(message_id)
            for reply in replies:
                self.waited = seconds
                if self.waited <= self.timeout:
                    self.answered += not reply.has_error()
                    yield reply

    def _pull_one(self, message_id: str) -> tuple[Iterable[Message], float]:
        """Return the reply to a message, if there is one, and the seconds that the site took."""
        if isinstance(self.grid, Timed):
            return self.grid.pull_within([message_id], self.timeout)
        asked = time.monotonic()
        replies = list(self.grid.pull_messages([message_id]))
        return replies, time.monotonic() - asked


@runtime_checkable
class Timed(Protocol):
    """A grid in this process that knows how long each site has worked."""

    def pull_within(
        self, message_ids: Iterable[str], timeout: float | None
    ) -> tuple[Iterable[Message], float]:
        """Return the replies that came in time, and the seconds that the last site took."""


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What one site answered.

    Attributes
    ----------
    node_id : int
    site : str
        The site's name.
    value : T
        What `read` of the question returned for the reply.
    content : RecordDict
        The reply itself.
    """

    node_id: int
    site: str
    value: T
    content: RecordDict


@dataclass(frozen=True)
class NoAnswer:
    """A site without a usable answer, and why; `silent` if no reply came at all."""

    node_id: int
    site: str
    reason: str
    silent: bool = False


@dataclass
class Question(Generic[T]):
    """A question to sites; iterating over it sends it and yields the answers as they come.

    Attributes
    ----------
    name : str
        Name of the query, which listeners hear as the phase.
    listener : Listener
        Hears who is asked, who answers and who does not.
    server_round : int
        The round that listeners hear.
    failures : list of NoAnswer
        Sites that replied with an error, with an answer that cannot be read, or not at all, in the
        order of their names; complete at the end of the iteration.
    """

    exchange: Exchange
    read: Callable[[int, RecordDict], T]
    names: dict[int, str]
    name: str
    listener: Listener
    server_round: int
    failures: list[NoAnswer] = field(default_factory=list)

    def __iter__(self) -> Iterator[Answer[T]]:
        replied: set[str] = set()
        asked = [self._name(message.metadata.dst_node_id) for message in self.exchange.messages]
        self.listener.asked(self.server_round, self.name, asked)
        for message, reply in self.exchange:
            if message.metadata.message_id in replied:
                continue
            replied.add(message.metadata.message_id)
            # Not the node of the reply: the SuperLink replies in place of a site that has died.
            node_id = message.metadata.dst_node_id
            before = self._name(node_id)
            learn_name(self.names, node_id, reply)
            if self._name(node_id) != before:
                self.listener.named(before, self._name(node_id))
            if reply.has_error():
                self._fail(node_id, error_text(reply))
                continue
            if (excess := metrics_excess(reply.content)) is not None:
                self._fail(node_id, f"malformed answer: {excess}")
                continue
            try:
                value = self.read(node_id, reply.content)
            except VersionError as error:
                self._fail(node_id, str(error))
                continue
            except MALFORMED as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
                self._fail(node_id, f"malformed answer: {kind}{error}")
                continue
            self.listener.replied(self._name(node_id))
            yield Answer(node_id, self._name(node_id), value, reply.content)
        for message in self.exchange.silent:
            node_id = message.metadata.dst_node_id
            self._fail(node_id, f"no answer {self.exchange.patience}", silent=True)
        self.failures.sort(key=lambda failure: (failure.site, failure.node_id))

    def _name(self, node_id: int) -> str:
        return self.names.get(node_id, f"node {node_id}")

    def _fail(self, node_id: int, reason: str, silent: bool = False) -> None:
        site = self._name(node_id)
        self.failures.append(NoAnswer(node_id, site, reason, silent))
        self.listener.failed(self.server_round, self.name, site, reason)


def ask(
    grid: Grid,
    question: str,
    contents: Mapping[int, RecordDict],
    read: Callable[[int, RecordDict], T],
    timeout: float,
    names: dict[int, str],
    minimum: int | None = None,
    grace: float = 0.0,
    listener: Listener = NOBODY,
    server_round: int = 0,
    enough: Enough | None = None,
) -> Question[T]:
    """Prepare a question to sites; iterating over it sends it and yields the answers.

    Parameters
    ----------
    grid : Grid
    question : str
        Name of the query, such as ``describe``.
    contents : mapping of int to RecordDict
        The content of the message to each site, by node id.
    read : callable
        Maps node id and content of a reply to the answer; raises one of `MALFORMED` if the reply is
        malformed. The text of a `ValueError` becomes the reason.
    timeout : float
        Seconds to wait for the answers.
    names : dict of int to str
        Site name by node id; the name of a site that is missing is added from its reply.
    minimum : int, optional
    grace : float
        As in `Exchange`.
    listener : Listener
        Hears who is asked and who answers, with the question's name as the phase.
    server_round : int
        The round that the listener hears.
    enough : callable, optional
        As in `Exchange`.

    Returns
    -------
    Question
    """
    kind = f"{MessageType.QUERY}.{question}"
    messages = [Message(content, node_id, kind) for node_id, content in contents.items()]
    exchange = Exchange(grid, messages, timeout, minimum, grace, enough)
    return Question(exchange, read, names, question, listener, server_round)


def ask_all(
    grid: Grid,
    question: str,
    contents: Mapping[int, RecordDict],
    read: Callable[[int, RecordDict], T],
    timeout: float,
    names: dict[int, str],
    minimum: int | None = None,
    grace: float = 0.0,
    listener: Listener = NOBODY,
    server_round: int = 0,
    enough: Enough | None = None,
) -> tuple[list[Answer[T]], list[NoAnswer]]:
    """Ask as `ask` does, and wait for all answers.

    Returns
    -------
    tuple of (list of Answer, list of NoAnswer)
        The answers, and the sites without one; both in the order of the sites' names.
    """
    asked = ask(
        grid,
        question,
        contents,
        read,
        timeout,
        names,
        minimum,
        grace,
        listener,
        server_round,
        enough,
    )
    answers = sorted(asked, key=lambda answer: (answer.site, answer.node_id))
    return answers, asked.failures
