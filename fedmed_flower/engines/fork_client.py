"""What Flower starts in place of ``flwr-clientapp`` where a fork server runs.

The text of this file is written out under the command's name into a folder that comes first on
``PATH``, as `forking` says. It hands its command line, environment, folder and descriptors 0, 1 and
2 to the fork server, passes signals on to the child that the server forks, and ends as the child
ends. If the server cannot or may not serve, it becomes the real command, the next one on ``PATH``,
and says why in one line.

It imports the standard library alone: it starts in a hundredth of a second, and no package has to
be found.

The messages on the socket, integers in network order:

1. to the server: the lengths of the command line and of the environment, with four descriptors
   (0, 1, 2 and the folder); then both, their texts ended or divided by zero bytes;
2. from the server: the length of a reason, and the reason why it does not serve; none if it does;
3. to the server: one byte. From here on the command may have begun, so that it must not be run a
   second time;
4. from the server: the child's number with a descriptor of the process, or 0 if no child could be
   made;
5. from the server: the child's exit code, negative for a signal.
"""

# pathlib would double the time in which this starts.
# ruff: noqa: PTH100, PTH113, PTH116, PTH118, PTH119, PTH120, PTH123

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
import sys

SOCKET = "FEDMED_FORK_SERVER"
LENGTHS = struct.Struct("!II")
NUMBER = struct.Struct("!i")
DESCRIPTORS = 4
GO = b"g"
# Seconds for each answer of the server before the command begins.
PATIENCE = 20.0
# What may be sent to a process to end it or to tell it something. Stops of a terminal are not
# passed on.
PASSED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_CREDENTIALS = struct.Struct("3i")
_PATHS = (b"/bin", b"/usr/bin")


class NotServedError(Exception):
    """The fork server does not run the command, which has not begun."""


class LostError(Exception):
    """The fork server ended before it said how the command ended."""


class _Signals:
    """Keeps what comes before the child is there, and passes on what comes later."""

    def __init__(self) -> None:
        self._early: list[int] = []
        self._child = -1
        for number in PASSED:
            # What is ignored from the start on stays ignored, here and in the child.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)

    def _take(self, number: int, _frame: object) -> None:
        if self._child < 0:
            self._early.append(number)
        else:
            _send(self._child, number)

    def to_child(self, descriptor: int) -> None:
        """Pass on what came, and from now on at once, to the process of a descriptor."""
        self._child = descriptor
        while self._early:
            _send(descriptor, self._early.pop(0))

    def to_self(self) -> None:
        """Take back all handlers, and let what came act on this process."""
        for number in PASSED:
            if signal.getsignal(number) == self._take:
                signal.signal(number, signal.SIG_DFL)
        for early in self._early:
            os.kill(os.getpid(), early)


def _send(descriptor: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        # It has just ended; how follows on the socket.
        return


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end of a Unix socket, as the kernel knows."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(found)
    return pid, uid


def main() -> None:
    """Run the command that this file is named after, by the fork server or as a new process."""
    signals = _Signals()
    name = os.path.basename(sys.argv[0])
    command = _real_command(name)
    if command is None:
        _say(f"{name}: there is no such command on PATH")
        sys.exit(127)
    try:
        code = _by_server(command, signals)
    except NotServedError as reason:
        _say(f"{name}: a new process instead of the fork server: {reason}")
        _become(command, signals)
    except LostError as error:
        _say(f"{name}: {error}")
        sys.exit(1)
    _end(code)


def _real_command(name: str) -> bytes | None:
    """Return the next command of a name on ``PATH`` after this one, as a shell finds it."""
    here = os.stat(os.path.dirname(os.path.abspath(sys.argv[0])))
    path = os.environb.get(b"PATH")
    for folder in _PATHS if path is None else path.split(b":"):
        found = os.path.join(folder, os.fsencode(name))
        try:
            own = os.path.samestat(os.stat(folder or b"."), here)
        except OSError:
            continue
        if not own and os.path.isfile(found) and os.access(found, os.X_OK):
            return found
    return None


def _by_server(command: bytes, signals: _Signals) -> int:
    """Have the fork server run the command; return its exit code, negative for a signal."""
    if any(argument.startswith("--allow") for argument in sys.argv):
        raise NotServedError("the app's own packages may be installed (--allow-...)")
    with _connected() as connection:
        try:
            _ask(connection, command)
            started = _start(connection)
        except OSError as error:
            raise NotServedError(f"no answer ({error})") from error
        signals.to_child(started)
        connection.settimeout(None)
        try:
            return int(NUMBER.unpack(_receive(connection, NUMBER.size))[0])
        except OSError as error:
            # Nobody could say any more how the child ends.
            _send(started, signal.SIGKILL)
            raise LostError("the fork server ended while the command ran") from error


def _connected() -> socket.socket:
    path = os.environ.get(SOCKET)
    if not path:
        raise NotServedError(f"{SOCKET} is not set")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    try:
        folder = os.stat(os.path.dirname(path))
        if folder.st_uid != os.geteuid() or stat.S_IMODE(folder.st_mode) & 0o077:
            raise NotServedError("the socket's folder is open to other users")
        connection.connect(path)
        if peer(connection)[1] != os.geteuid():
            raise NotServedError("the socket is another user's")
    except OSError as error:
        connection.close()
        raise NotServedError(f"it cannot be reached ({error})") from error
    except NotServedError:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, command: bytes) -> None:
    """Send the request; raise if the server refuses it."""
    arguments = b"\0".join([command, *map(os.fsencode, sys.argv[1:])])
    # As this process was given it: Python may have added the locale to its own copy.
    with open("/proc/self/environ", "rb") as file:
        environment = file.read()
    lengths = LENGTHS.pack(len(arguments), len(environment))
    folder = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        descriptors = struct.pack(f"{DESCRIPTORS}i", 0, 1, 2, folder)
        connection.sendmsg([lengths], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    finally:
        os.close(folder)
    connection.sendall(arguments + environment)
    length = NUMBER.unpack(_receive(connection, NUMBER.size))[0]
    if length:
        raise NotServedError(_receive(connection, length).decode())


def _start(connection: socket.socket) -> int:
    """Let the server fork; return a descriptor of the child."""
    connection.sendall(GO)
    try:
        data, ancillary, _flags, _address = connection.recvmsg(
            NUMBER.size, socket.CMSG_SPACE(struct.calcsize("i"))
        )
    except OSError as error:
        raise LostError("the fork server did not say whether the command began") from error
    if len(data) < NUMBER.size:
        raise LostError("the fork server ended while it started the command")
    if NUMBER.unpack(data)[0] == 0:
        raise NotServedError("the server could not fork")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return int(struct.unpack("i", content)[0])
    raise LostError("the fork server sent no descriptor of the command's process")


def _receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionResetError("the fork server closed the connection")
        content += part
    return content


def _become(command: bytes, signals: _Signals) -> None:
    signals.to_self()
    # Python ignores these two; the real command starts as the shim did.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(command, [command, *map(os.fsencode, sys.argv[1:])])
    except OSError as error:
        _say(f"{os.fsdecode(command)}: {error}")
        sys.exit(126)


def _end(code: int) -> None:
    """End as the child has ended, by an exit code or by a signal."""
    if code >= 0:
        os._exit(code)
    import resource

    # The child has written its core file; this process has none to write.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
    os.kill(os.getpid(), -code)


def _say(text: str) -> None:
    try:
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    except OSError:
        # There is nobody to tell; the command runs all the same.
        return


if __name__ == "__main__":
    main()
