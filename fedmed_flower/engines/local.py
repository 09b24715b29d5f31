"""Run a ServerApp and its ClientApps in one process, through Flower's public Grid interface."""

from __future__ import annotations

import gc
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import uuid4

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower.data.site import simulation
from fedmed_flower.engines.answering import Answer, answer, copy_message
from fedmed_flower.engines.clock import VirtualClock, speeds_of
from fedmed_flower.engines.notebook import framed_report, in_notebook, inline_progress
from fedmed_flower.engines.workers import Workers, number_of_workers
from fedmed_flower.errors import InputError
from fedmed_flower.settings.registry import Sectioned, complete, require_known

log = logging.getLogger("flwr.fedmed")

_FIRST_NODE_ID = 1001

Listener = Callable[[Message, int, int], None]


@dataclass(frozen=True)
class LocalRun:
    """What a run of `run_local` leaves.

    Attributes
    ----------
    context : Context
        The context of the server, as its app left it.
    result : flwr.serverapp.strategy.Result or None
        The result of the app's `federate` or `grow`; else that of the last strategy of this package
        that it started; None if it used none.
    folder : Path or None
        The run folder of that result; None if nothing was written.
    """

    context: Context
    result: Result | None
    folder: Path | None

    def _repr_html_(self) -> str | None:
        """Return the report as a notebook shows it; None if the run wrote none."""
        return None if self.folder is None else framed_report(self.folder)


def run_local(
    server_app: ServerApp,
    client_app: ClientApp,
    num_sites: int,
    *,
    run_config: UserConfig | None = None,
    node_configs: Sequence[UserConfig] | None = None,
    app_name: str = "",
    on_message: Listener | None = None,
    verbose: bool = False,
    progress: bool = True,
    virtual_speeds: Sequence[float] | None = None,
    workers: int | Workers = 1,
) -> LocalRun:
    """Run an app in this process, one client after the other, or several in processes of their own.

    The clients see what they see on Flower's simulation engine: their own copies of contents, a
    ``context.state`` that lasts from round to round, and a ``partition-id``. If a client raises,
    its reply is the error reply that Flower's engine would send. A debugger works inside a client.
    In a notebook the value of a cell that ends with the run is its report.

    Parameters
    ----------
    server_app, client_app
        The Flower app.
    num_sites : int
        At least 1.
    run_config : dict, optional
        The run config of server and clients.
    node_configs : sequence of dict, optional
        One per site, added to ``partition-id`` and ``num-partitions``. A site with its own
        ``site-name`` or ``data-dir`` is treated as a real hospital: of its errors only the class
        leaves.
    app_name : str
        Name of the app in reports.
    on_message : callable, optional
        Called as ``on_message(message, done, sent)`` before the first client of `sent` messages
        that were sent together, with `done` 0, and after each; `message` is the client's.
    verbose : bool
        Whether to show Flower's own lines on the console too, below WARNING.
    progress : bool
        Whether to show, in a notebook, how far the run is. Elsewhere nothing is shown.
    virtual_speeds : sequence of float, optional
        Training messages that each site answers in a second of the virtual clock; above 0. The
        history then has ``virtual-seconds`` after each round, and asynchronous rounds take replies
        in the order of that clock. None: as ``virtual-speeds`` of the run config, if it is there.
    workers : int or Workers
        Number of clients that work at once, from 1 to 64; more than sites are not started. From 2
        on they are processes forked from this one, on Linux, and no debugger works in them; the
        result is the same. `Workers` have been started already, and are not ended here.

    Returns
    -------
    LocalRun
        The result, the run folder and the server's context.

    Raises
    ------
    InputError
        If `num_sites` is below 1, `node_configs` or `virtual_speeds` has another length, a speed is
        not above 0, `run_config` has a key that neither this package nor the app knows, although
        the client is one of this package, or workers cannot be started from this process.
    """
    if num_sites < 1:
        raise InputError(f"num_sites must be at least 1, got {num_sites}")
    configs = [{}] * num_sites if node_configs is None else list(node_configs)
    if len(configs) != num_sites:
        raise InputError(
            f"node_configs must have num_sites = {num_sites} items, got {len(configs)}"
        )
    if not isinstance(workers, Workers):
        workers = number_of_workers(workers, num_sites)
    run_id = secrets.randbits(63)
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    config = dict(run_config or {})
    if isinstance(client_app, Sectioned):
        require_known(config, client_app.sections)
    speeds = speeds_of(config, num_sites) if virtual_speeds is None else list(virtual_speeds)
    if speeds is not None and len(speeds) != num_sites:
        raise InputError(
            f"virtual_speeds must have num_sites = {num_sites} items, got {len(speeds)}"
        )
    if speeds is not None and not all(0 < speed < math.inf for speed in speeds):
        raise InputError(f"virtual_speeds must be above 0 and finite, got {speeds}")
    contexts = {
        _FIRST_NODE_ID + index: Context(
            run_id=run_id,
            node_id=_FIRST_NODE_ID + index,
            node_config={"partition-id": index, "num-partitions": num_sites} | dict(node_config),
            state=RecordDict(),
            run_config=dict(config),
        )
        for index, node_config in enumerate(configs)
    }
    rounds = None
    if isinstance(client_app, Sectioned):
        rounds = int(complete(config)["num-server-rounds"])
    shown = inline_progress(rounds) if progress and in_notebook() else nullcontext()
    quiet = nullcontext() if verbose else _without_flowers_lines()
    context = Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), config)
    # torch and MONAI load a million objects that are never garbage; to scan them takes a quarter
    # of a second each time.
    gc.freeze()
    try:
        with ExitStack() as stack:
            # Before anything is shown: that may start a thread.
            if workers == 1:
                sites: Sites = InTurn(client_app)
            elif isinstance(workers, Workers):
                sites = workers
            else:
                sites = stack.enter_context(Workers(client_app, workers))
            listener = stack.enter_context(shown)
            stack.enter_context(quiet)
            stack.enter_context(simulation())
            by_node = None if speeds is None else dict(zip(contexts, speeds, strict=True))
            grid = LocalGrid(sites, contexts, _all_of(on_message, listener), by_node)
            grid.run.fab_id = app_name
            server_app(grid=grid, context=context)
    finally:
        gc.unfreeze()
    return LocalRun(context, grid.result, grid.folder)


