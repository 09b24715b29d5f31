"""A process that has imported everything once and forks a child for each message.

`forking` starts it, `fork_client` asks it. It opens no connection but its socket, starts no thread
and never asks for a GPU, so that a child has all that a new process would have. What a child cannot
have as a new process would is compared with what the asking process was given (`Surroundings`); at
a difference the server refuses, and the asking process becomes the real command.

Linux alone: it reads ``/proc``, and hands out descriptors of processes.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import gc
import importlib
import io
import json
import os
import random
import re
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from multiprocessing.process import current_process
from pathlib import Path
from typing import Any, NoReturn

from fedmed_flower.engines.fork_client import DESCRIPTORS, GO, LENGTHS, NUMBER, PATIENCE, peer

# Bytes of a request; Linux itself gives a process no more than 6 MiB.
MOST_BYTES = 6 << 20
# Requests that are being read at a time.
MOST_ASKING = 64
# Seconds in which a request must be whole and confirmed: the asking process waits less.
ASKING = 2 * PATIENCE
_PROC = Path("/proc")
# Lines of /proc/PID/status that a child has from this process.
_STATUS = re.compile(
    r"^(Umask|Uid|Gid|Groups|Sig(?:Blk|Ign)|Cap\w+|NoNewPrivs|Seccomp|Cpus_allowed|Mems_allowed):"
    r"[ \t]*(.*)$",
    re.MULTILINE,
)
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class RefusedError(Exception):
    """A child would not be what a new process is; the text names what differs."""


# What the asking process was given


def surroundings(pid: int | str) -> dict[str, str]:
    """Return what a process was given by the one that started it, apart from its environment.

    Parameters
    ----------
    pid : int or "self"

    Raises
    ------
    OSError
        If the process has ended or is another user's.
    """
    folder = _PROC / str(pid)
    found = dict(_STATUS.findall((folder / "status").read_text(errors="replace")))
    for line in (folder / "limits").read_text().splitlines()[1:]:
        name, *values = re.split(r"\s{2,}", line.strip())
        found[name] = " ".join(values)
    # The name in parentheses may itself hold spaces and parentheses.
    found["nice value"] = (
        (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[16]
    )
    for name in ("cgroup", "oom_score_adj"):
        found[name] = (folder / name).read_text().strip()
    return found


def environment(content: bytes) -> dict[bytes, bytes]:
    """Return an environment as ``/proc/PID/environ`` has it, by name."""
    pairs = (text.partition(b"=") for text in content.split(b"\0") if b"=" in text)
    return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class Surroundings:
    """What this process was given at its start, to be compared with what others were given.

    Attributes
    ----------
    variables : dict
        The environment before anything was imported.
    others : dict
        As `surroundings` returns it.
    """

    variables: Mapping[bytes, bytes]
    others: Mapping[str, str]

    @classmethod
    def own(cls) -> Surroundings:
        """Return those of this process, before it has changed any."""
        content = (_PROC / "self" / "environ").read_bytes()
        return cls(environment(content), surroundings("self"))

    def check(self, variables: Mapping[bytes, bytes], pid: int) -> None:
        """Refuse a process that was given something else.

        A variable may also have the value that it has in this process by now: what Flower's modules
        set when they are imported is set in the process that starts the command, too.

        Raises
        ------
        RefusedError
            With the first name that differs; values are not shown.
        """
        for name in sorted(self.variables.keys() | variables.keys()):
            known = (self.variables.get(name), os.environb.get(name))
            if variables.get(name) not in known:
                text = name.decode("ascii", "backslashreplace")
                raise RefusedError(f"{text} differs in the environment")
        try:
            others = surroundings(pid)
        except OSError as error:
            raise RefusedError(f"the asking process cannot be read ({error.strerror})") from error
        for what, value in self.others.items():
            if others.get(what) != value:
                raise RefusedError(f"{what} differs")


# What was imported


Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Packages:
    """Files of what was imported, and what was installed, to notice a change.

    Attributes
    ----------
    files : dict
        Path -> time of change in nanoseconds, bytes, inode; of all modules and mapped libraries.
    installed : dict
        The same of folders of metadata and ``.pth`` files in the folders of ``sys.path``.
    """

    files: Mapping[str, Stamp]
    installed: Mapping[str, Stamp]

    @classmethod
    def now(cls) -> Packages:
        """Return what this process has imported."""
        return cls(dict(_stamps(_loaded())), dict(_stamps(_installed())))

    def check(self) -> None:
        """Refuse if a file has changed since.

        Raises
        ------
        RefusedError
            With the path of the first one.
        """
        for path, stamp in self.files.items():
            if _stamp(path) != stamp:
                raise RefusedError(f"{path} has changed since the fork server imported it")
        installed = dict(_stamps(_installed()))
        for path in sorted(installed.keys() | self.installed.keys()):
            if installed.get(path) != self.installed.get(path):
                raise RefusedError(f"{path} has changed since the fork server started")


def _loaded() -> Iterator[str]:
    for module in list(sys.modules.values()):
        # Some modules import others when they are asked for an attribute.
        path = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str):
            yield path
    for line in (_PROC / "self" / "maps").read_text(errors="surrogateescape").splitlines():
        path = line.split(maxsplit=5)[-1]
        if path.startswith("/") and ".so" in path:
            yield path


def _installed() -> Iterator[str]:
    for folder in sys.path:
        with suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info", ".pth", ".egg-link")):
                    yield entry.path


def _stamps(paths: Iterable[str]) -> Iterator[tuple[str, Stamp]]:
    for path in paths:
        stamp = _stamp(path)
        # A module without a file, such as one in an archive, cannot be watched.
        if stamp is not None:
            yield path, stamp


def _stamp(path: str) -> Stamp | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def threads() -> list[str]:
    """Return the names of this process's threads beside the one that calls."""
    own = threading.get_native_id()
    return [
        (task / "comm").read_text(errors="replace").strip()
        for task in (_PROC / "self" / "task").iterdir()
        if int(task.name) != own
    ]


