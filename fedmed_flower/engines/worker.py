"""A worker process: it answers the messages of its sites, one after the other.

Workers are forked by a process of their own (`attend`), which itself was forked before the run
began and does nothing else. So a worker can be replaced at any time, whatever threads the run has
started since, and whether or not it has used a GPU. If the run's process ends, however it ends, the
operating system closes its connections: `attend` then kills the workers.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower.data.site import simulation
from fedmed_flower.engines.answering import answer
from fedmed_flower.engines.channel import Channel
from fedmed_flower.errors import InputError

# Exit code of a worker that failed outside a client (EX_SOFTWARE).
_BROKEN = 70
# Seconds that a process which has closed its connection has to end by itself.
_ENDING = 2.0
# Numbers from which torch adds on several threads.
_MANY = 1 << 18


class Task(NamedTuple):
    """A message for a site of the worker.

    Attributes
    ----------
    message : Message
    context : Context
        Its state is empty.
    state : RecordDict or None
        The site's state; None if it is the one with which the worker's last message to it ended.
    """

    message: Message
    context: Context
    state: RecordDict | None


class Ready(NamedTuple):
    """A worker has started and can compute."""


class Began(NamedTuple):
    """The next message has come to its turn, at this time of `time.monotonic`."""

    at: float


class Said(NamedTuple):
    """What a site has logged, or printed on a stream of this name.

    `raised_at` tells tracebacks apart: class of the exception, file and line; None without one.
    """

    record: logging.LogRecord | None
    stream: str
    text: str
    raised_at: tuple[object, ...] | None


class Done(NamedTuple):
    """A message has been answered; `state` is None if it has not changed."""

    reply: Message | None
    state: RecordDict | None
    seconds: float


def attend(control: socket.socket, app: ClientApp) -> NoReturn:
    """Fork a worker when asked to, and say how one has ended, until the other end is closed.

    Parameters
    ----------
    control : socket
        Of packets. One with a file descriptor, the worker's end of its connection, asks for a
        worker: the answer is its process id. One with a process id waits for the worker's end, and
        kills it if it does not end by itself: the answer is the exit code, or minus the signal.
    app : ClientApp
    """
    # Ctrl-C reaches all processes of a terminal: the run decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Else a collection would copy each page of memory that the processes share.
    gc.freeze()
    workers: set[int] = set()
    while True:
        try:
            request, connections, _, _ = socket.recv_fds(control, 64, 1)
        except ConnectionResetError:
            request = b""
        if not request:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            for pid in workers:
                os.waitpid(pid, 0)
            os._exit(0)
        if connections:
            pid = os.fork()
            if not pid:
                control.close()
                work(Channel(socket.socket(fileno=connections[0])), app)
            os.close(connections[0])
            workers.add(pid)
            control.send(b"%d" % pid)
        else:
            pid = int(request)
            workers.discard(pid)
            control.send(b"%d" % os.waitstatus_to_exitcode(_ended(pid)))


def _ended(pid: int) -> int:
    """Wait until a process has ended, kill it if it takes long, and return its status."""
    until = time.monotonic() + _ENDING
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def work(channel: Channel, app: ClientApp) -> NoReturn:
    """Answer messages until the other end is closed."""
    code = _BROKEN
    try:
        _stand_apart()
        _speak_through(channel)
        _require_threads()
        channel.send(Ready())
        with simulation():
            _serve(channel, app)
    except (EOFError, BrokenPipeError):
        code = 0
    except SystemExit as end:
        # Of a client, which ends its worker alone.
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        # Without the handlers of this process: they belong to the run's.
        os._exit(code)


def _serve(channel: Channel, app: ClientApp) -> None:
    states: dict[int, RecordDict] = {}
    while True:
        tasks: Sequence[Task] = channel.receive()
        for message, context, given in tasks:
            node_id = context.node_id
            before = states[node_id] if given is None else given
            context.state = before
            TaskIdentity.run_id = context.run_id
            TaskIdentity.node_id = SUPERLINK_NODE_ID
            TaskIdentity.task_id = 1
            began = time.monotonic()
            channel.send(Began(began))
            reply, state = answer(app, message, context)
            states[node_id] = state
            seconds = time.monotonic() - began
            channel.send(Done(reply, None if state == before else state, seconds))


def _stand_apart() -> None:
    """Give this process generators of its own, and no terminal to read from."""
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()
    if transforms := sys.modules.get("monai.transforms.transform"):
        # All transforms that nobody has seeded draw from this one.
        transforms.Randomizable.R.seed()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    sys.breakpointhook = _refuse_debugger


def _refuse_debugger(*_: object, **__: object) -> NoReturn:
    raise InputError("a debugger needs the terminal, which a worker does not have: take 1 worker")


def _require_threads() -> None:
    """Compute on as many threads as sites will.

    If the run's process had already done so before it was forked, this does not return: GNU's
    OpenMP waits for threads that do not exist here.
    """
    if torch := sys.modules.get("torch"):
        torch.ones(_MANY).sum()


def _speak_through(channel: Channel) -> None:
    """Send what is logged and printed in this process to the run's."""
    pid = os.getpid()
    formatter = logging.Formatter()

    def forward(_: logging.Logger, record: logging.LogRecord) -> None:
        if os.getpid() != pid:
            # A process that a client has started.
            os.write(2, f"{formatter.format(record)}\n".encode(errors="replace"))
            return
        sent = copy.copy(record)
        sent.msg = record.getMessage()
        sent.args = None
        raised_at = None
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            frames = traceback.extract_tb(error.__traceback__)
            places = [(frame.filename, frame.lineno) for frame in frames]
            raised_at = (type(error).__name__, *places[-1:])
            sent.exc_text = formatter.formatException(record.exc_info)
        sent.exc_info = None
        channel.send(Said(sent, "", "", raised_at))

    # The handlers of the run's process handle the record there.
    logging.Logger.callHandlers = forward  # type: ignore[assignment,method-assign]
    sys.stdout = _Stream(channel, "stdout", 1)
    sys.stderr = _Stream(channel, "stderr", 2)


class _Stream(io.TextIOBase):
    """A stream whose text the run's process prints."""

    encoding: Any = "utf-8"

    def __init__(self, channel: Channel, name: str, number: int) -> None:
        self._channel = channel
        self._name = name
        self._number = number
        self._pid = os.getpid()

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the number of the stream that this process was given."""
        return self._number

    def write(self, text: str) -> int:
        """Send a text."""
        if os.getpid() == self._pid:
            self._channel.send(Said(None, self._name, text, None))
        else:
            with suppress(OSError):
                os.write(self._number, text.encode(errors="replace"))
        return len(text)