def _all_of(*listeners: Listener | None) -> Listener | None:
    """Return what calls all listeners that there are; None if there is none."""
    given = [listener for listener in listeners if listener is not None]

    def listen(message: Message, done: int, sent: int) -> None:
        for listener in given:
            listener(message, done, sent)

    return listen if given else None


@contextmanager
def _without_flowers_lines() -> Iterator[None]:
    """Keep Flower's own lines below WARNING from the console; this package's are shown.

    A handler that somebody has set to DEBUG shows all.
    """
    consoles = [
        handler
        for handler in logging.getLogger("flwr").handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
        and handler.level >= logging.INFO
    ]
    for handler in consoles:
        handler.addFilter(_ours_or_warning)
    try:
        yield
    finally:
        for handler in consoles:
            handler.removeFilter(_ours_or_warning)


def _ours_or_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or f"{record.name}.".startswith(f"{log.name}.")


class Sites(Protocol):
    """Who answers the messages: the sites in this process (`InTurn`), or in others (`Workers`)."""

    def begin(self, messages: Sequence[Message], contexts: Mapping[int, Context]) -> None:
        """Hear which messages will be answered next."""

    def answer(self, message: Message, context: Context, timeout: float | None) -> Answer:
        """Return the answer of a site with this context, which stays as it is."""

    def drop(self, message_id: str) -> None:
        """Forget a message."""


class InTurn:
    """Sites in this process, each of which works when its answer is asked for."""

    def __init__(self, app: ClientApp) -> None:
        self._app = app

    def begin(self, messages: Sequence[Message], contexts: Mapping[int, Context]) -> None:
        """Do nothing."""

    def answer(self, message: Message, context: Context, timeout: float | None) -> Answer:
        """Run the client; nothing stops it at its timeout."""
        began = time.monotonic()
        reply, state = answer(self._app, message, context)
        return Answer(reply, state, time.monotonic() - began)

    def drop(self, message_id: str) -> None:
        """Do nothing."""


@dataclass
class _Progress:
    """Of the messages that were sent together: how many, how many are done, whether any may be."""

    sent: int = 0
    done: int = 0
    begun: bool = False


class _Waiting(NamedTuple):
    """A message whose client has not run, and the virtual time at which its reply is due."""

    message: Message
    progress: _Progress
    due: float


