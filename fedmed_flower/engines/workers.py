"""Workers: processes that answer messages side by side, each for the same sites all along.

The result is that of one site after the other, bit for bit. A site's answer depends on its message,
its state and its rows alone; replies are handed on in the order in which they are asked for, with
the lines that the site has logged and printed.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedmed_flower.engines.answering import Answer
from fedmed_flower.engines.channel import Channel
from fedmed_flower.engines.notebook import in_notebook
from fedmed_flower.engines.worker import Began, Done, Ready, Said, Task, attend
from fedmed_flower.errors import InputError
from fedmed_flower.settings.registry import Sectioned

log = logging.getLogger("flwr.fedmed")

MOST_WORKERS = 64
# Seconds that a worker has to start.
_STARTING = 30.0
# The last two take a second each; torch's optimizers import the last one.
_AT_WORK = (
    "fedmed_flower.clients.duplicates",
    "fedmed_flower.clients.queries",
    "fedmed_flower.clients.trial",
    "sklearn.metrics",
    "torch._dynamo",
)


def number_of_workers(wanted: int, num_sites: int) -> int:
    """Return how many workers to start: as many as wanted, but no more than sites.

    Raises
    ------
    InputError
        If `wanted` is not from 1 to `MOST_WORKERS`.
    """
    if not 1 <= wanted <= MOST_WORKERS:
        raise InputError(f"workers must be from 1 to {MOST_WORKERS}, got {wanted}")
    if wanted > num_sites:
        log.info("%d workers for %d sites: one a site is started", wanted, num_sites)
    return min(wanted, num_sites)


class WorkersError(RuntimeError):
    """A worker that has ended could not be replaced."""


@dataclass
class _Asked:
    """A message that a worker is to answer.

    Attributes
    ----------
    message : Message
    context : Context
        The one of the site, with its present state.
    began : float or None
        When its turn came, by `time.monotonic`.
    said : list of Said
        What the site has logged and printed so far.
    done : Done or None
    timeout : float or None
        Seconds that it may take; known when its answer is waited for.
    given_up : bool
        Whether nobody waits for the reply any more.
    """

    message: Message
    context: Context
    began: float | None = None
    said: list[Said] = field(default_factory=list)
    done: Done | None = None
    timeout: float | None = None
    given_up: bool = False


@dataclass(eq=False)
class _Worker:
    """A worker's process, what it was sent and has not answered, and what it will be sent then."""

    pid: int
    channel: Channel
    sent: deque[_Asked] = field(default_factory=deque)
    queue: deque[_Asked] = field(default_factory=deque)