def descriptors() -> dict[int, str]:
    """Return this process's open descriptors beyond 2, and what each leads to."""
    found: dict[int, str] = {}
    for link in list((_PROC / "self" / "fd").iterdir()):
        # The descriptor of the listing itself is gone by now.
        with suppress(OSError):
            if int(link.name) > 2:
                found[int(link.name)] = str(link.readlink())
    return found


def own_interpreter(command: bytes) -> None:
    """Refuse a command that is no script of this Python, without options.

    Raises
    ------
    RefusedError
    """
    name = os.fsdecode(command)
    with Path(name).open("rb") as file:
        line = file.readline(4096).strip()
    if not line.startswith(b"#!/"):
        raise RefusedError(f"{name} is no Python script")
    if line[2:].split() != [line[2:].strip()]:
        raise RefusedError(f"{name} starts Python with options")
    found = os.fsdecode(line[2:].strip())
    same = [(path.parent.resolve(), path.resolve()) for path in map(Path, (found, sys.executable))]
    if same[0] != same[1]:
        raise RefusedError(f"{name} is a script of {found}, not of {sys.executable}")


# The child


class Generators:
    """Generators of random numbers that the imports have made, such as NumPy's global one.

    In a new process each draws its seed from the operating system. All children would have the
    same numbers.
    """

    def __init__(self) -> None:
        self._found: list[Any] = []
        numpy = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (random.Random,)
        if numpy is not None:
            self._bits = numpy.random.BitGenerator
            kinds += (self._bits, numpy.random.RandomState)
        for each in gc.get_objects():
            # isinstance would ask objects that stand for others, which then import those.
            if issubclass(type(each), kinds) and not issubclass(type(each), random.SystemRandom):
                self._found.append(each)

    def names(self) -> list[str]:
        """Return the types of the generators, as a list for the log."""
        return sorted(type(each).__name__ for each in self._found)

    def seed(self) -> None:
        """Seed each from the operating system."""
        for each in self._found:
            if isinstance(each, random.Random):
                each.seed()
            elif isinstance(each, self._bits):
                each.state = type(each)().state
            else:
                each.seed()
        torch = sys.modules.get("torch")
        # The default generator of a new process has this fixed seed until somebody sets another;
        # an import that has set one has drawn it from the operating system.
        if torch is not None and torch.default_generator.initial_seed() != _TORCH_SEED:
            torch.default_generator.seed()


