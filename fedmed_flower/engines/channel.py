"""Values between two processes of one run, one of which has forked the other.

What they hold in large `bytes`, such as the arrays of a model, goes beside the pickle, without a
copy in it. Bytes that the last value held too are not sent again: the sites of a worker are sent
the same model.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Bytes from which a part is sent beside the pickle.
_LARGE = 1 << 16
# Most bytes that one call of the system receives.
_MOST = 1 << 30
_HEAD = struct.Struct("<?I")


class Channel:
    """One end of a connection.

    Parameters
    ----------
    connection : socket
        A stream to a process that was forked from this one, or the other way round: what it sends
        is unpickled.

    Attributes
    ----------
    torn : bool
        Whether an exception, such as an interrupt, has left a value half sent or half received.
        The connection cannot be used any more.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.torn = False
        self._connection = connection
        self._lock = threading.Lock()
        self._sent: dict[int, tuple[int, bytes]] = {}
        self._received: dict[int, bytes] = {}
        self._count = 0

    def fileno(self) -> int:
        """Return the number of the connection, to wait for it."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close this end: the other one hears of it when it receives."""
        self._connection.close()

    def send(self, value: Any, keep: bool = False) -> None:
        """Send a value.

        Parameters
        ----------
        value : any
            What pickle can take.
        keep : bool
            Whether both ends keep its large bytes for the next value that is sent.

        Raises
        ------
        OSError
            If the other end is closed.
        """
        with self._lock, self._whole():
            body = io.BytesIO()
            writer = _Writer(body, self._sent, self._count)
            writer.dump(value)
            self._count += len(writer.new)
            self._sent = writer.used if keep else {}
            parts = [body.getbuffer(), *(memoryview(part) for part in writer.new)]
            head = _HEAD.pack(keep, len(parts))
            lengths = struct.pack(f"<{len(parts)}Q", *(part.nbytes for part in parts))
            self._connection.sendall(head + lengths)
            for part in parts:
                self._connection.sendall(part)

    def receive(self) -> Any:
        """Return the next value.

        Raises
        ------
        EOFError
            If the other end is closed.
        """
        with self._whole():
            return self._next()

    def _next(self) -> Any:
        keep, count = _HEAD.unpack(self._exactly(_HEAD.size))
        lengths = struct.unpack(f"<{count}Q", self._exactly(8 * count))
        body, *new = [self._exactly(length) for length in lengths]
        reader = _Reader(io.BytesIO(body), self._received, new)
        value = reader.load()
        self._received = reader.used if keep else {}
        return value

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.torn = True
            raise

    def _exactly(self, length: int) -> bytes:
        """Return so many bytes; of up to 1 GiB there is no copy."""
        parts: list[bytes] = []
        missing = length
        while missing:
            try:
                part = self._connection.recv(min(missing, _MOST), socket.MSG_WAITALL)
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the other process has closed the connection")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Writer(pickle.Pickler):
    """Replaces large bytes by numbers.

    Attributes
    ----------
    used : dict
        Number and bytes, by the identity of the bytes, which live as long as they stand here.
    new : list of bytes
        Those that the other end has not kept, in the order of their numbers.
    """

    def __init__(self, file: io.BytesIO, kept: dict[int, tuple[int, bytes]], count: int) -> None:
        super().__init__(file, protocol=5)
        self._kept = kept
        self._count = count
        self.used: dict[int, tuple[int, bytes]] = {}
        self.new: list[bytes] = []

    def persistent_id(self, obj: object) -> int | None:
        """Return the number of large bytes; None leaves the object to pickle."""
        if type(obj) is not bytes or len(obj) < _LARGE:
            return None
        key = id(obj)
        if key not in self.used:
            if key in self._kept:
                self.used[key] = self._kept[key]
            else:
                self.used[key] = (self._count + len(self.new), obj)
                self.new.append(obj)
        return self.used[key][0]


class _Reader(pickle.Unpickler):
    """Puts the large bytes back.

    Attributes
    ----------
    used : dict of int to bytes
        By their numbers.
    """

    def __init__(self, file: io.BytesIO, kept: dict[int, bytes], new: list[bytes]) -> None:
        super().__init__(file)
        self._kept = kept
        self._new = iter(new)
        self.used: dict[int, bytes] = {}

    def persistent_load(self, pid: Any) -> bytes:
        """Return the bytes of a number: those that were kept, or the next new ones."""
        if pid not in self.used:
            self.used[pid] = self._kept[pid] if pid in self._kept else next(self._new)
        return self.used[pid]