class LocalGrid(Grid):
    """Runs a ClientApp on each message when its reply is pulled.

    Attributes
    ----------
    complete : bool
        True: all sites are connected from the start, so nobody waits for more.
    in_process : bool
        True: a client runs when its reply is pulled.
    result, folder
        As in `LocalRun`.

    Parameters
    ----------
    sites : Sites
    contexts : dict
        The context of each node, by node id.
    on_message : callable, optional
        As in `run_local`.
    speeds : mapping of int to float, optional
        Of each node, as in `VirtualClock`.
    """

    complete = True
    in_process = True

    def __init__(
        self,
        sites: Sites,
        contexts: Mapping[int, Context],
        on_message: Listener | None = None,
        speeds: Mapping[int, float] | None = None,
    ) -> None:
        self._sites = sites
        self._contexts = dict(contexts)
        self._on_message = on_message
        self._run = Run.create_empty(next(iter(contexts.values())).run_id)
        self._clock = VirtualClock(speeds)
        self._waiting: dict[str, _Waiting] = {}
        self.result: Result | None = None
        self.folder: Path | None = None

    def set_run(self, run: Run) -> None:
        """Set the run that `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run of this grid."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a `Message` with these values."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all sites, in the order of their index."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages, whose clients run when the replies are pulled; return their ids."""
        ids = list[str]()
        progress = _Progress()
        for message in messages:
            if message.metadata.dst_node_id not in self._contexts:
                raise ValueError(f"there is no node {message.metadata.dst_node_id}")
            message_id = str(uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            due = self._clock.due(message)
            self._waiting[message_id] = _Waiting(copy_message(message), progress, due)
            ids.append(message_id)
        progress.sent = len(ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients of these messages and return their replies."""
        return self.pull_within(message_ids, None)[0]

    def pull_within(
        self, message_ids: Iterable[str], timeout: float | None
    ) -> tuple[list[Message], float]:
        """Run the clients of these messages; one that takes longer than `timeout` does not reply.

        All that were sent together with one of them may begin.

        Returns
        -------
        tuple of (list of Message, float)
            The replies, and the seconds that the last client took.
        """
        ids = [message_id for message_id in message_ids if message_id in self._waiting]
        for message_id in ids:
            self._begin(self._waiting[message_id].progress)
        return self._replies(ids, timeout)

    def _begin(self, progress: _Progress) -> None:
        """Let all begin that were sent together."""
        if not progress.begun:
            progress.begun = True
            together = [one.message for one in self._waiting.values() if one.progress is progress]
            self._sites.begin(together, self._contexts)

    @property
    def now(self) -> float:
        """Seconds of the virtual clock."""
        return self._clock.now

    @property
    def virtual_seconds(self) -> float | None:
        """Seconds of the virtual clock; None if the sites were given no speeds."""
        return self._clock.now if self._clock.given else None

    def set_clock(self, seconds: float) -> None:
        """Set the virtual clock, at the start of a run or of what is left of one."""
        self._clock.now = seconds

    def next_reply(self, message_ids: Sequence[str], until: float) -> Message | None:
        """Run the client whose reply is due next by the virtual clock, and return its reply.

        Of replies that are due at the same time, that of the site with the lower index comes first.
        A client that does not reply is passed over.

        Returns
        -------
        Message or None
            None if no reply is due until `until`, which the clock then shows.
        """
        waiting = {key: self._waiting[key] for key in message_ids if key in self._waiting}
        due = [key for key in sorted(waiting, key=_turn(waiting)) if waiting[key].due <= until]
        self._sites.begin([waiting[key].message for key in due], self._contexts)
        for key in due:
            replies, _ = self._replies([key], timeout=None)
            if replies:
                return replies[0]
        self._clock.advance(until)
        return None

    def drop(self, message_ids: Iterable[str]) -> None:
        """Forget messages whose replies nobody will pull, so that they do not stay in memory."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)
            self._sites.drop(message_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the clients of these messages; one that takes longer than `timeout` does not reply.

        The timeout is each client's own, from when its turn comes.
        """
        return self.pull_within(self.push_messages(messages), timeout)[0]

    def take_result(self, result: Result, folder: Path | None) -> None:
        """Take up the result of a strategy, and its run folder, in place of an earlier one's."""
        self.result = result
        self.folder = folder

    def export_states(self) -> dict[str, bytes]:
        """Return the ``context.state`` of each client that keeps one, serialised, by node id."""
        return {
            str(node_id): recorddict_to_proto(context.state).SerializeToString()
            for node_id, context in self._contexts.items()
            if context.state
        }

    def import_states(self, states: Mapping[str, bytes]) -> None:
        """Restore what `export_states` returned; a client that is not in it gets an empty state."""
        for node_id, context in self._contexts.items():
            proto = ProtoRecordDict.FromString(states.get(str(node_id), b""))
            context.state = recorddict_from_proto(proto)

    def _replies(self, ids: Sequence[str], timeout: float | None) -> tuple[list[Message], float]:
        replies = []
        seconds = 0.0
        for message_id in ids:
            waiting = self._waiting.pop(message_id)
            message = waiting.message
            progress = waiting.progress
            context = self._contexts[message.metadata.dst_node_id]
            self._clock.advance(waiting.due)
            if progress.done == 0:
                self._report(message, progress)
            reply, context.state, seconds = self._sites.answer(message, context, timeout)
            late = timeout is not None and seconds > timeout
            if reply is not None and not late:
                reply.metadata.__dict__["_message_id"] = str(uuid4())
                replies.append(reply)
            progress.done += 1
            self._report(message, progress)
        return replies, seconds

    def _report(self, message: Message, progress: _Progress) -> None:
        if self._on_message is not None:
            self._on_message(message, progress.done, progress.sent)


def _turn(waiting: Mapping[str, _Waiting]) -> Callable[[str], tuple[float, int]]:
    """Return the order of replies: by when they are due, then by the site's index."""
    return lambda key: (waiting[key].due, waiting[key].message.metadata.dst_node_id)