class Workers:
    """Processes that answer the messages of a ClientApp.

    Parameters
    ----------
    app : ClientApp
    count : int
        Number of processes; from 1 to `MOST_WORKERS`. The site of node id i has worker i modulo
        `count`.

    Raises
    ------
    InputError
        If this process cannot be forked safely.
    """

    def __init__(self, app: ClientApp, count: int) -> None:
        _import_beforehand(app)
        _require_forkable()
        self._control, self._attendant = _fork_attendant(app)
        self._selector = selectors.DefaultSelector()
        self._asked: dict[str, _Asked] = {}
        # The state with which a site's last message went to its worker, or came back.
        self._last: dict[int, RecordDict] = {}
        self._raised: set[tuple[object, ...]] = set()
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._started())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._control.close()
        with suppress(ChildProcessError):
            os.waitpid(self._attendant, 0)
        for worker in self._workers:
            worker.channel.close()
        self._selector.close()

    def begin(self, messages: Sequence[Message], contexts: Mapping[int, Context]) -> None:
        """Let workers begin to answer messages, each in this order, when they are free.

        Parameters
        ----------
        messages : sequence of Message
            Those that have begun already are passed over.
        contexts : mapping of int to Context
            By node id, with the present states.
        """
        for message in messages:
            key = message.metadata.message_id
            if key not in self._asked:
                node_id = message.metadata.dst_node_id
                self._asked[key] = _Asked(message, contexts[node_id])
                self._worker_of(node_id).queue.append(self._asked[key])
        for worker in list(self._workers):
            self._feed(worker)

    def answer(self, message: Message, context: Context, timeout: float | None) -> Answer:
        """Wait for a message's answer, and hand on what the site has logged and printed meanwhile.

        Parameters
        ----------
        message : Message
        context : Context
            With the site's present state.
        timeout : float or None
            Seconds from the site's turn after which there is no reply. The site may go on for as
            long again; then its worker is killed if another of its sites is waited for.

        Raises
        ------
        WorkersError
            If a worker has ended and cannot be replaced.
        """
        self.begin([message], {context.node_id: context})
        asked = self._asked.pop(message.metadata.message_id)
        asked.timeout = timeout
        while asked.done is None:
            if self._read(0) or asked.done is not None:
                continue
            worker = self._worker_of(context.node_id)
            limit = _limit(worker.sent[0])
            left = None if limit is None else limit - time.monotonic()
            if left is None or left > 0:
                self._read(left)
            elif worker.sent[0] is asked:
                asked.given_up = True
                self._repeat(asked)
                began = time.monotonic() if asked.began is None else asked.began
                return Answer(None, context.state, time.monotonic() - began)
            else:
                os.kill(worker.pid, signal.SIGKILL)
                self._replace(worker, "process was ended after twice the timeout")
        self._repeat(asked)
        reply, state, seconds = asked.done
        if state is None:
            return Answer(reply, context.state, seconds)
        self._last[context.node_id] = state
        return Answer(reply, state, seconds)

    def drop(self, message_id: str) -> None:
        """Forget a message; what its site has done meanwhile does not change its state."""
        asked = self._asked.pop(message_id, None)
        if asked is None:
            return
        asked.given_up = True
        node_id = asked.context.node_id
        worker = self._worker_of(node_id)
        if asked in worker.queue:
            worker.queue.remove(asked)
        else:
            self._last.pop(node_id, None)

    def _worker_of(self, node_id: int) -> _Worker:
        return self._workers[node_id % len(self._workers)]

    def _feed(self, worker: _Worker) -> None:
        """Send a worker what it has to do, if it has done all that it was sent.

        Only then does it certainly receive; else both ends could wait for each other.
        """
        if worker.sent or not worker.queue:
            return
        tasks = []
        for asked in worker.queue:
            context = asked.context
            known = self._last.get(context.node_id) is context.state
            bare = Context(
                context.run_id,
                context.node_id,
                context.node_config,
                RecordDict(),
                context.run_config,
            )
            tasks.append(Task(asked.message, bare, None if known else context.state))
            self._last[context.node_id] = context.state
        worker.sent.extend(worker.queue)
        worker.queue.clear()
        try:
            worker.channel.send(tasks, keep=True)
        except OSError:
            self._replace(worker)

    def _read(self, timeout: float | None) -> bool:
        """Wait so long for what any worker sends, and take it up; return whether any has."""
        torn = [worker for worker in self._workers if worker.channel.torn]
        for worker in torn:
            self._replace(worker, "process was ended after an interrupt")
        ready = self._selector.select(0 if torn else timeout)
        for key, _ in ready:
            worker = key.data
            try:
                self._take(worker, worker.channel.receive())
            except EOFError:
                self._replace(worker)
        return bool(torn or ready)

    def _take(self, worker: _Worker, value: Began | Said | Done) -> None:
        first = worker.sent[0]
        match value:
            case Began():
                first.began = value.at
            case Said():
                first.said.append(value)
                if first.given_up:
                    self._repeat(first)
            case Done():
                worker.sent.popleft()
                first.done = value
                context = first.context
                in_step = self._last.get(context.node_id) is context.state
                if first.given_up and in_step and value.state is not None:
                    # As if it had replied in time: only its reply was late.
                    context.state = value.state
                    self._last[context.node_id] = value.state
                self._feed(worker)

    def _repeat(self, asked: _Asked) -> None:
        """Log and print here what a site has logged and printed."""
        for record, stream, text, raised_at in asked.said:
            if record is None:
                getattr(sys, stream).write(text)
                continue
            if raised_at is not None:
                source = (asked.context.run_id, *raised_at)
                if source in self._raised:
                    # One traceback is enough, whichever worker has logged it.
                    record.exc_text = None
                self._raised.add(source)
            logging.getLogger(record.name).handle(record)
        asked.said.clear()

    def _started(self) -> _Worker:
        """Return a new worker, which has nothing to do yet.

        Raises
        ------
        InputError
            If it hangs.
        WorkersError
            If it ends, or could not be forked.
        """
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [b"worker"], [theirs.fileno()])
            pid = int(self._control.recv(64))
        except (OSError, ValueError) as error:
            ours.close()
            raise WorkersError("the process that starts workers has ended") from error
        finally:
            theirs.close()
        worker = _Worker(pid, Channel(ours))
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        if not _readable(worker.channel, _STARTING):
            raise InputError(
                "a worker hangs at its start, because this process has computed on several threads "
                "before: set OMP_NUM_THREADS=1, start run_local before anything is computed, or "
                "leave workers at 1"
            )
        try:
            started = worker.channel.receive()
        except EOFError:
            raise WorkersError(f"a worker's {self._end_of(worker)} at its start") from None
        if not isinstance(started, Ready):
            raise WorkersError(f"a worker has sent {type(started).__name__} at its start")
        return worker

    def _replace(self, worker: _Worker, why: str = "") -> None:
        """Put a new worker in the place of one that has ended.

        The message that it was at is answered by an error; the new one takes the others.
        """
        self._selector.unregister(worker.channel)
        worker.channel.close()
        end = self._end_of(worker)
        end = why or end
        index = self._workers.index(worker)
        if worker.sent:
            failed = worker.sent.popleft()
            error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=f"its worker's {end}")
            seconds = 0.0 if failed.began is None else time.monotonic() - failed.began
            failed.done = Done(Message(error, reply_to=failed.message), None, seconds)
        for node_id in list(self._last):
            if node_id % len(self._workers) == index:
                del self._last[node_id]
        new = self._started()
        new.queue.extend([*worker.sent, *worker.queue])
        for asked in new.queue:
            asked.began = None
        worker.sent.clear()
        worker.queue.clear()
        self._workers[index] = new
        log.warning("worker %d: its %s; a new one takes its place", index + 1, end)
        self._feed(new)

    def _end_of(self, worker: _Worker) -> str:
        """Return in words how a worker has ended."""
        try:
            self._control.send(b"%d" % worker.pid)
            code = int(self._control.recv(64))
        except (OSError, ValueError) as error:
            raise WorkersError("the process that starts workers has ended") from error
        if code >= 0:
            return f"process ended with exit code {code}"
        name = signal.Signals(-code).name
        memory = ", as the system does if memory runs out" if -code == signal.SIGKILL else ""
        return f"process was ended by signal {-code} ({name}){memory}"


