"""A process that has imported everything once and forks a child for each message.

`forking` starts it, `fork_client` asks it. It opens no connection but its socket, starts no thread
and never asks for a GPU, so that a child has all that a new process would have. What a child cannot
have as a new process would is compared with what the asking process was given (`Surroundings`); at
a difference the server refuses, and the asking process becomes the real command.

Linux alone: it reads ``/proc``, and hands out descriptors of processes.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedmed_flower.engines.fork_child import Imported, Request, become, leave, run_script
from fedmed_flower.engines.fork_client import DESCRIPTORS, GO, LENGTHS, NUMBER, PATIENCE, peer
from fedmed_flower.engines.fork_guard import (
    Packages,
    RefusedError,
    Surroundings,
    descriptors,
    environment,
    own_interpreter,
    threads,
)

# Bytes of a request; Linux itself gives a process no more than 6 MiB.
MOST_BYTES = 6 << 20
# Requests that are being read at a time.
MOST_ASKING = 64
# Seconds in which a request must be whole and confirmed: the asking process waits less.
ASKING = 2 * PATIENCE
_STOPPING = (signal.SIGTERM, signal.SIGINT)


@dataclass(eq=False)
class _Asking:
    """A process that asks; its request may not yet be whole."""

    connection: socket.socket
    pid: int
    until: float
    content: bytearray = field(default_factory=bytearray)
    descriptors: list[int] = field(default_factory=list)
    request: Request | None = None
    closed: bool = False

    def read(self) -> bool:
        """Read what has come; return whether something has."""
        data, passed, _flags, _address = socket.recv_fds(self.connection, 1 << 16, DESCRIPTORS)
        self.descriptors += passed
        self.content += data
        return bool(data)

    def whole(self) -> Request | None:
        """Return the request, or None if more has to come.

        Raises
        ------
        ValueError
            If it is no request, or too large.
        """
        if len(self.content) < LENGTHS.size:
            return None
        first, second = LENGTHS.unpack_from(self.content)
        if first + second > MOST_BYTES:
            raise ValueError(f"a request of {first + second:,} bytes")
        body = bytes(self.content[LENGTHS.size :])
        if len(body) < first + second:
            return None
        if len(body) > first + second or len(self.descriptors) != DESCRIPTORS:
            raise ValueError("a malformed request")
        return Request(body[:first].split(b"\0"), environment(body[first:]), self.descriptors)

    def close(self) -> None:
        """Forget it, with the descriptors that it sent."""
        self.closed = True
        self.connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


@dataclass(eq=False)
class _Running:
    """A child, and the connection to the process that asked for it."""

    pid: int
    descriptor: int
    connection: socket.socket
    ended: bool = False
    alone: bool = False


Step = Callable[[], Request | None]


class Server:
    """Answers on a Unix socket, with one thread, and forks.

    Parameters
    ----------
    listener : socket.socket
        Bound, and in a folder that no other user can enter.
    control : socket.socket
        The other end is the launcher's; when it is closed, no new request is taken, and the server
        ends with its last child.
    check : callable
        Called with a request and the number of the asking process; raises `RefusedError`.
    """

    def __init__(
        self,
        listener: socket.socket,
        control: socket.socket,
        check: Callable[[Request, int], None],
    ) -> None:
        self._listener = listener
        self._control = control
        self._check = check
        self._asking: list[_Asking] = []
        self._running: list[_Running] = []
        self._open = True
        self._ending = False
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # What the imports have set is what a child has.
        self._handlers = {number: signal.getsignal(number) for number in _STOPPING}
        for number in _STOPPING:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._stopped, warn_on_full_buffer=False)
        listener.setblocking(False)
        self._watch(listener, self._accept)
        self._watch(control, self._close)
        self._watch(self._stop, self._end)

    def serve(self) -> Request | None:
        """Serve until the launcher is gone and no child is left.

        Returns
        -------
        Request or None
            In a child, what it has to run; in the server, None at its end.
        """
        while self._open or self._running:
            for key, _ in self._selector.select(self._patience()):
                step: Step = key.data
                request = step()
                if request is not None:
                    return request
            for asking in [each for each in self._asking if each.until < time.monotonic()]:
                self._drop(asking)
        return None

    def _watch(self, descriptor: socket.socket | int, step: Step) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, step)

    def _patience(self) -> float | None:
        times = [each.until for each in self._asking]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        pid, uid = peer(connection)
        if uid != os.geteuid() or len(self._asking) >= MOST_ASKING:
            connection.close()
            return
        connection.setblocking(False)
        asking = _Asking(connection, pid, time.monotonic() + ASKING)
        self._asking.append(asking)
        self._watch(connection, lambda: self._hear(asking))

    def _drop(self, asking: _Asking) -> None:
        self._asking.remove(asking)
        self._selector.unregister(asking.connection)
        asking.close()

    def _hear(self, asking: _Asking) -> Request | None:
        if asking.closed:
            return None
        try:
            came = asking.read()
            if came and asking.request is not None and bytes(asking.content) == GO:
                return self._fork(asking, asking.request)
            if not came or asking.request is not None:
                self._drop(asking)
                return None
            asking.request = asking.whole()
        except (OSError, ValueError) as error:
            say(f"a request was dropped: {error}")
            self._drop(asking)
            return None
        if asking.request is not None:
            asking.content.clear()
            self._answer(asking, asking.request)
        return None

    def _answer(self, asking: _Asking, request: Request) -> None:
        reason = b""
        try:
            self._check(request, asking.pid)
        except RefusedError as error:
            reason = str(error).encode(errors="backslashreplace")[:2000]
        # It fits into the socket's empty buffer; whoever does not read it only waits in vain.
        with suppress(OSError):
            asking.connection.send(NUMBER.pack(len(reason)) + reason)
        if reason:
            self._drop(asking)

    def _fork(self, asking: _Asking, request: Request) -> Request | None:
        self._asking.remove(asking)
        self._selector.unregister(asking.connection)
        # A signal for the server must not find the child with the server's handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            say(f"no child could be made: {error}")
            with suppress(OSError):
                asking.connection.send(NUMBER.pack(0))
            asking.close()
            return None
        if pid == 0:
            asking.connection.close()
            self._forget()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return request
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for descriptor in asking.descriptors:
            os.close(descriptor)
        running = _Running(pid, os.pidfd_open(pid), asking.connection)
        self._running.append(running)
        self._watch(running.descriptor, lambda: self._reap(running))
        self._watch(running.connection, lambda: self._abandon(running))
        with suppress(OSError):
            socket.send_fds(running.connection, [NUMBER.pack(pid)], [running.descriptor])
        return None

    def _forget(self) -> None:
        """Close in a child all that is the server's."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._selector.close()
        self._listener.close()
        self._control.close()
        os.close(self._stop)
        os.close(self._stopped)
        for asking in self._asking:
            asking.close()
        for running in self._running:
            os.close(running.descriptor)
            running.connection.close()

    def _reap(self, running: _Running) -> None:
        """Say how a child has ended."""
        _pid, status = os.waitpid(running.pid, 0)
        running.ended = True
        self._running.remove(running)
        self._selector.unregister(running.descriptor)
        os.close(running.descriptor)
        if not running.alone:
            self._selector.unregister(running.connection)
        with suppress(OSError):
            running.connection.send(NUMBER.pack(os.waitstatus_to_exitcode(status)))
        running.connection.close()

    def _abandon(self, running: _Running) -> None:
        """Kill a child whose asking process is gone: that was killed in the child's place."""
        if running.ended or running.alone:
            return
        try:
            if running.connection.recv(1):
                return
        except BlockingIOError:
            return
        except OSError as error:
            say(f"the process that asked for {running.pid} is gone: {error}")
        running.alone = True
        self._selector.unregister(running.connection)
        signal.pidfd_send_signal(running.descriptor, signal.SIGKILL)

    def _close(self) -> None:
        """Take no more requests: the launcher has closed its end."""
        if not self._open:
            return
        self._open = False
        self._selector.unregister(self._control)
        self._selector.unregister(self._listener)
        self._listener.close()
        for asking in list(self._asking):
            self._drop(asking)

    def _end(self) -> None:
        """Ask all children to end; kill them if this is not the first time."""
        with suppress(BlockingIOError):
            os.read(self._stop, 64)
        self._close()
        number = signal.SIGKILL if self._ending else signal.SIGTERM
        self._ending = True
        for running in self._running:
            signal.pidfd_send_signal(running.descriptor, number)


