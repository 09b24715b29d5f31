"""Run a ServerApp and its ClientApps in one process, through Flower's public Grid interface."""

from __future__ import annotations

import copy
import gc
import logging
import math
import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from logging import DEBUG
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    RecordDict,
    UserConfig,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower.data.site import simulation
from fedmed_flower.engines.clock import VirtualClock, speeds_of
from fedmed_flower.engines.notebook import framed_report, in_notebook, inline_progress
from fedmed_flower.errors import InputError
from fedmed_flower.settings.registry import Sectioned, complete, require_known

log = logging.getLogger("flwr.fedmed")

_FIRST_NODE_ID = 1001
# Flower's integers: those from 2^63 on are sent as unsigned.
_LEAST = -(2**63)
_MOST = 2**64 - 1

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
) -> LocalRun:
    """Run an app in this process, one client after the other.

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

    Returns
    -------
    LocalRun
        The result, the run folder and the server's context.

    Raises
    ------
    InputError
        If `num_sites` is below 1, `node_configs` or `virtual_speeds` has another length, a speed is
        not above 0, or `run_config` has a key that neither this package nor the app knows, although
        the client is one of this package.
    """
    if num_sites < 1:
        raise InputError(f"num_sites must be at least 1, got {num_sites}")
    configs = [{}] * num_sites if node_configs is None else list(node_configs)
    if len(configs) != num_sites:
        raise InputError(
            f"node_configs must have num_sites = {num_sites} items, got {len(configs)}"
        )
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
        with simulation(), quiet, shown as listener:
            by_node = None if speeds is None else dict(zip(contexts, speeds, strict=True))
            grid = LocalGrid(client_app, contexts, _all_of(on_message, listener), by_node)
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


@dataclass
class _Progress:
    """Of the messages that were sent together: how many there are and how many are done."""

    sent: int = 0
    done: int = 0


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
    client_app : ClientApp
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
        client_app: ClientApp,
        contexts: Mapping[int, Context],
        on_message: Listener | None = None,
        speeds: Mapping[int, float] | None = None,
    ) -> None:
        self._client_app = client_app
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
            self._waiting[message_id] = _Waiting(_copy_message(message), progress, due)
            ids.append(message_id)
        progress.sent = len(ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients of these messages and return their replies."""
        ids = [message_id for message_id in message_ids if message_id in self._waiting]
        return self._replies(ids, timeout=None)

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
        while waiting:
            key = min(
                waiting,
                key=lambda key: (waiting[key].due, waiting[key].message.metadata.dst_node_id),
            )
            if waiting.pop(key).due > until:
                break
            replies = self._replies([key], timeout=None)
            if replies:
                return replies[0]
        self._clock.advance(until)
        return None

    def drop(self, message_ids: Iterable[str]) -> None:
        """Forget messages whose replies nobody will pull, so that they do not stay in memory."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the clients of these messages; one that takes longer than `timeout` does not reply.

        The timeout is each client's own, since they run one after the other.
        """
        return self._replies(list(self.push_messages(messages)), timeout)

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

    def _replies(self, ids: list[str], timeout: float | None) -> list[Message]:
        replies = []
        for message_id in ids:
            waiting = self._waiting.pop(message_id)
            message = waiting.message
            progress = waiting.progress
            self._clock.advance(waiting.due)
            if progress.done == 0:
                self._report(message, progress)
            began = time.monotonic()
            reply = self._handle(message)
            late = timeout is not None and time.monotonic() - began > timeout
            if reply is not None and not late:
                reply.metadata.__dict__["_message_id"] = str(uuid4())
                replies.append(reply)
            progress.done += 1
            self._report(message, progress)
        return replies

    def _report(self, message: Message, progress: _Progress) -> None:
        if self._on_message is not None:
            self._on_message(message, progress.done, progress.sent)

    def _handle(self, message: Message) -> Message | None:
        """Run one client on copies, so that no change reaches another client."""
        stored = self._contexts[message.metadata.dst_node_id]
        context = Context(
            stored.run_id,
            stored.node_id,
            dict(stored.node_config),
            copy_content(stored.state),
            dict(stored.run_config),
        )
        try:
            reply: object = self._client_app(_copy_message(message), context)
            if not isinstance(reply, Message | None):
                raise TypeError(f"a ClientApp must return a Message, got {type(reply).__name__}")
            if reply is not None and reply.has_content():
                _require_64_bits(reply.content)
            _require_64_bits(context.state)
        except Exception as error:
            log.log(DEBUG, "%s", traceback.format_exc())
            raised = ClientAppException(str(error))
            reason = f"{type(raised)}:<'{raised}'>"
            failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
            return Message(failure, reply_to=message)
        stored.state = copy_content(context.state)
        return None if reply is None else _copy_message(reply)


def _require_64_bits(content: RecordDict) -> None:
    """Raise `ValueError` if a record holds an integer that Flower's wire format cannot."""
    records: list[Any] = [*content.metric_records.values(), *content.config_records.values()]
    for key, value in (entry for record in records for entry in record.items()):
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int) and not _LEAST <= number <= _MOST:
                raise ValueError(f"{key} is an integer beyond 64 bits")


def _copy_message(message: Message) -> Message:
    copied = copy.copy(message)
    copied.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        copied.content = copy_content(message.content)
    return copied


def copy_content(content: RecordDict) -> RecordDict:
    """Copy records so that changing the copy in place leaves the original as it is.

    The arrays' values are immutable bytes and are shared.
    """
    copied = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            copied[name] = ArrayRecord(
                {k: Array(a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()}
            )
        else:
            copied[name] = copy.deepcopy(record)
    return copied