def _limit(first: _Asked) -> float | None:
    """Return until when a worker may be at a message; None without a limit."""
    if first.timeout is None or first.began is None:
        return None
    return first.began + first.timeout * (2 if first.given_up else 1)


def _readable(channel: Channel, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _fork_attendant(app: ClientApp) -> tuple[socket.socket, int]:
    """Fork the process that forks workers; return the connection to it, and its id."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        # Of threads: those of OpenBLAS and jemalloc, which are prepared for it, remain.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        try:
            ours.close()
            attend(theirs, app)
        finally:
            os._exit(1)
    theirs.close()
    return ours, pid


def _require_forkable() -> None:
    """Refuse to fork where what is forked might hang or fail.

    Raises
    ------
    InputError
    """
    leave = "leave workers at 1"
    if sys.platform != "linux":
        raise InputError(
            f"workers are forked, which is safe on Linux alone, and this is {sys.platform}: "
            f"{leave}, or take `fedmed run APP --engine flower`"
        )
    if in_notebook():
        raise InputError(
            "workers cannot be forked from a notebook, whose kernel has threads: "
            f"{leave}, or run `fedmed run APP --workers N` in a terminal"
        )
    names = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
    if names:
        raise InputError(
            f"workers cannot be forked while other threads run ({', '.join(sorted(names))}): "
            f"start run_local before they start, or {leave}"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise InputError(
            "workers cannot be forked after this process has used a GPU: start run_local before, "
            f"or {leave}"
        )


def _import_beforehand(app: ClientApp) -> None:
    """Import what hospitals of this package import at work, once rather than in each worker."""
    if isinstance(app, Sectioned):
        for name in _AT_WORK:
            import_module(name)