def say(text: str) -> None:
    """Write one line for the launcher's log."""
    # The server does not wait for a launcher that does not read.
    with suppress(OSError):
        os.write(1, f"{text}\n".encode(errors="backslashreplace"))


@dataclass(frozen=True)
class Orders:
    """What the launcher wants: see `forking`."""

    socket: str
    control: int
    commands: list[str]
    modules: list[str]


def prepare(orders: Orders) -> Imported:
    """Import all, and see to it that a child can be what a new process is.

    Raises
    ------
    RefusedError
        If it cannot.
    """
    for command in orders.commands:
        own_interpreter(os.fsencode(command))
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(orders.commands[0]).resolve().parent)
    before = descriptors()
    settings = os.environ.get("MPLCONFIGDIR")
    for name in orders.modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            traceback.print_exc()
            raise RefusedError(f"{name} cannot be imported ({type(error).__name__})") from error
    opened = [path for number, path in descriptors().items() if number not in before]
    if opened:
        raise RefusedError(f"the imports have opened {', '.join(sorted(opened))}")
    if os.environ.get("MPLCONFIGDIR") != settings:
        raise RefusedError(
            "matplotlib has made a folder for its settings, which the first child would delete: "
            "set MPLCONFIGDIR to a folder that can be written"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RefusedError("the imports have asked for a GPU")
    imported = Imported()
    # Where one cannot be seeded, no child is right.
    imported.seed()
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    # OpenBLAS ends its threads before a fork and starts them when they are next needed.
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    _alone()
    return imported


def _alone() -> None:
    if others := threads():
        raise RefusedError(f"the fork server has threads: {', '.join(sorted(others))}")


def main() -> None:
    """Be the fork server; in a child, be the command that was asked for."""
    began = time.monotonic()
    own = Surroundings.own()
    orders = Orders(**json.loads(sys.argv[1]))
    control = socket.socket(fileno=orders.control)
    control.set_inheritable(False)
    try:
        imported = prepare(orders)
    except RefusedError as reason:
        control.sendall(f"{reason}\n".encode(errors="backslashreplace"))
        os._exit(1)
    packages = Packages.now()
    commands = {os.fsencode(command) for command in orders.commands}

    def check(request: Request, pid: int) -> None:
        if request.arguments[0] not in commands:
            raise RefusedError("the fork server was started for another command")
        own.check(request.variables, pid)
        packages.check()
        _alone()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(orders.socket)
        listener.listen(MOST_ASKING)
        say(
            f"fork server: {len(sys.modules)} modules in {time.monotonic() - began:.1f} s, "
            f"{time.process_time():.1f} s of the processor"
        )
        os.set_blocking(1, False)
        control.sendall(b"\n")
        server = Server(listener, control, check)
        request = server.serve()
    if request is None:
        Path(orders.socket).unlink(missing_ok=True)
        os._exit(0)
    try:
        become(request, imported)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    leave(run_script(sys.argv[0]))
