"""Replies of a round that do not fit in memory together, kept in files until they are combined.

A robust rule needs all replies at once. What is beyond a bound is written to a file as it arrives,
and its arrays then read that file through a memory map: the same bytes, so that a rule makes the
same model. Rules read block by block, from all replies in turn, and the system keeps in memory what
it has room for.

A file has no name from the moment it is made, and nobody else can open it. It is gone when its
arrays are, or when the process ends, however it ends.
"""

from __future__ import annotations

import copy
import mmap
import os
from pathlib import Path
from tempfile import TemporaryFile

from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedmed_flower.arrays.views import record_of, records_of
from fedmed_flower.errors import InputError

# Values begin where a processor reads them best.
_ALIGNMENT = 64
# What is taken for the replies if no bound is given, of the memory that is available.
_SHARE = 0.5
_MEMORY = Path("/proc/meminfo")


class Spill:
    """Keeps the arrays of a round's replies in memory up to a bound, and the others in files.

    Parameters
    ----------
    gigabytes : float
        The bound, in 10^9 bytes. 0: half of the memory that is available now, as Linux tells it;
        no bound where it does not.
    folder : Path or None
        Where the files lie; None is the system's folder for temporary files.

    Attributes
    ----------
    held, spilled : int
        Bytes of the arrays in memory and in files.
    """

    def __init__(self, gigabytes: float, folder: Path | None) -> None:
        self._most = gigabytes * 1e9 if gigabytes else _SHARE * available_memory()
        self._folder = folder
        self.held = 0
        self.spilled = 0

    def message(self, reply: Message) -> Message:
        """Return a reply whose arrays are in memory or, beyond the bound, in a file.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        if not reply.has_content():
            return reply
        records = records_of(reply.content, ArrayRecord)
        kept = self.records(records)
        if all(kept[name] is records[name] for name in kept):
            return reply
        copied = copy.copy(reply)
        copied.content = RecordDict({**reply.content, **kept})
        return copied

    def records(self, records: dict[str, ArrayRecord]) -> dict[str, ArrayRecord]:
        """Return records, all in memory or all in one file.

        Raises
        ------
        InputError
            As `message`.
        """
        size = sum(len(array.data) for record in records.values() for array in record.values())
        if self.held + size <= self._most:
            self.held += size
            return records
        self.spilled += size
        try:
            return _in_file(records, self._folder)
        except OSError as error:
            place = self._folder or "the system's folder for temporary files"
            raise InputError(
                f"the replies of a round are larger than the memory for them (memory_gigabytes, "
                f"server-memory-gigabytes), and {place} cannot hold {size:,} bytes of them "
                f"({error.strerror}): free space there, or raise the bound"
            ) from error


def available_memory() -> float:
    """Return the bytes of memory that are available on this machine; infinity if it is unknown."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return float("inf")
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    number = named.get("MemAvailable", "").removesuffix("kB").strip()
    return 1024 * int(number) if number.isdecimal() else float("inf")


def _in_file(records: dict[str, ArrayRecord], folder: Path | None) -> dict[str, ArrayRecord]:
    """Return records whose arrays read a file without a name."""
    starts: list[int] = []
    arrays = [array for record in records.values() for array in record.values()]
    with TemporaryFile(dir=folder) as file:
        for array in arrays:
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            starts.append(file.tell())
            file.write(array.data)
        file.flush()
        if not file.tell():
            return records
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    places = iter(starts)
    return {
        name: record_of({key: _reading(array, whole, next(places)) for key, array in one.items()})
        for name, one in records.items()
    }


def _reading(array: Array, whole: memoryview, start: int) -> Array:
    """Return an array whose bytes are a part of a file."""
    part = Array(array.dtype, tuple(array.shape), array.stype, b"")
    # Flower asks for bytes when an array is made, and reads them as any buffer.
    part.data = whole[start : start + len(array.data)]  # type: ignore[assignment]
    return part