_TORCH_SEED = 67280421310721


@dataclass(frozen=True)
class Request:
    """A command to be run: its path and arguments, the environment, descriptors 0-2 and folder."""

    arguments: list[bytes]
    variables: dict[bytes, bytes]
    descriptors: list[int]


def become(request: Request, generators: Generators) -> None:
    """Turn this child of the server into a process that was just started."""
    for target in range(3):
        os.dup2(request.descriptors[target], target)
    os.fchdir(request.descriptors[3])
    for descriptor in request.descriptors:
        os.close(descriptor)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _reopen(stream)
    arguments = [os.fsdecode(each) for each in request.arguments]
    sys.argv[:] = arguments
    sys.orig_argv[:] = [sys.executable, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    importlib.invalidate_caches()
    tempfile.tempdir = None
    # Of processes that know each other; shared by all children otherwise.
    current_process().authkey = os.urandom(32)
    generators.seed()


def _reopen(stream: Any) -> None:
    """Make a standard stream anew in place: loggers have kept it since they were imported.

    What the descriptor leads to decides whether lines are flushed and whether one can seek in it.
    """
    buffer = stream.buffer
    raw = buffer if isinstance(buffer, io.FileIO) else buffer.raw
    mode = raw.mode.rstrip("+").replace("b", "")
    name = raw.name
    io.FileIO.__init__(raw, raw.fileno(), mode, closefd=False)
    raw.name = name
    if buffer is not raw:
        size = os.fstat(raw.fileno()).st_blksize
        buffer.__init__(raw, size if size > 1 else io.DEFAULT_BUFFER_SIZE)
    stream.__init__(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream is sys.stderr or raw.isatty(),
        write_through=buffer is raw,
    )
    stream.mode = mode


def run_script(path: str) -> int:
    """Run a Python script as the main module; return its exit code, negative for a signal."""
    main = types.ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(
        __file__=path, __builtins__=builtins, __cached__=None, __loader__=loader, __annotations__={}
    )
    sys.modules["__main__"] = main
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as end:
        return _exit_code(end.code)
    except BaseException as error:
        # Without the lines of this file.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stdout.flush()
    print(code, file=sys.stderr)
    return 1


def leave(code: int) -> NoReturn:
    """End this process as Python ends one, but leave what the server imported in its place.

    To take thousands of modules apart would copy the server's pages and cost more than a message.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        # As Python does at a second signal: it says so, and ends all the same.
        traceback.print_exc()
    atexit._run_exitfuncs()
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    # Of what was made since the fork alone, which is not frozen.
    files = [each for each in gc.get_objects() if type(each) in kinds]
    for kind in kinds:
        for file in files:
            if type(file) is kind and not file.closed and file.writable():
                with suppress(OSError, ValueError):
                    file.flush()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # As Python says it.
            code = code or 120
    ctypes.CDLL(None).fflush(None)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# The server


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
        self._watch(self._stop, self._kill)

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

    def _kill(self) -> None:
        """End at once, with all children."""
        with suppress(BlockingIOError):
            os.read(self._stop, 64)
        self._close()
        for running in self._running:
            signal.pidfd_send_signal(running.descriptor, signal.SIGKILL)


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


def prepare(orders: Orders) -> Generators:
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
    for name in orders.modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            traceback.print_exc()
            raise RefusedError(f"{name} cannot be imported ({type(error).__name__})") from error
    opened = [path for number, path in descriptors().items() if number not in before]
    if opened:
        raise RefusedError(f"the imports have opened {', '.join(sorted(opened))}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RefusedError("the imports have asked for a GPU")
    generators = Generators()
    # Where one cannot be seeded, no child is right.
    generators.seed()
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
    return generators


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
        generators = prepare(orders)
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
        become(request, generators)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    leave(run_script(sys.argv[0]))
