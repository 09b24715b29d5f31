"""Asynchronous rounds: a round ends when K usable replies have come, whoever sent them.

FedBuff: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: Federated Learning with Buffered
Asynchronous Aggregation, AISTATS 2022, https://arxiv.org/abs/2106.06639, algorithm 1, with the
paper's polynomial staleness weights.

A reply is the change that a site has made to the model that was sent to it. That model may be some
rounds old by then: here the change is moved onto the current model, and the reply's weight is
lowered by its age. What travels beside the model is moved too; its weight stays, so that control
variates add up. Everything behind that is the strategy's own: screening, rule, limits, server
optimiser, record. Two things differ from the paper. The strategy's rule divides by the sum of the
weights, where the paper divides by K: replies of one age make a full step, however old they are.
And a site counts at most once in a round: a fast site waits for the next model, so that it can
neither fill the buffer alone nor send the same reply twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import Draft, flat, not_finite, view
from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Method
from fedmed_flower.metrics.names import STALENESS
from fedmed_flower.server.arrivals import arrivals_of
from fedmed_flower.server.inbox import AcceptedReply, Inbox, Request
from fedmed_flower.server.screening import model_of, screen
from fedmed_flower.strategies.server_optimizers import stepped
from fedmed_flower.wire import ALL_SITES

# What is noted in the first round after a resume.
RESUMED = (
    "the run goes on: what was under way or in the buffer is lost, and all sites train from the "
    "model of the round before"
)
# A site that has failed n times in a row is next asked 2 ** (n - 1) rounds later, at most so many.
_LONGEST_REST = 64


def refusal(
    name: str,
    size: int,
    *,
    quorum: int | None,
    min_replies: int,
    needed: int,
    draws_by_law: bool,
    method: Method | None,
    below: type | None,
    own_exchange: bool,
) -> str | None:
    """Return why a strategy cannot train in asynchronous rounds; None if it can.

    Parameters
    ----------
    name : str
        The strategy's.
    size : int
        Replies of a round.
    quorum, min_replies : int
        Arguments of the strategy.
    needed : int
        Usable replies that its rule needs.
    draws_by_law : bool
        Whether the strategy draws the sites of a round by a law of its own.
    method : Method or None
        None if the strategy has none.
    below : type or None
        Somebody else's strategy, whose rule makes the model.
    own_exchange : bool
        Whether the strategy sends and collects messages in its own way.
    """
    without = "leave buffer out"
    if draws_by_law:
        return f"{name} needs the reply of every site that it has drawn for a round: {without}"
    if method is not None and method.needs_all:
        return f"the method {method.name} is wrong with replies to different models: {without}"
    if below is not None:
        return (
            f"the rule of {below.__name__} is not ours, and may count on replies to the current "
            f"model: {without}, or take a strategy of fedmed_flower.strategies"
        )
    if own_exchange:
        return f"{name} has its own exchange, which asynchronous rounds do not call: {without}"
    if quorum is not None:
        return (
            "buffer excludes quorum: a round that ends with a number of replies has one; leave "
            "quorum out"
        )
    if min_replies > size:
        return f"min_replies must be at most buffer={size}, got {min_replies}"
    if needed > size:
        return (
            f"{name} needs {needed} replies a round to keep its promise, but buffer={size}: raise "
            "buffer or lower num_malicious_nodes"
        )
    return None


@dataclass(frozen=True)
class Dispatch:
    """What a round sends to the sites.

    Attributes
    ----------
    server_round : int
    model : ArrayRecord
    companions : dict of str to ArrayRecord
        What goes beside the model, by name.
    """

    server_round: int
    model: ArrayRecord
    companions: dict[str, ArrayRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class UnderWay:
    """A message without a reply so far: what was sent, and when by the clock of the arrivals."""

    request: Request
    sent: Dispatch
    seconds: float


def staleness_factor(staleness: int, exponent: float) -> float:
    """Return ``(1 + s) ^ -a``, by which the weight of a reply of age s is multiplied.

    Examples
    --------
    >>> staleness_factor(0, 0.5), staleness_factor(3, 0.5)
    (1.0, 0.5)
    """
    return float((1 + staleness) ** -exponent)


def moved(
    reply: ArrayRecord, sent: ArrayRecord, current: ArrayRecord, keys: Collection[str]
) -> ArrayRecord:
    """Return a reply's change of what was sent to it as a change of the current record.

    Parameters
    ----------
    reply, sent, current : ArrayRecord
        Of the same keys, shapes and dtypes.
    keys : collection of str
        The entries that become ``current + (reply - sent)``, computed in float64 at least. The
        others are those of the reply.
    """
    draft = Draft(reply)
    rows = (flat(record, reply) for record in (reply, sent, current))
    # What overflows is refused by the rule, as a reply with infinite values.
    with np.errstate(over="ignore", invalid="ignore"):
        for key, out, new, old, now in zip(reply, draft.row, *rows, strict=True):
            if key in keys:
                change = kernels.widen(new).astype(np.float64) - kernels.widen(old)
                out[...] = kernels.narrow(kernels.widen(now) + change, out.dtype)
            else:
                out[...] = new
    return draft.finish()


class ReplyBuffer:
    """The messages under way and the replies that have come, of one run.

    Parameters
    ----------
    grid : Grid
    inbox : Inbox
    size : int
        Usable replies with which a round ends; at least 1.
    exponent : float
        Of `staleness_factor`.
    timeout : float
        Seconds after which a message counts as not replied to.
    statistics : collection of str
        Keys of the model's buffers. They and batch normalisation's running statistics are taken
        from a reply as they are: moved onto other statistics, a variance could be negative.

    Attributes
    ----------
    asked : int
        Sites to which this round has sent a model, or for whose reply it has waited.
    """

    def __init__(
        self,
        grid: Grid,
        inbox: Inbox,
        size: int,
        exponent: float,
        timeout: float,
        statistics: Collection[str] = (),
    ) -> None:
        self.size = size
        self.asked = 0
        self._grid = grid
        self._inbox = inbox
        self._exponent = exponent
        self._timeout = timeout
        self._statistics = statistics
        self._arrivals = arrivals_of(grid)
        self._current = Dispatch(0, ArrayRecord())
        self._under_way: dict[str, UnderWay] = {}
        # Messages that were given up, by id: their sites are busy until the reply comes after all.
        self._overdue: dict[str, UnderWay] = {}
        # Of the replies of this round: to what each one replied, by the id of the message.
        self._replied: dict[str, UnderWay] = {}
        # Of sites that have failed, by node: times in a row, and the round of the next message.
        self._failed: dict[int, int] = {}
        self._resting: dict[int, int] = {}
        self._ever_replied: set[int] = set()
        self._started = False
        # Messages of this round so far, and rows of the history before it.
        self._count = 0
        self._first_row = 0

    def gather(
        self,
        current: Dispatch,
        configure: Callable[[], Iterable[Message]],
        nodes: Callable[[], set[int]],
        usable: Callable[[Message], bool],
    ) -> list[Message]:
        """Send a model to each free site, and wait until the buffer is full.

        Parameters
        ----------
        current : Dispatch
            The model of this round.
        configure : callable
            Returns messages with that model to free sites; see `free`.
        nodes : callable
            Returns the nodes that may be sent training messages.
        usable : callable
            Whether a reply can be used, as far as is known before it is combined with others.

        Returns
        -------
        list of Message
            All replies of this round, in the order in which they came, also those that cannot be
            used. Fewer usable ones than `size` if no further site can reply.

        Raises
        ------
        InputError
            If there are fewer than `size` nodes before the first message is sent.
        """
        self._begin(current)
        replies: list[Message] = []
        count = 0
        begun = False
        while count < self.size:
            if not begun or self.free(nodes(), training=True):
                messages = list(configure())
                if not self._started:
                    self._require_sites(len(nodes()))
                self._send(messages)
                if messages or not begun:
                    self._tell_who_trains()
            begun = True
            if not self._under_way:
                # Replies that have come must not wait for a site that was given up.
                if count or not self._wait_for_overdue():
                    break
                continue
            reply = self._next()
            if reply is None:
                continue
            replies.append(reply)
            under_way = self._replied[reply.metadata.reply_to_message_id]
            if usable(reply):
                count += 1
                self._recover(under_way.request.node_id)
            else:
                self._rest(under_way.request.node_id)
        self.asked += len(self._under_way)
        self._inbox.count_traffic()
        if 0 < count < self.size:
            text = f"{count} of {self.size} usable replies: no further site can reply, so the round"
            self._inbox.note(
                current.server_round, "train", ALL_SITES, f"{text} ends with those that there are"
            )
        return replies

    def usable(self, reply: Message, weighted_by_key: str, layout: ArrayRecord) -> bool:
        """Return whether a reply passes screening and is finite.

        Parameters
        ----------
        reply : Message
        weighted_by_key, layout
            As in `screen`.
        """
        companions = self._current.companions
        if screen(reply, weighted_by_key, layout, companions) is not None:
            return False
        return not_finite(model_of(reply, companions)) is None

    def free(self, nodes: Collection[int], training: bool) -> set[int]:
        """Return the nodes that work on nothing and may be sent a message in this round.

        A node that has failed before rests for some rounds, unless there is no other.

        Parameters
        ----------
        nodes : collection of int
            Nodes that are connected.
        training : bool
            Whether it is a training message, of which a node gets one a round.
        """
        waiting = (*self._under_way.values(), *self._overdue.values())
        free = set(nodes).difference(one.request.node_id for one in waiting)
        if not training:
            return free
        free.difference_update(one.request.node_id for one in self._replied.values())
        now = self._current.server_round
        rested = {node for node in free if self._resting.get(node, 0) <= now}
        return rested if rested or self._under_way else free

    def sent_for(self, reply: Message) -> Dispatch:
        """Return what was sent to the site of a reply of this round."""
        return self._replied[reply.metadata.reply_to_message_id].sent

    @property
    def training(self) -> int:
        """Number of sites that train at present."""
        return len(self._under_way)

    def rebased(self, replies: Iterable[AcceptedReply]) -> Iterator[AcceptedReply]:
        """Move the change of each reply onto the current model, and lower its weight by its age.

        Companions are moved onto the current ones of their names.
        """
        for reply in replies:
            sent = self.sent_for(reply.message)
            staleness = self._age(sent)
            if staleness:
                reply.freshness = staleness_factor(staleness, self._exponent)
                keys = stepped(sent.model, self._statistics)
                reply.arrays = moved(reply.arrays, sent.model, self._current.model, keys)
                reply.companions = {
                    name: moved(
                        record,
                        sent.companions[name],
                        self._current.companions[name],
                        [key for key, a in record.items() if kernels.is_floating(view(a).dtype)],
                    )
                    for name, record in reply.companions.items()
                }
            yield reply

    def record(self) -> None:
        """Put the age of each reply into the history, and forget the replies of the round."""
        now = self._current.server_round
        rows = self._inbox.history.rows[self._first_row :]
        trained = {site for _, phase, site, _, _ in rows if phase == "train"}
        ages = {
            self._inbox.name(one.request.node_id): float(self._age(one.sent))
            for one in self._replied.values()
        }
        for site in sorted(trained & ages.keys()):
            self._inbox.history.add(now, "train", site, {STALENESS: ages[site]})
        self._replied = {}

    def close(self) -> None:
        """Record what is under way at the end of the run and will not be used."""
        now = self._current.server_round
        dropped: list[str] = []
        for one in self._under_way.values():
            site = self._inbox.name(one.request.node_id)
            if one.request.node_id in self._ever_replied:
                dropped.append(f"{site} (round {one.sent.server_round})")
            else:
                text = f"no reply by the end of the run to what round {one.sent.server_round} sent"
                self._inbox.fail(now, "train", site, text)
        if dropped:
            text = f"still in training at the end and not used: {', '.join(sorted(dropped))}"
            self._inbox.note(now, "train", ALL_SITES, text)
        if hasattr(self._grid, "drop"):
            self._grid.drop([*self._under_way, *self._overdue])
        self._under_way = {}
        self._overdue = {}

    def _begin(self, current: Dispatch) -> None:
        self._current = current
        self._replied = {}
        self._first_row = len(self._inbox.history.rows)
        self._count = 0
        self.asked = 0
        self._inbox.begin_phase()

    def _require_sites(self, count: int) -> None:
        """Require so many sites that the buffer can become full."""
        if count < self.size:
            raise InputError(
                f"buffer must be at most the number of sites that train, {count}, got {self.size}"
            )

    def _tell_who_trains(self) -> None:
        """Tell the listeners of all sites that train now, whenever they began."""
        sites = [self._inbox.name(one.request.node_id) for one in self._under_way.values()]
        self._inbox.listeners.asked(self._current.server_round, "train", sites)

    def _send(self, messages: list[Message]) -> None:
        """Send messages; record which of them could not be sent."""
        self._started |= bool(messages)
        accepted = {key for key in self._grid.push_messages(messages) if key}
        # The time that sending took does not count: a large model takes long.
        now = self._arrivals.now
        for message in messages:
            request = Request.of(message, self._count)
            self._count += 1
            under_way = UnderWay(request, self._current, now)
            if request.message_id in accepted:
                self._under_way[request.message_id] = under_way
            else:
                self._replied[f"not sent {request.number}"] = under_way
                self._fail(under_way, "the message could not be sent")

    def _next(self) -> Message | None:
        """Return the next reply to a message under way; None if it was another, or none came."""
        deadline = min(one.seconds for one in self._under_way.values()) + self._timeout
        began = time.monotonic()
        reply = self._arrivals.next_reply([*self._under_way, *self._overdue], deadline)
        if reply is None:
            self._give_up(deadline)
            return None
        request_id = reply.metadata.reply_to_message_id
        if request_id in self._overdue:
            self._come_back(self._overdue.pop(request_id), reply)
            return None
        one = self._under_way.pop(request_id, None)
        if one is None:
            return None
        self._replied[request_id] = one
        self._ever_replied.add(one.request.node_id)
        self.asked += 1
        in_process = getattr(self._grid, "in_process", False)
        seconds = time.monotonic() - began if in_process else self._arrivals.now - one.seconds
        now = self._current.server_round
        self._inbox.take(one.request, reply, now, "train", seconds)
        return reply

    def _give_up(self, until: float) -> None:
        """Count the messages as lost that were to be replied to until a time."""
        for key, one in list(self._under_way.items()):
            if one.seconds + self._timeout <= until:
                self._overdue[key] = self._under_way.pop(key)
                text = f"no reply within {self._timeout:g} s to what round "
                self._fail(one, f"{text}{one.sent.server_round} sent")

    def _come_back(self, one: UnderWay, reply: Message) -> None:
        """Take up that a site is free again whose message was given up."""
        self._ever_replied.add(one.request.node_id)
        if not reply.has_error():
            text = f"replied too late to what round {one.sent.server_round} sent: not used"
            site = self._inbox.name(one.request.node_id)
            self._inbox.note(self._current.server_round, "train", site, text)

    def _wait_for_overdue(self) -> bool:
        """Wait for a site that was given up, if no other can be asked; False if none comes back."""
        if not self._overdue:
            return False
        until = self._arrivals.now + self._timeout
        if not math.isfinite(until):
            return False
        reply = self._arrivals.next_reply([*self._overdue], until)
        if reply is None:
            text = f"no site can be asked, and none has come back within {self._timeout:g} s"
            self._inbox.fail(self._current.server_round, "train", ALL_SITES, text)
            return False
        one = self._overdue.pop(reply.metadata.reply_to_message_id, None)
        if one is not None:
            self._come_back(one, reply)
        return True

    def _fail(self, one: UnderWay, reason: str) -> None:
        """Record that a message has no reply."""
        self.asked += 1
        site = self._inbox.name(one.request.node_id)
        self._inbox.fail(self._current.server_round, "train", site, reason)
        self._rest(one.request.node_id)

    def _rest(self, node_id: int) -> None:
        times = self._failed.get(node_id, 0) + 1
        self._failed[node_id] = times
        rest = min(2 ** (times - 1), _LONGEST_REST)
        self._resting[node_id] = self._current.server_round + rest

    def _recover(self, node_id: int) -> None:
        self._failed.pop(node_id, None)
        self._resting.pop(node_id, None)

    def _age(self, sent: Dispatch) -> int:
        """Return in how many rounds the model has changed since it was sent."""
        return self._current.server_round - sent.server_round
